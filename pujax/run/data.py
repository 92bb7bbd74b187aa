"""Prompts and anchors to padded batches. A batch is a function of the seed and the step alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pujax.errors import ConfigError, DataError
from pujax.files.chat import Chat
from pujax.records import Anchor, Example, Prompt, messages_key
from pujax.run.settings import DataConfig
from pujax.types import Batch, Tokens


@dataclass(frozen=True)
class Dataset:
    """Examples with their static shape: P, R and T in tokens, and what was cut to fit."""

    examples: tuple[Example, ...]
    prompt_size: int
    reference_size: int
    response_size: int
    dropped: int
    truncated: int
    anchors_cut: int


def make_dataset(
    prompts: Iterable[Prompt], anchors: Mapping[str, Anchor], chat: Chat, config: DataConfig
) -> Dataset:
    """Tokenise prompts with their anchors.

    An anchor that the teacher was cut off in, or that exceeds T, is truncated and unfinished. A
    prompt longer than P is an error, dropped, or loses its first tokens, as
    `config.on_too_long` says; the last two are counted.

    Raises `DataError` for a prompt without an anchor, a prompt that is too long, or no prompts.
    """
    examples, dropped, truncated, anchors_cut = [], 0, 0, 0
    P, T = config.max_prompt_tokens, config.max_response_tokens
    extra = 0
    for prompt in prompts:
        anchor = anchors.get(messages_key(prompt.messages))
        if anchor is None:
            raise DataError(
                f"prompt {prompt.id!r} has no anchor in {config.anchors}: "
                "collect it with `python -m pujax.collect`, or set teacher=..."
            )
        messages = with_system(prompt.messages, config.system)
        prompt_ids = chat.render(messages)
        reference_ids = chat.reference_head(messages)
        if len(prompt_ids) > P:
            if config.on_too_long == "error":
                raise DataError(
                    f"prompt {prompt.id!r} has {len(prompt_ids)} tokens, data.max_prompt_tokens is "
                    f"{P}: raise it, or set data.on_too_long=drop or truncate"
                )
            if config.on_too_long == "drop":
                dropped += 1
                continue
            truncated += 1
            cut = len(prompt_ids) - P
            prompt_ids, reference_ids = prompt_ids[cut:], reference_ids[cut:]
        finished = anchor.finished
        anchor_ids = chat.encode_response(anchor.response, finished)
        if len(anchor_ids) > T:
            anchor_ids, finished = anchor_ids[:T], False
            anchors_cut += 1
        extra = max(extra, len(reference_ids) - len(prompt_ids))
        examples.append(
            Example(
                prompt=prompt,
                prompt_ids=tuple(prompt_ids),
                reference_ids=tuple(reference_ids),
                anchor=anchor.response,
                anchor_ids=tuple(anchor_ids),
                anchor_finished=finished,
            )
        )
    if not examples:
        raise DataError(f"no prompts left to use ({dropped} dropped as too long)")
    return Dataset(tuple(examples), P, P + extra, T, dropped, truncated, anchors_cut)


def with_system(messages: Sequence[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    """The messages, led by the system message `system` unless they have one or it is None."""
    if system is None or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def collate(examples: Sequence[Example], dataset: Dataset) -> Batch:
    """Right-pad examples to the dataset's shapes. Padding is 0; lengths tell what is real."""

    def padded(rows: Iterable[Sequence[int]], size: int) -> Tokens:
        rows = list(rows)
        tokens = np.zeros((len(rows), size), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        return Tokens(jnp.asarray(tokens), jnp.array([len(row) for row in rows], jnp.int32))

    return Batch(
        prompts=padded((e.prompt_ids for e in examples), dataset.prompt_size),
        anchors=padded((e.anchor_ids for e in examples), dataset.response_size),
        anchor_finished=jnp.array([e.anchor_finished for e in examples]),
        references=padded((e.reference_ids for e in examples), dataset.reference_size),
    )


def picks(count: int, size: int, seed: Sequence[int], step: int) -> list[int]:
    """Which `size` of `count` examples step number `step` sees.

    Every epoch is a permutation of its own, made from `seed` and its number; a batch may span two
    and then may hold an example twice. Raises `ConfigError` when there are fewer than `size`.
    """
    if size > count:
        raise ConfigError(f"a batch of {size} prompts needs as many examples; there are {count}")
    positions = range(step * size, (step + 1) * size)
    orders = {
        epoch: np.random.default_rng([*seed, epoch]).permutation(count)
        for epoch in {position // count for position in positions}
    }
    return [int(orders[position // count][position % count]) for position in positions]


def batch_at(
    dataset: Dataset, size: int, seed: Sequence[int], step: int
) -> tuple[list[Example], Batch]:
    """The examples of step number `step`, and as a batch."""
    examples = [dataset.examples[i] for i in picks(len(dataset.examples), size, seed, step)]
    return examples, collate(examples, dataset)
