"""Evaluations side by side, for a terminal, for Markdown and for the page."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pujax.evaluation.metrics import QUALITY, Shown
from pujax.evaluation.results import Evaluation, shown_by
from pujax.evaluation.statistics import FEW, Difference, compare, compare_runs


@dataclass(frozen=True)
class Arm:
    """One column of a table: an evaluation, or those of runs that differ in their seed alone.

    Of a stage of several runs `of` names them, so that it is compared with another run by run.
    """

    model: str
    runs: tuple[Evaluation, ...]
    of: tuple[str, ...] = ()

    def values(self, metric: str) -> list[float]:
        """The metric's values in all runs."""
        return [value for run in self.runs for value in run.values(metric)]


Column = Evaluation | Arm


def difference(first: Column, second: Column) -> dict[str, Difference]:
    """How far `second` is above `first`, over prompts, and over seeds where there are several."""
    one, other = runs_of(first), runs_of(second)
    if len(one) == len(other) == 1:
        return compare(one[0], other[0])
    stages = isinstance(first, Arm) and isinstance(second, Arm) and first.of == second.of != ()
    return compare_runs(one, other, matched=stages)


def runs_of(column: Column) -> tuple[Evaluation, ...]:
    """The evaluations of a column."""
    return column.runs if isinstance(column, Arm) else (column,)


C = TypeVar("C", bound=Column)


def changed(columns: Sequence[C]) -> list[C]:
    """The columns without those of the very model before them, as a stage of no steps leaves it."""

    def same(one: Column, other: Column) -> bool:
        ofs = [[run.of for run in runs_of(column)] for column in (one, other)]
        return ofs[0] == ofs[1] and None not in ofs[0]

    return [
        column for at, column in enumerate(columns) if not at or not same(columns[at - 1], column)
    ]


def cells(
    columns: Sequence[Column], *, against_first: bool = False
) -> tuple[list[str], dict[str, list[str | Difference]]]:
    """The comparison as a grid: column names, and under each metric's name its cells.

    Columns are the models in the order given, then the difference of each to the one before it, or
    of each to the first. A metric that only some of the models have leaves its other cells empty.
    """
    pairs = [(columns[0], other) for other in columns[1:]]
    if not against_first:
        pairs = list(pairwise(columns))
    header = [column.model for column in columns]
    header += [f"{second.model} - {first.model}" for first, second in pairs]
    compared = [difference(first, second) for first, second in pairs]
    rows: dict[str, list[str | Difference]] = {}
    for metric, shown in shown_by(run for column in columns for run in runs_of(column)).items():
        values = [column.values(metric) for column in columns]
        if any(values):
            means: list[str | Difference] = [
                number(shown, float(np.mean(v))) if v else "" for v in values
            ]
            rows[metric] = means + [differences.get(metric, "") for differences in compared]
    return header, rows


def kind_cells(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Quality by kind of prompt: column names, and rows whose cells read base → sft → aligned."""
    splits = [evaluation.by_kind() for evaluation in evaluations]
    shown = shown_by(evaluations)
    quality = [metric for metric in QUALITY if metric in shown]
    header = ["kind", "prompts", *(shown[metric].title for metric in quality)]
    rows = []
    for kind, first in splits[0].items():
        row = [kind, str(len(first.rows))]
        for metric in quality:
            values = [split[kind].values(metric) for split in splits]
            means = [f"{np.mean(v):z.2f}" for v in values if v]
            row.append(" → ".join(means))
        rows.append(row)
    return header, rows


def number(shown: Shown, value: float, *, sign: bool = False) -> str:
    """A metric's value as the tables show it."""
    return f"{value:{'+' if sign else ''}z.{shown.digits}f}"


def interval(shown: Shown, difference: Difference) -> str:
    """A difference as the tables show it: mean [low, high], with an asterisk if that is clear."""
    mean = number(shown, difference.mean, sign=True)
    low, high = number(shown, difference.low), number(shown, difference.high)
    return f"{mean}{'*' if difference.clear else ''} [{low}, {high}]"


def note(columns: Sequence[Column], *, few: bool = True) -> str:
    """What a reader of the tables must know; not that prompts are `few` where that is said."""
    first = runs_of(columns[0])[0]
    rows = len(first.rows)
    answers = sum(row.answer is not None for row in first.rows)
    seeds = [len(runs_of(column)) for column in columns]
    text = f"{rows} held-out prompts, {answers} with a true answer; greedy decoding."
    if max(seeds) > 1:
        text += f" Means of {', '.join(map(str, seeds))} runs."
    if len(columns) > 1:
        over = "seeds and prompts" if max(seeds) > 1 else "prompts"
        text += f" Differences with 95 % intervals (paired bootstrap over {over}); * excludes 0."
        if few and rows < FEW:
            text += f" Under {FEW} prompts none is called clear."
    return text


def table(columns: Sequence[Column], *, against_first: bool = False) -> "Wide":
    """The comparison for a terminal; clear gains are green, clear losses red.

    What is too wide for it goes on in a further table: no number is ever cut.
    """
    columns = columns if against_first else changed(columns)
    header, rows = cells(columns, against_first=against_first)
    shown = shown_by(run for column in columns for run in runs_of(column))
    texts = {}
    for metric, row in rows.items():
        texts[escape(shown[metric].title)] = written = []
        for cell in row:
            if isinstance(cell, str):
                written.append(cell)
            else:
                # Without the space, so that a narrow terminal breaks the line before the bracket.
                text = escape(interval(shown[metric], cell).replace(", ", ","))
                colour = {"gain": "green", "loss": "red"}.get(verdict(shown[metric], cell))
                written.append(f"[{colour}]{text}[/]" if colour else text)
    return Wide(header, texts, note(columns), apart=len(columns))


@dataclass(frozen=True)
class Wide:
    """Named rows of texts, as one table where that fits, and else as several below each other.

    No cell is broken that fits beside its name. The columns from `apart` on, where it is not 0,
    then begin a table of their own.
    """

    header: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    caption: str
    corner: str = "held-out"
    apart: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        """The tables for a console of that width, and what must be known of them."""
        for places in self._parts(options.max_width):
            yield self._grid(places, options.max_width)
        yield Text(self.caption, style="table.caption")

    def _parts(self, room: int) -> list[list[int]]:
        """Which columns stand in one table: all, or as many of each side of `apart` as fit."""
        every = list(range(len(self.header)))
        if self._width(every, room) <= room:
            return [every]
        parts: list[list[int]] = []
        for side in filter(None, (every[: self.apart], every[self.apart :])):
            parts.append([])
            for place in side:
                if parts[-1] and self._width([*parts[-1], place], room) > room:
                    parts.append([])
                parts[-1].append(place)
        return parts

    def _width(self, places: Sequence[int], room: int) -> int:
        """How wide a table of these columns is where no cell is broken."""
        # Between two columns stand two spaces, and at both edges as much.
        widths = self._widths(places, lambda text: [text], room)
        return sum(widths) + 2 * len(widths) + 2

    def _widths(
        self, places: Sequence[int], split: Callable[[str], Iterable[str]], room: int
    ) -> list[int]:
        """The columns' widths, that of the names first, where `split` says how texts break.

        Names take no more than half of the room, as far as their words fit into that.
        """
        names = [self.corner, *map(_shown, self.rows)]
        word = max(cell_len(part) for name in names for part in name.split() or [""])
        widths = [min(max(map(cell_len, names)), max(word, room // 2))]
        for place in places:
            texts = [self.header[place], *(_shown(row[place]) for row in self.rows.values())]
            widths.append(max(cell_len(part) for text in texts for part in split(text) or [""]))
        return widths

    def _grid(self, places: Sequence[int], room: int) -> Table:
        whole = self._width(places, room) <= room  # one column alone may be too wide
        widths = self._widths(places, (lambda text: [text]) if whole else str.split, room)
        grid = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        grid.add_column(escape(self.corner), overflow="fold", width=widths[0])
        for place, width in zip(places, widths[1:], strict=True):
            title = escape(self.header[place])
            grid.add_column(title, justify="right", overflow="fold", width=width)
        for name, row in self.rows.items():
            grid.add_row(name, *(row[place] for place in places))
        return grid


def _shown(marked: str) -> str:
    return Text.from_markup(marked).plain


def named(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> Wide:
    """Rows of texts, each led by its name, for a terminal."""
    texts = {escape(name): [escape(cell) for cell in cells] for name, *cells in rows}
    return Wide(header[1:], texts, caption, header[0])


def verdict(shown: Shown, difference: Difference) -> str:
    """`gain` or `loss` where the difference is clear and the metric has a better end, else ``."""
    if not difference.clear or not shown.better:
        return ""
    return "gain" if (difference.mean > 0) == (shown.better == "higher") else "loss"


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """The comparison as a Markdown table, for a README."""
    evaluations = changed(evaluations)
    header, rows = cells(evaluations)
    shown = shown_by(evaluations)
    lines = [
        "| held-out | " + " | ".join(header) + " |",
        "|---|" + "---:|" * len(header),
    ]
    for metric, row in rows.items():
        # The asterisk is text here, not the start of an emphasis.
        texts = [
            cell if isinstance(cell, str) else interval(shown[metric], cell).replace("*", r"\*")
            for cell in row
        ]
        lines.append(f"| {shown[metric].title} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", note(evaluations).replace("*", r"\*")])
