"""`pujax report`: the page of a run, of several side by side, or of a sweep, of files alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pujax.config.commands import command, in_new_words, listed
from pujax.errors import EvaluationError, require
from pujax.files.locate import at_home
from pujax.files.settings import SETTINGS
from pujax.inference.finished import newest_runs


@dataclass(frozen=True)
class ReportConfig:
    """Everything `python -m pujax.report` is told.

    Attributes:
        run: a run's directory, or a folder of runs: its newest finished one; or a list of them:
            [A,B], which are put side by side in compared.html too.
        sweep: a folder with runs below it: their table and plot, a row a setting, and their page.
    """

    run: Any = None
    sweep: str | None = None

    def __post_init__(self) -> None:
        one = bool(self.runs) != (self.sweep is not None)
        require(one, "run", self.run, "set run=DIRECTORY, or sweep=DIRECTORY for all runs below it")

    @property
    def runs(self) -> list[str]:
        """The runs' directories."""
        return listed("run", self.run)


def run(settings: ReportConfig) -> None:
    """Write the report of each run, and print where; or that of a sweep, and print it."""
    if settings.sweep is not None:
        of_sweep(at_home(settings.sweep))
        return
    directories = newest_runs(settings.runs)
    for directory in directories:
        if not (directory / SETTINGS).is_file():  # refused before matplotlib is imported
            raise EvaluationError(
                f"{directory / SETTINGS} is not there: is {directory} a run's directory?"
            )
    from pujax.evaluation.comparison import refuse_other_page
    from pujax.evaluation.page import refuse_foreign, write

    for directory in directories:
        refuse_foreign(directory)
    together = None
    if len(directories) > 1:
        refuse_other_page(_compared(directories))
        together = of_several(directories)  # first, since it refuses runs that can't be compared
    for directory in directories:
        print(write(directory))
    if together is not None:
        print(together)


def of_several(directories: Sequence[Path]) -> Path:
    """The page of several runs side by side, in the folder that they share.

    Raises `DiskError` where something else has its name.
    """
    from pujax.evaluation.comparison import write
    from pujax.inference.evaluated import arms, by_arm

    columns, between = arms(directories, [])
    return write(_compared(directories), by_arm(directories), columns, against_first=between)


def _compared(directories: Sequence[Path]) -> Path:
    shared = os.path.commonpath([directory.resolve() for directory in directories])
    return Path(shared) / "compared.html"


def of_sweep(directory: Path) -> None:
    """Print the table of the runs below `directory`, and which are unfinished."""
    if next(directory.rglob(SETTINGS), None) is None:  # refused before matplotlib is imported
        raise EvaluationError(f"{directory}: no runs below it: give the folder that they lie in")
    from rich.console import Console

    from pujax.config.settings import default_of
    from pujax.evaluation.sweep import write

    table, told = write(directory, default_of)
    if table is not None:
        Console().print(table)
    for line in told:
        print(line)


_main = command("report", ReportConfig, run, folder="tools")


def main() -> None:
    """The command; what was typed in its former words is answered with the new ones."""
    in_new_words("report")
    _main()


if __name__ == "__main__":
    main()
