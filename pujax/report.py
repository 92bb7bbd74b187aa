"""`pujax report`: a run's curves.png and report.html made anew, of its files alone."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from pujax.config.commands import command, in_new_words, listed
from pujax.errors import require
from pujax.files.locate import at_home


@dataclass(frozen=True)
class ReportConfig:
    """Everything `python -m pujax.report` is told.

    Attributes:
        run: a run's directory, or a list of them: [A,B].
    """

    run: Any = MISSING

    def __post_init__(self) -> None:
        require(bool(self.runs), "run", self.run, "set run=DIRECTORY")

    @property
    def runs(self) -> list[str]:
        """The runs' directories."""
        return listed("run", self.run)


def run(settings: ReportConfig) -> None:
    """Write the report of each run, and print where."""
    from pujax.evaluation.page import refuse_foreign, write

    for run in settings.runs:
        directory = at_home(run)
        refuse_foreign(directory)
        print(write(directory))


_main = command("report", ReportConfig, run, folder="tools")


def main() -> None:
    """The command; what was typed in its former words is answered with the new ones."""
    in_new_words("report")
    _main()


if __name__ == "__main__":
    main()
