"""Suites with what they ask for: a model, a reference, evaluations, a judge, their records."""

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pujax import __version__
from pujax.config.functions import build
from pujax.config.settings import TrainConfig
from pujax.errors import ConfigError, DiskError, EvaluationError, RecordError
from pujax.evaluation.results import Evaluation
from pujax.evaluation.subjects import (
    Judge,
    Records,
    SharedRecords,
    Subject,
    SuiteAnswer,
    keep_answer,
    refuse_other_answer,
)
from pujax.evaluation.waiting import waited
from pujax.files.durable import on_disk, refuse_unwritable
from pujax.inference.finished import model_path
from pujax.inference.local_teacher import LocalTeacher, weighed
from pujax.records import Prompt, canonical, messages_key
from pujax.run.compilation import compile_once
from pujax.teacher.anchors import collect
from pujax.teacher.plan import make_plan
from pujax.teacher.settings import CollectConfig, TeacherConfig
from pujax.teacher.store import Anchors, Contents

Offer = Callable[[], tuple[Any, Any]]
"""What a suite may ask for, made when one does, and what tells it apart, as JSON."""


RECORDS = ("records", "drawn")
"""The parameters of a suite in which it keeps what it has."""


def answered(
    node: Any,
    folder: Path,
    offers: Mapping[str, Offer],
    *,
    shared: Path | None = None,
    trusted: Sequence[str] = (),
) -> tuple[SuiteAnswer, Path]:
    """What the suite that `node` names finds, and the file in `folder` that its records are in.

    The file is named for all that was asked, so that no other question's is written over; the same
    question goes on where it was left. What the subject does not decide is kept in `shared`, where
    that can be written, for other subjects. The table is kept beside the file, and a run's report,
    which shows it, is written anew. Raises `ConfigError` for a suite that can't be built, and what
    making its parameters and writing a report raise.
    """
    suite = build(node, "suite", trusted)
    function = getattr(suite, "func", suite)
    wanted = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    unknown = [name for name in wanted if name not in (*RECORDS, *offers)]
    if unknown:
        raise ConfigError(
            f"suite: {function.__name__} asks for {unknown[0]!r}: there are "
            f"{', '.join((*offers, *RECORDS[:-1]))} and {RECORDS[-1]}"
        )
    refuse_unwritable(folder)
    refuse_other_answer(function.__name__, folder)
    made = {name: offers[name]() for name in wanted if name not in RECORDS}
    asked = {name: identity for name, (_, identity) in made.items()}
    asked |= {"suite": dict(node), "pujax": __version__}
    kept = folder / f"suite-{function.__name__}-{_digest(asked)[:8]}.jsonl"
    with on_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    given = {name: value for name, (value, _) in made.items()}
    records = given["records"] = Records(kept, asked)
    if "drawn" in wanted:
        given["drawn"] = _drawn(function.__name__, asked, shared)
    say = None if sys.stdout.isatty() else partial(print, file=sys.stderr, flush=True)
    with waited(function.__name__, say):
        answer = suite(**{name: given[name] for name in wanted})
    records.write(answer.records)
    keep_answer(answer, function.__name__, folder)
    if (folder / "metrics.jsonl").is_file():
        from pujax.evaluation import page  # matplotlib with it

        page.write(folder)
    return answer, kept


def _drawn(name: str, asked: Mapping[str, Any], shared: Path | None) -> SharedRecords:
    """What was kept of the same question to other models; in memory alone without a folder."""
    if shared is None:
        return SharedRecords()
    whose = {key: v for key, v in asked.get("subject", {}).items() if key != "model"}
    asked = {**asked, "subject": whose}
    try:
        refuse_unwritable(shared)
        with on_disk(shared):
            shared.mkdir(parents=True, exist_ok=True)
    except DiskError:  # one that is another's, say: it is made again then
        return SharedRecords()
    path = shared / f"{name}-{_digest(asked)[:32]}.jsonl"
    for _ in range(2):
        try:
            return SharedRecords(Records(path, asked))
        except (EvaluationError, RecordError, OSError):  # made again, as its other log-probs are
            with suppress(OSError):
                path.unlink()
    return SharedRecords()  # something is in its place that stays there


def _digest(asked: Any) -> str:
    return hashlib.sha256(canonical(asked)).hexdigest()


def offered_subject(config: TrainConfig, path: str) -> tuple[Subject, Any]:
    """The model at `path`, or of a finished run's directory, with the prompts of `config`."""
    # jax with them, which a suite that only compares answers does not need.
    compile_once()
    from pujax.files.chat import Chat
    from pujax.inference.heldout import subject_for
    from pujax.inference.splits import asked_of, model_digest
    from pujax.run.data import load_heldout

    path = model_path(path)
    chat = Chat.load(path)
    dataset = load_heldout(config, chat)
    subject = subject_for(config, path, chat, dataset)
    return subject, asked_of(config, subject.examples) | {"model": model_digest(path)}


def offered_reference(directory: Path | None, config: TrainConfig) -> tuple[Subject, Any]:
    """What the alignment of the run in `directory` started from, with the prompts of `config`."""
    if directory is None:
        raise ConfigError("run: this suite asks for the reference of one run: set run=DIRECTORY")
    compile_once()
    from pujax.inference.heldout import reference_for
    from pujax.run.checkpoint import checksums

    subject = reference_for(directory, config)
    read = [[example.prompt_ids for example in subject.examples], repr(subject.model.config)]
    return subject, {**checksums(subject.params), "read": _digest(read)}


def offered_answers(evaluations: Sequence[Evaluation]) -> tuple[Sequence[Evaluation], Any]:
    """The evaluations there are."""
    rows = [
        [e.model, [[r.id, r.prompt, r.anchor, r.response] for r in e.rows]] for e in evaluations
    ]
    return evaluations, _digest(rows)


def offered_judge(
    teacher: TeacherConfig,
    collecting: CollectConfig,
    store: Path,
    *,
    say: Callable[[str], None] = print,
) -> tuple[Judge, Any]:
    """A teacher that is asked each question once; a model on this disk weighs the two letters.

    Its verdicts are kept in `store`. It raises what `collect` raises, and `EvaluationError` while
    verdicts are missing; a plan alone (`collect.dry_run`) is said, and ends the process.
    """
    protocol = teacher.protocol
    if getattr(protocol, "func", protocol) is LocalTeacher:
        teacher = replace(teacher, protocol=partial(LocalTeacher, answers=weighed))

    def judge(questions: Sequence[Prompt]) -> dict[str, str]:
        anchors = Anchors(store, teacher, questions)
        contents = Contents(store, anchors.take)
        if collecting.dry_run:
            again = collecting.retry_failed
            plan = make_plan(questions, teacher, contents, retry_failed=again)
            money = "unknown" if plan.cost is None else f"at most about {plan.cost:,.4f}"
            say(
                f"{plan.prompts} verdicts: has {plan.cached}, would ask {plan.to_ask}; about "
                f"{plan.prompt_tokens:,} + at most {plan.completion_tokens:,} tokens; cost {money}"
            )
            sys.exit(0)
        if teacher.asks:
            collect(lambda: questions, teacher, store, collecting, say=say, contents=contents)
        keys = {question.id: messages_key(question.messages) for question in questions}
        missing = [k for k in keys.values() if k not in anchors.found and k not in anchors.failed]
        if missing and not teacher.asks:
            raise EvaluationError(
                f"{store}: lacks {len(missing)} of {len(keys)} verdicts: name a judge to ask, "
                "teacher=... and teacher.model=..."
            )
        if missing:
            raise EvaluationError(
                f"{store}: {len(missing)} of {len(keys)} verdicts are still to be asked: start the "
                "same command again, or raise collect.budget"
            )
        return {
            name: anchors.found[key].response for name, key in keys.items() if key in anchors.found
        }

    return judge, teacher.asked
