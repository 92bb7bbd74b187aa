"""What the runs of a sweep were worth: a row a setting, over the seeds it was run with."""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pujax.errors import EvaluationError, PujaxError
from pujax.evaluation import comparison, tables
from pujax.evaluation.curves import LIGHT, in_utf8, style_of
from pujax.evaluation.results import Evaluation, load, shown_by
from pujax.evaluation.statistics import same_prompts
from pujax.files.durable import read_jsonl, sweep_files, write_whole
from pujax.files.settings import (
    DONE,
    SETTINGS,
    SWEPT,
    UNTOUCHED,
    flat,
    kept_settings,
    of_asking,
    within,
)
from pujax.records import STAGES
from pujax.text import counted

ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}


DefaultOf = Callable[[str], Any]
"""The default of a setting by its dotted key; None where it has none."""


def no_default(key: str) -> None:
    """None, of every setting."""


@dataclass(frozen=True)
class Job:
    """One run: what its numbers depend on, and its aligned model's evaluation once it is done.

    `apart` is what set it apart in its sweep, by key. An unfinished run has its `state` instead of
    an `evaluation`; one that can't be read has no settings either.
    """

    directory: Path
    seed: Any
    settings: Mapping[str, Any]
    apart: Mapping[str, str]
    evaluation: Evaluation | None = None
    state: str = ""

    @property
    def setting(self) -> str:
        """All but the seed that its numbers depend on."""
        return json.dumps(self.settings, sort_keys=True, default=str)


@dataclass(frozen=True)
class SweepRow:
    """The finished runs of one setting, a seed each, and how many seeds it was begun with."""

    name: str
    runs: tuple[Evaluation, ...]
    seeds: int
    directories: tuple[Path, ...]

    def mean(self, metric: str) -> tuple[float, float | None] | None:
        """The mean over seeds of the means over prompts, and its standard error if it has one."""
        means = [float(np.mean(values)) for run in self.runs if (values := run.values(metric))]
        if not means:
            return None
        error = np.std(means, ddof=1) / np.sqrt(len(means)) if len(means) > 1 else None
        return float(np.mean(means)), None if error is None else float(error)


@dataclass(frozen=True)
class Sweep:
    """All that lies below a directory: a row a setting, and the runs that are not finished."""

    rows: tuple[SweepRow, ...]
    unfinished: tuple[Job, ...]
    notes: tuple[str, ...]


def gather(directory: Path, default_of: DefaultOf = no_default) -> Sweep:
    """The runs below `directory`, by setting, in the order of their names.

    Runs that differ in nothing but their seed, and in what touches no numbers, are of one setting;
    of two that share the seed too the newest counts that is finished. A setting that a run lacks is
    younger than the run, which had its default. Raises `EvaluationError` where there are no runs.
    """
    found = [_job(path) for path in _runs_below(directory)]
    if not found:
        raise EvaluationError(f"{directory}: no runs below it: give the folder that they lie in")
    defaults = {key: default_of(key) for job in found for key in job.settings}
    found = [replace(job, settings=job.settings and {**defaults, **job.settings}) for job in found]
    newest: dict[tuple[str, str], Job] = {}
    for job in found:
        before = newest.get((job.setting, str(job.seed)))
        if job.settings and (before is None or not before.evaluation or job.evaluation):
            newest[job.setting, str(job.seed)] = job
    by_setting: dict[str, list[Job]] = {}
    for (setting, _), job in newest.items():
        by_setting.setdefault(setting, []).append(job)
    groups = list(by_setting.values())
    rows = [
        SweepRow(
            name,
            tuple(job.evaluation for job in group if job.evaluation),
            len(group),
            tuple(job.directory for job in group if job.evaluation),
        )
        for name, group in zip(_names(groups), groups, strict=True)
    ]
    unreadable = [job for job in found if not job.settings]
    unfinished = [job for job in (*unreadable, *newest.values()) if job.evaluation is None]
    runs = [run for row in rows for run in row.runs]
    notes = []
    if left := len(found) - len(unreadable) - len(newest):
        notes.append(f"{counted(left, 'other run')} of the same settings and seed left out.")
    try:
        for run in runs[1:]:
            same_prompts(runs[0], run)
    except EvaluationError:
        notes.append("Not all answered the same held-out prompts: those rows can't be compared.")
    return Sweep(tuple(rows), tuple(unfinished), tuple(notes))


def write(
    directory: Path, default_of: DefaultOf = no_default
) -> tuple[tables.Wide | None, list[str]]:
    """The table of the sweep below `directory`, and what else there is to say, a line each.

    They are written to `sweep.md` there too, and drawn in `sweep.png`; the settings stand side by
    side in `sweep.html`, unless their prompts differ. While no run is finished there is no table,
    and nothing is written.
    """
    sweep = gather(directory, default_of)
    told = [f"unfinished: {job.directory}: {job.state}" for job in sweep.unfinished]
    runs = [run for row in sweep.rows for run in row.runs]
    if not runs:
        return None, told
    header, cells = _cells(sweep.rows)
    caption = " ".join(
        [
            f"Aligned models on {len(runs[0].rows)} held-out prompts: mean ± standard error over "
            "seeds of each one's mean over prompts.",
            *sweep.notes,
        ]
    )
    lines = [
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * (len(header) - 1),
        *("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in cells),
    ]
    page = [*lines, "", caption, *(f"\n{line}" for line in told), ""]
    text, picture = sweep_files(directory, "| setting | seeds |")
    comparison.refuse_other_page(directory / "sweep.html")
    write_whole(text, "\n".join(page).encode(errors="backslashreplace"))
    write_whole(picture, _drawn(sweep.rows))
    told.append(f"sweep: {text}, {picture}{_page(directory, sweep)}")
    # Without spaces a narrow terminal does not break a number from its error.
    close = [[name, *(text.replace(" ± ", "±") for text in texts)] for name, *texts in cells]
    return tables.named(header, close, caption), told


def _page(directory: Path, sweep: Sweep) -> str:
    """The name of the page that was written, to be said; or nothing, where none can be."""
    rows = [row for row in sweep.rows if row.runs]
    page = directory / "sweep.html"
    try:
        comparison.write(
            page,
            {row.name: row.directories for row in rows},
            [tables.Arm(row.name, row.runs) for row in rows],
            against_first=True,
        )
    except EvaluationError:  # other prompts, which the table's note has said
        return ""
    return f", {page}"


# Reading what the runs left.


def _runs_below(directory: Path) -> Iterator[Path]:
    """Every folder with the settings of a run, by name; what lies in a run is not looked at."""
    for folder, folders, names in os.walk(directory):
        folders.sort()
        if SETTINGS in names:
            try:
                run = {"model", "loss"} <= kept_settings(Path(folder)).keys()
            except PujaxError:
                run = SWEPT in names
            if run:
                folders.clear()
                yield Path(folder)


def _job(directory: Path) -> Job:
    try:
        settings = flat(kept_settings(directory))
        apart = _swept(directory)
        evaluation = None
        if (directory / DONE).exists():
            evaluation = load(directory / "eval-aligned.jsonl")
        state = "" if evaluation else _state(directory, settings)
    except (PujaxError, FileNotFoundError) as error:
        return Job(directory, None, {}, {}, state=str(error))
    seed = settings.pop("seed", None)
    kept = {key: value for key, value in settings.items() if _counts(key, apart)}
    return Job(directory, seed, kept, apart, evaluation, state)


def _counts(key: str, apart: Mapping[str, str]) -> bool:
    """Whether a setting touches a run's numbers, or was swept."""
    return within(key, apart) or not (of_asking(key) or within(key, UNTOUCHED))


def _swept(directory: Path) -> dict[str, str]:
    """What set the run apart in its sweep, its seed aside."""
    try:
        apart = json.loads((directory / SWEPT).read_text(encoding="utf-8"))
        return {str(key): str(value) for key, value in apart.items() if key != "seed"}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise EvaluationError(
            f"{directory / SWEPT}: not what a sweep gave a run ({error}): remove it"
        ) from error


def _state(directory: Path, settings: Mapping[str, Any]) -> str:
    """How far an unfinished run has come, and what to do with it."""
    path = directory / "metrics.jsonl"
    steps = (
        [line for line in read_jsonl(path) if line.get("stage") in STAGES] if path.exists() else []
    )
    if not steps:
        return "no step yet: the same command begins it"
    stage, step = steps[-1]["stage"], steps[-1].get("step")
    whole = settings.get(f"{stage}.steps", "?")
    return f"{stage} step {step} of {whole}: the same command goes on with it"


def _names(groups: Sequence[Sequence[Job]]) -> list[str]:
    """What each setting is called: what its sweep set it apart by, as typed.

    Runs that no sweep made, or that two have given one name, are told apart by what differs.
    """
    typed = [max((job.apart for job in group), key=len) for group in groups]
    names = [" ".join(f"{key}={value}" for key, value in apart.items()) for apart in typed]
    settings = [group[0].settings for group in groups]
    found = []
    for name, own in zip(names, settings, strict=True):
        rivals = [other for other, also in zip(settings, names, strict=True) if also == name]
        if not name:
            rivals = settings
        elif len(rivals) == 1:
            found.append(name)
            continue
        keys = {key for other in rivals for key in own.keys() | other.keys()}
        apart = [
            f"{key}={own.get(key)}"
            for key in sorted(keys)
            if any(other.get(key) != own.get(key) for other in rivals)
        ]
        found.append(" ".join([*([name] if name else []), *apart]) or "as set")
    return found


# Showing it.


def _cells(rows: Sequence[SweepRow]) -> tuple[list[str], list[list[str]]]:
    """Column names, and a row of texts for each setting."""
    shown = _shown(rows)
    header = ["setting", "seeds", *(told.title for told in shown.values())]
    cells = []
    for row in rows:
        done = len(row.runs)
        texts = [row.name, str(done) if done == row.seeds else f"{done}/{row.seeds}"]
        for metric, told in shown.items():
            found = row.mean(metric)
            text = "" if found is None else tables.number(told, found[0])
            if found is not None and found[1] is not None:
                text += f" ± {tables.number(told, found[1])}"
            texts.append(text)
        cells.append(texts)
    return header, cells


def _shown(rows: Sequence[SweepRow]) -> dict[str, Any]:
    """How the metrics are shown that any row has."""
    shown = shown_by(run for row in rows for run in row.runs)
    return {name: told for name, told in shown.items() if any(row.mean(name) for row in rows)}


def _drawn(rows: Sequence[SweepRow]) -> bytes:
    """A small plot a metric, a line a setting: each seed as a dot, mean and standard error."""
    shown = _shown(rows)
    columns = min(3, len(shown))
    down = -(-len(shown) // columns)
    with matplotlib.rc_context(style_of(LIGHT)):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.04, hspace=0.04)
        size = (3 * columns + 2.5, (0.9 + 0.3 * len(rows)) * down)
        figure = Figure(figsize=size, layout=layout, facecolor=LIGHT.paper)
        FigureCanvasAgg(figure)
        grid = figure.subplots(down, columns, sharey=True, squeeze=False)
        for axes, (metric, told) in zip(grid.flat, shown.items(), strict=False):
            for at, row in enumerate(rows):
                seeds = [np.mean(values) for run in row.runs if (values := run.values(metric))]
                axes.plot(seeds, [at] * len(seeds), "o", color=LIGHT.stages["align"], alpha=0.35)
                if found := row.mean(metric):
                    axes.errorbar(found[0], at, xerr=found[1], fmt="|", color=LIGHT.ink, capsize=3)
            axes.set_title(in_utf8(told.title) + ARROWS[told.better], loc="left", fontsize=10.5)
            axes.set_yticks(range(len(rows)), [_short(in_utf8(row.name)) for row in rows])
            axes.grid(axis="x", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
        grid[0, 0].set_ylim(len(rows) - 0.5, -0.5)
        for axes in list(grid.flat)[len(shown) :]:
            axes.set_visible(False)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=160, metadata={"Software": "pujax"})
    return image.getvalue()


def _short(name: str) -> str:
    return name if len(name) <= 48 else f"{name[:47]}…"
