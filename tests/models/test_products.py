from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import tiny

from pujax.method.sampling import greedy
from pujax.models import lora
from pujax.models.decoder import LanguageModel
from pujax.models.logps import response_logps
from pujax.models.packing import TokenBudget
from pujax.models.products import rounded, streamed, summed_over_rows, times, transposed
from pujax.types import Tokens

SHAPE = (2, 3, 5)


def in_bfloat16(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_narrow_product_rounds_its_factors_and_nothing_else():
    """And so do those of its gradient, of which the kernels' sum over the rows."""
    x, q, k, dq, dk = normal(*SHAPE), normal(5, 4), normal(5, 7), normal(2, 3, 4), normal(2, 3, 7)
    products, gradient = jax.vjp(lambda x, q, k: times(x, (q, k), jnp.bfloat16), x, q, k)
    for product, kernel in zip(products, (q, k), strict=True):
        assert product.dtype == jnp.float32
        np.testing.assert_allclose(
            product, in_bfloat16(x) @ in_bfloat16(kernel), rtol=1e-5, atol=1e-5
        )
    d_x, d_q, d_k = gradient((jnp.asarray(dq), jnp.asarray(dk)))
    of_x = in_bfloat16(dq) @ in_bfloat16(q).T + in_bfloat16(dk) @ in_bfloat16(k).T
    np.testing.assert_allclose(d_x, of_x, rtol=1e-5, atol=1e-5)
    for mine, d in ((d_q, dq), (d_k, dk)):
        assert mine.dtype == jnp.float32
        theirs = np.einsum("bni,bno->io", in_bfloat16(x), in_bfloat16(d))
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    assert np.abs(products[0] - x @ q).max() > 1e-3  # float32's would be another


def test_a_frozen_kernel_that_is_narrow_already_has_a_gradient_of_its_type():
    x, kernel = normal(6, 5), jnp.asarray(normal(5, 4), jnp.bfloat16)
    d_x, d_kernel = jax.grad(lambda x, k: times(x, (k,), jnp.bfloat16)[0].sum(), (0, 1))(x, kernel)
    assert (d_x.dtype, d_kernel.dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("columns", [1, 13, 256, 257, 514, 576])
def test_a_transpose_is_one(rows, columns):
    x = jnp.asarray(normal(rows, columns), jnp.bfloat16)
    np.testing.assert_array_equal(jax.jit(transposed)(x), x.T)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [5, 514])  # of which the second is transposed in blocks
def test_sums_over_rows_are_float32s(dtype, width):
    x, y = (jnp.asarray(normal(2, 3, wide, seed=wide), dtype) for wide in (width, 4))
    found = jax.jit(summed_over_rows)(x, y)
    assert found.dtype == jnp.float32
    theirs = np.einsum("bni,bno->io", *(np.asarray(each, np.float64) for each in (x, y)))
    np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_streamed_product_is_float32s_where_that_is_asked_for(dtype):
    x, rows = jnp.asarray(normal(*SHAPE), dtype), jnp.asarray(normal(4, 5, seed=1), dtype)
    found = streamed(x, rows, jnp.float32)
    assert (found.shape, found.dtype) == ((2, 3, 4), jnp.float32)
    theirs = np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T
    np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False))
def test_a_rounded_number_is_its_narrow_self(number):
    found = jax.jit(rounded, static_argnums=1)(jnp.float32(number), jnp.dtype(jnp.bfloat16))
    assert found.dtype == jnp.float32
    assert float(found) == float(jnp.bfloat16(number)) or abs(number) < 2**-126  # flushed to 0


PROMPTS = Tokens(jnp.arange(4, 24).reshape(2, 10), jnp.array([10, 6]))
RESPONSES = jnp.arange(7, 31).reshape(2, 2, 6)


@pytest.mark.parametrize(("name", "budget"), [("qwen2", TokenBudget(32, 32)), ("gemma3", None)])
def test_in_bfloat16_a_cpu_rounds_factors_alone(name, budget):
    """So what a model reads is near what it reads in float32, and its gradient points there too."""
    config, params = tiny(name)
    adapter = lora.init_adapter(jax.random.key(1), params, rank=2)
    params = lora.with_adapter(params, jax.tree.map(lambda x: x + 0.05, adapter))
    mask = jnp.arange(6)[None, None] < jnp.array([[6, 4], [3, 5]])[..., None]

    def read(dtype):
        model = LanguageModel(config, jnp.dtype(dtype), budget=budget)
        assert model.between == jnp.float32
        assert model.empty_cache(1, 1, 1).k[0].dtype == jnp.float32

        def total(params):
            logps = response_logps(model, params, PROMPTS, RESPONSES, mask)
            return logps.sum(), logps

        gradient, logps = jax.jit(jax.grad(total, has_aux=True))(params)
        assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
        return np.asarray(logps), np.concatenate([g.ravel() for g in jax.tree.leaves(gradient)])

    (one, g), (other, h) = read("float32"), read("bfloat16")
    assert 0 < np.abs(one - other).max() < 0.1
    assert 0.99 < g @ h / np.linalg.norm(g) / np.linalg.norm(h) < 1


def test_what_is_sampled_in_bfloat16_has_the_log_probs_that_training_reads():
    config, params = tiny("qwen2")
    model = LanguageModel(config, jnp.dtype(jnp.bfloat16))
    made = jax.jit(lambda p: greedy(model, p, model.prefill(p, PROMPTS), size=6))(params)
    read = jax.jit(partial(response_logps, model))(params, PROMPTS, made.tokens, made.mask)
    assert made.logps is not None
    np.testing.assert_allclose(made.logps, read, atol=1e-4)
    whole = jax.jit(partial(response_logps, LanguageModel(config)))(
        params, PROMPTS, made.tokens, made.mask
    )
    assert np.abs(read - whole).max() > 1e-3
