"""`pujax evaluate`: a run's held-out table again, other models beside it, or several runs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pujax.config.commands import command, in_new_words, listed
from pujax.config.tool_settings import HeldoutConfig, MeasureConfig
from pujax.errors import ConfigError, EvaluationError, require
from pujax.files.durable import refuse_unwritable
from pujax.files.locate import here
from pujax.files.settings import kept_settings
from pujax.inference.finished import model_path, newest_runs, refuse_name
from pujax.run.compilation import compile_once
from pujax.teacher.prompts import refuse_missing
from pujax.teacher.settings import CollectConfig, TeacherConfig
from pujax.teacher.store import require_store

if TYPE_CHECKING:
    from pujax.evaluation.results import Evaluation
    from pujax.evaluation.subjects import Answer, Judge, Subject
    from pujax.inference.splits import Split


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything `python -m pujax.evaluate` is told: a run or several, and models to put beside.

    `model` names what is evaluated on the run's held-out prompts, `name` what each is called.
    Without a model, `name` says what each of several runs is called; those of one name are an arm.
    With anything of `data`, `eval` or `out`, or without a run, the prompts are a split of their
    own, asked of the `model`s or else of what each run ended with. A suite asks more: of the model,
    or what the run ended with, or of what has been evaluated; its judge is a teacher.

    Attributes:
        run: a run's directory, a folder of runs (its newest finished one), or a list: [A,B].
        model: evaluate this too, or a list: a run, a Hugging Face directory, a GGUF file, a hub id.
        name: what to call it, one a model; without a model one a run, runs of a name are an arm.
        suite: larger questions, by name, such as signal, ranking or winrate.
        out: the folder for what isn't a run's own table: RUN/heldout-FILE, evaluations/FILE.
        store: the judge's verdicts: verdicts.jsonl in the run's directory or in `out`.
        trusted: packages beside pujax whose functions may be named, by the run's own settings too:
            their code runs here.
        data: other held-out prompts, or the run's own laid out otherwise.
        eval: how they are measured.
        teacher: a suite's judge; of replay, `model` is whose anchors, where several are stored.
        collect: how the judge is asked.
    """

    run: Any = None
    model: Any = None
    name: Any = None
    suite: Any = None
    out: str | None = None
    store: str | None = None
    trusted: list[str] = field(default_factory=list)
    data: HeldoutConfig = field(default_factory=HeldoutConfig)
    eval: MeasureConfig = field(default_factory=MeasureConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)

    def __post_init__(self) -> None:
        if not self.runs:
            given = self.models and self.data.heldout is not None and self.data.anchors is not None
            if not given:
                raise ConfigError(
                    "missing value for run: set run=DIRECTORY, or all of model=, data.heldout= and "
                    "data.anchors="
                )
        if self.suite is not None and not self.names:
            return  # what it asks for says what it needs
        wanted = len(self.models) or (len(self.names) and len(self.runs))
        what = "model" if self.models else "run"
        remedy = f"give one a {what}, {wanted} in all"
        if self.models and not self.names:
            remedy = f"give each model a name: name={'NAME' if wanted == 1 else '[A,B]'}"
        require(len(self.names) == wanted, "name", self.name, remedy)
        distinct = not self.models or len(set(self.names)) == wanted
        require(distinct, "name", self.names, "give each model one of its own: name=[A,B]")
        one = not self.models or len(self.runs) < 2
        require(one, "run", self.run, "give one run whose held-out prompts the models answer")
        several = len(self.runs) > 1 and self.out is not None
        require(not several, "out", self.out, "one folder for several runs: take it out")

    @property
    def runs(self) -> list[str]:
        """The runs' directories."""
        return listed("run", self.run)

    @property
    def models(self) -> list[str]:
        """The models' paths."""
        return listed("model", self.model)

    @property
    def names(self) -> list[str]:
        """The names, one a model or a run; of models on a split their files' names will do."""
        names = listed("name", self.name)
        if names or not self.models or not self.splits:
            return names
        return [re.sub(r"[^\w.-]+", "-", Path(model.rstrip("/")).stem) for model in self.models]

    @property
    def splits(self) -> bool:
        """Whether other prompts are meant than a run's own, or the same asked otherwise."""
        changed = (self.data, self.eval, self.out) != (HeldoutConfig(), MeasureConfig(), None)
        return changed or not self.runs


def run(settings: EvaluateConfig) -> None:
    """Evaluate the models that are named, then print the table and what to know of it."""
    directories = newest_runs(settings.runs)
    _require_sources(settings, directories)
    if settings.models or settings.splits or settings.suite is not None:
        compile_once()
    from rich.console import Console

    from pujax.evaluation.findings import told
    from pujax.evaluation.results import save
    from pujax.evaluation.tables import named, table
    from pujax.inference.heldout import arms, evaluate_other, evaluations_of

    console = Console()
    if settings.suite is not None:
        answer, kept = _asked(settings, directories)
        console.print(named(answer.header, answer.rows, answer.note))
        print(kept)
        return
    folders = directories
    if settings.splits:
        folders = [_on_split(settings, directory) for directory in directories or [None]]
    elif settings.models:
        (directory,) = directories
        for path, name in zip(settings.models, settings.names, strict=True):
            save(evaluate_other(directory, path, name, trusted=settings.trusted), directory)
    if len(folders) == 1:
        columns = evaluations_of(folders[0])
        console.print(table(columns))
        for line in told(columns):
            console.print(line, markup=False, highlight=False)
        return
    compared, between = arms(directories, settings.names, folders)
    console.print(table(compared, against_first=between))


def _require_sources(settings: EvaluateConfig, directories: Sequence[Path]) -> None:
    """Refuse runs, models, prompts and a store that are not there, before jax is imported."""
    anew = settings.splits or settings.suite is not None
    if settings.models and not anew:
        (directory,) = directories
        for path, name in zip(settings.models, settings.names, strict=True):
            refuse_name(directory, path, name)
    for directory in directories:
        if settings.models or anew:
            kept_settings(directory)
        elif not any(directory.glob("eval-*.jsonl")):
            raise EvaluationError(f"{directory} has no eval-*.jsonl: is it a run's directory?")
    for path in settings.models:
        here(model_path(path))
    if settings.data.heldout is not None:
        refuse_missing(settings.data.heldout)
    if settings.data.anchors is not None:
        require_store(Path(settings.data.anchors))


def _split(settings: EvaluateConfig, directory: Path | None) -> "Split":
    from pujax.inference.splits import split_of

    return split_of(
        directory,
        settings.data,
        settings.eval,
        teacher=None if settings.teacher.asks else settings.teacher.model,
        out=settings.out,
        trusted=settings.trusted,
    )


def _on_split(settings: EvaluateConfig, directory: Path | None) -> Path:
    """The folder with the models' evaluations on a split, made now where they weren't there."""
    from pujax.inference.splits import FINAL, evaluated

    split = _split(settings, directory)
    models = list(zip(settings.models, settings.names, strict=True)) if settings.models else []
    for path, name in models or [(str(directory), FINAL)]:
        evaluated(split, path, name)
    return split.folder


def _asked(settings: EvaluateConfig, directories: Sequence[Path]) -> "tuple[Answer, Path]":
    """What the suite finds, and the file that its records are in."""
    from pujax.config.functions import with_protocol
    from pujax.inference import suites
    from pujax.inference.heldout import evaluations_of, final, run_config, titles

    directory = directories[0] if len(directories) == 1 else None
    if settings.splits:
        split = _split(settings, directories[-1] if directories else None)
        folder, config = split.folder, split.config
    else:
        folder, config = directories[-1], run_config(directories[-1])
    store = folder / "verdicts.jsonl" if settings.store is None else Path(settings.store)
    if settings.teacher.asks and not settings.collect.dry_run:
        refuse_unwritable(store.parent)

    def subject() -> "tuple[Subject, Any]":
        paths = settings.models or list(map(str, directories))
        require(len(paths) == 1, "model", paths, "this suite asks one model: name one")
        return suites.offered_subject(config, paths[0])

    def answers() -> "tuple[Sequence[Evaluation], Any]":
        if settings.splits:
            folders = [_on_split(settings, each) for each in directories or [None]]
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

    def judge() -> "tuple[Judge, Any]":
        teacher = with_protocol(settings.teacher, settings.trusted)
        return suites.offered_judge(teacher, settings.collect, store)

    offers = {
        "subject": subject,
        "reference": lambda: suites.offered_reference(directory, config),
        "answers": answers,
        "judge": judge,
    }
    return suites.answered(settings.suite, folder, offers, trusted=settings.trusted)


GROUPS = ("eval", "teacher", "scorer")

_main = command("evaluate", EvaluateConfig, run, folder="tools", shared=GROUPS)


def main() -> None:
    """The command; what was typed in its former words is answered with the new ones."""
    in_new_words("evaluate")
    _main()


if __name__ == "__main__":
    main()
