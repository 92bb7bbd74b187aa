"""Grouped-query attention of a group: each response to its own tokens and to the shared prompt.

One softmax runs over both. The prompt's keys are never copied: all its responses' queries multiply
them. Queries are walked in blocks, so that a block's scores stay in a processor's cache (see
`tiles`), and most keys that come after a block are left out. The backward pass makes the scores
again from a saved log-sum-exp (Dao et al., 2022), which costs less than reading them from memory.

Suffixes name the tokens of an array, before or among its heads: BNT all of them, Bnt a block's, n
sequences and t queries of each, BnS the keys that a block sees of its own sequences.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pujax.models.tiles import queries

RUNS = 4  # parts of long sequences, of which each leaves out the keys of those after it
# From [B, N, T, KV, R, H] to [B, KV, N, R, T, H], and of keys the same without R.
HEADS_FIRST = {6: (0, 3, 1, 4, 2, 5), 5: (0, 3, 1, 2, 4)}
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
    if T == 0:  # as of responses of one token, whose states predict nothing
        return jnp.zeros((B, N, 0, KV * R * H), v.dtype)
    most = queries(B * KV * R * (T + (0 if shared is None else shared.k.shape[-2])))
    blocks = -(-T // most)
    size = blocks * -(-T // blocks)
    mixed_BNT = _attended(most, *(_padded(x, size) for x in (q, k, v)), shared, reach)[:, :, :T]
    return mixed_BNT.reshape(B, N, T, KV * R * H)


def attend_next(
    q: Float[Array, "B N KV R H"],
    k: Float[Array, "B KV N H S"],
    v: Float[Array, "B KV N S H"],
    t: Int[Array, ""],
    *,
    shared_k: Float[Array, "B KV H P"],
    shared_v: Float[Array, "B KV P H"],
    lengths: Int[Array, " B"],
    reach: int | None = None,
) -> Float[Array, "B N O"]:
    """The same for token `t` of N responses, whose keys and values up to it stand in a cache.

    Keys lie with their tokens last: so XLA multiplies a few queries with them on a CPU without
    turning them first, which costs more than the product.
    """
    B, N, KV, R, H = q.shape
    q_BN1 = q.transpose(0, 2, 1, 3, 4)[:, :, :, :, None]
    own = _own_seen(t[None], v.shape[-2], reach)
    prompt = _prompt_seen(t[None], shared_v.shape[-2], lengths, reach)
    visible = [
        _Keys("bknhs", "bknsh", k, v, own),
        _Keys("bkhs", "bksh", shared_k, shared_v, prompt),
    ]
    mixed_BN1, _ = _forward_block(q_BN1, visible)
    mixed_BN = mixed_BN1[:, :, :, :, 0].astype(v.dtype)
    return mixed_BN.transpose(0, 2, 1, 3, 4).reshape(B, N, KV * R * H)


def _whole(
    most: int,
    q: Float[Array, "B N T KV R H"],
    k: Float[Array, "B N T KV H"],
    v: Float[Array, "B N T KV H"],
    shared: Shared | None,
    reach: Int[Array, ""] | None,
) -> Float[Array, "B N T KV R H"]:
    """What each query gets, `most` queries a row at a time.

    Where T is more than that it is a multiple of the blocks' size.
    """
    return _forward(most, q, k, v, shared, reach)[0]


def _forward(most: int, q: Array, k: Array, v: Array, shared: Shared | None, reach: Array | None):
    n, size, runs = _plan(q.shape[1], q.shape[2], most)

    def block(stop: int, made: tuple[Array, Array], at: Array) -> tuple[tuple[Array, Array], None]:
        mixed_BNT, normalizer_BNT = made
        first = at[0], 0
        k_BnS, v_BnS = _cut(k, first, (n, stop)), _cut(v, first, (n, stop))
        visible = _visible(k_BnS, v_BnS, shared, at[1] + jnp.arange(size), reach)
        mixed_Bnt, normalizer_Bnt = _forward_block(_cut(q, at, (n, size)), visible)
        return (_put(mixed_BNT, mixed_Bnt, at), _put(normalizer_BNT, normalizer_Bnt, at)), None

    made = jnp.zeros(q.shape, v.dtype), jnp.zeros((*q.shape[:-1], 1))
    for stop, where in runs:
        made, _ = jax.lax.scan(partial(block, stop), made, where)
    mixed_BNT, normalizer_BNT = (checkpoint_name(x, KEPT) for x in made)
    return mixed_BNT, (q, k, v, shared, reach, mixed_BNT, normalizer_BNT)


def _backward(most: int, saved: tuple, cotangent: Float[Array, "B N T KV R H"]):
    q, k, v, shared, reach, mixed_BNT, normalizer_BNT = saved
    n, size, runs = _plan(q.shape[1], q.shape[2], most)
    products_BNT = jnp.sum(mixed_BNT.astype(jnp.float32) * cotangent, axis=-1, keepdims=True)

    def block(stop: int, made: tuple, at: Array) -> tuple[tuple, None]:
        d_q_BNT, d_k_BNT, d_v_BNT, *d_shared = made
        first = at[0], 0
        k_BnS, v_BnS = _cut(k, first, (n, stop)), _cut(v, first, (n, stop))
        visible = _visible(k_BnS, v_BnS, shared, at[1] + jnp.arange(size), reach)
        d_q_Bnt, (d_own_BnS, *d_prompt) = _backward_block(
            _cut(q, at, (n, size)),
            visible,
            *(_cut(x_BNT, at, (n, size)) for x_BNT in (normalizer_BNT, cotangent, products_BNT)),
        )
        d_k_BNT = _put(d_k_BNT, _cut(d_k_BNT, first, (n, stop)) + d_own_BnS[0], first)
        d_v_BNT = _put(d_v_BNT, _cut(d_v_BNT, first, (n, stop)) + d_own_BnS[1], first)
        d_shared = jax.tree.map(jnp.add, d_shared, [x for pair in d_prompt for x in pair])
        return (_put(d_q_BNT, d_q_Bnt, at), d_k_BNT, d_v_BNT, *d_shared), None

    like = [q, k, v] if shared is None else [q, k, v, shared.k, shared.v]
    made = tuple(jnp.zeros(x.shape) for x in like)
    for stop, where in runs:
        made, _ = jax.lax.scan(partial(block, stop), made, where)
    d_q_BNT, d_k_BNT, d_v_BNT, *d_prompt = (
        gradient.astype(x.dtype) for gradient, x in zip(made, like, strict=True)
    )
    d_shared = shared and shared.replace(k=d_prompt[0], v=d_prompt[1], lengths=None)
    return d_q_BNT, d_k_BNT, d_v_BNT, d_shared, None


_attended = jax.custom_vjp(_whole, nondiff_argnums=(0,))
_attended.defvjp(_forward, _backward)


def _plan(N: int, T: int, most: int) -> tuple[int, int, list[tuple[int, Int[Array, "W 2"]]]]:
    """Sequences and queries of a block, and runs of blocks.

    A block has at most so many queries. Of each run how many keys its blocks see, and the first
    sequence and query of each block.
    """
    n = max(n for n in range(1, N + 1) if N % n == 0 and n * T <= max(most, T))
    blocks = -(-T // most)
    size, each = T // blocks, -(-blocks // RUNS)
    runs = []
    for run in (range(i, min(i + each, blocks)) for i in range(0, blocks, each)):
        where = [(first, block * size) for first in range(0, N, n) for block in run]
        runs.append(((run[-1] + 1) * size, jnp.array(where)))
    return n, size, runs


def _cut(x: Array, at: Any, size: tuple[int, int]) -> Array:
    """Of [B, N, T, KV, ...] n sequences' t tokens, `at` the first: [B, KV, n, ..., t, (H)]."""
    x = jax.lax.dynamic_slice_in_dim(x, at[0], size[0], axis=1)
    x = jax.lax.dynamic_slice_in_dim(x, at[1], size[1], axis=2)
    return x.transpose(HEADS_FIRST[x.ndim])


def _put(x: Array, block: Array, at: Any) -> Array:
    """`x` with a block back where `_cut` took it."""
    block = block.transpose(np.argsort(HEADS_FIRST[x.ndim])).astype(x.dtype)
    return jax.lax.dynamic_update_slice(x, block, (0, at[0], at[1]) + (0,) * (x.ndim - 3))


class _Keys(NamedTuple):
    """Keys and values that a block of queries sees, by the names of their axes in a product."""

    k_axes: str
    v_axes: str
    k: Array
    v: Array
    seen: Bool[Array, "#B #t S"]

    def scores(self, q: Float[Array, "B KV n R t H"]) -> Float[Array, "B KV n R t S"]:
        """Masked scores in float32."""
        scores_BntS = _dot(f"bknrth,{self.k_axes}->bknrts", q, self.k)
        return jnp.where(self.seen[:, None, None, None], scores_BntS, NEGATIVE)


def _visible(
    k: Float[Array, "B KV n S H"],
    v: Float[Array, "B KV n S H"],
    shared: Shared | None,
    at: Int[Array, " t"],
    reach: int | Array | None,
) -> list[_Keys]:
    """What queries `at` these places see: their own sequence's keys, and the prompt's."""
    own = _Keys("bknsh", "bknsh", k, v, _own_seen(at, k.shape[-2], reach))
    if shared is None:
        return [own]
    seen = _prompt_seen(at, shared.k.shape[-2], shared.lengths, reach)
    return [own, _Keys("bksh", "bksh", shared.k, shared.v, seen)]


def _own_seen(at: Int[Array, " t"], count: int, reach: int | Array | None) -> Bool[Array, "1 t S"]:
    """Which of `count` keys of their own sequence queries `at` these places see."""
    behind = at[None, :, None] - jnp.arange(count)[None, None]
    return _near(behind >= 0, behind, reach)


def _prompt_seen(
    at: Int[Array, " t"], count: int, lengths: Int[Array, " B"], reach: int | Array | None
) -> Bool[Array, "B #t P"]:
    """The same of the prompt's keys, of which the first `lengths` are real."""
    key_at, length = jnp.arange(count)[None, None], lengths[:, None, None]
    return _near(key_at < length, length + at[None, :, None] - key_at, reach)


def _near(real: Array, behind: Array, reach: int | Array | None) -> Array:
    return real if reach is None else real & (behind < reach)


def _forward_block(
    q: Float[Array, "B KV n R t H"], visible: list[_Keys]
) -> tuple[Float[Array, "B KV n R t H"], Float[Array, "B KV n R t 1"]]:
    """What the queries get, and the log of their weights' sum."""
    scores = [keys.scores(q) for keys in visible]
    top_Bnt = reduce(jnp.maximum, [x_BntS.max(axis=-1, keepdims=True) for x_BntS in scores])
    total_Bnt, mixed_Bnt = jnp.zeros(top_Bnt.shape), jnp.zeros(q.shape)
    for scores_BntS, keys in zip(scores, visible, strict=True):
        weights_BntS = jnp.exp(scores_BntS - top_Bnt)
        total_Bnt += weights_BntS.sum(axis=-1, keepdims=True)
        of_values = f"bknrts,{keys.v_axes}->bknrth"
        mixed_Bnt += _dot(of_values, weights_BntS.astype(keys.v.dtype), keys.v)
    return mixed_Bnt / total_Bnt, top_Bnt + jnp.log(total_Bnt)


def _backward_block(
    q: Float[Array, "B KV n R t H"],
    visible: list[_Keys],
    normalizer: Float[Array, "B KV n R t 1"],
    cotangent: Float[Array, "B KV n R t H"],
    products: Float[Array, "B KV n R t 1"],
) -> tuple[Float[Array, "B KV n R t H"], list[tuple[Array, Array]]]:
    """The queries' gradient, and that of each of the visible keys and values.

    `products` are those of what each query got with its cotangent.
    """
    d_q_Bnt, d_visible = jnp.zeros(q.shape), []
    for keys in visible:
        weights_BntS = jnp.exp(keys.scores(q) - normalizer)
        d_weights_BntS = _dot(f"bknrth,{keys.v_axes}->bknrts", cotangent, keys.v)
        d_scores_BntS = (weights_BntS * (d_weights_BntS - products)).astype(keys.k.dtype)
        d_q_Bnt += _dot(f"bknrts,{keys.k_axes}->bknrth", d_scores_BntS, keys.k)
        d_k = _dot(f"bknrts,bknrth->{keys.k_axes}", d_scores_BntS, q)
        weights_BntS = weights_BntS.astype(keys.v.dtype)
        d_v = _dot(f"bknrts,bknrth->{keys.v_axes}", weights_BntS, cotangent)
        d_visible.append((d_k, d_v))
    return d_q_Bnt, d_visible


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _padded(x: Array, size: int) -> Array:
    """More tokens, which come after the others and so change nothing."""
    return jnp.pad(x, [(0, size - x.shape[2]) if axis == 2 else (0, 0) for axis in range(x.ndim)])
