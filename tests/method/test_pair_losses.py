"""What the papers state of the losses of pairs."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from groups import (
    ALL_WORDS,
    GROUP,
    LOGPS,
    REFERENCE,
    bandit,
    gradient,
    make_group,
    optimize,
    random_group,
)

from pujax.method import labels, losses, pair_losses


def pair(logps, ref_logps, **fields):
    """Log-probs and group of B pairs: a mute anchor, the chosen, the rejected."""
    logps, ref = (jnp.pad(jnp.asarray(x), ((0, 0), (1, 0)))[:, :, None] for x in (logps, ref_logps))
    scores = jnp.broadcast_to(jnp.asarray([0.0, 1.0, 0.0]), ref.shape[:2])
    return logps, make_group(ref, scores=scores, **fields)


def test_dpo_ends_at_the_reference_tilted_by_the_reward():
    # Rafailov et al., eq. 4: pairs in proportion to Bradley-Terry's odds of a reward r give
    # policy ~ ref exp(r / beta).
    reward, beta = jnp.asarray([1.0, 0.0, -1.0, 0.5]), 0.7
    rewards_G = jnp.concatenate([jnp.zeros(1), reward])

    def bradley_terry(scores):
        odds = jax.nn.sigmoid(rewards_G[:, None] - rewards_G[None, :])
        candidate = jnp.arange(5) > 0
        both = candidate[:, None] & candidate[None, :] & ~jnp.eye(5, dtype=bool)
        return jnp.where(both, odds, 0)[None] / 6

    logps = optimize(
        functools.partial(pair_losses.dpo, beta=beta, pairs=bradley_terry),
        bandit(ALL_WORDS),
        ALL_WORDS,
    )
    np.testing.assert_allclose(jnp.exp(logps), jax.nn.softmax(REFERENCE + reward / beta), atol=1e-3)


def test_distillation_ends_at_the_reference_tilted_by_the_scores():
    scores = jnp.asarray([[9.0, 1.0, 0.0, -1.0, 0.5]])
    loss = functools.partial(pair_losses.distill, beta=0.7)
    logps = optimize(loss, bandit(ALL_WORDS, scores=scores), ALL_WORDS)
    tilted = jax.nn.softmax(REFERENCE + scores[0, 1:] / 0.7)
    np.testing.assert_allclose(jnp.exp(logps), tilted, atol=1e-3)


def family_of(*members):
    """A bandit with each word once beside the anchor, drawn evenly, and a family's scores of it."""
    members = jnp.asarray([members])
    scores = members.mean(axis=1)
    even = jnp.full((1, 5, 1), jnp.log(0.25))
    return replace(bandit(ALL_WORDS, scores=scores, old_logps=even), members=members)


MEMBERS = [[0.0, 1.0, 0.0, -1.0, 0.5], [0.0, -1.0, 0.3, 0.0, 1.0], [0.0, 0.2, 0.1, 0.0, 0.0]]


def tilted_by(member, beta=0.7):
    """Log-probs of a family's responses under the policy that `distill` ends at."""
    table = jax.nn.log_softmax(REFERENCE + jnp.asarray(member[1:]) / beta)
    return table, table[ALL_WORDS][:, :, None]


def test_e_dpo_costs_what_the_nearest_member_costs_and_no_more_than_any():
    group = family_of(*MEMBERS)
    assert group.members is not None
    _, logps = tilted_by([0.0, 0.3, 0.2, -0.4, 0.1])
    each = [
        pair_losses.distill(logps, replace(group, scores=group.members[:, m]), beta=0.7)[0]
        for m in range(3)
    ]
    nearest, _ = pair_losses.e_dpo(logps, group, beta=0.7)
    np.testing.assert_allclose(nearest, np.min(each, axis=0), rtol=1e-6)
    assert all((nearest <= one + 1e-7).all() for one in each)
    assert np.ptp(each) > 0.1
    alone, _ = pair_losses.e_dpo(logps, replace(group, members=None), beta=0.7)
    np.testing.assert_array_equal(alone, pair_losses.distill(logps, group, beta=0.7)[0])


def test_pessimism_chooses_of_a_familys_optima_the_one_nearest_to_the_reference():
    group = family_of(*MEMBERS)
    costs, kls = [], []
    for member in MEMBERS:
        table, logps = tilted_by(member)
        loss, _ = pair_losses.e_dpo(logps, group, beta=0.7)
        np.testing.assert_allclose(loss, 0, atol=1e-10)
        loss, metrics = pair_losses.e_dpo(logps, group, beta=0.7, pessimism=0.01)
        exact = np.sum(np.exp(REFERENCE) * (REFERENCE - table))
        np.testing.assert_allclose(metrics["kl/from_ref"], exact, atol=1e-6)
        costs.append(float(loss[0]))
        kls.append(exact)
    assert np.argmin(costs) == np.argmin(kls) == 2


def test_the_gradient_of_pessimism_is_that_of_the_kl_from_the_reference():
    group = family_of(*MEMBERS)

    def kl(logits):
        logps = jax.nn.log_softmax(logits)[ALL_WORDS][:, :, None]
        loss, _ = pair_losses.e_dpo(logps, group, beta=0.7, pessimism=1.0)
        return (loss - pair_losses.e_dpo(logps, group, beta=0.7)[0]).sum()

    logits = jnp.asarray([0.3, -0.2, 0.0, 1.0])
    expected = jax.nn.softmax(logits) - jnp.exp(REFERENCE)
    np.testing.assert_allclose(jax.grad(kl)(logits), expected, atol=1e-6)


def test_simpo_costs_log_two_at_its_margin_whatever_the_lengths():
    # Mean log-probs -1 and -1.5, over 1 and 3 tokens: a lead of gamma / beta.
    logps = jnp.asarray([[[0.0, 0, 0], [-1.0, jnp.nan, jnp.nan], [-1.5, -1.0, -2.0]]])
    mask = jnp.asarray([[[False] * 3, [True, False, False], [True] * 3]])
    group = make_group(jnp.full((1, 3, 3), jnp.nan), mask=mask, scores=[[0.0, 1.0, 0.0]])
    loss_B, _ = pair_losses.simpo(logps, group, beta=3.0, gamma=1.5)
    np.testing.assert_allclose(loss_B, [np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("loss", [pair_losses.simpo, pair_losses.orpo])
def test_losses_without_a_reference_do_not_read_it(loss):
    logps, group = random_group(0)
    blind = replace(group, ref_logps=jnp.full(group.ref_logps.shape, jnp.nan))
    np.testing.assert_array_equal(loss(logps, blind)[0], loss(logps, group)[0])


def test_orpo_without_odds_is_the_chosens_likelihood():
    logps, group = random_group(1)
    orpo = functools.partial(pair_losses.orpo, odds_weight=0.0)
    np.testing.assert_array_equal(orpo(logps, group)[0], losses.raft(logps, group)[0])


def test_orpo_has_a_finite_gradient_where_a_response_is_certain():
    logps, group = pair([[0.0, -1e-9], [-1e-9, -40.0]], [[0.0, 0.0], [0.0, 0.0]])
    assert jnp.isfinite(pair_losses.orpo(logps, group)[0]).all()
    assert jnp.isfinite(gradient(pair_losses.orpo, logps, group)).all()


def test_slic_leaves_pairs_beyond_its_margin_alone():
    # beta (Delta_w - Delta_l) is 1.5 at beta 0.5, and 0.75 at 0.25.
    np.testing.assert_array_equal(
        gradient(functools.partial(pair_losses.slic, beta=0.5), LOGPS, GROUP), np.zeros((1, 3, 2))
    )
    np.testing.assert_array_equal(
        gradient(functools.partial(pair_losses.slic, beta=0.25), LOGPS, GROUP),
        [[[0, 0], [-0.25, -0.25], [0.25, 0]]],
    )


def test_kto_saturates_on_both_sides_of_its_reference_point():
    # The slope of 1 - sigmoid(beta Delta) is -beta / 4 at Delta = 0 and dies out on both sides.
    flagged = functools.partial(
        pair_losses.kto, beta=0.5, sides=labels.flags, reference_point=pair_losses.no_kl
    )
    for flag in (1.0, -1.0):
        delta = jnp.asarray([0.0, 40.0, -40.0])
        group = make_group(np.zeros((3, 2, 1)), scores=np.full((3, 2), flag))
        logps = jnp.stack([jnp.zeros(3), delta], axis=1)[:, :, None]
        slope = gradient(flagged, logps, group)[:, 1, 0]
        np.testing.assert_allclose(slope, [-flag * 0.125, 0, 0], atol=1e-8)


def test_kto_measures_from_the_other_candidates_mean_delta():
    group = make_group(np.zeros((2, 4, 1)), valid=[[True] * 4, [True, True, True, False]])
    delta = jnp.asarray([[9.0, 1.0, 3.0, 5.0], [9.0, -4.0, 2.0, 7.0]])
    point = pair_losses.others_kl(delta, group)
    np.testing.assert_allclose(point[:, 1:3], [[4, 3], [2, 0]])
    np.testing.assert_allclose(point[:, 0], [3, 0])  # of all candidates; a mean below 0 counts as 0


def test_kto_learns_from_a_response_that_is_alone():
    group = make_group(np.zeros((1, 2, 1)), scores=[[0.0, -1.0]])
    loss = functools.partial(pair_losses.kto, beta=0.5, sides=labels.flags)
    np.testing.assert_allclose(gradient(loss, jnp.zeros((1, 2, 1)), group)[0, :, 0], [0, 0.125])


def test_gamma_one_is_dpo():
    logps, group = random_group(2)
    for length_normalized in (False, True):
        given = {"beta": 0.3, "length_normalized": length_normalized}
        np.testing.assert_allclose(
            pair_losses.gamma_dpo(logps, group, gamma=1.0, **given)[0],
            pair_losses.dpo(logps, group, **given)[0],
            rtol=1e-5,
        )


@pytest.mark.parametrize("gamma", [1.0, 0.25])
def test_a_pair_is_ranked_right_if_and_only_if_its_loss_is_below_the_references(gamma):
    # Chen et al., Theorem 4.1, and as it reads for their eq. 4.
    keys = jax.random.split(jax.random.key(0))
    policy, ref = (3 * jax.random.normal(key, (400, 2)) - 8 for key in keys)
    logps, group = pair(policy, ref)
    loss_B, _ = pair_losses.gamma_dpo(logps, group, beta=0.4, gamma=gamma)
    if gamma == 1:
        loss_B, _ = pair_losses.dpo(logps, group, beta=0.4)
    bound_B = jax.nn.softplus(-0.4 * gamma * (ref[:, 1] - ref[:, 0]))
    right_B = policy[:, 0] >= policy[:, 1]
    np.testing.assert_array_equal(loss_B <= bound_B, right_B)
    assert 100 < right_B.sum() < 300


@pytest.mark.parametrize(
    "loss",
    [
        pair_losses.dpo,
        pair_losses.orpo,
        pair_losses.kto,
        pair_losses.distill,
        pair_losses.e_dpo,
        pair_losses.spo,
        losses.listwise,
        losses.weighted_sft,
        losses.raft,
        losses.nnpu,
        losses.grpo,
        functools.partial(losses.grpo, advantage=losses.mean, kl_coef=0.5),
        functools.partial(losses.grpo, aggregate=losses.sequence_mean, clip=losses.sequence_clip),
        functools.partial(losses.grpo, aggregate=losses.token_mean),
        functools.partial(losses.ldl_grpo, kl_coef=0.5),
    ],
)
def test_a_candidate_that_is_absent_changes_nothing(loss):
    logps, group = random_group(3, G=3)

    def pad(x, value):
        return jnp.pad(x, ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2), constant_values=value)

    scores = pad(group.scores, -jnp.inf)
    with labels.absent_candidates():
        q, valid = labels.softmax_labels(scores, anchor_mass=0.2)
    wider = replace(
        group,
        tokens=pad(group.tokens, 0),
        mask=pad(group.mask, False),
        finished=pad(group.finished, False),
        old_logps=pad(group.old_logps, jnp.nan),
        ref_logps=pad(group.ref_logps, jnp.nan),
        scores=scores,
        labels=q,
        valid=valid,
    )
    loss_B, metrics = loss(logps, group)
    with labels.absent_candidates():
        wider_B, wider_metrics = loss(pad(logps, jnp.nan), wider)
    np.testing.assert_allclose(wider_B, loss_B, rtol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(wider_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
    slope = jax.grad(lambda x: loss(x, group)[0].sum())(logps)
    with labels.absent_candidates():
        wider_slope = jax.grad(lambda x: loss(x, wider)[0].sum())(pad(logps, 0.0))
    np.testing.assert_allclose(wider_slope, pad(slope, 0.0), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(q[:, :-1], group.labels)
    np.testing.assert_array_equal(valid[:, -1], [False, False])


def test_kto_measures_given_responses_from_the_batchs_own_kl():
    # Delta is (1, 2, -1): sigmoid(-0.5 (2 - 0.5)) and sigmoid(0.5 (-1 - 0.5)) are the same.
    group = replace(GROUP, kl=jnp.asarray([0.5]))
    loss_B, metrics = pair_losses.kto(LOGPS, group, beta=0.5)
    np.testing.assert_allclose(loss_B, [0.3208213], rtol=1e-6)
    np.testing.assert_allclose(metrics["kto/reference_point"], 0.5)
    # And a response that is alone has a reference point too, which moves its loss.
    alone = make_group(np.zeros((1, 2, 1)), scores=[[0.0, -1.0]])
    flagged = functools.partial(pair_losses.kto, beta=0.5, sides=labels.flags)
    values = [
        flagged(jnp.zeros((1, 2, 1)), replace(alone, kl=jnp.asarray([kl])))[0] for kl in (0.0, 2.0)
    ]
    np.testing.assert_allclose(values, [[0.5], [0.2689414]], rtol=1e-6)  # sigmoid(-1)


def test_spo_orders_all_degrees_by_plackett_and_luce():
    # Implied rewards 2, -1 and 0.5 of degrees 1, 1/2 and 0, beside the pair of 1 over 0.
    group = make_group(np.zeros((1, 4, 1)), scores=[[9.0, 1.0, 0.5, 0.0]])
    logps = jnp.asarray([[[7.0], [2.0], [-1.0], [0.5]]])
    e = np.exp
    order = np.log(1 + e(-3) + e(-1.5)) + np.log(1 + e(1.5))
    pair = np.log1p(e(-1.5))
    value, _ = pair_losses.spo(logps, group, beta=1.0, gamma=0.4)
    np.testing.assert_allclose(value, [pair + 0.4 * order / 2], rtol=1e-6)
    plain, _ = pair_losses.spo(logps, group, beta=1.0, gamma=0.0)
    np.testing.assert_array_equal(plain, pair_losses.dpo(logps, group, beta=1.0)[0])
    equal = replace(group, scores=jnp.ones((1, 4)))
    assert pair_losses.spo(logps, equal)[0] == 0


def test_spo_ends_with_the_degrees_in_order():
    scores = jnp.asarray([[9.0, 3.0, 2.0, 1.0, 0.0]])
    loss = functools.partial(pair_losses.spo, beta=0.7, gamma=1.0)
    delta = optimize(loss, bandit(ALL_WORDS, scores=scores), ALL_WORDS, steps=300) - REFERENCE
    assert (jnp.diff(delta) < -0.1).all()
