"""What the page says that a loss makes of each response."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from pujax.config.compose import conf_dir
from pujax.config.functions import build_loss
from pujax.evaluation.preferred import preference_of
from pujax.method.labels import softmax_labels
from tests.groups import gradient, make_group

LOSSES = {
    path.stem: yaml.safe_load(path.read_text()) for path in Path(conf_dir(), "loss").glob("*")
}

OF_LABELS = {"listwise", "ldl_grpo", "weighted_sft"}

# The anchor's score first, which no loss of candidates reads.
SCORES = [1.0, 0.5, 0.0, 0.3]


def told(loss, scores=(1.0, 0.5, 0.0)):
    """What becomes of the anchor and of each candidate."""
    _, rule = preference_of(loss)
    return [found.words for found in rule(scores, [0.0, 0.75, 0.25])]


ALIKE = {"cdpo", "cispo", "dapo", "dr_grpo", "gspo"}  # other numbers in the same functions


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - ALIKE))
def test_what_is_said_to_be_raised_or_lowered_is_so_by_the_losss_gradient(name):
    scores = jnp.array([SCORES])
    labels, valid = softmax_labels(scores)
    _, rule = preference_of(LOSSES[name])
    found = rule(SCORES, np.asarray(labels)[0].tolist())
    loss, _ = build_loss(OmegaConf.create(LOSSES[name]))
    group = make_group(np.full((1, 4, 1), -1.0), scores=scores, q=labels, valid=valid)
    pull = -np.asarray(gradient(loss, group.ref_logps, group))[0, :, 0]
    if name in OF_LABELS:
        assert [regard.words[:5] for regard in found] == ["label"] * 4
    said = np.sign([regard.pull for regard in found])
    np.testing.assert_array_equal(said, np.sign(np.where(np.abs(pull) < 1e-6, 0, pull)))


def test_losses_of_sides_and_of_scores_name_them():
    sides = {"_target_": "pujax.method.labels.anchor_and_candidates"}
    assert told(LOSSES["kto"]) == ["not used", "good", "bad"]
    assert told(LOSSES["kto"] | {"sides": sides}) == ["good", "bad 0.50", "bad 0.50"]
    for name in ("distill", "e_dpo", "pessimistic", "grpo"):
        assert told(LOSSES[name]) == ["not used", "raised", "lowered"]
    assert told(LOSSES["spo"]) == ["not used", "raised", "lowered"]
    assert told(LOSSES["spo"], [1.0, 0.3, 0.3]) == ["not used", "neither", "neither"]
    assert told(LOSSES["spo"], [1.0, None, 0.3]) == ["not used", "neither", "neither"]
    assert told(LOSSES["grpo_anchor"]) == ["imitated", "raised", "lowered"]
    assert told(LOSSES["nnpu"]) == ["positive", "unlabeled", "unlabeled"]
    assert told(LOSSES["raft"]) == ["not used", "imitated", "not used"]


def test_scores_that_are_equal_or_not_finite_raise_nothing():
    assert told(LOSSES["distill"], [1.0, 0.3, 0.3]) == ["not used", "neither", "neither"]
    assert told(LOSSES["distill"], [None, None, 0.3]) == ["not used", "neither", "neither"]
    assert told(LOSSES["kto"], [1.0, 0.3, 0.3]) == ["not used"] * 3


def test_a_loss_of_ones_own_is_shown_with_its_labels():
    own = LOSSES["distill"] | {"_target_": "mine.losses.distill"}
    assert told(own) == ["label 0.00", "label 0.75", "label 0.25"]
    assert told(None) == told(own)


@pytest.mark.parametrize(
    "changed",
    [
        {"gamma": "x"},
        {"pairs": {"_target_": "pujax.method.labels.best_and_worst"}},  # which makes sides
        {"pairs": {"_target_": "pujax.method.labels.standardize"}},
    ],
)
def test_settings_that_the_loss_would_not_take_do_not_break_the_page(changed):
    assert len(told(LOSSES["spo"] | changed)) == 3
