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
from pujax.text import counted
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


@dataclass(frozen=True)
class _Fitted:
    """A prompt as tokens, before it has an anchor."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    reference_ids: tuple[int, ...]
    truncated: bool


def load_data(
    config: TrainConfig, chat: Chat, say: Callable[[str], None]
) -> tuple[Dataset, Dataset]:
    """Training and held-out examples of the same static shape.

    A configured teacher is asked for the anchors that the store lacks, once it is known that their
    prompts can be used. Raises `DataError`, and what reading prompts and asking raise.
    """
    teacher = with_protocol(config.teacher, config.trusted)
    sources = (config.data.prompts, config.data.heldout)
    parts = [_fit(load_prompts(source), chat, config.data) for source in sources]
    shared = {f.prompt_ids for f in parts[0][0]} & {f.prompt_ids for f in parts[1][0]}
    if shared:
        raise DataError(
            f"{counted(len(shared), 'prompt is', 'prompts are')} in both {config.data.prompts} and "
            f"{config.data.heldout}: take out of one what is in both, or the evaluation means "
            "nothing"
        )
    anchors = anchors_for(
        [fitted.prompt for part, _ in parts for fitted in part],
        teacher,
        Path(config.data.anchors),
        config.collect,
        say=say,
    )
    made = [_answered(part, dropped, anchors, chat, config.data) for part, dropped in parts]
    for name, data in zip(("training", "held-out"), made, strict=True):
        cut = counted(data.anchors_cut, "anchor")
        notes = [
            *([f"{data.dropped} dropped as too long"] if data.dropped else []),
            *([f"{data.truncated} truncated"] if data.truncated else []),
            *([f"{cut} cut at {data.response_size} tokens"] if data.anchors_cut else []),
        ]
        say(", ".join([counted(len(data.examples), f"{name} prompt"), *notes]))
    train_data, heldout = made
    return train_data, heldout


def load_heldout(config: TrainConfig, chat: Chat) -> Dataset:
    """A run's held-out examples by the rules of `load_data`, for any model's `chat`.

    Nobody is asked. Raises `DataError` where the store lacks what the run had, and what reading
    prompts and anchors raises.
    """
    fitted, dropped = _fit(load_prompts(config.data.heldout), chat, config.data)
    anchors = anchors_for(
        [each.prompt for each in fitted],
        replace(config.teacher, protocol=_ask_nobody),
        Path(config.data.anchors),
        config.collect,
        say=lambda line: None,
    )
    return _answered(fitted, dropped, anchors, chat, config.data)


def _ask_nobody(*_: Any) -> AbstractAsyncContextManager[Any]:
    raise DataError(
        "data.anchors lacks answers to data.heldout that the run had: put them back, or collect "
        "them with `pujax collect`"
    )


def _answered(
    fitted: Sequence[_Fitted],
    dropped: int,
    anchors: Mapping[str, Anchor],
    chat: Chat,
    config: DataConfig,
) -> Dataset:
    """The prompts that have an anchor: the teacher refused the others, and that has been said."""
    kept = [each for each in fitted if messages_key(each.prompt.messages) in anchors]
    return _with_anchors(kept, dropped, anchors, chat, config)


def make_dataset(
    prompts: Iterable[Prompt], anchors: Mapping[str, Anchor], chat: Chat, config: DataConfig
) -> Dataset:
    """Tokenise prompts with their anchors.

    An anchor that the teacher was cut off in, or that exceeds T, is truncated and unfinished. A
    prompt longer than P is an error, dropped, or loses the beginning of its last message, as
    `config.on_too_long` says; the last two are counted.

    Raises `DataError` for a prompt without an anchor, a prompt that is too long, or no prompts.
    """
    return _with_anchors(*_fit(prompts, chat, config), anchors, chat, config)


def _fit(prompts: Iterable[Prompt], chat: Chat, config: DataConfig) -> tuple[list[_Fitted], int]:
    """The prompts that `config.on_too_long` leaves, as tokens, and how many were dropped."""
    P, fitted, dropped = config.max_prompt_tokens, [], 0
    for prompt in prompts:
        messages = with_system(prompt.messages, config.system)
        prompt_ids = chat.render(messages)
        truncated = len(prompt_ids) > P
        if truncated and config.on_too_long == "error":
            raise DataError(
                f"prompt {prompt.id!r} has {len(prompt_ids)} tokens, data.max_prompt_tokens is "
                f"{P}: raise it, or set data.on_too_long=drop or truncate"
            )
        if truncated and config.on_too_long == "drop":
            dropped += 1
            continue
        if truncated:
            messages = _shortened(prompt.id, messages, chat, P)
            prompt_ids = chat.render(messages)
        reference_ids = chat.reference_head(messages)
        fitted.append(_Fitted(prompt, tuple(prompt_ids), tuple(reference_ids), truncated))
    return fitted, dropped


def _with_anchors(
    fitted: Sequence[_Fitted],
    dropped: int,
    anchors: Mapping[str, Anchor],
    chat: Chat,
    config: DataConfig,
) -> Dataset:
    P, T = config.max_prompt_tokens, config.max_response_tokens
    examples, extra, anchors_cut = [], 0, 0
    for each in fitted:
        prompt = each.prompt
        anchor = anchors.get(messages_key(prompt.messages))
        if anchor is None:
            raise DataError(
                f"prompt {prompt.id!r} has no anchor in {config.anchors}: "
                "collect it with `python -m pujax.collect`, or set teacher=..."
            )
        finished = anchor.finished
        anchor_ids = chat.encode_response(anchor.response, finished)
        if len(anchor_ids) > T:
            anchor_ids, finished = anchor_ids[:T], False
            anchors_cut += 1
        extra = max(extra, len(each.reference_ids) - len(each.prompt_ids))
        examples.append(
            Example(
                prompt=prompt,
                prompt_ids=each.prompt_ids,
                reference_ids=each.reference_ids,
                anchor=anchor.response,
                anchor_ids=tuple(anchor_ids),
                anchor_finished=finished,
            )
        )
    if not examples:
        raise DataError(f"no prompts left to use ({dropped} dropped as too long)")
    truncated = sum(each.truncated for each in fitted)
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
