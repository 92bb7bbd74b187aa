"""`pujax collect`: ask a teacher each prompt once and keep every answer.

Collects what `store` lacks of `data.prompts`; `collect.dry_run=true` tells what that would take,
`stats=true` describes the store. The exit status is 0 when nothing is left to ask or the budget is
reached, 1 after an error, when nothing that was asked got a usable answer or no prompt has one, and
128 + the signal's number after Ctrl-C, SIGTERM or a closed terminal.
"""

import heapq
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pujax.config.commands import command
from pujax.config.functions import with_protocol
from pujax.errors import ConfigError, StoreError, TeacherError
from pujax.records import Anchor, Prompt, messages_key
from pujax.teacher.anchors import anchors_for, collect
from pujax.teacher.asking import Tally
from pujax.teacher.plan import Plan, make_plan
from pujax.teacher.prompts import load_prompts, refuse_pipes, warn
from pujax.teacher.settings import CollectConfig, TeacherConfig
from pujax.teacher.store import (
    Contents,
    anchor_of,
    digest,
    failures_path,
    read_failures,
    read_records,
)
from pujax.teacher.writer import kept_beside
from pujax.text import counted, printable

REPORT_EVERY = 30.0  # seconds between progress lines where there is no terminal


@dataclass(frozen=True)
class PromptsConfig:
    """Where prompts are.

    Attributes:
        prompts: a file, a list of files, or a dataset as in {dataset: NAME, split: train,
            slice: "0:100", columns: {prompt: question}, template: "{question}"}.
    """

    prompts: Any = None


@dataclass(frozen=True)
class CollectRun:
    """Everything `python -m pujax.collect` is told.

    Attributes:
        store: the anchor store, a .jsonl file; it is made, or gets what it lacks.
        stats: describe the store, and its answers to `data.prompts` where that is set; ask nobody.
        trusted: packages beside pujax whose functions may be named: their code runs here.
        data: the prompts.
        teacher: whom to ask.
        collect: how to ask.
    """

    store: str = MISSING
    stats: bool = False
    trusted: list[str] = field(default_factory=list)
    data: PromptsConfig = field(default_factory=PromptsConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)


def run(settings: CollectRun) -> int:
    """The exit status of collecting, planning or describing, as the settings ask."""
    store = Path(settings.store)
    teacher = with_protocol(settings.teacher, settings.trusted)
    if settings.stats or settings.collect.dry_run:
        for kept in kept_beside(store):
            warn(f"{kept} has answers that a run could not store: the next collection puts them in")
    if settings.stats:
        print(describe(store))
        if settings.data.prompts is not None:
            for line in describe_answers(store, list(load_prompts(settings.data.prompts, warn))):
                print(line)
        return 0
    if settings.data.prompts is None:
        raise ConfigError("data.prompts is not set: name a file, a list of files or a dataset")
    told: set[str] = set()

    def say_once(text: str) -> None:
        if text not in told:
            told.add(text)
            warn(text)

    def prompts() -> Iterable[Prompt]:
        return load_prompts(settings.data.prompts, say_once)

    if not teacher.asks:
        no_teacher = "no teacher given to ask for them: add teacher=... and teacher.model=..."
        if not anchors_for(list(prompts()), teacher, store, settings.collect, remedy=no_teacher):
            raise TeacherError(_unanswered(store, None))
        return 0
    if settings.collect.dry_run:
        retry_failed = settings.collect.retry_failed
        plan = make_plan(prompts(), teacher, Contents(store), retry_failed=retry_failed)
        print(describe_plan(plan, teacher))
        return 0
    refuse_pipes(settings.data.prompts)  # they are read twice
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        show = _reporter(progress)
        contents = Contents(store)
        tally = collect(prompts, teacher, store, settings.collect, tick=show, contents=contents)
    if tally.stopped and tally.stopped in signal.Signals.__members__:
        return 128 + signal.Signals[tally.stopped]
    if tally.asked and not tally.answered and not tally.stopped:
        last = f" (the last: {tally.trouble})" if tally.trouble else ""
        raise TeacherError(f"nothing that was asked got a usable answer: {tally.failed}{last}")
    if not tally.answered and not any(
        digest(messages_key(prompt.messages, teacher.asked)) in contents.answered
        for prompt in prompts()
    ):
        raise TeacherError(_unanswered(store, tally.stopped))
    return 0


def _unanswered(store: Path, stopped: str | None) -> str:
    """That no prompt has an answer, why, and what to do."""
    why = f"{failures_path(store)} has what the teacher said: collect.retry_failed=true asks again"
    if stopped:
        why = f"{stopped}: raise collect.budget"
    return f"no prompt has a usable answer: {why}"


def _reporter(progress: Progress):
    """A function that shows a tally: as a bar on a terminal, as a line now and then elsewhere."""
    bar = progress.add_task("asking", total=None)
    last = time.monotonic()

    def show(plan: Plan, tally: Tally) -> None:
        nonlocal last
        failed = sum(tally.failed.values())
        done = tally.answered + failed
        note = "".join(
            f", {count} {name}"
            for name, count in (("failed", failed), ("retried", tally.retried))
            if count
        )
        if progress.console.is_terminal:
            progress.update(bar, total=plan.to_ask, completed=done, description=f"asking{note}")
        elif time.monotonic() - last > REPORT_EVERY:
            last = time.monotonic()
            print(f"asking: {done} of {plan.to_ask}{note}", file=sys.stderr, flush=True)

    return show


def describe_plan(plan: Plan, teacher: TeacherConfig) -> str:
    """What a collection would take, for `collect.dry_run`."""
    money = "unknown: set teacher.price.input and teacher.price.output, per million tokens"
    if plan.cost is not None:
        money = f"at most about {plan.cost:,.4f}"
    bound = "at most" if teacher.max_tokens else "a guess, as teacher.max_tokens is null,"
    return "\n".join(
        (
            f"prompts     {plan.prompts:>10,}",
            f"cached      {plan.cached:>10,}",
            f"failed      {plan.failed:>10,}   asked again with collect.retry_failed=true alone",
            f"duplicates  {plan.duplicates:>10,}",
            f"to ask      {plan.to_ask:>10,}",
            f"tokens in   {plan.prompt_tokens:>10,}   about, by a count of characters",
            f"tokens out  {plan.completion_tokens:>10,}   {bound} of all answers",
            f"cost        {money}",
        )
    )


def describe(store: Path) -> str:
    """Counts, lengths, finish reasons, cost and the extremes of a store, for `stats`."""
    if not store.is_file():
        raise StoreError(f"{store}: no such store, so nothing to describe: check `store`")
    lengths: list[int] = []
    unfinished = thoughts = 0
    counts: dict[str, Counter[str]] = {"model": Counter(), "finish_reason": Counter()}
    bill: Counter[str] = Counter()
    keys: set[str] = set()

    def answers() -> Iterable[tuple[int, str, str]]:
        nonlocal unfinished, thoughts
        for _, record in read_records(store):
            anchor = anchor_of(record)
            unfinished += anchor is not None and not anchor.finished
            thoughts += anchor is None or len(anchor.response) < len(record["response"])
            keys.add(record["key"])
            lengths.append(len(record["response"]))
            for name, counter in counts.items():
                counter[str(record[name])] += 1
            _charge(bill, record)
            yield lengths[-1], printable(record["id"], 80), record["response"]

    short: list[tuple[int, str, str]] = []
    long: list[tuple[int, str, str]] = []
    for answer in answers():
        short = heapq.nsmallest(10, [*short, answer])
        long = heapq.nlargest(10, [*long, answer])
    reasons: Counter[str] = Counter()
    for _, record in read_failures(store):
        reasons[record["reason"]] += 1
        _charge(bill, record)
    lines = [f"answers        {len(lengths):,}" + _twice(len(lengths) - len(keys))]
    lines += [f"{name:<14} {_table(counter)}" for name, counter in counts.items()]
    lines += [f"unfinished     {unfinished:,}", f"with thoughts  {thoughts:,}"]
    lines += [f"failures       {_table(reasons) if reasons else 0}"]
    lines += [
        f"tokens         {bill['prompt_tokens']:,} in, {bill['completion_tokens']:,} out",
        f"cost           {_money(bill['cost'] / 1e9, bill['unpriced'], bill['records'])}",
    ]
    if lengths:
        lines += [
            f"characters     shortest {min(lengths)}, median {statistics.median(lengths):g}, "
            f"mean {statistics.fmean(lengths):.1f}, longest {max(lengths)}"
        ]
    for title, extremes in (("shortest", short), ("longest", long)):
        lines += [f"{title}:"]
        lines += [f"  {size:>6}  {name}  {text!r:.80}" for size, name, text in extremes]
    return "\n".join(lines)


def describe_answers(store: Path, prompts: Sequence[Prompt]) -> Iterable[str]:
    """How good the answers are that a store has to these prompts, as far as that can be told."""
    from pujax.run.judged import judged, kept

    asked = {messages_key(prompt.messages): prompt for prompt in prompts}
    anchors: dict[str, Anchor] = {}
    for _, record in read_records(store):
        key, anchor = messages_key(record["messages"]), anchor_of(record)
        if key in asked and anchor is not None:
            anchors[key] = anchor
    told = {"answered": f"{len(anchors):,} of {counted(len(asked), 'prompt')}"}
    told |= kept(store, prompts, TeacherConfig())
    told |= judged([(asked[key], anchor.response) for key, anchor in anchors.items()])
    yield "of data.prompts:"
    yield from (f"  {name:<14} {words}" for name, words in told.items())


def _charge(bill: Counter[str], record: dict[str, Any]) -> None:
    for name in ("prompt_tokens", "completion_tokens"):
        bill[name] += (record["usage"] or {}).get(name, 0)
    bill["cost"] += round((record["cost"] or 0.0) * 1e9)
    bill["unpriced"] += record["cost"] is None
    bill["records"] += 1


def _table(counter: Counter[str]) -> str:
    return ", ".join(f"{printable(name, 80)} {count:,}" for name, count in counter.most_common())


def _twice(count: int) -> str:
    return f" ({count:,} of them asked twice)" if count else ""


def _money(known: float, unpriced: int, records: int) -> str:
    """A sum of money; what had no price is not taken for nothing."""
    if records and unpriced == records:
        return "unknown"
    return f"{known:,.4f}" + (f" (the price of {unpriced:,} was unknown)" if unpriced else "")


main = command("collect", CollectRun, run)

if __name__ == "__main__":
    main()
