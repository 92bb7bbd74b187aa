"""Several runs on one page: their arms side by side, and how each came to where it is."""

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pujax.evaluation import findings, tables
from pujax.evaluation.cards import answer_cards
from pujax.evaluation.curves import DARK, LIGHT, colour_of, held_out_panels, together
from pujax.evaluation.markup import GENERATOR, compared, document, plain, table
from pujax.evaluation.metrics import Shown
from pujax.evaluation.page import steps
from pujax.evaluation.results import OWN, shown_by
from pujax.evaluation.tables import Arm
from pujax.files.durable import refuse_other, refuse_unwritable, write_whole
from pujax.files.settings import UNTOUCHED, flat, kept_settings, of_asking, within
from pujax.text import counted


@np.errstate(over="ignore", invalid="ignore")  # a sum beyond float64 is shown as inf or nan
def write(
    page: Path,
    arms: Mapping[str, Sequence[Path]],
    columns: Sequence[Arm],
    *,
    against_first: bool,
) -> Path:
    """Write the page of several runs, `arms` their directories by what each arm is called.

    `columns` are what is compared: the arms by what their runs ended with, each against the first,
    or of a single arm its stages, each against the one before. Raises `EvaluationError` unless all
    answered the same prompts, and what reading logs and settings and writing raises.
    """
    refuse_unwritable(page.parent)
    refuse_other_page(page)
    columns = columns if against_first else tables.changed(columns)
    name = _name(page)
    runs = sum(map(len, arms.values()))
    sections = [
        f"<h1>{escape(name)}: {counted(runs, 'run')} side by side</h1>",
        _findings(columns, against_first),
        _table(columns, against_first),
        _curves(arms, shown_by(run for column in columns for run in column.runs)),
        _settings(arms),
        _directories(page.parent, arms),
        answer_cards(
            [replace(column.runs[0], model=column.model) for column in columns],
            kept_settings(next(iter(arms.values()))[0]),  # the prompts and anchors are of all
        ),
    ]
    write_whole(page, document(name, sections).encode(errors="xmlcharrefreplace"))
    return page


def refuse_other_page(page: Path) -> None:
    """Raise `DiskError` where something else than a page of several runs is at `page`."""
    of_before = f"<title>{escape(_name(page))}</title>\n<style>\n:root {{"  # and no generator
    refuse_other(page, GENERATOR.encode(), of_before.encode(errors="xmlcharrefreplace"))


def _name(page: Path) -> str:
    return "/".join(page.resolve().parts[-2:-1])


def _findings(columns: Sequence[Arm], against_first: bool) -> str:
    """How each column does against the one that it is held to, and what speaks against that."""
    first = columns[0]
    before = [first if against_first else column for column in columns[:-1]]
    told = "".join(
        f'<p class="verdict {found.style}">{escape(found.sentence)}</p>'
        for found in map(findings.against, before, columns[1:])
    )
    ended = columns if against_first else columns[-1:]
    runs = [replace(run, model=column.model) for column in ended for run in column.runs]
    early = [
        f"{column.model} is compared by its {run.model} model, the last that it has: finish it"
        for column in columns
        for run in column.runs
        if against_first and run.model in OWN[:-1]
    ]
    told_of = [*early, *(warning for run in runs for warning in findings.warnings([run]))]
    warnings = dict.fromkeys(told_of)
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return told + (f'<ul class="warnings">{items}</ul>' if items else "")


def _table(columns: Sequence[Arm], against_first: bool) -> str:
    header, rows = tables.cells(columns, against_first=against_first)
    shown = shown_by(run for column in columns for run in column.runs)
    body = [
        (shown[metric].title, [compared(shown[metric], cell) for cell in row])
        for metric, row in rows.items()
    ]
    return (
        "<h2>Held-out evaluation</h2>"
        + table(["", *header], body)
        + f"<p>{escape(tables.note(columns))}</p>"
    )


def _curves(arms: Mapping[str, Sequence[Path]], shown: Mapping[str, Shown]) -> str:
    """A picture a held-out metric, a line a run, in the colour of its arm."""
    logs = {
        name: [steps(path) for run in runs if (path := run / "metrics.jsonl").is_file()]
        for name, runs in arms.items()
    }
    pictures = []
    lines = [line for runs in logs.values() for run in runs for line in run]
    for panel in held_out_panels(lines, shown):
        light, dark = (
            "data:image/svg+xml;base64,"
            + base64.b64encode(together(list(logs.values()), theme, panel)).decode()
            for theme in (LIGHT, DARK)
        )
        pictures.append(
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{escape(panel.title)} over the steps"></picture>'
        )
    if not pictures:
        return ""
    legend = " ".join(
        f'<span class="arm"><i style="background:{colour_of(at)}"></i> {escape(name)}</span>'
        for at, name in enumerate(arms)
    )
    return (
        f'<h2>On the way</h2><p class="legend">{legend}</p>'
        f'<div class="curves">{"".join(pictures)}</div><p>A line a run, over the steps of both '
        "stages; eval.every=N gives it more points.</p>"
    )


def _settings(arms: Mapping[str, Sequence[Path]]) -> str:
    """The settings in which the arms' first runs differ."""
    kept = [flat(kept_settings(runs[0])) for runs in arms.values()]
    rows = []
    for key in dict.fromkeys(key for settings in kept for key in settings):
        values = [_told(settings.get(key)) for settings in kept]
        if len(set(values)) > 1 and not (of_asking(key) or within(key, UNTOUCHED)):
            rows.append((key, map(plain, values)))
    return f"<h2>What sets them apart</h2>{table(['setting', *arms], rows)}" if rows else ""


def _told(value: Any) -> str:
    return "" if value is None else str(value)


def _directories(folder: Path, arms: Mapping[str, Sequence[Path]]) -> str:
    """Where each run lies, linked to its own report."""
    items = []
    for name, runs in arms.items():
        links = ", ".join(
            f'<a href="{escape(os.path.relpath(run / "report.html", folder))}">'
            f"{escape(os.path.relpath(run, folder))}</a>"
            for run in runs
        )
        items.append(f"<li>{escape(name)}: {links}</li>")
    return f'<h2>Runs</h2><ul class="runs">{"".join(items)}</ul>'
