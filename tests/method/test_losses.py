import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from groups import (
    ALL_WORDS,
    GROUP,
    LOGPS,
    REFERENCE,
    STALE,
    bandit,
    gradient,
    make_group,
    optimize,
    random_group,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pujax.config.compose import conf_dir
from pujax.config.functions import build
from pujax.errors import ConfigError
from pujax.method import labels, losses, pair_losses

quick = settings(deadline=None, max_examples=15)

VARIANTS: dict[str, Callable] = {
    "sft": losses.sft,
    "raft": losses.raft,
    "dpo": pair_losses.dpo,
    "dpo_mean": functools.partial(
        pair_losses.dpo, length_normalized=True, label_smoothing=0.1, nll_weight=1.0
    ),
    "dpo_anchor": functools.partial(pair_losses.dpo, pairs=labels.anchor_vs_all),
    "ipo": pair_losses.ipo,
    "slic": functools.partial(pair_losses.slic, nll_weight=1.0),
    "simpo": pair_losses.simpo,
    "orpo": pair_losses.orpo,
    "gamma_dpo": pair_losses.gamma_dpo,
    "kto": pair_losses.kto,
    "distill": pair_losses.distill,
    "nnpu": losses.nnpu,
    "nnpu_logistic": functools.partial(losses.nnpu, surrogate=losses.logistic_loss),
    "listwise": losses.listwise,
    "grpo": losses.grpo,
    "grpo_token": functools.partial(
        losses.grpo, advantage=losses.mean, aggregate=losses.token_mean
    ),
    "grpo_sequence": functools.partial(
        losses.grpo,
        advantage=losses.from_labels,
        aggregate=losses.sequence_mean,
        mask_unfinished=True,
    ),
    "gspo": functools.partial(
        losses.grpo, clip=losses.sequence_clip, aggregate=losses.sequence_mean
    ),
    "cispo": functools.partial(losses.grpo, clip=losses.weight_clip, aggregate=losses.token_mean),
    "ldl_grpo": losses.ldl_grpo,
    "weighted_sft": losses.weighted_sft,
    "beside_anchor": functools.partial(losses.beside_anchor, loss=losses.ldl_grpo),
    "ldl_grpo_finished": functools.partial(losses.ldl_grpo, mask_unfinished=True),
}
YAMLS = {path.stem: path for path in Path(conf_dir(), "loss").glob("*.yaml")}
VARIANTS |= {
    name: build(OmegaConf.load(p), "loss") for name, p in YAMLS.items() if name not in VARIANTS
}
every_loss = pytest.mark.parametrize("name", VARIANTS)


@functools.cache
def compiled(name):
    """Loss, metrics and gradient under one jit, for groups of one fixed shape."""

    def run(logps, group):
        loss_B, metrics = VARIANTS[name](logps, group)
        metrics |= losses.group_metrics(logps, group)
        return loss_B, metrics, gradient(VARIANTS[name], logps, group)

    return jax.jit(run)


def assert_same_metrics(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)


# Values worked out by hand: see `groups` for the numbers.


@pytest.mark.parametrize(
    ("loss", "group", "settings", "expected"),
    [
        (losses.sft, GROUP, {}, 1.0),  # (1 + 1) / 2
        (losses.weighted_sft, GROUP, {}, 1.7),  # 0.2 * 1 + 0.6 * 1.5 + 0.2 * 3
        # GRPO's -0.35 + 0.04 / 2, see below, and twice the anchor's 1.
        (losses.beside_anchor, STALE, {"weight": 2.0}, 1.67),
        # beta margin = 0.5 (2 + 1) = 1.5; log(1 + exp(-1.5)) = 0.2014133.
        (pair_losses.dpo, GROUP, {"beta": 0.5}, 0.2014133),
        (losses.raft, GROUP, {}, 1.5),  # candidate 1: (1 + 2) / 2
        # 0.9 * 0.2014133 + 0.1 * (0.2014133 + 1.5)
        (pair_losses.dpo, GROUP, {"beta": 0.5, "label_smoothing": 0.1}, 0.3514133),
        # A token each: 0.5 (1 + 1) = 1; log(1 + exp(-1)) = 0.3132617.
        (pair_losses.dpo, GROUP, {"beta": 0.5, "length_normalized": True}, 0.3132617),
        # 0.2014133 + 2 * mean(1, 2)
        (pair_losses.dpo, GROUP, {"beta": 0.5, "nll_weight": 2.0}, 3.2014133),
        # Margins 0.5 (1 - 2) and 0.5 (1 + 1): (log(1 + e^0.5) + log(1 + e^-1)) / 2.
        (pair_losses.dpo, GROUP, {"beta": 0.5, "pairs": labels.anchor_vs_all}, 0.6436693),
        (pair_losses.ipo, GROUP, {"beta": 0.5}, 4.0),  # (3 - 1)^2
        (pair_losses.ipo, GROUP, {"beta": 0.25}, 1.0),  # (3 - 2)^2
        # A token each: (1 + 1 - 1)^2.
        (pair_losses.ipo, GROUP, {"beta": 0.5, "length_normalized": True}, 1.0),
        (pair_losses.slic, GROUP, {"beta": 0.25}, 0.25),  # 1 - 0.25 (2 + 1)
        (pair_losses.slic, GROUP, {"beta": 0.5}, 0.0),  # 1 - 1.5 < 0
        (pair_losses.slic, GROUP, {"beta": 0.25, "nll_weight": 2.0}, 3.25),  # 0.25 + 2 mean(1, 2)
        (
            pair_losses.slic,
            GROUP,
            {"beta": 0.25, "length_normalized": True},
            0.5,
        ),  # 1 - 0.25 (1 + 1)
        # Mean log-probs -1.5 and -3: log(1 + exp(0.5 - 1.5)).
        (pair_losses.simpo, GROUP, {"beta": 1.0, "gamma": 0.5}, 0.3132617),
        # Log odds -1.5 - log(1 - e^-1.5) = -1.2475175 and -3 - log(1 - e^-3) = -2.9489308:
        # 1.5 + 0.5 log(1 + exp(-1.7014133)).
        (pair_losses.orpo, GROUP, {"odds_weight": 0.5}, 1.5837839),
        # lp - lp_ref / 2 is -3 + 5/2 and -3 + 2/2: log(1 + exp(-0.5 * 1.5)).
        (pair_losses.gamma_dpo, GROUP, {"beta": 0.5, "gamma": 0.5}, 0.3868710),
        (pair_losses.gamma_dpo, GROUP, {"beta": 0.5, "gamma": 0.0}, 0.6931472),  # -3 and -3
        (pair_losses.gamma_dpo, GROUP, {"beta": 0.5, "gamma": 1.0}, 0.2014133),  # as dpo
        # Scores 1 and 0: (1 - 0.5 (2 + 1))^2.
        (pair_losses.distill, GROUP, {"beta": 0.5}, 0.25),
        # Reference points max(0, -1) and 2: (sigmoid(-0.5 * 2) + sigmoid(-0.5 * 3)) / 2.
        (pair_losses.kto, GROUP, {"beta": 0.5}, 0.2256835),
        (pair_losses.kto, GROUP, {"beta": 0.5, "desirable_weight": 2.0}, 0.3601542),
        # From the reference itself: (sigmoid(-1) + sigmoid(-0.5)) / 2.
        (pair_losses.kto, GROUP, {"beta": 0.5, "reference_point": pair_losses.no_kl}, 0.3232410),
        # Candidate 1 alone is flagged: candidate 2 scored 0.
        (pair_losses.kto, GROUP, {"beta": 0.5, "sides": labels.flags}, 0.2689414),
        # h = (1, 2, -1): 0.5 * 0.2689414 + (0.8807971 + 0.2689414) / 2 - 0.5 * 0.7310586
        (losses.nnpu, GROUP, {"beta": 1.0, "prior": 0.5}, 0.3438106),
        # 0.5748692 - 0.9 * 0.7310586 < 0, so 0.9 * 0.2689414 is left.
        (losses.nnpu, GROUP, {"beta": 1.0, "prior": 0.9}, 0.2420473),
        # l(1) = 0.3132617, l(-1) = 1.3132617, l(-2) = 2.1269280:
        # 0.5 * 0.3132617 + (2.1269280 + 0.3132617) / 2 - 0.5 * 1.3132617
        (
            losses.nnpu,
            GROUP,
            {"beta": 1.0, "prior": 0.5, "surrogate": losses.logistic_loss},
            0.7200949,
        ),
        # sum q log q = -0.9502705; sum q beta Delta = 1.2; log(e + e^2 + 1/e) = 2.3490111.
        (losses.listwise, GROUP, {"beta": 1.0}, 0.1987406),
        # A token each, Delta = (1/2, 1, -1): -0.9502705 - 0.5 + log(e^0.5 + e + 1 / e).
        (losses.listwise, GROUP, {"beta": 1.0, "length_normalized": True}, 0.1046864),
        # Advantages 0.5, -0.5. Candidate 1: -min(0.75, 0.6) - 0.5; candidate 2: -min(-0.75, -0.6).
        (losses.grpo, STALE, {"advantage": losses.mean, "kl_coef": 0.0}, -0.175),
        # Advantages 1, -1 double it.
        (losses.grpo, STALE, {"kl_coef": 0.0}, -0.35),
        # Candidates 1 and 2 share 0.75 and 0.25 of the label mass: K q - 1 = 0.5, -0.5.
        (losses.grpo, STALE, {"advantage": losses.from_labels, "kl_coef": 0.0}, -0.175),
        # The KL's value is (2 - 1) / 2.
        (losses.grpo, STALE, {"advantage": losses.mean, "kl_coef": 2.0}, 0.825),
        # (-1.1 / 2 + 0.75) / 2
        (
            losses.grpo,
            STALE,
            {"advantage": losses.mean, "kl_coef": 0.0, "aggregate": losses.sequence_mean},
            0.1,
        ),
        # (-1.1 + 0.75) / 3
        (
            losses.grpo,
            STALE,
            {"advantage": losses.mean, "kl_coef": 0.0, "aggregate": losses.token_mean},
            -0.1166667,
        ),
        # -0.6 becomes -0.65 with the upper clip at 1.3.
        (
            losses.grpo,
            STALE,
            {"advantage": losses.mean, "kl_coef": 0.0, "clip_high": 0.3},
            -0.2,
        ),
        # Ratios of whole responses sqrt(1.5) and 1.5: (-min(0.612, 0.6) - min(-0.75, -0.6)) / 2.
        (
            losses.grpo,
            STALE,
            {
                "advantage": losses.mean,
                "kl_coef": 0.0,
                "aggregate": losses.sequence_mean,
                "clip": losses.sequence_clip,
            },
            0.075,
        ),
        # Weights 1.2, 1 and 1.2: (1.2 * 0.5 * 1 + 0.5 * 2 - 1.2 * 0.5 * 3) / 3.
        (
            losses.grpo,
            STALE,
            {
                "advantage": losses.mean,
                "kl_coef": 0.0,
                "aggregate": losses.token_mean,
                "clip": losses.weight_clip,
                "clip_low": 1.0,
            },
            -0.0666667,
        ),
        # p ~ (e, e^2 / 1.5, e^-1 / 1.5) = (0.344541, 0.624373, 0.031086);
        # A = 3 (q - p) = (-0.433624, -0.073119, 0.506742); by response 0.867248,
        # 1.5 * 0.073119 + 0.073119 and -1.2 * 0.506742; the KL counts three times.
        (losses.ldl_grpo, STALE, {"beta": 1.0, "kl_coef": 0.0}, 0.441954),
        (losses.ldl_grpo, STALE, {"beta": 1.0, "kl_coef": 2.0}, 3.441954),
    ],
)
def test_loss_has_the_value_worked_out_by_hand(loss, group, settings, expected):
    loss_B, _ = loss(LOGPS, group, **settings)
    np.testing.assert_allclose(loss_B, [expected], rtol=1e-5)


def test_constant_aggregation_divides_by_its_length():
    value = losses.grpo(LOGPS, STALE)[0]
    long = losses.grpo(LOGPS, STALE, aggregate=functools.partial(losses.constant, length=10.0))[0]
    np.testing.assert_allclose(long, value / 10, rtol=1e-6)


def test_advantages_are_those_worked_out_by_hand():
    group = make_group(
        np.zeros((1, 4, 1)), scores=[[50.0, 0.0, 2.0, 4.0]], q=[[0.5, 0.25, 0.125, 0.125]]
    )
    np.testing.assert_allclose(losses.mean(group), [[-2, 0, 2]], rtol=1e-6)
    np.testing.assert_allclose(losses.mean_std(group), [[-1.2247449, 0, 1.2247449]], rtol=1e-6)
    np.testing.assert_allclose(losses.from_labels(group), [[0.5, -0.25, -0.25]], rtol=1e-6)


def test_advantages_leave_out_what_is_not_valid():
    group = make_group(
        np.zeros((1, 4, 1)),
        scores=[[50.0, 0.0, jnp.nan, 4.0]],
        q=[[0.0, 0.25, 0.0, 0.75]],
        valid=[[False, True, False, True]],
    )
    np.testing.assert_allclose(losses.mean(group), [[-2, 0, 2]], rtol=1e-6)
    np.testing.assert_allclose(losses.mean_std(group), [[-1, 0, 1]], rtol=1e-6)
    np.testing.assert_allclose(losses.from_labels(group), [[-0.5, 0, 0.5]], rtol=1e-6)


# Metrics.


def test_preference_metrics_are_those_worked_out_by_hand():
    metrics = pair_losses.dpo(LOGPS, GROUP, beta=0.5, pairs=labels.anchor_vs_all)[1]
    # Rewards (0.5, 1, -0.5): margins -0.5 and 1, one of the two pairs right.
    expected = {
        "reward/margin": 0.25,
        "reward/accuracy": 0.5,
        "logps/chosen": -2.0,
        "logps/rejected": -3.0,
        "group/no_signal": 0.0,
    }
    assert_same_metrics(metrics, expected)


@pytest.mark.parametrize("loss", [losses.listwise, losses.ldl_grpo])
def test_label_losses_choose_the_top_label_and_reject_the_lowest(loss):
    metrics = loss(LOGPS, replace(GROUP, labels=jnp.asarray([[0.5, 0.3, 0.2]])), beta=0.5)[1]
    # The anchor (reward 0.5, log-prob -2) over candidate 2 (reward -0.5, log-prob -3).
    values = [metrics[f"{name}"] for name in ("reward/margin", "logps/chosen", "logps/rejected")]
    np.testing.assert_allclose(values, [1, -2, -3], rtol=1e-6)


def test_grpo_chooses_and_rejects_among_the_candidates():
    metrics = losses.grpo(LOGPS, replace(GROUP, labels=jnp.asarray([[0.5, 0.3, 0.2]])))[1]
    values = [metrics[f"{name}"] for name in ("reward/margin", "logps/chosen", "logps/rejected")]
    np.testing.assert_allclose(values, [3, -3, -3], rtol=1e-6)


def test_clip_fraction_is_the_share_of_tokens_whose_gradient_the_clip_stops():
    # Of three candidate tokens, ratio 1.5 with a positive advantage alone.
    metrics = losses.grpo(LOGPS, STALE)[1]
    np.testing.assert_allclose(metrics["policy/clip_fraction"], 1 / 3, rtol=1e-6)
    clipped = gradient(functools.partial(losses.grpo, kl_coef=0.0), LOGPS, STALE)[0, 1:] == 0
    np.testing.assert_array_equal(clipped, [[True, False], [False, True]])  # the last is masked
    # With the anchor, five tokens; candidate 2 has the positive advantage.
    metrics = losses.ldl_grpo(LOGPS, STALE, beta=1.0)[1]
    np.testing.assert_allclose(metrics["policy/clip_fraction"], 1 / 5, rtol=1e-6)


def test_groups_without_a_preference_are_counted():
    group = make_group(
        np.zeros((2, 3, 1)),
        scores=[[9.0, 1.0, 1.0], [9.0, 1.0, 2.0]],
        q=[[0, 0.5, 0.5], [0, 0.4, 0.6]],
        valid=[[False, True, True]] * 2,
    )
    for name in ("dpo", "ipo", "listwise", "grpo", "grpo_token", "grpo_sequence", "ldl_grpo"):
        metrics = VARIANTS[name](group.ref_logps, group)[1]
        np.testing.assert_allclose(metrics["group/no_signal"], 0.5, err_msg=name)


def test_a_group_without_a_preference_counts_as_a_coin_toss():
    equal = replace(GROUP, scores=jnp.ones((1, 3)))
    loss_B, metrics = pair_losses.dpo(LOGPS, equal)
    assert loss_B == 0
    expected = {
        "reward/margin": 0.0,
        "reward/accuracy": 0.5,
        "logps/chosen": -3.0,  # the mean over candidates of -3 and -3
        "logps/rejected": -3.0,
        "group/no_signal": 1.0,
    }
    assert_same_metrics(metrics, expected)


def test_group_metrics_are_those_worked_out_by_hand():
    # log policy - log ref over candidate tokens: 1, 1, -1.
    expected = {
        "kl/ref": 1 / 3,
        "logps/anchor": -2.0,
        "label/entropy": 0.9502705,
        "label/top1_mass": 0.6,
    }
    assert_same_metrics(losses.group_metrics(LOGPS, GROUP), expected)


def test_group_metrics_are_finite_for_an_anchor_alone():
    alone = make_group(np.full((2, 1, 3), -1.0))
    metrics = losses.group_metrics(alone.ref_logps, alone)
    assert all(np.isfinite(value) for value in metrics.values())
    np.testing.assert_allclose(losses.sft(alone.ref_logps, alone)[0], [1, 1])


@every_loss
def test_metrics_have_no_gradient(name):
    logps, group = random_group(0)

    @jax.jit
    @jax.grad
    def total(logps):
        metrics = VARIANTS[name](logps, group)[1] | losses.group_metrics(logps, group)
        return sum(metrics.values())

    np.testing.assert_array_equal(total(logps), np.zeros(logps.shape))


# Identities.


def test_dpo_is_log_two_when_policy_equals_reference():
    _, group = random_group(1)
    loss_B, metrics = pair_losses.dpo(group.ref_logps, group)
    np.testing.assert_allclose(loss_B, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/accuracy"], 0.5)


@pytest.mark.parametrize("anchor_mass", [0.0, 0.2])
def test_first_gradient_of_listwise_is_a_policy_gradient(anchor_mass):
    # Advantages beta (q_i - 1 / G), G the valid responses, on every token.
    _, group = random_group(2, anchor_mass=anchor_mass)
    grad = gradient(functools.partial(losses.listwise, beta=0.3), group.ref_logps, group)
    advantages = 0.3 * (group.labels - group.valid / group.valid.sum(axis=-1, keepdims=True))
    expected = jnp.where(group.mask, -advantages[:, :, None], 0)
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("anchor_mass", [0.0, 0.2])
def test_first_gradient_of_ldl_grpo_is_that_of_listwise_times_g_over_beta(anchor_mass):
    # Off the reference: only policy = old policy is needed.
    _, group = random_group(3, anchor_mass=anchor_mass)
    ldl = functools.partial(losses.ldl_grpo, beta=0.3, kl_coef=0.0)
    listwise = functools.partial(losses.listwise, beta=0.3)
    np.testing.assert_allclose(
        gradient(ldl, group.old_logps, group),
        gradient(listwise, group.old_logps, group) * group.valid.sum(axis=-1)[:, None, None] / 0.3,
        rtol=1e-5,
        atol=1e-5,
    )


def test_ldl_grpo_at_the_reference_without_the_anchor_is_k_times_grpo_with_label_advantages():
    logps, group = random_group(4, anchor_mass=0.0)
    group = replace(group, old_logps=group.ref_logps)
    grpo = functools.partial(losses.grpo, advantage=losses.from_labels)
    K = logps.shape[1] - 1
    np.testing.assert_allclose(
        losses.ldl_grpo(logps, group)[0], K * grpo(logps, group)[0], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        gradient(losses.ldl_grpo, logps, group),
        K * gradient(grpo, logps, group),
        rtol=1e-4,
        atol=1e-4,
    )


def test_where_labels_are_met_ldl_grpo_stops_and_grpo_with_label_advantages_does_not():
    q = jnp.asarray([[0.0, 0.5, 0.3, 0.2]])
    group = make_group(np.zeros((1, 4, 1)), q=q, valid=[[False, True, True, True]])
    met = jnp.where(group.valid, jnp.log(q), 0)[:, :, None] / 0.5  # beta Delta = log q
    group = replace(group, old_logps=met)
    ldl = functools.partial(losses.ldl_grpo, beta=0.5, kl_coef=0.0)
    grpo = functools.partial(losses.grpo, advantage=losses.from_labels, kl_coef=0.0)
    np.testing.assert_allclose(gradient(ldl, met, group), np.zeros((1, 4, 1)), atol=1e-6)
    assert jnp.abs(gradient(grpo, met, group)).max() > 0.1


def test_nnpu_leaves_candidates_alone_where_the_max_binds():
    grad = gradient(functools.partial(losses.nnpu, beta=1.0, prior=0.9), LOGPS, GROUP)
    np.testing.assert_array_equal(grad[0, 1:], np.zeros((2, 2)))
    assert (grad[0, 0] < 0).all()


@pytest.mark.parametrize("name", ["grpo", "grpo_token", "grpo_sequence"])
def test_grpo_ignores_the_anchor(name):
    logps, group = random_group(5)
    other = replace(
        group,
        scores=group.scores.at[:, 0].set(jnp.nan),
        old_logps=group.old_logps.at[:, 0].set(jnp.nan),
        ref_logps=group.ref_logps.at[:, 0].set(jnp.nan),
    )
    np.testing.assert_array_equal(
        VARIANTS[name](logps, group)[0], VARIANTS[name](logps.at[:, 0].set(jnp.nan), other)[0]
    )
    assert (gradient(VARIANTS[name], logps, group)[:, 0] == 0).all()


def test_the_anchor_takes_part_in_ldl_grpo_when_it_is_valid():
    for anchor_mass, takes_part in ((0.0, False), (0.2, True)):
        logps, group = random_group(6, anchor_mass=anchor_mass)
        grad = gradient(losses.ldl_grpo, logps, group)[:, 0]
        assert bool((grad != 0).any()) is takes_part


@pytest.mark.parametrize(
    ("clip", "aggregate"),
    [(losses.sequence_clip, losses.sequence_mean), (losses.weight_clip, losses.token_mean)],
)
def test_on_policy_gspo_and_cispo_are_grpo(clip, aggregate):
    logps, group = random_group(17)
    group = replace(group, old_logps=logps)
    theirs = functools.partial(losses.grpo, clip=clip, aggregate=aggregate)
    grpo = functools.partial(losses.grpo, aggregate=aggregate)
    np.testing.assert_allclose(
        gradient(theirs, logps, group), gradient(grpo, logps, group), rtol=1e-5, atol=1e-6
    )


def test_cispo_keeps_the_gradient_of_tokens_that_its_clip_binds():
    loss = functools.partial(
        losses.grpo, clip=losses.weight_clip, advantage=losses.mean, kl_coef=0.0
    )
    # Two candidates: -clip(r) A / 2, with r = (1.5, 1) and A = 0.5, r = 1.5 and A = -0.5.
    np.testing.assert_allclose(
        gradient(loss, LOGPS, STALE)[0, 1:], [[-0.3, -0.25], [0.3, 0.0]], rtol=1e-6
    )
    np.testing.assert_allclose(loss(LOGPS, STALE)[1]["policy/clip_fraction"], 2 / 3, rtol=1e-6)


def test_gspo_clips_a_response_whole():
    loss = functools.partial(
        losses.grpo, clip=losses.sequence_clip, advantage=losses.mean, kl_coef=0.0
    )
    grad = gradient(loss, LOGPS, STALE)[0, 1:]
    np.testing.assert_array_equal(grad == 0, [[True, True], [False, True]])  # the last is masked


@pytest.mark.parametrize("loss", [losses.grpo, losses.ldl_grpo])
def test_the_anchors_likelihood_adds_its_gradient_to_the_groups(loss):
    logps, group = random_group(6, anchor_mass=0.0)
    both = gradient(functools.partial(losses.beside_anchor, loss=loss, weight=0.5), logps, group)
    np.testing.assert_allclose(
        both,
        gradient(loss, logps, group) + 0.5 * gradient(losses.sft, logps, group),
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize("loss", [losses.grpo, losses.ldl_grpo])
def test_mask_unfinished_stops_the_gradient_of_cut_off_candidates_alone(loss):
    logps, group = random_group(7)
    group = replace(
        group, finished=group.finished.at[0, 1].set(False).at[0, 0].set(False), old_logps=logps
    )
    kept = gradient(functools.partial(loss, mask_unfinished=True, kl_coef=0.0), logps, group)
    all_in = gradient(functools.partial(loss, kl_coef=0.0), logps, group)
    np.testing.assert_array_equal(kept, all_in.at[0, 1].set(0))
    assert (all_in[0, 1] != 0).any()


# KL to the reference, on policies small enough to enumerate.


def trees(first, then):
    """Log-probs [7 2] and mask of all responses of up to 2 tokens from 3 words; word 0 is EOS."""
    first, then = jax.nn.log_softmax(first), jax.nn.log_softmax(then)
    rows = [(first[0], jnp.float32(0))]
    rows += [(first[a], then[a, b]) for a in (1, 2) for b in range(3)]
    mask = np.asarray([[True, False]] + [[True, True]] * 6)
    return jnp.asarray([jnp.stack(row) for row in rows]), jnp.asarray(mask)


def random_tree(seed):
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], (3,)), jax.random.normal(keys[1], (3, 3))


def exact_kl(policy, reference):
    logps, _ = trees(*policy)
    ratios = (logps - trees(*reference)[0]).sum(axis=-1)
    return jnp.sum(jnp.exp(logps.sum(axis=-1)) * ratios)


@pytest.mark.parametrize("K", [1, 2])
def test_kl_terms_have_the_exact_kl_gradient_over_all_responses(K):
    policy, reference = random_tree(0), random_tree(1)
    ref_logps, mask = trees(*reference)
    # Every group of K responses is a prompt, weighted by its probability under the policy.
    members = np.asarray(list(itertools.product(range(7), repeat=K)))
    with_anchor = np.concatenate([np.zeros((len(members), 1), int), members], axis=1)

    def expected_kl(policy):
        logps, _ = trees(*policy)
        probs = jnp.exp(logps.sum(axis=-1))[members].prod(axis=-1)
        group = make_group(
            ref_logps[with_anchor],
            mask=mask[with_anchor],
            old_logps=jax.lax.stop_gradient(logps)[with_anchor],
        )
        terms = losses.kl_terms(logps[with_anchor], group, group.mask[:, 1:])
        return jnp.sum(jax.lax.stop_gradient(probs) * losses.constant(terms, group.mask[:, 1:]))

    value, grads = jax.jit(jax.value_and_grad(expected_kl))(policy)
    exact, exact_grads = jax.jit(jax.value_and_grad(exact_kl))(policy, reference)
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        np.testing.assert_allclose(grad, exact_grad, rtol=1e-4, atol=1e-6)


def test_kl_terms_from_an_older_policy_are_exact_for_one_token():
    old, ref, new = (jax.nn.log_softmax(random_tree(seed)[0]) for seed in (2, 3, 4))
    pairs = np.asarray(list(itertools.product(range(3), repeat=2)))
    words = np.concatenate([np.zeros((9, 1), int), pairs], axis=1)

    def expected_kl(logits):
        logps = jax.nn.log_softmax(logits)
        group = make_group(ref[words][:, :, None], old_logps=old[words][:, :, None])
        terms = losses.kl_terms(logps[words][:, :, None], group, group.mask[:, 1:])
        return jnp.sum(
            jnp.exp(old)[pairs].prod(axis=-1) * losses.constant(terms, group.mask[:, 1:])
        )

    def exact(logits):
        logps = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logps) * (logps - ref))

    np.testing.assert_allclose(
        jax.grad(expected_kl)(new), jax.grad(exact)(new), rtol=1e-4, atol=1e-6
    )


def test_logged_kl_is_unbiased_for_one_token():
    policy, ref = (jax.nn.log_softmax(random_tree(seed)[0]) for seed in (5, 6))
    words = np.asarray([[0, 0], [0, 1], [0, 2]])
    group = make_group(ref[words][:, :, None])
    values = [
        losses.group_metrics(policy[words[i : i + 1]][:, :, None], one_row(group, i))["kl/ref"]
        for i in range(3)
    ]
    np.testing.assert_allclose(
        jnp.exp(policy) @ jnp.asarray(values), jnp.exp(policy) @ (policy - ref), rtol=1e-5
    )


# Optima on a one-token bandit of four words.


def test_sft_ends_at_the_anchor():
    logps = optimize(losses.sft, bandit(ALL_WORDS), ALL_WORDS)
    assert jnp.exp(logps[2]) > 0.99


def test_sharp_labels_make_weighted_sft_the_likelihood_of_the_best_candidate():
    logps, group = random_group(17)
    q, valid = labels.softmax_labels(group.scores, tau=1e-3)
    loss_B, _ = losses.weighted_sft(logps, replace(group, labels=q, valid=valid))
    best = group.scores[:, 1:].argmax(axis=1) + 1
    means = jnp.mean(logps, axis=-1, where=group.mask)
    np.testing.assert_allclose(loss_B, -means[jnp.arange(2), best], rtol=1e-5)


def test_raft_ends_at_the_candidate_that_scored_best():
    group = bandit(ALL_WORDS, scores=[[9.0, 1.0, 4.0, 3.0, 2.0]])
    assert jnp.exp(optimize(losses.raft, group, ALL_WORDS)[1]) > 0.99


def test_cdpo_ends_at_the_log_odds_of_its_label_smoothing():
    group = bandit(ALL_WORDS, scores=[[0.0, 1.0, 4.0, 3.0, 2.0]])  # word 1 over word 0
    loss = functools.partial(pair_losses.dpo, beta=0.5, label_smoothing=0.2)
    delta = optimize(loss, group, ALL_WORDS) - REFERENCE
    np.testing.assert_allclose(0.5 * (delta[1] - delta[0]), np.log(0.8 / 0.2), rtol=1e-3)


def test_ipo_ends_at_half_of_one_over_beta():
    group = bandit(ALL_WORDS, scores=[[0.0, 1.0, 4.0, 3.0, 2.0]])
    delta = optimize(functools.partial(pair_losses.ipo, beta=0.5), group, ALL_WORDS) - REFERENCE
    np.testing.assert_allclose(delta[1] - delta[0], 1.0, rtol=1e-3)


@pytest.mark.parametrize("loss", [losses.listwise, functools.partial(losses.ldl_grpo, kl_coef=0.0)])
def test_label_losses_end_where_implied_rewards_are_log_labels(loss):
    q = np.asarray([[0.0, 0.4, 0.3, 0.2, 0.1]])
    group = bandit(ALL_WORDS, q=q, valid=q > 0)
    delta = optimize(functools.partial(loss, beta=0.5), group, ALL_WORDS) - REFERENCE
    gap = 0.5 * delta - np.log(q[0, 1:])
    np.testing.assert_allclose(gap, np.full(4, gap[0]), atol=1e-3)


def test_grpo_ends_at_the_reference_tilted_by_the_advantage_over_the_kl_coefficient():
    # One candidate a prompt, weighted by its probability: the expected gradient, exactly.
    words = np.asarray([[0, 0], [0, 1], [0, 2], [0, 3]])
    advantages = jnp.asarray([1.0, 0.0, -1.0, 0.5])
    loss = functools.partial(losses.grpo, advantage=lambda group: group.scores[:, 1:], kl_coef=0.7)
    group = bandit(words, scores=jnp.stack([jnp.zeros(4), advantages], axis=1))
    logps = optimize(loss, group, words, weights=jnp.exp)
    np.testing.assert_allclose(
        jnp.exp(logps), jax.nn.softmax(REFERENCE + advantages / 0.7), atol=1e-3
    )


def test_grpo_with_label_advantages_and_no_kl_ends_at_the_top_label():
    q = np.asarray([[0.0, 0.4, 0.2, 0.2, 0.2]])
    loss = functools.partial(losses.grpo, advantage=losses.from_labels, kl_coef=0.0)
    logps = optimize(loss, bandit(ALL_WORDS, q=q, valid=q > 0), ALL_WORDS)
    assert jnp.exp(logps[0]) > 0.99


def test_nnpu_ends_at_the_anchor_with_the_risk_worked_out():
    # h = log(policy / reference). The candidates are all four words and the prior is 1 / 4, so the
    # anchor's part of the unlabeled cancels: risk = (sigmoid(-h_a) + sum over the others of
    # sigmoid(h)) / 4. It falls as the anchor (reference 0.3) takes all: sigmoid(log 0.3) / 4.
    group = bandit(ALL_WORDS)
    loss = functools.partial(losses.nnpu, beta=1.0, prior=0.25)
    logps = optimize(loss, group, ALL_WORDS)
    assert jnp.exp(logps[2]) > 0.99
    risk = loss(logps[ALL_WORDS][:, :, None], group)[0]
    np.testing.assert_allclose(risk, [0.3 / 1.3 / 4], rtol=0.02)


# What must not matter.


def one_row(group, i):
    return jax.tree.map(lambda x: x[i : i + 1], group)


@every_loss
def test_jit_changes_nothing(name):
    logps, group = random_group(8)
    eager, metrics = VARIANTS[name](logps, group)
    jitted, jitted_metrics, _ = compiled(name)(logps, group)
    np.testing.assert_allclose(jitted, eager, rtol=1e-5, atol=1e-6)
    assert_same_metrics(jitted_metrics, metrics | losses.group_metrics(logps, group))


@every_loss
def test_a_batch_is_its_prompts_one_by_one(name):
    logps, group = random_group(9)
    loss_B, metrics, grad = compiled(name)(logps, group)
    alone = [compiled(name)(logps[i : i + 1], one_row(group, i)) for i in range(2)]
    np.testing.assert_allclose(loss_B, [loss[0] for loss, _, _ in alone], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, [grad[0] for _, _, grad in alone], rtol=1e-5, atol=1e-6)
    mean = jax.tree.map(lambda *values: sum(values) / 2, *(metrics for _, metrics, _ in alone))
    assert_same_metrics(metrics, mean)


@every_loss
def test_the_order_of_candidates_does_not_matter(name):
    logps, group = random_group(11)
    order = np.asarray([0, 3, 1, 2])
    names = ("tokens", "mask", "finished", "old_logps", "ref_logps", "scores", "labels", "valid")
    shuffled = replace(group, **{name: getattr(group, name)[:, order] for name in names})
    loss_B, metrics, grad = compiled(name)(logps, group)
    shuffled_B, shuffled_metrics, shuffled_grad = compiled(name)(logps[:, order], shuffled)
    np.testing.assert_allclose(shuffled_B, loss_B, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shuffled_grad, grad[:, order], rtol=1e-5, atol=1e-6)
    assert_same_metrics(shuffled_metrics, metrics)


@every_loss
def test_padding_does_not_matter(name):
    logps, group = random_group(12)

    def pad(x, value):
        return jnp.pad(x, ((0, 0), (0, 0), (0, 2)), constant_values=value)

    padded = replace(
        group,
        tokens=pad(group.tokens, 7),
        mask=pad(group.mask, False),
        old_logps=pad(group.old_logps, -jnp.inf),
        ref_logps=pad(group.ref_logps, jnp.nan),
    )
    loss_B, metrics, grad = compiled(name)(logps, group)
    padded_B, padded_metrics, padded_grad = compiled(name)(pad(logps, jnp.inf), padded)
    np.testing.assert_allclose(padded_B, loss_B, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(padded_grad, pad(grad, 0), rtol=1e-5, atol=1e-6)
    assert_same_metrics(padded_metrics, metrics)


def booleans(*shape):
    size = int(np.prod(shape))
    lists = st.lists(st.booleans(), min_size=size, max_size=size)
    return lists.map(lambda values: jnp.asarray(values).reshape(shape))


@every_loss
@quick
@given(
    mask=booleans(2, 4, 3),
    valid=booleans(2, 4),
    finished=booleans(2, 4),
    junk=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_gradients_are_finite_and_blind_to_what_any_mask_hides(name, mask, valid, finished, junk):
    logps, group = random_group(13)
    group = replace(group, mask=mask, finished=finished, valid=valid)
    group = replace(group, labels=jnp.where(valid, group.labels, 0))
    clean = compiled(name)(logps, group)

    def soil(x):
        return jnp.where(mask, x, junk)

    soiled = replace(group, old_logps=soil(group.old_logps), ref_logps=soil(group.ref_logps))
    results = compiled(name)(soil(logps), soiled)
    for value, expected in zip(jax.tree.leaves(results), jax.tree.leaves(clean), strict=True):
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(value, expected)
    assert (np.asarray(results[2])[~mask] == 0).all()


@every_loss
def test_losses_are_float32_when_log_probs_are_bfloat16(name):
    logps, group = random_group(14)
    logps, old, ref = (x.astype(jnp.bfloat16) for x in (logps, group.old_logps, group.ref_logps))
    made = jax.eval_shape(VARIANTS[name], logps, replace(group, old_logps=old, ref_logps=ref))
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype("float32")}


# Settings.


@pytest.mark.parametrize(
    ("loss", "setting"),
    [
        (pair_losses.dpo, {"beta": 0.0}),
        (pair_losses.dpo, {"label_smoothing": 0.5}),
        (pair_losses.ipo, {"beta": -1.0}),
        (pair_losses.slic, {"beta": 0.0}),
        (pair_losses.simpo, {"gamma": -1.0}),
        (pair_losses.orpo, {"odds_weight": -1.0}),
        (pair_losses.gamma_dpo, {"gamma": -1.0}),
        (pair_losses.kto, {"desirable_weight": -1.0}),
        (losses.nnpu, {"beta": 0.0}),
        (losses.nnpu, {"prior": 1.0}),
        (losses.listwise, {"beta": 0.0}),
        (losses.ldl_grpo, {"beta": 0.0}),
        (losses.grpo, {"clip_low": 1.5}),
        (losses.grpo, {"kl_coef": -0.1}),
        (losses.ldl_grpo, {"clip_high": 0.0}),
        (losses.beside_anchor, {"weight": 0.0}),
    ],
)
def test_a_loss_setting_out_of_range_is_named(loss, setting):
    logps, group = random_group(15)
    with pytest.raises(ConfigError, match=f"loss.{next(iter(setting))}"):
        loss(logps, group, **setting)


def defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


LOSSES = sorted(Path(conf_dir(), "loss").glob("*.yaml"))


@pytest.mark.parametrize("path", LOSSES, ids=lambda p: p.stem)
def test_loss_settings_leave_nothing_unsaid(path):
    bound = build(OmegaConf.load(path), "loss")
    assert set(bound.keywords) == set(defaults(bound.func))


@pytest.mark.parametrize(
    "path", [path for path in LOSSES if hasattr(losses, path.stem)], ids=lambda p: p.stem
)
def test_settings_named_like_a_loss_are_its_defaults(path):
    bound = build(OmegaConf.load(path), "loss")
    function = getattr(losses, path.stem)
    assert bound.func is function
    stated = dict(bound.keywords)
    for name, part in stated.items():
        if hasattr(part, "func"):
            assert part.keywords == defaults(part.func)
            stated[name] = part.func
    assert stated == defaults(function)
    logps, group = random_group(16)
    np.testing.assert_array_equal(bound(logps, group)[0], function(logps, group)[0])


def test_the_trade_off_between_two_scorers_moves_with_lambda_to_a_known_optimum():
    # beta 1: policy ~ ref sum_k lambda_k q_k; two scorers that want words 0 and 3.
    members = jnp.asarray([[[9.0, 3.0, 1.0, 0.0, 0.0], [9.0, 0.0, 0.0, 1.0, 3.0]]])
    worth = []
    for share in (0.0, 0.5, 1.0):
        rule = functools.partial(labels.mixed_labels, weights=[share, 1 - share])
        q, valid = labels.labels_of(rule, members[:, 0], members, jax.random.key(0))
        group = bandit(ALL_WORDS, q=q, valid=valid)
        logps = optimize(functools.partial(losses.listwise, beta=1.0), group, ALL_WORDS, steps=1000)
        np.testing.assert_allclose(
            jnp.exp(logps), jax.nn.softmax(REFERENCE + jnp.log(q[0, 1:])), atol=2e-3
        )
        worth.append(members[0, :, 1:] @ jnp.exp(logps))
    first, second = zip(*worth, strict=True)
    assert first[0] + 0.2 < first[1] < first[2] - 0.2
    assert second[0] - 0.2 > second[1] > second[2] + 0.2
