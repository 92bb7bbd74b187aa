"""Virtual tokens before a prompt, fitted while every weight is frozen (Lester et al., 2021).

Their ids are those behind the vocabulary, so a prompt that they lead is one like any other, and a
decoder whose parameters have a `soft_prompt` [N, D] beside its tables looks them up there. The
output's table has no row for them: none is ever sampled.
"""

from collections.abc import Sequence

import jax.numpy as jnp
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
