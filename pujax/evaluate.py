"""`pujax evaluate`: a run's held-out table again, other models beside it, or several runs."""

from pujax.config.commands import command, in_new_words
from pujax.config.tool_settings import EvaluateConfig
from pujax.files.locate import at_home
from pujax.run.compilation import compile_once


def run(settings: EvaluateConfig) -> None:
    """Evaluate the models that are named, then print the table and what to know of it."""
    if settings.models or settings.splits or settings.suite is not None:
        compile_once()
    from rich.console import Console

    from pujax.evaluation.findings import remarks
    from pujax.evaluation.results import save
    from pujax.evaluation.tables import named, table
    from pujax.inference.evaluating import asked, on_split
    from pujax.inference.finished import newest_run
    from pujax.inference.heldout import arms, evaluate_other, evaluations_of

    console = Console()
    directories = [newest_run(at_home(run)) for run in settings.runs]
    if settings.suite is not None:
        answer, kept = asked(settings, directories)
        console.print(named(answer.header, answer.rows, answer.note))
        print(kept)
        return
    folders = directories
    if settings.splits:
        folders = [on_split(settings, directory) for directory in directories or [None]]
    elif settings.models:
        (directory,) = directories
        for path, name in zip(settings.models, settings.names, strict=True):
            save(evaluate_other(directory, path, name, trusted=settings.trusted), directory)
    if len(folders) == 1:
        columns = evaluations_of(folders[0])
        console.print(table(columns))
        for line in remarks(columns):
            console.print(line, markup=False, highlight=False)
        return
    compared, between = arms(directories, settings.names, folders)
    console.print(table(compared, against_first=between))


GROUPS = ("eval", "teacher", "scorer")

_main = command("evaluate", EvaluateConfig, run, folder="tools", shared=GROUPS)


def main() -> None:
    """The command; what was typed in its former words is answered with the new ones."""
    in_new_words("evaluate")
    _main()


if __name__ == "__main__":
    main()
