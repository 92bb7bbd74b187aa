"""`pujax collect`: ask a teacher each prompt once and keep every answer.

Collects what `store` lacks of `data.prompts`; `collect.dry_run=true` tells what that would take,
`stats=true` describes the store, and `merge=[A,B]` puts into it what it lacks of other stores. The
exit status is 0 when nothing is left to ask, 1 after an error, when a budget was reached before
that, when nothing that was asked got a usable answer or no prompt has one, and 128 + the signal's
number after Ctrl-C, SIGTERM or a closed terminal.
"""

import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from pujax.config.commands import command, listed
from pujax.config.functions import with_protocol
from pujax.errors import ConfigError, TeacherError, require
from pujax.records import Prompt, messages_key
from pujax.teacher.anchors import anchors_for, collect
from pujax.teacher.describing import describe, describe_plan
from pujax.teacher.merging import merge
from pujax.teacher.plan import make_plan
from pujax.teacher.progress import progress
from pujax.teacher.prompts import load_prompts, refuse_pipes, warn
from pujax.teacher.settings import CollectConfig, TeacherConfig, check_source
from pujax.teacher.store import Contents, digest, failures_path
from pujax.teacher.writer import kept_beside


@dataclass(frozen=True)
class PromptsConfig:
    """Where prompts are.

    Attributes:
        prompts: a file, a list of files, or a dataset as in {dataset: NAME, split: train,
            slice: "0:100", columns: {prompt: question}, template: "{question}"}.
    """

    prompts: Any = None

    def __post_init__(self) -> None:
        check_source("data.prompts", self.prompts)


@dataclass(frozen=True)
class CollectRun:
    """Everything `python -m pujax.collect` is told.

    Attributes:
        store: the anchor store, a .jsonl file; it is made, or gets what it lacks.
        merge: stores to put into this one, and ask nobody: shards of it that other machines filled.
        stats: describe the store, and its answers to `data.prompts` where that is set; ask nobody.
        trusted: packages beside pujax whose functions may be named: their code runs here.
        data: the prompts.
        teacher: whom to ask.
        collect: how to ask.
    """

    store: str = MISSING
    merge: Any = None
    stats: bool = False
    trusted: list[str] = field(default_factory=list)
    data: PromptsConfig = field(default_factory=PromptsConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)

    def __post_init__(self) -> None:
        require(self.store != "", "store", "", "name a .jsonl file, which may be a new one")


def run(settings: CollectRun) -> int:
    """The exit status of collecting, planning or describing, as the settings ask."""
    store = Path(settings.store)
    if settings.merge is not None:
        require(
            settings.data.prompts is None and not settings.stats,
            "merge",
            settings.merge,
            "it asks and describes nothing: leave data.prompts and stats to the next command",
        )
        shards = [Path(each) for each in listed("merge", settings.merge)]
        require(bool(shards), "merge", settings.merge, "name the stores to put in: merge=[A,B]")
        dry = "merge has no dry run: leave one of the two out; stats=true describes a store"
        require(not settings.collect.dry_run, "collect.dry_run", True, dry)
        merge(shards, store)
        return 0
    teacher = with_protocol(settings.teacher, settings.trusted)
    if settings.stats or settings.collect.dry_run:
        for kept in kept_beside(store):
            warn(f"{kept} has answers that a run could not store: the next collection puts them in")
    if settings.stats:
        print(describe(store))
        if settings.data.prompts is not None:
            from pujax.run.judged import describe_answers

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
        no_teacher = "teacher=replay asks nobody: choose another teacher=... and teacher.model=..."
        if not anchors_for(list(prompts()), teacher, store, settings.collect, remedy=no_teacher):
            raise TeacherError(_unanswered(store, None))
        return 0
    if settings.collect.dry_run:
        retry_failed = settings.collect.retry_failed
        contents = Contents(store, asked=teacher.asked)
        plan = make_plan(prompts(), teacher, contents, retry_failed=retry_failed)
        print(describe_plan(plan, teacher))
        return 0
    refuse_pipes(settings.data.prompts)  # they are read twice
    contents = Contents(store, asked=teacher.asked)
    with progress() as show:
        tally = collect(prompts, teacher, store, settings.collect, tick=show, contents=contents)
    if tally.stopped and tally.stopped in signal.Signals.__members__:
        return 128 + signal.Signals[tally.stopped]
    if tally.asked and not tally.answered and not tally.stopped:
        last = f" (the last: {tally.trouble})" if tally.trouble else ""
        raise TeacherError(f"nothing that was asked got a usable answer: {tally.failures}{last}")
    if not tally.answered and not any(
        digest(messages_key(prompt.messages, teacher.asked)) in contents.answered
        for prompt in prompts()
    ):
        raise TeacherError(_unanswered(store, tally.stopped))
    return int(tally.left > 0)  # to a budget: said already


def _unanswered(store: Path, stopped: str | None) -> str:
    """That no prompt has an answer, why, and what to do."""
    why = f"{failures_path(store)} has what the teacher said: collect.retry_failed=true asks again"
    if stopped:
        why = f"{stopped}: raise collect.budget"
    return f"no prompt has a usable answer: {why}"


main = command("collect", CollectRun, run)

if __name__ == "__main__":
    main()
