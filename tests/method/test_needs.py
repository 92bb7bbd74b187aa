"""What a loss needs of a group, found by trying it."""

from functools import partial

import jax.numpy as jnp
import pytest

from pujax.errors import ConfigError
from pujax.method import labels, losses, pair_losses
from pujax.method.needs import Needs, ignores_labels, needs_of

ALONE = partial(labels.softmax_labels)
SHARED = partial(labels.softmax_labels, anchor_mass=0.2)


@pytest.mark.parametrize(
    ("loss", "rule", "anchor", "reference"),
    [
        (losses.sft, ALONE, True, False),
        (pair_losses.dpo, ALONE, False, True),
        (partial(pair_losses.dpo, pairs=labels.anchor_vs_all), ALONE, True, True),
        (partial(pair_losses.dpo, nll_weight=1.0), ALONE, False, True),
        (pair_losses.ipo, ALONE, False, True),
        (losses.nnpu, ALONE, True, True),
        (losses.listwise, ALONE, False, True),
        (losses.listwise, SHARED, True, True),
        (partial(losses.grpo, kl_coef=0.0), ALONE, False, False),
        (partial(losses.grpo, kl_coef=0.1), ALONE, False, True),
        (partial(losses.ldl_grpo, kl_coef=0.0), SHARED, True, True),
    ],
)
def test_a_loss_needs_what_its_formula_names(loss, rule, anchor, reference):
    assert needs_of(loss, rule, 4) == Needs(anchor=anchor, reference=reference)


def nll(logps, mask):
    return -jnp.sum(logps, axis=-1, where=mask)


def anchor_where_all_scored_low(logps, group):
    low = jnp.all(group.scores[:, 1:] < -5, axis=1)
    rest = losses.grpo(logps, group, kl_coef=0.0)[0]
    return rest + jnp.where(low, nll(logps[:, 0], group.mask[:, 0]), 0), {}


def anchor_where_one_was_cut_off(logps, group):
    cut = jnp.any(~group.finished[:, 1:], axis=1)
    rest = losses.grpo(logps, group, kl_coef=0.0)[0]
    return rest + jnp.where(cut, nll(logps[:, 0], group.mask[:, 0]), 0), {}


def anchor_where_it_is_shorter(logps, group):
    short = jnp.all(group.mask.sum(axis=-1)[:, 1:] > group.mask.sum(axis=-1)[:, :1], axis=1)
    return jnp.where(short, nll(logps[:, 0], group.mask[:, 0]), nll(logps[:, 1], group.mask[:, 1]))


def anchor_where_all_are_tied(logps, group):
    tied = jnp.all(group.scores[:, 1:] == group.scores[:, 1:2], axis=1)
    rest = losses.grpo(logps, group, kl_coef=0.0)[0]
    return rest + jnp.where(tied, nll(logps[:, 0], group.mask[:, 0]), 0), {}


def anchor_where_it_ties_with_all(logps, group):
    tied = jnp.all(group.scores == group.scores[:, :1], axis=1)
    rest = losses.grpo(logps, group, kl_coef=0.0)[0]
    return rest + jnp.where(tied, nll(logps[:, 0], group.mask[:, 0]), 0), {}


def anchor_where_one_is_long(logps, group):
    long = jnp.any(group.mask.sum(axis=-1)[:, 1:] > 8, axis=1)
    rest = losses.grpo(logps, group, kl_coef=0.0)[0]
    return rest + jnp.where(long, nll(logps[:, 0], group.mask[:, 0]), 0), {}


@pytest.mark.parametrize(
    "loss",
    [
        anchor_where_all_scored_low,
        anchor_where_all_are_tied,
        anchor_where_it_ties_with_all,
        anchor_where_one_is_long,
        anchor_where_one_was_cut_off,
        lambda logps, group: (anchor_where_it_is_shorter(logps, group), {}),
    ],
    ids=["scores", "tied", "tied with the anchor", "long", "finished", "lengths"],
)
def test_a_loss_that_learns_from_some_anchors_needs_them(loss):
    assert needs_of(loss, ALONE, 4) == Needs(anchor=True, reference=False)


def test_what_a_loss_logs_of_what_is_not_computed_is_not_logged():
    def loss(logps, group):
        moved = jnp.sum(logps - group.ref_logps, axis=-1, where=group.mask).mean()
        told = {"mine/moved": moved, "mine/anchor": logps[:, 0].mean()}
        told |= {"mine/score": group.scores.mean(), "mine/none": jnp.float32(jnp.nan)}
        return losses.grpo(logps, group, kl_coef=0.0)[0], told

    assert needs_of(loss, ALONE, 4).unmade == {"mine/moved", "mine/anchor"}
    assert needs_of(loss, ALONE, 4, reference=True, anchor=True).unmade == set()
    assert needs_of(losses.nnpu, ALONE, 4).unmade == set()


def test_what_a_loss_needs_in_rare_cases_can_be_said():
    def rare(logps, group):
        anchor = jnp.where(group.scores[:, 1] == 7.25, nll(logps[:, 0], group.mask[:, 0]), 0)
        return anchor + nll(logps[:, 1], group.mask[:, 1]), {}

    assert needs_of(rare, ALONE, 4) == Needs(anchor=False, reference=False)
    assert needs_of(rare, ALONE, 4, anchor=True) == Needs(anchor=True, reference=False)
    with pytest.raises(ConfigError, match=r"loss\.needs\.anchor=False: the loss learns from it"):
        needs_of(losses.nnpu, ALONE, 4, anchor=False)


def test_a_loss_that_nothing_moves_is_refused():
    with pytest.raises(ConfigError, match="learns nothing from groups of 1 candidates") as refused:
        needs_of(pair_losses.dpo, ALONE, 1)
    assert "(loss=kto loss.sides._target_=pujax.method.labels.flags)" in str(refused.value)
    needs_of(partial(pair_losses.kto, sides=labels.flags), ALONE, 1)  # as that says


@pytest.mark.parametrize(
    ("loss", "members", "kl"),
    [
        (pair_losses.e_dpo, True, False),
        (pair_losses.kto, False, True),
        (partial(pair_losses.kto, reference_point=pair_losses.no_kl), False, False),
        (pair_losses.distill, False, False),
    ],
)
def test_a_loss_of_a_family_or_of_a_batchs_kl_is_known(loss, members, kl):
    found = needs_of(loss, ALONE, 3)
    assert (found.members, found.kl) == (members, kl)


def test_a_loss_that_ignores_labels_is_known():
    sharp = partial(labels.softmax_labels, tau=0.1)
    mixed = partial(labels.mixed_labels, weights=[1.0, 2.0, 3.0])
    for rule in (sharp, SHARED, mixed):
        assert ignores_labels(pair_losses.dpo, rule, 3)
        assert not ignores_labels(losses.listwise, rule, 3)
    assert needs_of(losses.listwise, mixed, 3) == Needs(anchor=False, reference=True)
