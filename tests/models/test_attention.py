import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pujax.models import tiles
from pujax.models.attention import Shared, attend, attend_next

KV, R, H = 2, 3, 8
FAR = np.iinfo(np.int32).max


def _noise(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def _sequences(B: int, N: int, T: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _noise(B, N, T, KV, R, H), _noise(B, N, T, KV, H), _noise(B, N, T, KV, H)[..., ::-1]


def _naive(q, k, v, k_prompt, v_prompt, lengths, reach):
    """Each response on its own: its prompt's real keys, then its own, in one plain softmax."""
    B, N, T = q.shape[:3]
    rows = []
    for b in range(B):
        P = lengths[b]
        for n in range(N):
            keys = jnp.concatenate([k_prompt[b, :, :P].transpose(1, 0, 2), k[b, n]])
            values = jnp.concatenate([v_prompt[b, :, :P].transpose(1, 0, 2), v[b, n]])
            behind = (P + np.arange(T))[:, None] - np.arange(P + T)[None]
            scores = jnp.einsum("tkrh,skh->krts", q[b, n], keys)
            seen = (behind >= 0) & (behind < reach)
            weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
            rows.append(jnp.einsum("krts,skh->tkrh", weights, values).reshape(T, -1))
    return jnp.stack(rows).reshape(B, N, T, -1)


@pytest.mark.parametrize("reach", [FAR, 4])
@pytest.mark.parametrize(("N", "T", "block"), [(3, 5, 128), (4, 6, 12), (2, 11, 4)])
def test_a_shared_prompt_is_as_a_copy_of_it_before_each_response(N, T, block, reach, monkeypatch):
    monkeypatch.setattr(tiles, "QUERIES", block)
    q, k, v = _sequences(2, N, T)
    prompt, real = (_noise(2, KV, 7, H), _noise(2, KV, 7, H) + 1), (7, 4)
    limit = None if reach == FAR else jnp.int32(reach)

    def ours(q, k, v, k_prompt, v_prompt):
        return attend(q, k, v, shared=Shared(k_prompt, v_prompt, jnp.array(real)), reach=limit)

    def naive(q, k, v, k_prompt, v_prompt):
        return _naive(q, k, v, k_prompt, v_prompt, real, reach)

    given, out = (q, k, v, *prompt), _noise(2, N, T, KV * R * H)
    one, one_back = jax.vjp(jax.jit(ours), *given)
    other, other_back = jax.vjp(jax.jit(naive), *given)
    np.testing.assert_allclose(one, other, atol=1e-5)
    for mine, theirs in zip(one_back(out), other_back(out), strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.parametrize("block", [128, 4])
def test_without_a_prompt_it_is_causal_attention(block, monkeypatch):
    monkeypatch.setattr(tiles, "QUERIES", block)
    q, k, v = _sequences(2, 1, 10)
    flat = q[:, 0].reshape(2, 10, KV * R, H), k[:, 0], v[:, 0]

    def total(q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v)))

    def expected(q, k, v):
        return jnp.sum(jnp.sin(jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True)))

    one, mine = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)
    other, theirs = jax.jit(jax.value_and_grad(expected, (0, 1, 2)))(*flat)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, atol=1e-5)


def test_the_next_token_gets_what_it_gets_among_all():
    q, k, v = _sequences(2, 3, 6)
    shared = Shared(_noise(2, KV, 7, H), _noise(2, KV, 7, H) + 1, jnp.array([7, 4]))
    for reach in (None, 3):
        whole = attend(q, k, v, shared=shared, reach=None if reach is None else jnp.int32(reach))
        for t in range(6):
            # What the cache holds beyond token t is not there yet.
            keys, values = (x.at[:, :, t + 1 :].set(9.0).transpose(0, 3, 1, 2, 4) for x in (k, v))
            one = attend_next(
                q[:, :, t],
                keys.swapaxes(-1, -2),
                values,
                jnp.int32(t),
                shared_k=shared.k.swapaxes(-1, -2),
                shared_v=shared.v,
                lengths=shared.lengths,
                reach=reach,
            )
            np.testing.assert_allclose(one, whole[:, :, t], atol=1e-5)


def test_in_bfloat16_weights_add_up_in_float32():
    # 300 equal keys: each weight is 1/300, and the mean of ones is one.
    q, k = jnp.zeros((1, 1, 300, 1, 1, H), jnp.bfloat16), jnp.zeros((1, 1, 300, 1, H), jnp.bfloat16)
    mixed = attend(q, k, jnp.ones_like(k))
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mixed, 1.0)


def test_scores_of_a_long_prompt_are_never_all_in_memory():
    q, k, v = (x.repeat(64, axis=2) for x in _sequences(1, 1, 32))
    scores = 4 * KV * R * q.shape[2] ** 2

    def gradient(q, k, v):
        return jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2))(q, k, v)

    needed = jax.jit(gradient).lower(q, k, v).compile().memory_analysis()
    assert needed is not None
    assert needed.temp_size_in_bytes < 0.6 * scores
