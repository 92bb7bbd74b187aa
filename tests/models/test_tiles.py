"""What an accelerator computes in other pieces than a CPU: here on a CPU, told that it is none."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pujax.method.sampling import greedy
from pujax.models import attention, decoder, tiles
from pujax.models.logps import response_logps
from pujax.types import Tokens


@pytest.fixture
def elsewhere(monkeypatch):
    """As on an accelerator."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_a_cpus_tiles_are_small_and_others_are_bounded_by_memory(monkeypatch):
    assert (tiles.queries(1), tiles.tokens(), tiles.words()) == (64, 512, 4096)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert (tiles.tokens(), tiles.words()) == (8192, 8192)
    # All scores of 1024 queries fit, half of them do, and never fewer than a CPU's.
    assert [tiles.queries(2**17), tiles.queries(2**18), tiles.queries(2**24)] == [1024, 512, 64]


def _log_probs(model, params, prompts):
    after = Tokens(*map(jnp.asarray, prompts))
    tokens = jax.random.randint(jax.random.key(3), (4, 3, 21), 6, 96)
    mask = jnp.arange(21)[None, None] < jnp.array([[21, 4, 9]]).repeat(4, 0)[..., None]

    def total(params):
        found = response_logps(model, params, after, tokens, mask)
        return (found * jnp.cos(jnp.arange(21.0)[None, None])).sum(), found

    return jax.jit(jax.grad(total, has_aux=True))(params)


def test_larger_tiles_change_neither_log_probs_nor_gradient(model, params, prompts, monkeypatch):
    one = _log_probs(model, params, prompts)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(tiles, "SCORES", 2**13)  # so that a row of queries is more than one tile
    monkeypatch.setattr(tiles, "QUERIES", 2)
    blocks = []
    plan = attention._plan
    monkeypatch.setattr(attention, "_plan", lambda *a: blocks.append(a[-1]) or plan(*a))
    other = _log_probs(model, params, prompts)
    assert min(blocks) < 21
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.abs(mine).max() > 0.01
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


def test_decoding_multiplies_either_way_round(model, params, prompts, elsewhere, monkeypatch):
    del elsewhere
    prefix = model.prefill(params, Tokens(*map(jnp.asarray, prompts)))
    one = greedy(model, params, prefix, size=6)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    other = greedy(replace(model), params, prefix, size=6)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert one.logps is not None
    assert other.logps is not None
    np.testing.assert_allclose(one.logps, other.logps, atol=1e-4)
    rows, x = params["layers"]["q"][0].T, jnp.ones((2, 3, 32))
    np.testing.assert_allclose(
        decoder._streamed(x, rows, jnp.float32), x @ rows.T, rtol=1e-5, atol=1e-5
    )
