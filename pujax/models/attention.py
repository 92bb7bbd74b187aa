"""Grouped-query attention of a group: each response to its own tokens and to the shared prompt.

One softmax runs over both. The prompt's keys are never copied: all its responses' queries multiply
them. Queries are walked in blocks, so that a block's scores stay in the processor's cache, and most
keys that come after a block are left out. The backward pass makes the scores again from a saved
log-sum-exp (Dao et al., 2022), which costs less than reading them from memory.

Where cuDNN has a kernel for a case, that is used instead (never tried: no GPU was at hand).
"""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

BLOCK = 128  # queries a row, at most, whose scores are made together
RUNS = 4  # parts of long sequences, of which each leaves out the keys of those after it
KEPT = "attended"  # the name under which a rematerialisation policy may keep what attention gave
NEGATIVE = -1e30  # a masked score; finite, so that a wholly masked row stays finite


@flax.struct.dataclass
class Shared:
    """A layer's keys and values of prompts, of which the first `lengths` are real."""

    k: Float[Array, "B KV P H"]
    v: Float[Array, "B KV P H"]
    lengths: Int[Array, " B"]


def attend(
    q: Float[Array, "B N T KV R H"],
    k: Float[Array, "B N T KV H"],
    v: Float[Array, "B N T KV H"],
    *,
    shared: Shared | None = None,
    reach: Int[Array, ""] | None = None,
) -> Float[Array, "B N T O"]:
    """Causal attention of N sequences a row, which continue the row's `shared` prompt if given.

    `q` comes scaled. With `reach` a token sees itself and the `reach - 1` tokens before it alone.
    """
    B, N, T, KV, R, H = q.shape
    if shared is None and reach is None and _suits_cudnn(q.dtype, H):
        sequences = (x.reshape(B * N, T, -1, H) for x in (q, k, v))
        mixed = jax.nn.dot_product_attention(
            *sequences, scale=1.0, is_causal=True, implementation="cudnn"
        )
        return mixed.reshape(B, N, T, KV * R * H)
    # As many sequences at once as fill a block; of longer ones as many blocks as they fill.
    n = max(n for n in range(1, N + 1) if N % n == 0 and n * T <= max(BLOCK, T))
    blocks = -(-T // BLOCK)
    size = blocks * -(-T // blocks)
    q, k, v = (
        jnp.pad(x, [(0, 0), (0, 0), (0, size - T)] + [(0, 0)] * (x.ndim - 3)) for x in (q, k, v)
    )
    q = q.reshape(B, N // n, n, size, KV, R, H).transpose(1, 0, 4, 2, 5, 3, 6)
    k, v = (x.reshape(B, N // n, n, size, KV, H).transpose(1, 0, 4, 2, 3, 5) for x in (k, v))
    mixed = _attended(q, k, v, shared, reach)
    return mixed.transpose(1, 0, 3, 5, 2, 4, 6).reshape(B, N, size, KV * R * H)[:, :, :T]


def attend_next(
    q: Float[Array, "B N KV R H"],
    k: Float[Array, "B KV N S H"],
    v: Float[Array, "B KV N S H"],
    t: Int[Array, ""],
    *,
    shared: Shared,
    reach: int | None = None,
) -> Float[Array, "B N O"]:
    """The same for token `t` of N responses, whose keys and values up to it stand in a cache."""
    B, N, KV, R, H = q.shape
    q = q.transpose(0, 2, 1, 3, 4)[:, :, :, :, None]
    mixed, _ = _forward_block(q, k, v, shared, t, reach)
    return mixed[:, :, :, :, 0].transpose(0, 2, 1, 3, 4).reshape(B, N, KV * R * H)


def _suits_cudnn(dtype: Any, head_width: int) -> bool:
    """Whether cuDNN's flash attention takes it: 16-bit numbers on an NVIDIA GPU, Ampere or newer.

    It knows no prompt that sequences share.
    """
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    recent = float(device.compute_capability) >= 8.0
    return recent and dtype.itemsize == 2 and head_width % 8 == 0 and head_width <= 128


@jax.custom_vjp
def _attended(
    q: Float[Array, "J B KV n R T H"],
    k: Float[Array, "J B KV n T H"],
    v: Float[Array, "J B KV n T H"],
    shared: Shared | None,
    reach: Int[Array, ""] | None,
) -> Float[Array, "J B KV n R T H"]:
    """What each query gets, n sequences at a time."""
    return _forward(q, k, v, shared, reach)[0]


def _forward(q: Array, k: Array, v: Array, shared: Shared | None, reach: Array | None):
    size, runs = _runs(q.shape[-2])

    def sequences(_: None, inputs: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
        q, k, v = inputs

        def block(keys: tuple, _: None, i: Array) -> tuple[None, tuple[Array, Array]]:
            return None, _forward_block(_rows(q, i, size), *keys, shared, i * size, reach)

        made = []
        for run in runs:
            keys = k[..., : (run[-1] + 1) * size, :], v[..., : (run[-1] + 1) * size, :]
            made.append(jax.lax.scan(partial(block, keys), None, jnp.array(run))[1])
        mixed, normalizer = (jnp.concatenate(parts) for parts in zip(*made, strict=True))
        return None, (_joined(mixed, -2), _joined(normalizer, -1))

    _, (mixed, normalizer) = jax.lax.scan(sequences, None, (q, k, v))
    mixed, normalizer = checkpoint_name(mixed, KEPT), checkpoint_name(normalizer, KEPT)
    return mixed, (q, k, v, shared, reach, mixed, normalizer)


def _backward(saved: tuple, cotangent: Float[Array, "J B KV n R T H"]):
    q, k, v, shared, reach, mixed, normalizer = saved
    size, runs = _runs(q.shape[-2])

    def sequences(d_shared: tuple[Array, Array] | None, inputs: tuple[Array, ...]):
        q, k, v, mixed, normalizer, cotangent = inputs
        products = jnp.sum(mixed.astype(jnp.float32) * cotangent, axis=-1)

        def block(keys: tuple, carry: tuple, i: Array) -> tuple[tuple, Array]:
            d_k, d_v, d_shared = carry
            rows = (_rows(x, i, size) for x in (q, cotangent))
            sums = (_rows(x, i, size, axis=-1) for x in (normalizer, products))
            own, of_prompt = _backward_block(*rows, *sums, *keys, shared, i * size, reach)
            d_q = own[0]
            if d_shared is not None:
                assert of_prompt is not None
                d_q += of_prompt[0]
                d_shared = d_shared[0] + of_prompt[1], d_shared[1] + of_prompt[2]
            return (d_k + own[1], d_v + own[2], d_shared), d_q

        d_q, d_k, d_v = [], jnp.zeros(k.shape), jnp.zeros(v.shape)
        for run in runs:
            keys = k[..., : (run[-1] + 1) * size, :], v[..., : (run[-1] + 1) * size, :]
            zeros = jnp.zeros(keys[0].shape)
            (d_keys, d_values, d_shared), d_rows = jax.lax.scan(
                partial(block, keys), (zeros, zeros, d_shared), jnp.array(run)
            )
            d_k = d_k.at[..., : zeros.shape[-2], :].add(d_keys)
            d_v = d_v.at[..., : zeros.shape[-2], :].add(d_values)
            d_q.append(d_rows)
        return d_shared, (_joined(jnp.concatenate(d_q), -2), d_k, d_v)

    start = None if shared is None else (jnp.zeros(shared.k.shape), jnp.zeros(shared.v.shape))
    inputs = (q, k, v, mixed, normalizer, cotangent)
    d_shared, (d_q, d_k, d_v) = jax.lax.scan(sequences, start, inputs)
    if shared is not None:
        d_k_shared, d_v_shared = d_shared
        d_shared = shared.replace(
            k=d_k_shared.astype(k.dtype), v=d_v_shared.astype(v.dtype), lengths=None
        )
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_shared, None


_attended.defvjp(_forward, _backward)


def _forward_block(
    q: Float[Array, "B KV n R t H"],
    k: Float[Array, "B KV n S H"],
    v: Float[Array, "B KV n S H"],
    shared: Shared | None,
    first: int | Int[Array, ""],
    reach: int | Array | None,
) -> tuple[Float[Array, "B KV n R t H"], Float[Array, "B KV n R t"]]:
    """What queries `first`, `first` + 1, ... get, and the log of their weights' sum."""
    own, of_prompt = _scores(q, k, shared, first, reach)
    top = own.max(axis=-1, keepdims=True)
    if of_prompt is not None:
        top = jnp.maximum(top, of_prompt.max(axis=-1, keepdims=True))
    own = jnp.exp(own - top)
    total = own.sum(axis=-1, keepdims=True)
    mixed = _dot("bknrts,bknsh->bknrth", own.astype(v.dtype), v)
    if of_prompt is not None:
        of_prompt = jnp.exp(of_prompt - top)
        total += of_prompt.sum(axis=-1, keepdims=True)
        mixed += _dot("bknrtp,bkph->bknrth", of_prompt.astype(v.dtype), shared.v)
    return (mixed / total).astype(v.dtype), (top + jnp.log(total))[..., 0]


def _backward_block(
    q: Float[Array, "B KV n R t H"],
    cotangent: Float[Array, "B KV n R t H"],
    normalizer: Float[Array, "B KV n R t"],
    products: Float[Array, "B KV n R t"],
    k: Float[Array, "B KV n S H"],
    v: Float[Array, "B KV n S H"],
    shared: Shared | None,
    first: int,
    reach: Array | None,
):
    """Gradients of queries, keys and values: by way of a block's own keys, and of the prompt's.

    `products` are those of each query's result with its cotangent.
    """

    def part(scores: Array, k: Array, v: Array, keys: str):
        weights = jnp.exp(scores - normalizer[..., None])
        d_v = _dot(f"bknrts,bknrth->{keys}", weights.astype(v.dtype), cotangent)
        d_weights = _dot(f"bknrth,{keys}->bknrts", cotangent, v)
        d_scores = (weights * (d_weights - products[..., None])).astype(k.dtype)
        d_q = _dot(f"bknrts,{keys}->bknrth", d_scores, k)
        return d_q, _dot(f"bknrts,bknrth->{keys}", d_scores, q), d_v

    own, of_prompt = _scores(q, k, shared, first, reach)
    own = part(own, k, v, "bknsh")
    return own, None if of_prompt is None else part(of_prompt, shared.k, shared.v, "bksh")


def _scores(
    q: Float[Array, "B KV n R t H"],
    k: Float[Array, "B KV n S H"],
    shared: Shared | None,
    first: int | Int[Array, ""],
    reach: int | Array | None,
) -> tuple[Float[Array, "B KV n R t S"], Float[Array, "B KV n R t P"] | None]:
    """Masked scores of own keys and of the prompt's, in float32."""
    at = first + jnp.arange(q.shape[-2])[None, :, None]
    ahead = at - jnp.arange(k.shape[-2])[None, None]
    own = _seen(_dot("bknrth,bknsh->bknrts", q, k), ahead >= 0, ahead, reach)
    if shared is None:
        return own, None
    lengths, key_at = shared.lengths[:, None, None], jnp.arange(shared.k.shape[-2])[None, None]
    scores = _dot("bknrth,bkph->bknrtp", q, shared.k)
    return own, _seen(scores, key_at < lengths, lengths + at - key_at, reach)


def _seen(
    scores: Float[Array, "B KV n R t S"],
    real: Bool[Array, "#B #t S"],
    ahead: Int[Array, "#B t S"],
    reach: int | Array | None,
) -> Float[Array, "B KV n R t S"]:
    """Scores of keys that are `real` and less than `reach` behind their query."""
    seen = real if reach is None else real & (ahead < reach)
    return jnp.where(seen[:, None, None, None], scores, NEGATIVE)


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _runs(length: int) -> tuple[int, list[range]]:
    """The queries of a block, and the blocks as at most `RUNS` runs of them."""
    blocks = -(-length // BLOCK)
    each = -(-blocks // RUNS)
    runs = [range(i, min(i + each, blocks)) for i in range(0, blocks, each)]
    return length // blocks, runs


def _rows(x: Array, i: Int[Array, ""], size: int, axis: int = -2) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _joined(blocks: Array, axis: int) -> Array:
    """Blocks on a leading axis, joined along `axis`."""
    x = jnp.moveaxis(blocks, 0, axis - 1)
    shape = list(blocks.shape[1:])
    shape[axis] *= blocks.shape[0]
    return x.reshape(shape)
