"""Prompts and anchors to padded batches. A batch is a function of the seed and the step alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pujax.errors import ConfigError, DataError
from pujax.files.chat import Chat
from pujax.records import Anchor, Example, Prompt, messages_key
from pujax.run.compose import with_protocol
from pujax.run.settings import DataConfig, TrainConfig
from pujax.teacher.anchors import anchors_for
from pujax.teacher.prompts import load_prompts
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


def load_data(
    config: TrainConfig, chat: Chat, say: Callable[[str], None]
) -> tuple[Dataset, Dataset]:
    """Training and held-out examples of the same static shape.

    A configured teacher is asked for the anchors that the store lacks, before anything else.
    Raises `DataError`, and what reading prompts and asking raise.
    """
    teacher = with_protocol(config.teacher, config.trusted)
    parts = [list(load_prompts(source)) for source in (config.data.prompts, config.data.heldout)]
    anchors = anchors_for(
        [*parts[0], *parts[1]],
        teacher,
        Path(config.data.anchors),
        config.collect,
        say=say,
    )
    train_data, heldout = (_answered(part, anchors, chat, config.data) for part in parts)
    shared = {e.prompt_ids for e in train_data.examples} & {e.prompt_ids for e in heldout.examples}
    if shared:
        raise DataError(
            f"{len(shared)} prompts are in both {config.data.prompts} and {config.data.heldout}: "
            "take them out of one, or the evaluation means nothing"
        )
    for name, data in (("training", train_data), ("held-out", heldout)):
        notes = [
            f"{count} {what}"
            for count, what in (
                (data.dropped, "dropped as too long"),
                (data.truncated, "truncated"),
                (data.anchors_cut, f"anchors cut at {data.response_size} tokens"),
            )
            if count
        ]
        say(f"{len(data.examples)} {name} prompts" + "".join(f", {n}" for n in notes))
    return train_data, heldout


def load_heldout(config: TrainConfig, chat: Chat) -> Dataset:
    """A run's held-out examples by the rules of `load_data`, for any model's `chat`.

    Nobody is asked. Raises `DataError` where the store lacks what the run had, and what reading
    prompts and anchors raises.
    """
    prompts = list(load_prompts(config.data.heldout))
    anchors = anchors_for(
        prompts,
        replace(config.teacher, protocol=_ask_nobody),
        Path(config.data.anchors),
        config.collect,
        say=lambda line: None,
    )
    return _answered(prompts, anchors, chat, config.data)


def _ask_nobody(*_: Any) -> AbstractAsyncContextManager[Any]:
    raise DataError(
        "data.anchors lacks answers to data.heldout that the run had: put them back, or collect "
        "them with `pujax collect`"
    )


def _answered(
    prompts: Iterable[Prompt], anchors: Mapping[str, Anchor], chat: Chat, config: DataConfig
) -> Dataset:
    """The prompts that have an anchor: the teacher refused the others, and that has been said."""
    kept = [prompt for prompt in prompts if messages_key(prompt.messages) in anchors]
    return make_dataset(kept, anchors, chat, config)


def make_dataset(
    prompts: Iterable[Prompt], anchors: Mapping[str, Anchor], chat: Chat, config: DataConfig
) -> Dataset:
    """Tokenise prompts with their anchors.

    An anchor that the teacher was cut off in, or that exceeds T, is truncated and unfinished. A
    prompt longer than P is an error, dropped, or loses the beginning of its last message, as
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
            messages = _shortened(prompt.id, messages, chat, P)
            prompt_ids, reference_ids = chat.render(messages), chat.reference_head(messages)
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


def _shortened(
    name: str, messages: Sequence[dict[str, str]], chat: Chat, size: int
) -> list[dict[str, str]]:
    """The conversation with as much of its last message's end as `size` tokens hold.

    The template around it, the system message and earlier turns stay whole. Raises `DataError`
    where they leave no room.
    """
    *before, last = messages
    text = last["content"]

    def keeping(count: int) -> list[dict[str, str]]:
        return [*before, {**last, "content": text[len(text) - count :]}]

    fits, beyond = 0, len(text)
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if len(chat.render(keeping(middle))) <= size:
            fits = middle
        else:
            beyond = middle
    if fits == 0:
        raise DataError(
            f"prompt {name!r}: the template and what stands before its last message leave no room "
            f"in data.max_prompt_tokens={size}: raise it, or set data.on_too_long=drop"
        )
    return keeping(fits)


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
