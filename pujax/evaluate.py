"""`pujax evaluate`: a run's held-out table again, other models beside it, or several runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from pujax.errors import require
from pujax.run.commands import command, in_new_words, listed
from pujax.run.compilation import compile_once


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything `python -m pujax.evaluate` is told: a run or several, and models to put beside.

    `model` names what is evaluated on the run's held-out prompts, `name` what each is called.
    Without a model, `name` says what each of several runs is called; those of one name are an arm.
    A `suite` asks more of one model: `model`, or what the run ended with.

    Attributes:
        run: a run's directory, a folder of runs (its newest finished one), or a list: [A,B].
        model: evaluate this too, or a list: a run, a Hugging Face directory, a GGUF file, a hub id.
        name: what to call it, one a model; without a model one a run, runs of a name are an arm.
        suite: larger questions to one model, by name, such as signal.
    """

    run: Any = MISSING
    model: Any = None
    name: Any = None
    suite: Any = None

    def __post_init__(self) -> None:
        require(bool(self.runs), "run", self.run, "set run=DIRECTORY")
        if self.suite is not None:
            require(len(self.runs) == 1, "run", self.run, "a suite asks one run's held-out prompts")
            require(len(self.models) < 2, "model", self.model, "a suite asks one model at a time")
            require(self.name is None, "name", self.name, "a suite needs none: take it out")
            return
        wanted = len(self.models) or (len(self.names) and len(self.runs))
        what = "model" if self.models else "run"
        remedy = f"give one a {what}, {wanted} in all"
        if self.models and not self.names:
            remedy = f"give each model a name: name={'NAME' if wanted == 1 else '[A,B]'}"
        require(len(self.names) == wanted, "name", self.name, remedy)
        one = not self.models or len(self.runs) == 1
        require(one, "run", self.run, "give one run whose held-out prompts the models answer")

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
        """The names, one a model or a run."""
        return listed("name", self.name)


def run(settings: EvaluateConfig) -> None:
    """Evaluate the models that are named, then print the table and what to know of it."""
    if settings.models or settings.suite is not None:
        compile_once()
    from rich.console import Console

    from pujax.evaluation.findings import told
    from pujax.evaluation.results import save
    from pujax.evaluation.tables import plain, table
    from pujax.run.finished import newest_run
    from pujax.run.heldout import answered, arms, evaluate_other, evaluations_of

    console = Console()
    directories = [newest_run(Path(run).expanduser()) for run in settings.runs]
    if settings.suite is not None:
        (directory,) = directories
        (path,) = settings.models or [str(directory)]
        answer, kept = answered(directory, path, settings.suite)
        console.print(plain(answer.header, answer.rows, answer.note))
        print(kept)
        return
    if settings.models:
        (directory,) = directories
        for path, name in zip(settings.models, settings.names, strict=True):
            save(evaluate_other(directory, path, name), directory)
    if len(directories) == 1:
        columns = evaluations_of(directories[0])
        console.print(table(columns))
        for line in told(columns):
            console.print(line, markup=False, highlight=False)
        return
    compared, between = arms(directories, settings.names)
    console.print(table(compared, against_first=between))


_main = command("evaluate", EvaluateConfig, run, folder="tools")


def main() -> None:
    """The command; what was typed in its former words is answered with the new ones."""
    in_new_words("evaluate")
    _main()


if __name__ == "__main__":
    main()
