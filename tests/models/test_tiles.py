"""What an accelerator computes in other pieces than a CPU: here on a CPU, told that it is none."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import TINY, tiny

from pujax.method.sampling import greedy
from pujax.models import attention, decoder, lora, products, tiles
from pujax.models.logps import response_logps
from pujax.models.sharding import make_mesh
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
        products.streamed(x, rows, jnp.float32), x @ rows.T, rtol=1e-5, atol=1e-5
    )


def _decoding(name, mesh=None):
    """A family's decoding of one token, its parameters with an adapter, and its layers as laid out.

    Each call gives other functions, so that each is traced anew.
    """
    config, base = tiny(name)
    adapter = lora.init_adapter(jax.random.key(0), base, rank=2)
    adapter = jax.tree.map(
        lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), adapter
    )
    model = decoder.LanguageModel(config, mesh=mesh)
    shape = (config.layers, 2, config.kv_heads, 5, config.head_width)
    k_LB = jnp.sin(jnp.arange(np.prod(shape))).reshape(shape)
    last_BD = jnp.zeros((2, config.width))
    prefix = decoder.Prefix(k_LB, k_LB[::-1], jnp.array([5, 3]), last_BD)

    def step(params):
        decoding, cache = model.decoding(params, prefix), model.empty_cache(2, 3, 2)
        return model.decode(params, decoding, cache, jnp.arange(6).reshape(2, 3) + 7, jnp.int32(0))

    return step, lora.with_adapter(base, adapter), lambda p: model.decoding(p, prefix).layers


@pytest.mark.parametrize("name", TINY)
def test_elsewhere_a_layer_reads_its_input_in_one_product_with_the_same_outcome(name, monkeypatch):
    step, params, _ = _decoding(name)
    one = jax.jit(step).lower(params)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    step, params, _ = _decoding(name)
    other = jax.jit(step).lower(params)
    # Of four layers q, k and v, and gate and up.
    assert one.as_text().count("dot_general") - other.as_text().count("dot_general") == 4 * 3
    one, other = (jax.tree.leaves(each.compile()(params)) for each in (one, other))
    assert np.asarray(one[0]).std() > 0.1
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("tensor", [1, 2])
def test_kernels_are_joined_unless_heads_are_split(tensor, elsewhere):
    del elsewhere
    _, params, layers = _decoding("qwen2", make_mesh(-1, 2, tensor))
    names = {name for name in jax.eval_shape(layers, params)[0] if name.endswith("_rows")}
    apart = {f"{name}_rows" for name in ("q", "k", "v", "gate", "up")}
    joined = {"q+k+v_rows", "gate+up_rows"}
    assert names == {"o_rows", "down_rows"} | (joined if tensor == 1 else apart)
