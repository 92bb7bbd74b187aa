"""Train several seeds of an arm in one program.

python -m experiments.paper.together SETTINGS -- SETTINGS [-- SETTINGS ...]

Each part is the settings of one `python -m pujax.train`, which differ in nothing that decides what
is compiled: seeds and the models that they start from may differ, sizes and rates may not. Each run
is pujax's own `fit`, in a thread and a directory of its own, and says there in output.log how it
goes. What they share is the steps: when all have come to theirs, one program does them all
(`jax.vmap`). A GPU spends most of a small student's step on starting kernels, and so starts them
once for all runs.

Runs that were begun before are not taken: `python -m pujax.train` goes on with each.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import hydra

from pujax.config.compose import conf_dir, from_hydra, register
from pujax.config.settings import TrainConfig
from pujax.errors import PujaxError, StopRequested, require
from pujax.files.settings import SETTINGS, flat
from pujax.run.compilation import compile_once
from pujax.run.directory import OUTPUT, run_directory
from pujax.train import require_sources

OWN = ("seed", "run.name", "run.dir", "model.path")
"""What may differ between runs that are done together."""

LOOK = 0.2  # seconds between looks at the threads: signals come through in between

Signals = Callable[[], AbstractContextManager[Callable[[], int]]]


class Meeting:
    """Where the threads of several runs meet for each step; the last to come does all of them."""

    def __init__(self, runs: int) -> None:
        self._asked: list[Any] = [None] * runs
        self._made: Sequence[Any] = ()
        self._programs: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._barrier = threading.Barrier(runs, action=self._work)

    def step(self, place: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function` makes of one run's arguments, made when all runs have come here.

        Raises `threading.BrokenBarrierError` once a run can't come any more.
        """
        self._asked[place] = function, arguments
        self._barrier.wait()
        return self._made[place]

    def leave(self) -> None:
        """Tell the others not to wait for a run that failed."""
        self._barrier.abort()

    def _work(self) -> None:
        functions, arguments = zip(*self._asked, strict=True)
        program = self._programs.get(functions[0])
        if program is None:
            program = self._programs[functions[0]] = at_once(functions[0])
        self._made = program(*arguments)


def at_once(function: Callable[..., Any]) -> Callable[..., Sequence[Any]]:
    """A jitted program that makes of each of several tuples of arguments what `function` does."""
    import jax
    import jax.numpy as jnp

    def program(*each: tuple[Any, ...]) -> list[Any]:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        made = jax.vmap(function)(*stacked)
        return [jax.tree.map(lambda x, i=i: x[i], made) for i in range(len(each))]

    return jax.jit(program)


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit status is 1 where a run failed, 128 and a signal's number after one."""
    try:
        configs = [*read(sys.argv[1:] if words is None else words)]
        check(configs)
    except PujaxError as error:
        print(f"together: {error}", file=sys.stderr)
        return 1
    compile_once()
    from pujax.run.fit import stop_signals

    with stop_signals() as stopping:
        failures = trained(configs, lambda: nullcontext(stopping))
    for directory, error in failures.items():
        print(f"together: {directory}: {error}", file=sys.stderr)
    stopped = [error.number for error in failures.values() if isinstance(error, StopRequested)]
    return 128 + stopped[0] if stopped else int(bool(failures))


def read(words: Sequence[str]) -> Iterator[TrainConfig]:
    """The settings of each part of the command line. Raises `ConfigError`."""
    register("train_schema", TrainConfig)
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        for between, part in groupby(words, lambda word: word == "--"):
            if not between:
                yield from_hydra(TrainConfig, hydra.compose("train", overrides=[*part]))


def check(configs: Sequence[TrainConfig]) -> None:
    """Refuse runs that one program can't do. Raises `ConfigError`."""
    require(len(configs) > 1, "runs", len(configs), "give two or more, with -- between them")
    told = [flat(asdict(config)) for config in configs]
    for one in told:
        for key in told[0].keys() | one.keys():
            same = told[0].get(key) == one.get(key)
            require(same or key in OWN, key, one.get(key), f"{told[0].get(key)} in another run")
    patience = configs[0].eval.patience
    alone = "ends runs at steps of their own, and so none beside others: null, or one by one"
    require(patience is None, "eval.patience", patience, alone)
    places = [config.run.dir or "" for config in configs]
    for place in places:
        where = "give each run one of its own"
        require(places.count(place) == 1 and place != "", "run.dir", place or None, where)
        begun = (Path(place) / SETTINGS).exists()
        require(not begun, "run.dir", place, "begun before: `python -m pujax.train` goes on there")


def trained(configs: Sequence[TrainConfig], signals: Signals) -> dict[str, BaseException]:
    """Do the runs, and return of each directory whose run did not end well what ended it.

    A run that stops before its last step ends the others too.
    """
    failures: dict[str, BaseException] = {}
    meeting = Meeting(len(configs))

    def begin(place: int, config: TrainConfig) -> None:
        try:
            train(config, lambda _, function, mesh: partial(meeting.step, place, function), signals)
        except BaseException as error:
            failures[str(config.run.dir)] = error
            meeting.leave()

    threads = [threading.Thread(target=begin, args=each) for each in enumerate(configs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(LOOK)
    first = [e for e in failures.values() if not isinstance(e, threading.BrokenBarrierError)]
    return {
        directory: RuntimeError(f"ended with another run ({first[0]})")
        if isinstance(error, threading.BrokenBarrierError) and first
        else error
        for directory, error in failures.items()
    }


def train(config: TrainConfig, fitting: Callable[..., Any], signals: Signals) -> None:
    """One run, as `python -m pujax.train` does it; what it says goes to a file."""
    from rich.console import Console

    from pujax.run.fit import fit

    require_sources(config)
    with run_directory(config) as directory, (directory / OUTPUT).open("a") as output:
        console = Console(file=output, force_terminal=False, width=100)
        fit(config, directory, console=console, fitting=fitting, signals=signals)


if __name__ == "__main__":
    sys.exit(main())
