"""The losses that TRL has too, on the same log-probs. Skipped without TRL, which nothing needs."""

import importlib
import importlib.util
from collections import defaultdict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from groups import make_group

from pujax.method import labels, pair_losses

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("trl") is None,
        reason="compares with TRL, which is not installed (make torch)",
    ),
    pytest.mark.filterwarnings("ignore"),
]

B, T, BETA = 5, 4, 0.3
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, T + 1, (B, 2))
MASK = np.arange(T) < LENGTHS[:, :, None]  # of the chosen and the rejected
POLICY, REF = (np.where(MASK, -RNG.gamma(2.0, 1.0, (B, 2, T)), 0).astype("f4") for _ in range(2))


def ours(loss, kl=None, **settings):
    """The mean over B pairs: a mute anchor, the chosen, the rejected."""

    def led(x):
        return np.pad(x, ((0, 0), (1, 0), (0, 0)))

    scores = np.tile([0.0, 1.0, -1.0], (B, 1))
    group = make_group(led(REF), mask=led(MASK), scores=scores)
    if kl is not None:
        group = replace(group, kl=jnp.full(B, kl))
    return float(loss(jnp.asarray(led(POLICY)), group, **settings)[0].mean())


class Trainer(SimpleNamespace):
    """What TRL's losses read of their trainer. They call no method of it but the accelerator's."""

    def __init__(self, **settings: Any) -> None:
        import torch

        same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x}
        quiet = SimpleNamespace(device=torch.device("cpu"), **same)
        metrics = {"train": defaultdict(list)}
        model = SimpleNamespace(training=True)
        super().__init__(
            accelerator=quiet,
            _metrics=metrics,
            model=model,
            precompute_ref_logps=True,
            aux_loss_enabled=False,
            _total_train_tokens=0,
            _tp_size=1,
            **settings,
        )


def reader(logps):
    """A model whose log-probs of the chosen, then the rejected, are these."""
    import torch

    tokens = torch.tensor(np.concatenate([logps[:, 0], logps[:, 1]]))
    told = SimpleNamespace(
        log_probs=tokens,
        entropy=torch.zeros_like(tokens),
        mean_logits=torch.zeros_like(tokens),
        is_top1=torch.zeros_like(tokens, dtype=torch.bool),
    )
    return lambda **_: told


def inputs():
    import torch

    mask = np.concatenate([MASK[:, 0], MASK[:, 1]])
    mask = torch.tensor(np.pad(mask, ((0, 0), (1, 0)))).long()  # one token of prompt
    ids = torch.zeros_like(mask)
    sums = torch.tensor(REF.sum(axis=-1))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask,
        "ref_chosen_logps": sums[:, 0],
        "ref_rejected_logps": sums[:, 1],
        "ref_logps": torch.cat([sums[:, 0], sums[:, 1]]),
    }


def trl_dpo(loss_type):
    DPOTrainer = importlib.import_module("trl").DPOTrainer
    trainer = Trainer(
        beta=BETA,
        label_smoothing=0.0,
        loss_types=[loss_type],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    return float(DPOTrainer._compute_loss(trainer, reader(POLICY), inputs(), False))


@pytest.mark.parametrize(
    ("loss", "settings", "name"),
    [
        (pair_losses.dpo, {}, "sigmoid"),
        (pair_losses.dpo, {"length_normalized": True}, "sigmoid_norm"),
        (pair_losses.ipo, {"length_normalized": True}, "ipo"),
        (pair_losses.slic, {}, "hinge"),
    ],
)
def test_losses_of_pairs_are_those_of_trl(loss, settings, name):
    np.testing.assert_allclose(ours(loss, beta=BETA, **settings), trl_dpo(name), atol=1e-6)


def cpo(chosen, rejected, **settings):
    """TRL's loss of pairs of one number a response."""
    import torch

    CPOTrainer = importlib.import_module("trl.experimental.cpo").CPOTrainer

    trainer = Trainer(alpha=0.0, **settings)
    sides = (torch.tensor(side) for side in (chosen, rejected))
    return float(CPOTrainer.cpo_loss(trainer, *sides)[0].mean())


def test_conservative_dpo_is_trls_smoothed_loss_of_the_log_ratios():
    delta = (POLICY - REF).sum(axis=-1)
    settings = {"beta": BETA, "label_smoothing": 0.1}
    expected = cpo(delta[:, 0], delta[:, 1], loss_type="sigmoid", **settings)
    np.testing.assert_allclose(ours(pair_losses.dpo, **settings), expected, atol=1e-6)


def test_ipo_of_sums_is_trls_of_the_log_ratios():
    delta = (POLICY - REF).sum(axis=-1)
    expected = cpo(delta[:, 0], delta[:, 1], loss_type="ipo", beta=BETA, label_smoothing=0.0)
    np.testing.assert_allclose(ours(pair_losses.ipo, beta=BETA), expected, rtol=1e-6)


def test_simpo_is_that_of_trl():
    mean = POLICY.sum(axis=-1) / LENGTHS
    settings = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "label_smoothing": 0.0}
    expected = cpo(mean[:, 0], mean[:, 1], **settings)
    np.testing.assert_allclose(ours(pair_losses.simpo, beta=2.0, gamma=0.7), expected, atol=1e-6)


def test_orpos_odds_are_those_of_trl():
    import torch

    ORPOTrainer = importlib.import_module("trl.experimental.orpo").ORPOTrainer

    mean = POLICY.sum(axis=-1) / LENGTHS
    trainer = Trainer(beta=BETA)
    sides = (torch.tensor(mean[:, side]) for side in (0, 1))
    expected = -float(ORPOTrainer.odds_ratio_loss(trainer, *sides)[0].mean())
    odds = ours(pair_losses.orpo, odds_weight=BETA) - ours(pair_losses.orpo, odds_weight=0.0)
    np.testing.assert_allclose(odds, expected, atol=1e-6)


@pytest.mark.parametrize("kl", [0.0, 0.8, -0.5])
def test_kto_is_that_of_trl_from_the_same_reference_point(kl):
    import torch

    KTOTrainer = importlib.import_module("trl").KTOTrainer

    trainer = Trainer(
        beta=BETA,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    trainer._compute_kl_logps = lambda model, batch: torch.full((2 * B,), kl)
    flags = torch.tensor([True] * B + [False] * B)
    batch = inputs() | {"label": flags, "ref_KL_logps": torch.zeros(2 * B)}
    expected = float(KTOTrainer._compute_loss(trainer, reader(POLICY), batch, False))
    kl = max(0.0, kl)  # as `step.batch_kl` gives it
    point = partial(lambda delta, group, kl: jnp.full_like(delta, kl), kl=kl)
    for sides in (labels.best_and_worst, labels.flags):
        value = ours(
            pair_losses.kto,
            beta=BETA,
            sides=sides,
            desirable_weight=1.5,
            undesirable_weight=0.5,
            reference_point=point,
        )
        np.testing.assert_allclose(value, expected, atol=1e-6)
        own = ours(
            pair_losses.kto,
            kl=kl,
            beta=BETA,
            sides=sides,
            desirable_weight=1.5,
            undesirable_weight=0.5,
        )
        np.testing.assert_allclose(own, expected, atol=1e-6)
