import inspect
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pujax.config.compose import conf_dir
from pujax.config.functions import build
from pujax.errors import ConfigError
from pujax.method import labels

quick = settings(deadline=None, max_examples=50)


def row(*scores):
    return jnp.asarray([scores], jnp.float32)


# Scores.


def test_standardized_scores_are_distances_from_the_mean_in_deviations():
    # Over the last three: mean 2, population deviation sqrt((4 + 0 + 4) / 3) = 1.6330.
    scores = row(99.0, 0.0, 2.0, 4.0)
    z = labels.standardize(scores, labels.candidates(scores))
    np.testing.assert_allclose(z, [[0, -1.2247449, 0, 1.2247449]], rtol=1e-6)


@pytest.mark.parametrize("scores", [(7.0, 0.3, 0.3, 0.3), (7.0, 0.3, 0.3, 0.30000002)])
def test_scores_equal_to_float32_standardize_to_zero(scores):
    z = labels.standardize(row(*scores), labels.candidates(row(*scores)))
    np.testing.assert_array_equal(z, np.zeros((1, 4)))


def test_what_the_mask_hides_does_not_reach_the_standardized_scores():
    mask = jnp.asarray([[True, False, True], [False, False, False]])
    scores = jnp.asarray([[1.0, jnp.nan, 3.0], [jnp.nan, 1.0, 2.0]])
    np.testing.assert_allclose(labels.standardize(scores, mask), [[-1, 0, 1], [0, 0, 0]])


# Soft labels.


def test_labels_are_the_softmax_of_scores_over_tau():
    # tau = 1 / log 2 makes them proportional to 2^s: 1, 2, 4 over 7.
    q, _ = labels.softmax_labels(row(9.0, 0.0, 1.0, 2.0), tau=1 / math.log(2), standardized=False)
    np.testing.assert_allclose(q, [[0, 1 / 7, 2 / 7, 4 / 7]], rtol=1e-5)


def test_labels_of_standardized_scores_take_tau_in_deviations():
    # z = -1, 1 whatever the spread, so q = sigmoid(2 / tau).
    q, _ = labels.softmax_labels(row(0.0, 10.0, 30.0), tau=2.0)
    np.testing.assert_allclose(q, [[0, 0.2689414, 0.7310586]], rtol=1e-5)


def test_without_anchor_mass_the_anchor_takes_no_part():
    q, valid = labels.softmax_labels(row(9.0, 0.0, 1.0))
    assert q[0, 0] == 0
    np.testing.assert_array_equal(valid, [[False, True, True]])


def test_anchor_mass_goes_to_the_anchor_and_candidates_share_the_rest():
    scores = row(-5.0, 0.0, 1.0, 2.0)
    alone, _ = labels.softmax_labels(scores)
    q, valid = labels.softmax_labels(scores, anchor_mass=0.25)
    np.testing.assert_allclose(q[0], [0.25, *(0.75 * alone[0, 1:])], rtol=1e-6)
    assert valid.all()


def test_equal_scores_give_uniform_labels():
    q, _ = labels.softmax_labels(row(1.0, 0.1, 0.1, 0.1, 0.1))
    np.testing.assert_allclose(q, [[0, 0.25, 0.25, 0.25, 0.25]], rtol=1e-6)


@pytest.mark.parametrize(
    "setting", [{"tau": 0.0}, {"tau": -1.0}, {"anchor_mass": 1.0}, {"anchor_mass": -0.1}]
)
def test_a_label_setting_out_of_range_is_named(setting):
    with pytest.raises(ConfigError, match=f"labels.{next(iter(setting))}"):
        labels.softmax_labels(row(0.0, 1.0, 2.0), **setting)


@quick
@given(
    scores=st.lists(st.integers(-40, 40), min_size=2, max_size=7),
    tau=st.floats(0.2, 5),
    standardized=st.booleans(),
    anchor_mass=st.sampled_from([0.0, 0.3]),
)
def test_rows_of_labels_sum_to_one_over_the_valid(scores, tau, standardized, anchor_mass):
    q, valid = labels.softmax_labels(
        row(0.0, *[s / 8 for s in scores]),
        tau=tau,
        standardized=standardized,
        anchor_mass=anchor_mass,
    )
    np.testing.assert_allclose(q.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(q)[~np.asarray(valid)], 0)


@quick
@given(
    scores=st.lists(st.integers(-40, 40), min_size=2, max_size=7),
    scale=st.integers(1, 16),
    shift=st.integers(-8, 8),
)
def test_standardized_labels_ignore_the_scale_and_origin_of_scores(scores, scale, shift):
    before, _ = labels.softmax_labels(row(0.0, *scores))
    after, _ = labels.softmax_labels(row(0.0, *[scale * s + shift for s in scores]))
    np.testing.assert_allclose(before, after, rtol=1e-3, atol=1e-6)


# Signal theory: |s_i - r_i| <= eps. Multiples of 1/32 keep every comparison exact in float32.


@st.composite
def scores_near_rewards(draw):
    rewards = draw(st.lists(st.integers(-8, 8), min_size=2, max_size=6))
    eps = draw(st.integers(0, 16))
    errors = [draw(st.integers(-eps, eps)) for _ in rewards]
    r = np.asarray(rewards) / 8
    return r, r + np.asarray(errors) / 32, eps / 32


@quick
@given(drawn=scores_near_rewards(), tau=st.floats(0.2, 2), standardized=st.booleans())
def test_rewards_more_than_two_eps_apart_order_the_labels(drawn, tau, standardized):
    r, s, eps = drawn
    q, _ = labels.softmax_labels(row(0.0, *s), tau=tau, standardized=standardized)
    q = np.asarray(q)[0, 1:]
    apart = r[:, None] - r[None, :] > 2 * eps
    assert (q[:, None] > q[None, :])[apart].all()


@quick
@given(drawn=scores_near_rewards())
def test_the_top_label_has_regret_at_most_two_eps(drawn):
    r, s, eps = drawn
    q, _ = labels.softmax_labels(row(0.0, *s))
    assert r.max() - r[np.argmax(np.asarray(q)[0, 1:])] <= 2 * eps


@quick
@given(drawn=scores_near_rewards(), tau=st.floats(0.05, 1), delta=st.integers(0, 64))
def test_label_mass_on_the_far_from_best_is_exponentially_small(drawn, tau, delta):
    r, s, eps = drawn
    q, _ = labels.softmax_labels(row(0.0, *s), tau=tau, standardized=False)
    far = r < r.max() - delta / 32
    bound = (len(r) - 1) * np.exp(-(delta / 32 - 2 * eps) / tau)
    assert np.asarray(q)[0, 1:][far].sum() <= bound * (1 + 1e-5)


# Pairs.


def weights_of(**pairs):
    weights = np.zeros((1, 4, 4))
    for pair, weight in pairs.items():
        weights[0, int(pair[1]), int(pair[2])] = weight
    return weights


@pytest.mark.parametrize(
    ("rule", "scores", "expected"),
    [
        # The anchor's own score, 9 or -9, never counts.
        (labels.best_vs_worst, (9, 1, 3, 2), weights_of(_21=1)),
        (labels.best_vs_worst, (-9, 1, 3, 2), weights_of(_21=1)),
        (labels.best_vs_worst, (9, 3, 3, 2), weights_of(_13=0.5, _23=0.5)),
        (labels.best_vs_worst, (9, 2, 3, 2), weights_of(_21=0.5, _23=0.5)),
        (labels.best_vs_worst, (9, 2, 2, 2), weights_of()),
        (labels.anchor_vs_worst, (9, 1, 3, 2), weights_of(_01=1)),
        (labels.anchor_vs_worst, (-9, 1, 3, 1), weights_of(_01=0.5, _03=0.5)),
        (labels.anchor_vs_worst, (9, 2, 2, 2), weights_of(_01=1 / 3, _02=1 / 3, _03=1 / 3)),
        (labels.anchor_vs_all, (9, 1, 3, 2), weights_of(_01=1 / 3, _02=1 / 3, _03=1 / 3)),
    ],
)
def test_pair_rules_weigh_these_pairs(rule, scores, expected):
    np.testing.assert_allclose(rule(row(*scores)), expected, rtol=1e-6)


def test_extremes_within_an_empty_mask_are_no_pair():
    weights = labels.extremes(row(1.0, 2.0, 3.0), jnp.zeros((1, 3), bool))
    np.testing.assert_array_equal(weights, np.zeros((1, 3, 3)))


@quick
@given(
    scores=st.lists(st.integers(-2, 2), min_size=2, max_size=5),
    rule=st.sampled_from([labels.best_vs_worst, labels.anchor_vs_worst, labels.anchor_vs_all]),
    data=st.data(),
)
def test_pair_rules_follow_a_permutation_of_the_candidates(scores, rule, data):
    order = np.asarray([0, *data.draw(st.permutations(range(1, len(scores) + 1)))])
    scores_G = np.asarray([0, *scores], np.float32)
    before = np.asarray(rule(jnp.asarray(scores_G)[None]))[0]
    after = np.asarray(rule(jnp.asarray(scores_G[order])[None]))[0]
    np.testing.assert_allclose(after, before[order][:, order], rtol=1e-6)


def test_the_label_settings_state_every_default():
    node = OmegaConf.load(f"{conf_dir()}/labels/softmax.yaml")
    rule = build(node, "labels")
    stated = {key: value for key, value in node.items() if not str(key).startswith("_")}
    parameters = inspect.signature(labels.softmax_labels).parameters
    assert stated == {name: parameters[name].default for name in list(parameters)[1:]}
    q, _ = rule(row(0.0, 1.0, 2.0))
    np.testing.assert_array_equal(q, labels.softmax_labels(row(0.0, 1.0, 2.0))[0])


@pytest.mark.parametrize("rule", [labels.best_vs_worst, labels.anchor_vs_worst])
def test_pairs_do_not_depend_on_what_is_computed_beside_them(rule):
    # XLA computes what is cheap twice and rounds it in two ways, so that no score equals the best:
    # in this program 40 % of the groups would have had no pair, were it looked for by equality.
    def program(logps, h):
        scores = jnp.tanh(h) * jnp.sqrt(jnp.abs(h) + 1)
        q, valid = labels.softmax_labels(scores)
        pairs, others = rule(scores), labels.extremes(q, valid)
        margins = logps[:, :, None] - logps[:, None, :]
        seen = (pairs * jax.nn.softplus(-margins)).sum((1, 2)), (others * margins).sum((1, 2))
        return sum(x.mean() for x in seen) + (q * logps).sum(), (pairs, seen)

    h, logps = 1 + 0.3 * jax.random.normal(jax.random.key(0), (2, 64, 9))
    (_, (pairs, _)), _ = jax.jit(jax.value_and_grad(program, has_aux=True))(logps, h)
    np.testing.assert_array_equal(pairs, rule(jnp.tanh(h) * jnp.sqrt(jnp.abs(h) + 1)))
    np.testing.assert_array_equal(pairs.sum((1, 2)), 1)


# Several scores of a response.

MEMBERS = jnp.asarray([[[9.0, 1.0, 0.0, 2.0], [5.0, 0.0, 3.0, -1.0]]])
KEY = jax.random.key(3)


def mixed(**given):
    return labels.labels_of(
        partial(labels.mixed_labels, **given), MEMBERS.mean(axis=1), MEMBERS, KEY
    )


@pytest.mark.parametrize("corner", [0, 1])
def test_at_a_corner_mixed_labels_are_one_dimensions_own(corner):
    weights = [1.0 - corner, float(corner)]
    settings = {"tau": 0.7, "standardized": True, "anchor_mass": 0.2}
    q, valid = mixed(weights=weights, **settings)
    own, own_valid = labels.softmax_labels(MEMBERS[:, corner], **settings)
    np.testing.assert_array_equal(q, own)
    np.testing.assert_array_equal(valid, own_valid)


def test_mixed_labels_weigh_each_dimensions_softmax_at_temperature_one():
    e = np.exp
    first = np.array([e(1), 1, e(2)]) / (e(1) + 1 + e(2))
    second = np.array([1, e(3), e(-1)]) / (1 + e(3) + e(-1))
    q, _ = mixed(weights=[3.0, 1.0])
    np.testing.assert_allclose(q[0, 1:], 0.75 * first + 0.25 * second, rtol=1e-6)
    np.testing.assert_allclose(mixed()[0][0, 1:], (first + second) / 2, rtol=1e-6)
    # The loss is linear in the labels: lambda times each dimension's cross-entropy.
    log_p = jax.nn.log_softmax(jnp.asarray([0.2, -0.4, 0.9]))
    parts = [-(each * log_p).sum() for each in (first, second)]
    np.testing.assert_allclose(-(q[0, 1:] * log_p).sum(), parts[0] * 0.75 + parts[1] * 0.25, 1e-6)


def test_a_drawn_lambda_is_its_steps_alone_and_a_batchs_one():
    rule = partial(labels.mixed_labels, weights=[1.0, 1.0], drawn=True)
    two = jnp.concatenate([MEMBERS, MEMBERS])

    def made(key):
        return labels.labels_of(rule, two.mean(axis=1), two, key)[0]

    steps = [made(jax.random.fold_in(KEY, step)) for step in (4, 5)]
    np.testing.assert_array_equal(made(jax.random.fold_in(KEY, 4)), steps[0])
    assert jnp.abs(steps[0] - steps[1]).max() > 1e-3
    np.testing.assert_array_equal(steps[0][0], steps[0][1])


def test_a_lambda_that_the_prompt_states_is_its_own():
    rule = partial(labels.mixed_labels, weights=[1.0, 1.0], drawn=True)
    two, mix = jnp.concatenate([MEMBERS, MEMBERS]), jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
    q, _ = labels.labels_of(rule, two.mean(axis=1), two, KEY, mix)
    for row, corner in enumerate((0, 1)):
        np.testing.assert_array_equal(q[row], mixed(weights=[1.0 - corner, float(corner)])[0][0])


def test_weights_that_do_not_fit_are_named():
    for weights, drawn in (([1.0], False), ([1.0, -1.0], False), ([0.0, 0.0], False)):
        with pytest.raises(ConfigError, match=r"labels\.weights="):
            mixed(weights=weights, drawn=drawn)
    with pytest.raises(ConfigError, match=r"labels\.weights=.*to be drawn"):
        mixed(weights=[1.0, 0.0], drawn=True)
    with pytest.raises(ConfigError, match=r"labels: mixed_labels weighs several .*scorer=family"):
        labels.labels_of(labels.mixed_labels, MEMBERS[:, 0], None, KEY)
