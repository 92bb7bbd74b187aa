"""What a run writes while it trains, metrics and samples, and the progress it shows."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.summary import scalar

from pujax.errors import RecordError
from pujax.evaluation.waiting import about, duration, waited
from pujax.files.durable import Line, on_disk, read_jsonl, whole_lines, write_whole
from pujax.records import STAGES
from pujax.run.processes import first, told

# Metrics in the progress line, where a step has them; pairs' where it has no score of its own.
SHOWN = {"loss": "loss", "score/mean": "score", "reward/accuracy": "pair accuracy", "kl/ref": "kl"}

RECENT = 50  # steps whose pace the ETA goes by

_EVENTS: Any = event_pb2  # their classes are made at run time: a type checker knows none
_SUMMARIES: Any = summary_pb2


@dataclass(frozen=True)
class SampleGroup:
    """One group as a person reads it; scores and labels count the anchor in, at index 0."""

    id: str
    prompt: str
    anchor: str
    candidates: Sequence[str]
    scores: Sequence[float]
    labels: Sequence[float]

    def __post_init__(self) -> None:
        sizes = (len(self.candidates) + 1, len(self.scores), len(self.labels))
        if len(set(sizes)) > 1:
            raise ValueError(
                f"sample {self.id!r}: {sizes[0]} responses, {sizes[1]} scores and {sizes[2]} "
                "labels: the anchor and each candidate need one of each"
            )


class RunLog:
    """Appends a run's metrics and samples to its directory; close it, or use it in a `with`.

    `metrics.jsonl` gets one object a step, and `tensorboard/` a run a stage. `resume` is the stage
    and step of the checkpoint that the run goes on from, ("sft", 0) for none: what the files hold
    beyond it is cut off, so that no step appears twice. `earlier` are the lines that remain, `lost`
    says so where metrics up to there are missing; `tell` is told all that is written. Of several
    processes the first alone writes and tells, and all know what was written.

    Raises FileExistsError when the directory has metrics and `resume` is None, and `RecordError`
    naming file and line when a file to go on with can't be read.
    """

    def __init__(
        self,
        directory: Path,
        *,
        resume: tuple[str, int] | None = None,
        tell: Callable[[str, int, Mapping[str, Any]], None] = lambda place, step, metrics: None,
    ) -> None:
        self._tell = tell
        metrics, samples = directory / "metrics.jsonl", directory / "samples.jsonl"
        stage, step = resume or (STAGES[0], 0)

        def take_up() -> tuple[str, list[Line]]:
            directory.mkdir(parents=True, exist_ok=True)
            if resume is None and metrics.exists() and metrics.stat().st_size:
                raise FileExistsError(
                    f"{metrics} has the metrics of an earlier run: go on with it (resume=auto) or "
                    "choose another run.dir"
                )
            places, lost = cut(metrics, stage, step, once=True), ""
            if _gap(places) or (step and places[-1:] != [(stage, step)]):
                lost = f"{metrics} lacks what led to {stage} step {step}: it goes on from there"
            cut(samples, stage, step)
            return lost, read_jsonl(metrics) if metrics.exists() else []

        self.lost, self.earlier = told(take_up)
        self._evaluated = {
            (line["model"], line["step"]): line for line in self.earlier if line["stage"] == "eval"
        }
        self._writes = first()
        if self._writes:
            self._metrics = metrics.open("a", encoding="utf-8")
            # Half a surrogate pair, which a prompt may hold, becomes its JSON escape.
            self._samples = samples.open("a", encoding="utf-8", errors="backslashreplace")
        self._tensorboard = directory / "tensorboard"
        # TensorBoard hides what an earlier process wrote from the purged step on.
        later = STAGES[STAGES.index(stage) + 1 :]
        self._purge = {stage: step + 1} | dict.fromkeys(later, 0) if resume else {}
        for model in ("base", "sft", "aligned") if resume else ():
            kept = [at for name, at in self._evaluated if name == model]
            self._purge[f"eval-{model}"] = max(kept, default=-1) + 1
        self._writers: dict[str, _Plots] = {}

    def step(
        self, stage: str, step: int, metrics: Mapping[str, Any], *, seconds: float, tokens: int
    ) -> Line:
        """Write one step, `tokens` real tokens in `seconds`; returns the line as written.

        A value that isn't finite is written as null.
        """
        pace = {"time/step_s": seconds, "time/tokens_per_s": tokens / seconds}
        line = {"stage": stage, "step": step} | _rounded(metrics) | _rounded(pace)
        if self._writes:
            _append(self._metrics, [line])
            self._plot(stage, step, {**metrics, **pace})
            self._tell(stage, step, {**metrics, **pace})
        return line

    def evaluation(self, model: str, step: int, means: Mapping[str, float]) -> Line | None:
        """Write the means of `model` (base, sft or aligned) at `step` of the stage before them.

        Returns the line as written; None where the run had one before it was cut off and resumed.
        """
        if self.has(model, step):
            return None
        line = {"stage": "eval", "model": model, "step": step} | _rounded(means)
        self._evaluated[model, step] = line
        if self._writes:
            # Plotted first: a plot without its line is purged on resuming, a line has its plot.
            self._plot(f"eval-{model}", step, means)
            self._writers[f"eval-{model}"].flush()
            _append(self._metrics, [line])
            self.flush()
            self._tell(f"eval-{model}", step, means)
        return line

    def evaluations(self, model: str) -> dict[int, Line]:
        """The lines of `model`'s evaluations by step, of earlier processes too."""
        return {step: line for (name, step), line in self._evaluated.items() if name == model}

    def has(self, model: str, step: int) -> bool:
        """Whether the evaluation of `model` at `step` has been written."""
        return (model, step) in self._evaluated

    def samples(self, stage: str, step: int, groups: Iterable[SampleGroup]) -> None:
        """Write a step's groups as text, one a line."""
        if not self._writes:
            return
        lines = []
        for group in groups:
            numbers = {
                name: [_round(value) for value in getattr(group, name)]
                for name in ("scores", "labels")
            }
            lines.append({"stage": stage, "step": step} | asdict(group) | numbers)
        _append(self._samples, lines)

    def flush(self) -> None:
        """Put all that was written on the disk, as a checkpoint that comes after it will be."""
        if not self._writes:
            return
        for file in (self._metrics, self._samples):
            with on_disk(Path(file.name)):
                file.flush()
                os.fsync(file.fileno())
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Flush and close every file."""
        if not self._writes:
            return
        for file in (self._metrics, self._samples):
            with on_disk(Path(file.name)):
                file.close()
        for writer in self._writers.values():
            writer.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plot(self, run: str, step: int, metrics: Mapping[str, Any]) -> None:
        if run not in self._writers:
            self._writers[run] = _Plots(self._tensorboard / run, self._purge.get(run))
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._writers[run].add(step, finite)


class _Plots:
    """One of TensorBoard's runs; what is flushed is on the disk.

    tensorboardX's own `SummaryWriter` hands events to a thread, which a flush does not wait for,
    and which ends on a full disk: what is added then waits for ever.
    """

    def __init__(self, folder: Path, purge: int | None) -> None:
        self._folder = folder
        self._flushed = time.monotonic()
        with on_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
            if purge is not None:
                began = _EVENTS.SessionLog(status=_EVENTS.SessionLog.START)
                self._write(_EVENTS.Event(step=purge, session_log=began))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Plot the values at `step`; watched from outside they show within ten seconds."""
        told = [each for name, value in values.items() for each in scalar(name, value).value]
        with on_disk(self._folder):
            self._write(_EVENTS.Event(step=step, summary=_SUMMARIES.Summary(value=told)))
            if time.monotonic() - self._flushed > 10:
                self.flush()

    def flush(self) -> None:
        with on_disk(self._folder):
            self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with on_disk(self._folder):
            self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)


def cut(path: Path, stage: str, step: int, *, once: bool = False) -> list[tuple[str, int]]:
    """Drop from a log's first line beyond (`stage`, `step`) on, and a torn last line, atomically.

    Evaluations stay or go with the training steps around them. A file that isn't there is left so.
    Returns the steps that are left. Raises `RecordError` naming file and line for a line that no
    run writes, a step out of its order, and where each has a line `once` for one that is there
    twice.
    """
    if not path.exists():
        return []
    kept, places = list[bytes](), list[tuple[str, int]]()
    for number, (line, raw) in enumerate(whole_lines(path), 1):
        known = (*STAGES, "eval")
        for name, right in (
            ("stage", line.get("stage") in known),
            ("step", isinstance(line.get("step"), int)),
            ("model", line.get("stage") != "eval" or isinstance(line.get("model"), str)),
        ):
            if not right:
                raise RecordError(
                    f"{path}:{number}: no `{name}` that a run writes ({line.get(name)!r}): remove "
                    "this line"
                )
        if line["stage"] in STAGES:
            here = (line["stage"], line["step"])
            last = places[-1] if places else None
            if last and (_place(*here) < _place(*last) or (once and here == last)):
                raise RecordError(
                    f"{path}:{number}: {here[0]} step {here[1]} comes after {last[0]} step "
                    f"{last[1]}: put the file right"
                )
            if _place(*here) > _place(stage, step):
                break
            places.append(here)
        kept.append(raw + b"\n")
    write_whole(path, b"".join(kept))
    return places


def _gap(places: Sequence[tuple[str, int]]) -> bool:
    """Whether steps of a stage are left out between others or before them."""
    before = {stage: 0 for stage, _ in places}
    for stage, step in places:
        if step != before[stage] + 1:
            return True
        before[stage] = step
    return False


@contextmanager
def progress(
    stage: str,
    *,
    done: int,
    steps: int,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
    every: float = 10.0,
    rest: Callable[[float], float] | None = None,
) -> Iterator[Callable[[Line], None]]:
    """Show a stage's progress; yields the function that takes each step's line (`RunLog.step`).

    A terminal gets a bar; anything else a plain line at the first step, at the last, and no more
    often than each `every` seconds in between, and one a minute where a step takes longer. `done`
    steps were made before this process. `rest` is how many seconds the run takes after the stage,
    by those that a step of it takes: the lines tell of both.
    """
    console = console or Console()
    times: deque[float] = deque(maxlen=RECENT + 1)

    if not console.is_terminal:
        shown_at = -math.inf
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)

        def show_line(line: Line) -> None:
            nonlocal shown_at
            times.append(clock())
            if times[-1] - shown_at >= every or line["step"] >= steps:
                shown_at = times[-1]
                text = f"{stage} {line['step']}/{steps}  {summary(line)}  "
                say((text + _left(times, line, steps, rest)).rstrip())
                noted()

        with waited(stage, say) as noted:
            yield show_line
        return

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[now]}", markup=False),
    )
    with Progress(*columns, console=console, expand=True, refresh_per_second=4) as bar:
        task = bar.add_task(stage, total=steps, completed=done, now="compiling")

        def show_bar(line: Line) -> None:
            times.append(clock())
            now = f"{summary(line)}  {_left(times, line, steps)}".rstrip()
            bar.update(task, completed=line["step"], now=now)

        yield show_bar


def summary(line: Line) -> str:
    """A step's main metrics on one line, to three digits."""
    parts = [
        f"{short} {line[name]:#.3g}" if line[name] is not None else f"{short} not finite"
        for name, short in SHOWN.items()
        if name in line and not (name == "reward/accuracy" and "score/mean" in line)
    ]
    return "  ".join([*parts, f"{line['time/tokens_per_s']:.0f} tok/s"])


def eta(times: Sequence[float], left: int) -> float | None:
    """Seconds until `left` more steps are done, given when this process finished its last ones.

    The first step, which compiles, only starts the clock; pauses between steps count. None as
    long as there is no second step to go by.
    """
    if len(times) < 2:
        return None
    return (times[-1] - times[0]) / (len(times) - 1) * left


def _left(
    times: Sequence[float], line: Line, steps: int, rest: Callable[[float], float] | None = None
) -> str:
    pace = eta(times, 1)
    if pace is None:
        return ""
    seconds = pace * (steps - line["step"])
    whole = f", {about(seconds + rest(pace))} to the run's end" if rest else ""
    return f"{duration(seconds)} left{whole}"


def _place(stage: str, step: int) -> tuple[int, int]:
    return STAGES.index(stage), step


def _append(file: Any, lines: Iterable[Line]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    with on_disk(Path(file.name)):
        file.write(text)
        file.flush()


def _rounded(metrics: Mapping[str, Any]) -> Line:
    return {name: _round(value) for name, value in metrics.items()}


def _round(value: Any) -> float | int | None:
    """Six significant digits; null for what JSON has no number for."""
    number = float(value)
    if not math.isfinite(number):
        return None
    return float(f"{number:.6g}")
