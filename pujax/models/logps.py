"""Log-probs of responses under a model, for sampling, scoring and training alike."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pujax.models import tiles
from pujax.models.decoder import LanguageModel, Prefix
from pujax.models.sharding import BATCH_AXES, ways
from pujax.models.unembed import chosen_logps
from pujax.types import Params, Tokens


def token_logps(
    model: LanguageModel,
    params: Params,
    hidden: Float[Array, "B G T D"],
    tokens: Int[Array, "B G T"],
    mask: Bool[Array, "B G T"],
) -> Float[Array, "B G T"]:
    """Log-prob of each token given the hidden state that predicts it; 0 where `mask` is False.

    Each prompt's real tokens are packed to the front and unembedded chunk by chunk, as many
    chunks as hold one; neither pass ever holds more than a block of the vocabulary's logits. So
    [B, G, T, V] is never in memory and padding costs next to nothing.
    """
    B, G, T, _ = hidden.shape
    mesh = model.mesh
    if mesh is not None and (ways(mesh) == 1 or B % ways(mesh)):
        mesh = None  # over axes of one device XLA (jaxlib 0.10) can't sum up the table's gradient
    size = min(G * T, max(1, tiles.tokens() // (B if mesh is None else B // ways(mesh))))
    order = jnp.argsort(~mask.reshape(B, G * T), axis=1, stable=True)

    def chunked(values: Array) -> Array:
        """[B, G, T, ...] to [chunks, B, size, ...], real tokens first."""
        flat = values.reshape(B, G * T, *values.shape[3:])
        index = order.reshape(B, G * T, *[1] * (flat.ndim - 2))
        flat = jnp.take_along_axis(flat, index, axis=1)
        flat = jnp.pad(flat, [(0, 0), (0, -G * T % size)] + [(0, 0)] * (flat.ndim - 2))
        return flat.reshape(B, -1, size, *flat.shape[2:]).swapaxes(0, 1)

    used = -(-mask.sum(axis=(1, 2)).max() // size)
    chosen = chosen_logps
    if mesh is not None:
        # Each device on its own prompts: summed over devices the table's gradient is once, at the
        # end, where XLA would do so in every block of every chunk.
        rows, whole = PartitionSpec(None, BATCH_AXES), PartitionSpec()
        chosen = jax.shard_map(
            chosen_logps,
            mesh=mesh,
            in_specs=(rows, whole, rows, whole),
            out_specs=rows,
            axis_names=set(BATCH_AXES),
            check_vma=False,
        )
    logps = chosen(
        chunked(hidden.astype(model.dtype)), model.unembedding(params), chunked(tokens), used
    )
    logps = logps.swapaxes(0, 1).reshape(B, -1)[:, : G * T]
    logps = jnp.take_along_axis(logps, jnp.argsort(order, axis=1), axis=1).reshape(B, G, T)
    return jnp.where(mask, logps, 0.0)


def response_logps(
    model: LanguageModel,
    params: Params,
    after: Tokens | Prefix,
    tokens: Int[Array, "B G T"],
    mask: Bool[Array, "B G T"],
    *,
    anchor: bool = True,
) -> Float[Array, "B G T"]:
    """log π(y_t | x, y_<t) of every response token, the prompt encoded once; 0 where masked.

    Without `anchor` those of response 0 are not computed, and 0.
    """
    first = 0 if anchor else 1
    tokens, mask = tokens[:, first:], mask[:, first:]
    states = model.extend(params, after, tokens[:, :, :-1], mask=mask[:, :, :-1])
    logps = token_logps(model, params, states.predicting, tokens, mask)
    return jnp.pad(logps, [(0, 0), (first, 0), (0, 0)])


def mean_logps(logps: Float[Array, "B G T"], mask: Bool[Array, "B G T"]) -> Float[Array, "B G"]:
    """lp(y) / |y|, EOS included; 0 for an empty response."""
    return jnp.sum(logps, axis=-1, where=mask) / jnp.maximum(mask.sum(axis=-1), 1)
