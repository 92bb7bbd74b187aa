"""Prompts, anchors and preferences to examples of one static shape; `batches` draws from them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pujax.config.functions import build, with_protocol
from pujax.config.settings import DataConfig, GateConfig, TrainConfig
from pujax.errors import DataError, PujaxError
from pujax.evaluation.waiting import waited
from pujax.files.chat import Chat
from pujax.records import Anchor, Example, Given, Prompt, messages_key
from pujax.run.gate import gated, in_words
from pujax.run.rewarding import AnchorCheck, anchor_check
from pujax.run.unanswered import HAD_ALL, to_collect
from pujax.teacher.anchors import anchors_for
from pujax.teacher.asking import Tally
from pujax.teacher.degrees import KeyWords, graded, yake_words
from pujax.teacher.plan import Plan
from pujax.teacher.preferences import load_preferences
from pujax.teacher.prompts import load_prompts
from pujax.teacher.settings import TeacherConfig
from pujax.teacher.weighting import weighed
from pujax.text import counted, printable


@dataclass(frozen=True)
class Dataset:
    """Examples with their static shape: P, R and T in tokens, and what was cut to fit.

    `candidates` is how many an example is given at most: 0 where the student samples them. `other`
    is preference data that takes `share` of the steps beside these examples. `ref_logps` [N G T]
    are the reference's log-probs of the anchors and given candidates, where they are known. `gated`
    counts the anchors that are not trusted, by reason; `weighed` says that SFT weighs them down.
    `dimensions` names the ratings that every given candidate has.
    """

    examples: tuple[Example, ...]
    prompt_size: int
    reference_size: int
    response_size: int
    dropped: int = 0
    truncated: int = 0
    anchors_cut: int = 0
    bad_rows: int = 0
    candidates: int = 0
    other: "Dataset | None" = None
    share: float = 0.0
    gated: dict[str, int] = field(default_factory=dict)
    weighed: bool = False
    dimensions: tuple[str, ...] = ()
    ref_logps: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def gate_note(self) -> str | None:
        """What became of the anchors that are not trusted; None where there are none."""
        if not self.gated:
            return None
        kept = "weighed down in SFT" if self.weighed else "left out"
        return f"anchors that are not trusted ({in_words(self.gated)}) are {kept}"

    @property
    def parts(self) -> dict[str, "Dataset"]:
        """What steps draw from, by the setting that names it."""
        asked = not self.candidates or (self.examples and self.examples[0].asked is not None)
        own = {"data.prompts" if asked else "data.preferences": self}
        return own | (self.other.parts if self.other else {})

    def prefers(self, *, by_dimension: bool) -> bool:
        """Whether one given response is rated otherwise than another to the same prompt.

        Or, where prompts have one response each, than another prompt's. A response's ratings count
        one by one if `by_dimension`, else its score.
        """
        rated = [
            {given.ratings if by_dimension else given.score for given in example.given}
            for example in self.examples
        ]
        alone = [seen for seen, e in zip(rated, self.examples, strict=True) if len(e.given) == 1]
        return any(len(seen) > 1 for seen in rated) or len(set().union(*alone)) > 1

    @property
    def with_anchors(self) -> "Dataset":
        """The examples that have an anchor, which is all that SFT learns from."""
        other = None if self.other is None else self.other.with_anchors
        kept = tuple(example for example in self.examples if example.anchor_ids)
        return replace(self, examples=kept, other=other)

    def at(self, step: int) -> tuple["Dataset", int]:
        """Which part step number `step` draws from, and how many before it did."""
        if self.other is None:
            return self, step
        before, after = self.of_other(step), self.of_other(step + 1)
        return (self.other, before) if after > before else (self, step - before)

    def of_other(self, steps: int) -> int:
        """How many of the first `steps` draw from the other part; 0 where there is none."""
        return int(steps * self.share + 1e-9) if self.other is not None else 0


@dataclass(frozen=True)
class _Fitted:
    """A prompt as tokens, before it has an anchor."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    reference_ids: tuple[int, ...]
    truncated: bool


def load_data(
    config: TrainConfig,
    chat: Chat,
    say: Callable[[str], None],
    check: Callable[[Dataset], None] = lambda data: None,
    *,
    begun: bool = False,
) -> tuple[Dataset, Dataset]:
    """Training and held-out examples of the same static shape.

    A configured teacher is asked for the anchors that the store lacks, once it is known that their
    prompts can be used: `check` gets the training data with empty anchors before that, to refuse
    them. A run that has `begun` had every anchor, and asks nobody. Raises `DataError`, and what
    reading prompts, checking and asking raise.
    """
    data = config.data
    check_anchors = None
    if data.gate.check is not None:  # what is wrong with it shows before a teacher is paid
        function = build(data.gate.check, "data.gate.check", config.trusted)
        check_anchors = anchor_check(function, seconds=data.gate.seconds)
    words = yake_words() if data.degrees else None
    given = [] if data.preferences is None else [make_preferences(data.preferences, chat, data)]
    if data.anchors is None:
        own, heldout = [], _once(make_preferences(data.heldout, chat, data), say)
    else:
        teacher = with_protocol(config.teacher, config.trusted)
        sources = [data.heldout] if data.prompts is None else [data.prompts, data.heldout]
        with waited("reading the prompts", say):
            fits = [_fit(load_prompts(source), chat, data) for source in sources]
        if data.prompts is not None:
            check_apart(fits[0][0], fits[1][0], data.prompts, data.heldout)
        prompts = [fitted.prompt for part, _ in fits for fitted in part]
        empty = {messages_key(prompt.messages): _EMPTY for prompt in prompts}
        *own, _ = (_with_anchors(part, dropped, empty, chat, data) for part, dropped in fits)
        check(_joined(own, given, data))
        if begun and teacher.asks:
            teacher = replace(teacher, protocol=_ask_nobody)

        def place(prompt: Prompt) -> str:
            held = any(prompt is each.prompt for each in fits[-1][0])
            return f" in {data.heldout if held else data.prompts}"

        with _waited_for_answers(teacher, say) as tick:
            anchors = anchors_for(
                prompts,
                teacher,
                Path(data.anchors),
                config.collect,
                say=say,
                tick=tick,
                remedy=to_collect(data, begun=begun),
                place=place,
            )
        *own, heldout = (_answered(part, dropped, anchors, chat, data) for part, dropped in fits)
        with waited("checking the teacher's answers", say):
            own = [_trusted(part, data.gate, check_anchors) for part in own]
        if words is not None:
            own = [_by_degree(part, data.degrees, chat, words) for part in own]
    given = [_trusted(part, data.gate, check_anchors) for part in given]
    for part in given:
        check_apart(part.examples, heldout.examples, data.preferences, data.heldout)
    train_data = _joined(own, given, data)
    for name, part in (
        *(("training", part) for part in train_data.parts.values()),
        ("held-out", heldout),
    ):
        cut = counted(part.anchors_cut, "anchor")
        notes = [
            *([f"{part.dropped} dropped as too long"] if part.dropped else []),
            *([f"{part.truncated} truncated"] if part.truncated else []),
            *([f"{cut} cut at {part.response_size} tokens"] if part.anchors_cut else []),
            *([f"{counted(part.bad_rows, 'row')} left out"] if part.bad_rows else []),
        ]
        kind = " with given candidates" if part.candidates else ""
        say(", ".join([counted(len(part.examples), f"{name} prompt") + kind, *notes]))
        if part.gate_note:
            say(part.gate_note)
    return train_data, heldout


@contextmanager
def _waited_for_answers(
    teacher: TeacherConfig, say: Callable[[str], None]
) -> Iterator[Callable[[Plan, Tally], None]]:
    """What a collection tells how far it is; said each minute."""
    far = ""

    def tick(plan: Plan, tally: Tally) -> None:
        nonlocal far
        failed = sum(tally.failed.values())
        far = f", {tally.answered} of {plan.to_ask} answered, {failed} failed"

    what = "asking the teacher" if teacher.asks else "reading the teacher's answers"
    with waited(what, lambda line: say(line + far)):
        yield tick


_EMPTY = Anchor("", "stop", "")
"""In the place of an answer that nobody has given yet."""


def _joined(own: Sequence[Dataset], given: Sequence[Dataset], config: DataConfig) -> Dataset:
    """Prompts with anchors of their own, preference data, or both, of which there is one each."""
    if not (own and given):
        return [*own, *given][0]
    # Batches of either have the same shape, but for the candidates.
    size = max(part.reference_size for part in (*own, *given))
    first, second = (replace(part, reference_size=size) for part in (*own, *given))
    return replace(first, other=second, share=config.preference_share)


def check_apart(
    train: Iterable[Example | _Fitted], held: Sequence[Example | _Fitted], source: Any, heldout: Any
) -> None:
    """Refuse prompts that are both trained on and held out."""
    shared = {each.prompt_ids for each in train} & {each.prompt_ids for each in held}
    if shared:
        texts = list(
            dict.fromkeys(e.prompt.messages[-1]["content"] for e in held if e.prompt_ids in shared)
        )
        some = ", ".join(f"“{printable(text, 60)}”" for text in texts[:3])
        some += ", ..." if len(texts) > 3 else ""
        raise DataError(
            f"{counted(len(shared), 'prompt is', 'prompts are')} in both {source} and {heldout} "
            f"({some}): "
            "take out of one what is in both, or the evaluation means nothing"
        )


def _trusted(data: Dataset, gate: GateConfig, check: AnchorCheck | None) -> Dataset:
    """The data without the anchors that `gate` distrusts, or with these weighed down."""
    checked = None if check is None else check(data.examples)
    kept, counts = gated(data.examples, gate, checked)
    return replace(data, examples=kept, gated=counts, weighed=bool(counts) and gate.weight > 0)


def _by_degree(data: Dataset, degrees: int, chat: Chat, words: KeyWords) -> Dataset:
    """The data with the anchors' degrees as candidates; without anchors that have no key words.

    Of degrees that are the same tokens where T cuts them the first alone stays.
    """
    kept, T = [], data.response_size
    for example in data.examples:
        ended = example.asked is not None and example.asked.finished
        given: dict[tuple[int, ...], Given] = {}
        for text, score in graded(example.anchor, degrees, words):
            whole = chat.encode_response(text, ended)
            ids = tuple(whole[:T])
            given.setdefault(ids, Given(ids, score, finished=ended and len(whole) <= T, text=text))
        kept += [replace(example, given=tuple(given.values()))] if len(given) > 1 else []
    if not kept:
        raise DataError(
            "data.degrees: no anchor has two words that say anything, in data.max_response_tokens="
            f"{T}: leave it out"
        )
    most = max(len(example.given) for example in kept)
    return replace(
        data, examples=tuple(kept), candidates=most, bad_rows=len(data.examples) - len(kept)
    )


def load_heldout(
    config: TrainConfig, chat: Chat, say: Callable[[str], None] = lambda line: None
) -> Dataset:
    """A run's held-out examples by the rules of `load_data`, for any model's `chat`.

    Nobody is asked; `say` is told how many prompts are left out. Raises `DataError` where the store
    lacks what the run had, and what reading prompts and anchors raises.
    """

    def left_out(count: int, why: str) -> None:
        if count:
            say(f"{counted(count, 'held-out prompt is', 'held-out prompts are')} left out: {why}")

    longer = f"longer than data.max_prompt_tokens={config.data.max_prompt_tokens}"
    if config.data.anchors is None:
        rated = make_preferences(config.data.heldout, chat, config.data)
        left_out(rated.bad_rows, "their rows can't be used, data.on_bad_row=drop")
        left_out(rated.dropped, longer)
        return _once(rated, say)
    fitted, dropped = _fit(load_prompts(config.data.heldout), chat, config.data)
    anchors = anchors_for(
        [each.prompt for each in fitted],
        replace(config.teacher, protocol=_ask_nobody),
        Path(config.data.anchors),
        config.collect,
        say=lambda line: None,
    )
    dataset = _answered(fitted, dropped, anchors, chat, config.data)
    left_out(len(fitted) - len(dataset.examples), "the teacher gave no usable answer")
    left_out(dropped, longer)
    return dataset


def _ask_nobody(*_: Any) -> AbstractAsyncContextManager[Any]:
    raise DataError(
        f"data.anchors lacks answers to data.heldout or data.prompts, and the run {HAD_ALL}"
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


def _fit(
    prompts: Iterable[Prompt], chat: Chat, config: DataConfig, *, place: str | None = None
) -> tuple[list[_Fitted], int]:
    """The prompts that `config.on_too_long` leaves, as tokens, and how many were dropped.

    An error names one by its `place`, or else by its id.
    """
    P, fitted, dropped = config.max_prompt_tokens, [], 0
    for prompt in prompts:
        name = f"prompt {prompt.id!r}" if place is None else f"{place}: the prompt"
        messages = with_system(prompt.messages, config.system)
        prompt_ids = chat.render(messages)
        truncated = len(prompt_ids) > P
        if truncated and config.on_too_long == "error":
            raise DataError(
                f"{name} has {len(prompt_ids)} tokens, data.max_prompt_tokens is "
                f"{P}: raise it, or set data.on_too_long=drop or truncate"
            )
        if truncated and config.on_too_long == "drop":
            dropped += 1
            continue
        if truncated:
            messages = _shortened(name, messages, chat, P)
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
                asked=anchor,
            )
        )
    if not examples:
        raise DataError(f"no prompts left to use ({dropped} dropped as too long)")
    truncated = sum(each.truncated for each in fitted)
    return Dataset(tuple(examples), P, P + extra, T, dropped, truncated, anchors_cut)


def make_preferences(source: Any, chat: Chat, config: DataConfig) -> Dataset:
    """Tokenise preference data: to each prompt its rated responses, the best one as its anchor.

    A prompt whose one response is flagged as bad has no anchor. Prompts that are too long are
    treated as in `make_dataset`; rows that can't be used, a response beyond T among them, raise
    `DataError` or `PromptError`, or are counted, as `config.on_bad_row` says.
    """
    examples, dropped, truncated, bad_rows, extra = [], 0, 0, 0, 0
    P, T = config.max_prompt_tokens, config.max_response_tokens
    dimensions = set[tuple[str, ...]]()

    def bad(error: PujaxError) -> None:
        nonlocal bad_rows
        if config.on_bad_row == "error":
            raise error
        bad_rows += 1

    rated = load_preferences(source, weights=config.dimensions or None, bad=bad)
    for row, mix in weighed(rated, config.weightings, config.system, bad):
        given = tuple(
            Given(tuple(chat.encode_response(r.text, True)), r.score, r.ratings, text=r.text)
            for r in row.responses
        )
        longest = max(len(response.ids) for response in given)
        if longest > T:
            bad(
                DataError(
                    f"{row.place}: a response has {longest} tokens, data.max_response_tokens is "
                    f"{T}: raise it, or set data.on_bad_row=drop"
                )
            )
            continue
        if len({response.ids for response in given}) < len(given):
            bad(
                DataError(
                    f"{row.place}: two of its responses are the same tokens, so neither is "
                    "preferred: take the row out, or set data.on_bad_row=drop"
                )
            )
            continue
        fitted, left_out = _fit([row.prompt], chat, config, place=row.place)
        dropped += left_out
        dimensions.add(row.dimensions)
        best = max(range(len(given)), key=lambda i: given[i].score)
        known = len(given) > 1 or given[best].score > 0
        for each in fitted:
            truncated += each.truncated
            extra = max(extra, len(each.reference_ids) - len(each.prompt_ids))
            examples.append(
                Example(
                    prompt=row.prompt,
                    prompt_ids=each.prompt_ids,
                    reference_ids=each.reference_ids,
                    anchor=row.responses[best].text if known else "",
                    anchor_ids=given[best].ids if known else (),
                    anchor_finished=known,
                    given=given,
                    mix=mix,
                )
            )
    if not examples:
        raise DataError(
            f"no prompts left to use ({dropped} dropped as too long, {bad_rows} rows left out)"
        )
    most = max(len(example.given) for example in examples)
    made = Dataset(tuple(examples), P, P + extra, T, dropped, truncated, 0)
    shared = dimensions.pop() if len(dimensions) == 1 else ()
    return replace(made, bad_rows=bad_rows, candidates=most, dimensions=shared)


def _once(data: Dataset, say: Callable[[str], None]) -> Dataset:
    """The prompts that have an anchor, each as it first came: what can be evaluated.

    Given responses stay where one is preferred to another. `say` is told how many rows that leaves
    out. Raises `DataError` where none has an anchor.
    """
    anchored = [
        e if len({given.score for given in e.given}) > 1 else replace(e, given=())
        for e in data.examples
        if e.anchor_ids
    ]
    first = {example.prompt_ids: example for example in reversed(anchored)}
    if not first:
        raise DataError("data.heldout: no prompt has a good response: there is nothing to evaluate")
    kept = tuple(example for example in anchored if first[example.prompt_ids] is example)
    for count, why in (
        (len(data.examples) - len(anchored), "no response of theirs is good"),
        (len(anchored) - len(kept), "their prompt stands in a row before, which is kept"),
    ):
        if count:
            say(f"{counted(count, 'held-out row is', 'held-out rows are')} left out: {why}")
    return replace(data, examples=kept, candidates=max(len(example.given) for example in kept))


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
            f"{name}: the template and what stands before its last message leave no room "
            f"in data.max_prompt_tokens={size}: raise it, or set data.on_too_long=drop"
        )
    return keeping(fits)


def with_system(messages: Sequence[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    """The messages, led by the system message `system` unless they have one or it is None."""
    if system is None or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": system}, *messages]
