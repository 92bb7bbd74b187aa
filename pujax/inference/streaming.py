"""An answer from a model on this disk as it is made, token by token."""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pujax.files.chat import Message
from pujax.inference.generator import Generator, Reply, padded
from pujax.method.sampling import sample_token
from pujax.models.decoder import Cache, Decoding, LanguageModel
from pujax.types import Params, Tokens

HELD = "\N{REPLACEMENT CHARACTER}"
"""What the bytes of a character decode to before the last of them is there."""


def answer_aloud(
    generator: Generator,
    messages: Sequence[Message],
    say: Callable[[str], None],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Reply:
    """What `Generator.answer` replies, with each piece of text given to `say` once it is certain.

    The pieces joined are the reply's text. Raises what `answer` raises; what `say` raises ends the
    answer there.
    """
    prompts = padded(generator, [messages], max_tokens=max_tokens)
    programs = _programs(
        cast(Hashable, generator.model), max_tokens, temperature, top_k, top_p
    )  # a Flax module is hashable, which its type doesn't say
    params, key = generator.params, jax.random.key(seed)
    decoding, cache, token = programs.begin(params, prompts, key)
    ids, said, finished = [int(token[0, 0])], "", False
    while True:
        finished = ids[-1] in generator.model.config.eos_ids
        text = generator.chat.decode(ids)
        ended = finished or len(ids) == max_tokens
        whole = text if ended else text.rstrip(HELD)
        if len(whole) > len(said):
            say(whole[len(said) :])
            said = whole
        if ended:
            return Reply(text, finished, prompts.lengths.item(), len(ids))
        at = np.int32(len(ids) - 1)
        cache, token = programs.advance(params, decoding, cache, token, at, key)
        ids.append(int(token[0, 0]))


class _Programs(NamedTuple):
    """The first token with all that the others need, and one token more."""

    begin: Callable[..., tuple[Decoding, Cache, Int[Array, "1 1"]]]
    advance: Callable[..., tuple[Cache, Int[Array, "1 1"]]]


@lru_cache(maxsize=8)
def _programs(
    model: LanguageModel, size: int, temperature: float, top_k: int, top_p: float
) -> _Programs:
    """Both jitted, for each choice of model, length and filters; keys are those of `sample`."""

    def chosen(params: Params, hidden: Array, key: Array, t: Any) -> Int[Array, "1 1"]:
        logits = model.unembed(params, hidden)
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return sample_token(
            jax.random.fold_in(key, t), logits, temperature=temperature, top_k=top_k, top_p=top_p
        )

    def begin(
        params: Params, prompts: Tokens, key: Array
    ) -> tuple[Decoding, Cache, Int[Array, "1 1"]]:
        prefix = model.prefill(params, prompts)
        token = chosen(params, prefix.last[:, None], key, 0)
        return model.decoding(params, prefix), model.empty_cache(1, 1, size), token

    def advance(
        params: Params, decoding: Decoding, cache: Cache, token: Array, t: Array, key: Array
    ) -> tuple[Cache, Int[Array, "1 1"]]:
        hidden, cache = model.decode(params, decoding, cache, token, t)
        return cache, chosen(params, hidden, key, t + 1)

    return _Programs(jax.jit(begin), jax.jit(advance, donate_argnames="cache"))
