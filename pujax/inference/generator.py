"""Answers from a model on this disk."""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pujax.errors import ConfigError, require
from pujax.files import weights
from pujax.files.chat import Chat
from pujax.files.led import require_plain
from pujax.files.locate import at_home
from pujax.files.soft_prompt import load_soft_prompt, require_fit
from pujax.inference.finished import model_path
from pujax.models.decoder import LanguageModel
from pujax.models.lora import with_adapter
from pujax.models.soft_prompt import led
from pujax.types import Completions, Params, Tokens, right_padded


@dataclass(frozen=True)
class Reply:
    """A generated answer; `finished` when it ended by itself. Lengths in tokens."""

    text: str
    finished: bool
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True)
class Generator:
    """A model with its tokenizer, ready to answer."""

    model: LanguageModel
    params: Params
    chat: Chat
    virtual: int = 0

    @classmethod
    def load(cls, path: str, soft_prompt: str | None = None) -> "Generator":
        """The model of a run's directory, or at any path that `weights.load` takes.

        With a `soft_prompt`, a file of `pujax adapt`, each prompt is led by its `virtual` tokens.
        Raises `ConfigError`, and with it `WeightsError` and `ChatError`.
        """
        source = model_path(path)
        chat = Chat.load(source)
        if soft_prompt is not None:
            require(
                isinstance(soft_prompt, str | os.PathLike),
                "soft_prompt",
                soft_prompt,
                "one alone leads here: give one file",
            )
            require_plain(chat)
        config, params = weights.load(source)
        config = replace(config, eos_ids=chat.eos_ids)
        if soft_prompt is None:
            return cls(LanguageModel(config), params, chat)
        vectors, about = load_soft_prompt(at_home(soft_prompt))
        require_fit(soft_prompt, vectors, about, config, source)
        params = with_adapter(params, {"soft_prompt": jnp.asarray(vectors)})
        return cls(LanguageModel(config), params, chat, len(vectors))

    def answer(
        self,
        conversations: Sequence[Sequence[dict[str, str]]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Reply]:
        """One answer to each conversation; greedy at temperature 0.

        Raises `ConfigError` for a prompt that leaves the model no positions for `max_tokens`.
        """
        import jax

        prompts = padded(self, conversations, max_tokens=max_tokens)
        # A Flax module is hashable, which its type doesn't say.
        run = compiled(cast(Hashable, self.model), max_tokens, temperature, top_k, top_p)
        made = run(self.params, prompts, jax.random.key(seed))
        made, lengths = jax.device_get((made, prompts.lengths))
        counts = made.mask[:, 0].sum(axis=-1)
        return [
            Reply(
                text=self.chat.decode(made.tokens[b, 0, : counts[b]]),
                finished=bool(made.finished[b, 0]),
                prompt_tokens=int(lengths[b]),
                tokens=int(counts[b]),
            )
            for b in range(len(lengths))
        ]

    def shares(
        self, conversations: Sequence[Sequence[dict[str, str]]], words: Sequence[str]
    ) -> Float[np.ndarray, "B W"]:
        """How likely each conversation goes on with each of `words`, among those alone.

        Of a word its last token counts, so give words of one. Raises `ConfigError` as `answer`.
        """
        import jax

        prompts = padded(self, conversations, max_tokens=1)
        # The last id: some tokenizers open every text with a token for the space before it.
        ids = tuple(self.chat.encode(word)[-1] for word in words)
        run = _compared(cast(Hashable, self.model), ids)
        return np.asarray(jax.device_get(run(self.params, prompts)))


def padded(
    generator: Generator, conversations: Sequence[Sequence[dict[str, str]]], *, max_tokens: int
) -> Tokens:
    """Rendered conversations [B P], right-padded to a power of two.

    So few lengths are compiled. Raises `ConfigError` for one that leaves the model no positions for
    `max_tokens`.
    """
    rendered: list[Sequence[int]] = [
        generator.chat.render(list(messages)) for messages in conversations
    ]
    if generator.virtual:
        rendered = [led(ids, generator.virtual, generator.model.config) for ids in rendered]
    longest = max(map(len, rendered))
    room = generator.model.config.max_positions
    if longest + max_tokens > room:
        raise ConfigError(
            f"max_tokens={max_tokens}: with a prompt of {longest} tokens that is more "
            f"than the {room} positions the model knows: lower it, or shorten the prompt"
        )
    return right_padded(rendered, max(16, 1 << (longest - 1).bit_length()))


@lru_cache(maxsize=8)
def compiled(
    model: LanguageModel, size: int, temperature: float, top_k: int, top_p: float
) -> "Callable[..., Completions]":
    """One completion a prompt, jitted once for each choice of model, length and filters."""
    import jax

    from pujax.method.sampling import greedy, sample

    def run(params: Params, prompts: Tokens, key: Array) -> Completions:
        prefix = model.prefill(params, prompts)
        if temperature == 0:
            return greedy(model, params, prefix, size=size)
        return sample(
            model,
            params,
            prefix,
            key,
            size=size,
            candidates=1,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    return jax.jit(run)


@lru_cache(maxsize=8)
def _compared(model: LanguageModel, ids: tuple[int, ...]) -> "Callable[..., Array]":
    """The softmax over the next token's logits at `ids`, jitted once for each model and choice."""
    import jax
    import jax.numpy as jnp

    def run(params: Params, prompts: Tokens) -> Array:
        prefix = model.prefill(params, prompts)
        logits = model.unembed(params, prefix.last)[:, jnp.array(ids)]
        return jax.nn.softmax(logits, axis=-1)

    return jax.jit(run)
