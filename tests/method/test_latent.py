"""Latent reward heads, taught by a ranker that is often wrong."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pujax.errors import ConfigError
from pujax.method import labels
from pujax.method.latent import cost, every_pair, fitted, latent, rewards

SETTINGS = {"heads": 4, "latents": 4, "phi": 0.1, "steps": 60, "lr": 0.03}
FLIPS = (0.0, 0.1, 0.2, 0.4)


def toy(seed=0, B=32, K=6, D=8):
    """States of B prompts' responses, and each one's true worth: its distance from a plane."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(B, K + 1, D)).astype("f4")
    unit = states / np.sqrt((states**2).mean(axis=-1, keepdims=True))
    return jnp.asarray(states), unit[..., 0] - 0.5 * unit[..., 1]


def ranked_right(scores, worth):
    """The share of a prompt's pairs of candidates that scores order as their worth does."""
    pairs = np.asarray(every_pair(jnp.asarray(worth))) > 0
    margins = np.asarray(scores)[:, :, None] - np.asarray(scores)[:, None, :]
    return float((margins[pairs] > 0).mean())


def flipped(worth, share, rng):
    """Every pair of candidates by worth, that share of them the wrong way round."""
    pairs = np.array(every_pair(jnp.asarray(worth)))
    for b, i, j in zip(*np.nonzero(pairs), strict=True):
        if rng.random() < share:
            pairs[b, j, i], pairs[b, i, j] = pairs[b, i, j], 0
    return jnp.asarray(pairs)


def test_flipped_labels_hurt_the_heads_less_than_those_who_gave_them():
    states, worth = toy()
    rng = np.random.default_rng(1)
    fit = jax.jit(partial(fitted, **SETTINGS))
    right, given = [], []
    for share in FLIPS:
        pairs = flipped(worth, share, rng)
        right.append(ranked_right(rewards(fit(states, pairs, jax.random.key(0)), states), worth))
        given.append(1 - share)
    assert right[0] > 0.95
    assert all(found > said + 0.03 for found, said in zip(right[1:], given[1:], strict=True)), right


def test_a_strong_prior_leaves_the_heads_without_an_opinion():
    states, worth = toy(B=4)
    fit = jax.jit(partial(fitted, **SETTINGS | {"phi": 100.0}))
    params = fit(states, every_pair(jnp.asarray(worth)), jax.random.key(0))
    assert jnp.abs(rewards(params, states)).max() < 0.05


def test_the_cost_by_hand():
    """One head of one number: means (0, 1, -1), reward 2, a deviation that is almost none."""
    params = {
        "mean": jnp.asarray([[[1.0], [0.0]]]),
        "log_var": jnp.full((1, 1), -40.0),
        "reward": jnp.full((1, 1), 2.0),
    }
    states = jnp.asarray([[[0.0, 1.0], [1.0, 1.0], [-1.0, 1.0]]])
    pairs = every_pair(jnp.asarray([[9.0, 1.0, 0.0]]))
    # The first state has rms sqrt(1/2): its mean is 0 all the same. KL = (m^2 + s^2 - 1 + 40) / 2.
    value = cost(params, states, pairs, jax.random.key(0), phi=0.5)
    expected = np.log1p(np.exp(-4.0)) + 0.5 * (39 / 2 + 2 / 2 / 3)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(rewards(params, states), [[0.0, 2.0, -2.0]], rtol=1e-6)


def test_pairs_are_of_candidates_that_differ():
    scores = jnp.asarray([[9.0, 1.0, 1.0, 0.0]])
    pairs = np.zeros((1, 4, 4))
    pairs[0, 1, 3] = pairs[0, 2, 3] = 0.5
    np.testing.assert_array_equal(every_pair(scores), pairs)
    with labels.absent_candidates():
        assert every_pair(jnp.asarray([[9.0, 1.0, -jnp.inf]])).sum() == 0


def test_a_setting_out_of_range_is_named():
    nothing: Any = None
    for name, value in (("heads", 0), ("phi", -1.0), ("lr", 1.0)):
        setting: dict[str, Any] = {name: value}
        with pytest.raises(ConfigError, match=f"scorer.score.{name}"):
            latent(nothing, score=nothing, **setting)


def test_a_head_whose_latent_is_the_prior_has_no_say():
    states = jnp.asarray([[[0.0, 1.0], [1.0, 1.0], [-1.0, 1.0]]])
    sure, blank = jnp.asarray([[1.0], [0.0]]), jnp.zeros((2, 1))
    params = {
        "mean": jnp.stack([sure, blank]),
        "log_var": jnp.zeros((2, 1)),
        "reward": jnp.asarray([[2.0], [9.0]]),
    }
    np.testing.assert_allclose(rewards(params, states), [[0.0, 2.0, -2.0]], rtol=1e-5)
    even = params | {"mean": jnp.stack([sure, -sure])}  # as sure: the mean of 2 and -9
    np.testing.assert_allclose(rewards(even, states), [[0.0, -3.5, 3.5]], rtol=1e-5)
