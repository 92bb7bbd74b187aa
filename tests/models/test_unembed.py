import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pujax.models import tiles, unembed
from pujax.models.unembed import chosen_logps

CHUNKS, USED = 3, 2


@pytest.fixture
def work(monkeypatch):
    """Hidden states, a table of 30 words in blocks of 6, tokens, and weights of their log-probs."""
    monkeypatch.setattr(tiles, "WORDS", 6)
    rng = np.random.default_rng(0)
    hidden = rng.normal(0, 2, (CHUNKS, 2, 4, 8)).astype(np.float32)
    table = rng.normal(0, 2, (30, 8)).astype(np.float32)
    tokens = rng.integers(0, 30, (CHUNKS, 2, 4))
    weights = rng.normal(size=(CHUNKS, 2, 4)).astype(np.float32)
    return tuple(jnp.asarray(part) for part in (hidden, table, tokens, weights))


def _plain(hidden, table, tokens):
    logps = jax.nn.log_softmax(jnp.einsum("cbnd,vd->cbnv", hidden, table))
    logps = jnp.take_along_axis(logps, tokens[..., None], axis=-1)[..., 0]
    return jnp.where(jnp.arange(CHUNKS)[:, None, None] < USED, logps, 0.0)


def test_two_words_by_hand():
    hidden, table = jnp.ones((1, 1, 1, 1)), jnp.array([[0.0], [jnp.log(3.0)]])
    both = [chosen_logps(hidden, table, jnp.full((1, 1, 1), word), 1)[0, 0, 0] for word in (0, 1)]
    np.testing.assert_allclose(both, np.log([0.25, 0.75]), rtol=1e-6)


def test_blocks_hold_every_word_once_and_are_near_the_size_asked_for(monkeypatch):
    monkeypatch.setattr(tiles, "WORDS", 6)
    table = jnp.arange(30.0)[:, None]
    assert unembed._blocks(table).shape == (6, 5, 1)
    assert sorted(unembed._blocks(table).ravel().tolist()) == list(range(30))
    assert unembed._blocks(table[:29]).shape == (29, 1, 1)  # a prime is one block


def test_log_probs_and_gradients_are_those_of_whole_logits(work):
    hidden, table, tokens, weights = work
    assert unembed._blocks(table).shape[1] == 5

    def total(function, *choices):
        return lambda hidden, table: (function(hidden, table, tokens, *choices) * weights).sum()

    np.testing.assert_allclose(
        chosen_logps(hidden, table, tokens, USED), _plain(hidden, table, tokens), atol=1e-5
    )
    ours = jax.grad(total(chosen_logps, USED), (0, 1))(hidden, table)
    plain = jax.grad(total(_plain), (0, 1))(hidden, table)
    for a, b in zip(ours, plain, strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def test_what_lies_beyond_the_used_chunks_does_not_matter(work):
    hidden, table, tokens, _ = work
    broken = hidden.at[USED:].set(jnp.nan)
    logps, back = jax.vjp(lambda h, t: chosen_logps(h, t, tokens, USED), broken, table)
    assert not np.asarray(logps[USED:]).any()
    d_hidden, d_table = back(jnp.ones_like(logps))
    assert np.isfinite(d_hidden).all()
    assert np.isfinite(d_table).all()


def test_large_logits_do_not_overflow(work):
    hidden, table, tokens, _ = work
    logps = chosen_logps(100 * hidden, table, tokens, USED)
    np.testing.assert_allclose(logps, _plain(100 * hidden, table, tokens), rtol=1e-5, atol=1e-3)


def test_a_frozen_table_costs_no_gradient(work):
    hidden, table, tokens, _ = work

    def work_of(argument: int | tuple[int, ...]) -> float:
        def total(hidden, table):
            return chosen_logps(hidden, table, tokens, USED).sum()

        compiled = jax.jit(jax.grad(total, argument)).lower(hidden, table).compile()
        cost = compiled.cost_analysis()
        assert cost is not None
        return cost["flops"]

    assert work_of(0) < work_of((0, 1)) - 2 * 8 * 8 * 6 * 0.9
