"""What `pujax evaluate` asks of models and runs: a split's table, or a suite's answer."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pujax.config.functions import with_protocol
from pujax.config.tool_settings import EvaluateConfig
from pujax.errors import require
from pujax.evaluation.results import Evaluation
from pujax.evaluation.subjects import Judge, Subject, SuiteAnswer
from pujax.files.durable import refuse_unwritable
from pujax.inference import suites
from pujax.inference.evaluated import evaluations_of, final, run_config, titles

if TYPE_CHECKING:
    from pujax.inference.splits import Split


def _split(settings: EvaluateConfig, directory: Path | None) -> "Split":
    from pujax.inference.splits import split_of  # jax with it, as below

    return split_of(
        directory,
        settings.data,
        settings.eval,
        teacher=None if settings.teacher.asks else settings.teacher.model,
        out=settings.out,
        trusted=settings.trusted,
    )


def on_split(settings: EvaluateConfig, directory: Path | None) -> Path:
    """The folder with the models' evaluations on a split, made now where they weren't there."""
    from pujax.inference.splits import FINAL, evaluated

    split = _split(settings, directory)
    models = list(zip(settings.models, settings.names, strict=True)) if settings.models else []
    told = set[str]()

    def say(line: str) -> None:
        if line not in told:  # of prompts that several models share
            print(line)
        told.add(line)

    for path, name in models or [(str(directory), FINAL)]:
        evaluated(split, path, name, say=say)
    return split.folder


def asked(settings: EvaluateConfig, directories: Sequence[Path]) -> tuple[SuiteAnswer, Path]:
    """What the suite finds, and the file that its records are in."""
    directory = directories[0] if len(directories) == 1 else None
    if settings.splits:
        split = _split(settings, directories[-1] if directories else None)
        folder, config = split.folder, split.config
    else:
        folder, config = directories[-1], run_config(directories[-1])
    store = folder / "verdicts.jsonl" if settings.store is None else Path(settings.store)
    if settings.teacher.asks and not settings.collect.dry_run:
        refuse_unwritable(store.parent)

    @cache  # it may be the reference too
    def subject() -> tuple[Subject, Any]:
        paths = settings.models or list(map(str, directories))
        require(len(paths) == 1, "model", paths, "this suite asks one model: name one")
        return suites.offered_subject(config, paths[0])

    def answers() -> tuple[Sequence[Evaluation], Any]:
        if settings.splits:
            folders = [on_split(settings, each) for each in directories or [None]]
        else:
            remedy = "this suite compares what has been evaluated: do that first, without a suite"
            require(not settings.models, "model", settings.model, remedy)
            folders = list(directories)
        if len(folders) == 1:
            return suites.offered_answers(evaluations_of(folders[0]))
        names = settings.names or titles(directories)
        return suites.offered_answers(
            [replace(final(each), model=name) for each, name in zip(folders, names, strict=True)]
        )

    def judge() -> tuple[Judge, Any]:
        teacher = with_protocol(settings.teacher, settings.trusted)
        return suites.offered_judge(teacher, settings.collect, store)

    def reference() -> tuple[Subject, Any]:
        if not directories:  # what the model would learn from, before it has learnt
            return subject()
        return suites.offered_reference(directory, config)

    offers = {
        "subject": subject,
        "reference": reference,
        "answers": answers,
        "judge": judge,
    }
    known = None if directory is None else config.data.reference_cache
    return suites.answered(
        settings.suite,
        folder,
        offers,
        shared=None if known is None else Path(known),
        trusted=settings.trusted,
    )
