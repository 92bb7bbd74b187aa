"""Evaluations side by side, for a terminal, for Markdown and for the page."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from pujax.evaluation.metrics import HIGHER_IS_BETTER, METRICS, QUALITY, Evaluation
from pujax.evaluation.statistics import Difference, compare


def cells(evaluations: Sequence[Evaluation]) -> tuple[list[str], dict[str, list[str | Difference]]]:
    """The comparison as a grid: column names, and under each metric's title its cells.

    Columns are the models in the order given, then the difference of each to the one before it.
    """
    pairs = list(pairwise(evaluations))
    header = [evaluation.model for evaluation in evaluations]
    header += [f"{second.model} - {first.model}" for first, second in pairs]
    compared = [compare(first, second) for first, second in pairs]
    rows: dict[str, list[str | Difference]] = {}
    for metric in METRICS:
        values = [evaluation.values(metric) for evaluation in evaluations]
        if all(values):
            means: list[str | Difference] = [number(metric, float(np.mean(v))) for v in values]
            rows[metric] = means + [differences[metric] for differences in compared]
    return header, rows


def kind_cells(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Quality by kind of prompt: column names, and rows whose cells read base → sft → aligned."""
    splits = [evaluation.by_kind() for evaluation in evaluations]
    header = ["kind", "prompts", *(METRICS[metric] for metric in QUALITY)]
    rows = []
    for kind, first in splits[0].items():
        row = [kind, str(len(first.rows))]
        for metric in QUALITY:
            values = [split[kind].values(metric) for split in splits]
            means = [f"{np.mean(v):z.2f}" for v in values if v]
            row.append(" → ".join(means))
        rows.append(row)
    return header, rows


def number(metric: str, value: float, *, sign: bool = False) -> str:
    """A metric's value as the tables show it."""
    digits = 1 if metric == "length" else 3
    return f"{value:{'+' if sign else ''}z.{digits}f}"


def interval(metric: str, difference: Difference) -> str:
    """A difference as the tables show it: mean [low, high], with an asterisk if that excludes 0."""
    mean = number(metric, difference.mean, sign=True)
    low, high = number(metric, difference.low), number(metric, difference.high)
    return f"{mean}{'*' if difference.clear else ''} [{low}, {high}]"


def note(evaluations: Sequence[Evaluation]) -> str:
    """What a reader of the tables must know."""
    rows, answers = len(evaluations[0].rows), len(evaluations[0].values("exact"))
    text = f"{rows} held-out prompts, {answers} with a true answer; greedy decoding."
    if len(evaluations) > 1:
        text += " Differences with 95 % intervals (paired bootstrap over prompts); * excludes 0."
    return text


def table(evaluations: Sequence[Evaluation]) -> Table:
    """The comparison for a terminal; clear gains are green, clear losses red."""
    header, rows = cells(evaluations)
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.caption, shown.caption_justify = note(evaluations), "left"
    shown.add_column("held-out", no_wrap=True)
    for name in header:
        shown.add_column(name, justify="right")
    for metric, row in rows.items():
        texts = [METRICS[metric]]
        for cell in row:
            if isinstance(cell, str):
                texts.append(cell)
            else:
                # Without the space, so that a narrow terminal breaks the line before the bracket.
                text = escape(interval(metric, cell).replace(", ", ","))
                colour = {"gain": "green", "loss": "red"}.get(verdict(metric, cell))
                texts.append(f"[{colour}]{text}[/]" if colour else text)
        shown.add_row(*texts)
    return shown


def verdict(metric: str, difference: Difference) -> str:
    """`gain` or `loss` where the interval excludes 0 and the metric has a better end, else ``."""
    if not difference.clear or metric not in HIGHER_IS_BETTER:
        return ""
    return "gain" if difference.mean > 0 else "loss"


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """The comparison as a Markdown table, for a README."""
    header, rows = cells(evaluations)
    lines = [
        "| held-out | " + " | ".join(header) + " |",
        "|---|" + "---:|" * len(header),
    ]
    for metric, row in rows.items():
        # The asterisk is text here, not the start of an emphasis.
        texts = [
            cell if isinstance(cell, str) else interval(metric, cell).replace("*", r"\*")
            for cell in row
        ]
        lines.append(f"| {METRICS[metric]} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", note(evaluations).replace("*", r"\*")])
