"""`pujax evaluate`: a run's held-out table again, other models beside it, or several runs."""

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from pujax.config.commands import command, in_new_words
from pujax.config.functions import foresee, foresee_metrics
from pujax.config.settings import EvalConfig
from pujax.config.tool_settings import EvaluateConfig, HeldoutConfig
from pujax.errors import EvaluationError, PromptError
from pujax.files.durable import refuse_unwritable
from pujax.files.locate import at_home
from pujax.files.settings import SETTINGS, flat, kept_settings
from pujax.inference.finished import model_path, newest_runs, refuse_name, require_model
from pujax.run.compilation import compile_once
from pujax.run.unanswered import answered_in
from pujax.teacher.preferences import refuse_bad_rows
from pujax.teacher.prompts import refuse_bad_prompts, refuse_missing
from pujax.teacher.settings import TeacherConfig
from pujax.teacher.store import COLLECT, require_store


def run(settings: EvaluateConfig) -> None:
    """Evaluate the models that are named, then print the table and what to know of it."""
    directories = newest_runs(settings.runs)
    _require_sources(settings, directories)
    if settings.models or settings.splits:
        compile_once()
    from rich.console import Console

    from pujax.evaluation.findings import remarks
    from pujax.evaluation.results import save
    from pujax.evaluation.tables import named, table
    from pujax.inference.evaluated import arms, evaluations_of
    from pujax.inference.evaluating import asked, on_split

    console = Console()
    if settings.suite is not None:
        answer, kept = asked(settings, directories)
        console.print(named(answer.header, answer.rows, answer.note))
        print(kept)
        return
    folders = directories
    if settings.splits:
        folders = [on_split(settings, directory) for directory in directories or [None]]
    elif settings.models:
        from pujax.inference.heldout import evaluate_other  # jax with it

        (directory,) = directories
        for path, name in zip(settings.models, settings.names, strict=True):
            save(evaluate_other(directory, path, name, trusted=settings.trusted), directory)
    if len(folders) == 1:
        columns = evaluations_of(folders[0], last=settings.names if settings.models else ())
        console.print(table(columns))
        own = kept_settings(folders[0]) if (folders[0] / SETTINGS).is_file() else {}
        for line in remarks(columns, chosen_by=flat(own).get("checkpoint.best")):
            console.print(line, markup=False, highlight=False)
        return
    compared, between = arms(directories, settings.names, folders)
    console.print(table(compared, against_first=between))


def _require_sources(settings: EvaluateConfig, directories: Sequence[Path]) -> None:
    """Refuse runs, models, prompts and a store that are not there, before jax is imported."""
    measured = settings.eval
    if measured.metrics:
        drawn = EvalConfig(metrics=measured.metrics, samples=measured.samples or 0)
        foresee_metrics(drawn, settings.trusted)
    asks = settings.suite is None  # whether a model is asked, and not what was answered before
    if settings.suite is not None:
        suite = foresee(settings.suite, "suite", settings.trusted)
        asks = not {"subject", "reference"}.isdisjoint(signature(suite).parameters)
    if settings.teacher.protocol is not None:
        foresee(settings.teacher.protocol, "teacher.protocol", settings.trusted)
    anew = settings.splits or settings.suite is not None
    if settings.models and not anew:
        (directory,) = directories
        for path, name in zip(settings.models, settings.names, strict=True):
            refuse_name(directory, path, name)
    for directory in directories:
        if settings.models or anew:
            stored = flat(kept_settings(directory))
            if asks:
                _require_inputs(directory, stored, settings.data)
        elif not any(directory.glob("eval-*.jsonl")):
            raise EvaluationError(f"{directory} has no eval-*.jsonl: is it a run's directory?")
    for path in settings.models if settings.suite is None else ():  # a suite may take none
        require_model(model_path(path))
    if settings.data.heldout is not None:
        refuse_missing(settings.data.heldout, "data.heldout")
        if settings.data.anchors is not None:
            refuse_bad_prompts(settings.data.heldout)
        elif not directories and settings.data.on_bad_row != "drop":
            _refuse_bad_preferences(settings.data)
    if settings.data.anchors is not None:
        require_store(Path(settings.data.anchors))
        of_runs = [flat(kept_settings(each)).get("data.on_too_long") for each in directories]
        none_left_out = {settings.data.on_too_long, *of_runs} <= {None, "error"}
        if settings.data.heldout is not None and none_left_out:
            asked = [settings.data.heldout]
            answered_in(asked, settings.data.anchors, TeacherConfig(), COLLECT)  # of any teacher
    if settings.out is not None:
        refuse_unwritable(at_home(settings.out))


def _refuse_bad_preferences(data: HeldoutConfig) -> None:
    """Raise `PromptError` for held-out rows without rated responses, which no store answers."""
    try:
        refuse_bad_rows(data.heldout, weights=data.dimensions or None)
    except PromptError as error:
        raise PromptError(
            f"{error} (without data.anchors, where answers to prompts are, data.heldout is read as "
            "preferences)"
        ) from error


def _require_inputs(directory: Path, stored: Mapping[str, Any], given: HeldoutConfig) -> None:
    """Raise `EvaluationError` where files that a run read are not where its settings say.

    Those that are `given` anew are not looked for.
    """
    for key in ("heldout", "anchors"):
        source = stored.get(f"data.{key}") if getattr(given, key) is None else None
        for path in source if isinstance(source, list) else [source]:
            if isinstance(path, str) and not at_home(path).exists():
                raise EvaluationError(
                    f"{path}: no such file in {Path.cwd()}, and {directory}/{SETTINGS} has "
                    f"data.{key}={source}: start this where the run was started, or set data.{key}"
                )


GROUPS = ("eval", "teacher", "scorer")

_main = command("evaluate", EvaluateConfig, run, folder="tools", shared=GROUPS)


def main() -> None:
    """The command; what was typed in its former words is answered with the new ones."""
    in_new_words("evaluate")
    _main()


if __name__ == "__main__":
    main()
