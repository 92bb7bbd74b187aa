"""Virtual tokens before a prompt, fitted while every weight is frozen (Lester et al., 2021).

Their ids are those behind the vocabulary, so a prompt that they lead is one like any other, and a
decoder whose parameters have a `soft_prompt` [N, D] beside its tables looks them up there. The
output's table has no row for them: none is ever sampled. For other engines they become rows of the
tables like any token's (`with_rows`).
"""

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pujax.models.parameters import DecoderConfig
from pujax.types import Params

SoftPrompt = dict[str, Float[Array, "N D"]]
"""The one entry `soft_prompt`: what is fitted, and an adapter of a base (see `lora`)."""


def init_soft_prompt(params: Params, ids: Sequence[int]) -> SoftPrompt:
    """One virtual token for each of `ids`, in float32: at first what that token is."""
    return {"soft_prompt": jnp.take(params["embed"], jnp.array(ids), axis=0).astype(jnp.float32)}


def led(prompt: Sequence[int], count: int, config: DecoderConfig) -> tuple[int, ...]:
    """The ids of a prompt with `count` virtual tokens before it, but behind its BOS."""
    start = 1 if prompt and prompt[0] == config.bos_id else 0
    virtual = range(config.vocab, config.vocab + count)
    return (*prompt[:start], *virtual, *prompt[start:])


def with_rows(
    config: DecoderConfig, params: Params, vectors: Float[np.ndarray, "N D"], ids: Sequence[int]
) -> tuple[DecoderConfig, Params]:
    """The same model with virtual tokens as tokens of its vocabulary, grown to hold `ids`.

    Their rows of the output's table, which a tied model gets of its own, are the mean of all rows:
    such a token's logit is the mean of the logits, so never the greatest, and its share at
    temperature 1 is at most 1/V (Jensen's inequality). This is ours.
    """
    embed = jnp.asarray(params["embed"])
    unembed = embed if config.tied else jnp.asarray(params["unembed"])
    vocab = max(config.vocab, max(ids) + 1)
    grown = ((0, vocab - config.vocab), (0, 0))
    at = jnp.array(ids)
    never = jnp.union1d(at, jnp.arange(config.vocab, vocab))  # rows in between are no token's
    mean = jnp.mean(unembed, axis=0, dtype=jnp.float32).astype(unembed.dtype)
    tables = {
        "embed": jnp.pad(embed, grown).at[at].set(jnp.asarray(vectors, embed.dtype)),
        "unembed": jnp.pad(unembed, grown).at[never].set(mean[None]),
    }
    return replace(config, vocab=vocab, tied=False), params | tables
