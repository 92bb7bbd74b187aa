"""All that a run left behind on one page, `report.html`, that needs nothing from elsewhere."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pujax.errors import EvaluationError
from pujax.evaluation import findings, tables
from pujax.evaluation.cards import answer_cards, group_cards, samples, whose_anchors
from pujax.evaluation.curves import (
    DARK,
    LIGHT,
    SMOOTHED,
    STAGE_TITLES,
    Panel,
    curves,
    drawable,
)
from pujax.evaluation.markup import compared, document, plain, table
from pujax.evaluation.results import Evaluation, is_number, load_all, shown_by
from pujax.evaluation.signal import control_of, failing
from pujax.evaluation.statistics import FEW, Difference
from pujax.evaluation.subjects import kept_answers
from pujax.files.durable import Line, read_jsonl, refuse_unwritable, write_whole
from pujax.files.settings import SETTINGS, kept_settings, only_preferred
from pujax.records import STAGES
from pujax.text import counted, mask


@np.errstate(over="ignore", invalid="ignore")  # a sum beyond float64 is shown as inf or nan
def write(directory: Path) -> Path:
    """Write `curves.png` and `report.html` into a run's directory; returns the page's path.

    Files that an unfinished run doesn't have yet are left out. Raises `EvaluationError` naming the
    file, and the line where there is one, for a log that can't be read, `DiskError` for a page that
    can't be written, and `ConfigError` for settings that can't be read.
    """
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise EvaluationError(f"{path} is not there: is {directory} the directory of a run?")
    refuse_unwritable(directory)
    lines = steps(path)
    page = directory / "report.html"
    evaluations = load_all(directory)
    panels = drawable(lines, shown_by(evaluations))
    drawn = curves(lines, LIGHT, "png", panels)
    html = _page(directory, lines, evaluations, panels).encode(errors="xmlcharrefreplace")
    write_whole(directory / "curves.png", drawn)
    write_whole(page, html)
    return page


def refuse_foreign(directory: Path) -> None:
    """Raise `EvaluationError` unless `directory` is a run's, by its settings.

    Raises `ConfigError` for settings that can't be read. For who gives a directory by hand: a file
    of one of this page's names may be another program's.
    """
    path = directory / SETTINGS
    if not path.is_file():
        raise EvaluationError(f"{path} is not there: is {directory} a run's directory?")
    settings = kept_settings(directory)
    missing = [key for key in ("model", "loss") if key not in settings]
    if missing:
        raise EvaluationError(
            f"{path}: not the settings of a run (no {missing[0]}): is {directory} a run's "
            "directory?"
        )


# Reading what the run left.


def steps(path: Path) -> list[Line]:
    """The lines of the stages' steps and of the evaluations between them.

    Each number is one that a run may have, or null where it wasn't finite.
    """
    lines = []
    for number, line in enumerate(read_jsonl(path), 1):
        stage = line.get("stage")
        if stage not in (*STAGES, "eval"):
            raise EvaluationError(
                f"{path}:{number}: {str(stage)[:80]!r} is no stage of a run: is {path.parent} a "
                "run's directory? If so, remove this line"
            )
        numbers = {name: line[name] for name in line if name not in ("stage", "model")}
        wrong = [
            name for name, value in numbers.items() if value is not None and not is_number(value)
        ]
        if wrong or not isinstance(line.get("step"), int):
            raise EvaluationError(
                f"{path}: {wrong[0] if wrong else 'step'} is no number in {str(line)[:80]}: remove "
                "this line"
            )
        if stage == "eval" and not isinstance(line.get("model"), str):
            raise EvaluationError(f"{path}:{number}: of no model: remove this line")
        lines.append(line)
    return lines


# The page.


def _page(
    directory: Path,
    lines: Sequence[Line],
    evaluations: Sequence[Evaluation],
    panels: Sequence[Panel],
) -> str:
    path = directory / SETTINGS
    config = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    settings = kept_settings(directory) if path.is_file() else {}
    groups = samples(directory / "samples.jsonl")
    name = "/".join(directory.resolve().parts[-2:])
    return document(
        name,
        [
            f"<h1>{escape(name)}</h1>",
            _findings(evaluations, lines, settings) if evaluations else "",
            _facts(settings, lines),
            _evaluation(evaluations, lines, settings) if evaluations else "",
            _suites(directory),
            _curves(lines, panels) if panels else "",
            answer_cards(tables.changed(evaluations), settings) if evaluations else "",
            group_cards(groups, settings) if groups else "",
            f"<h2>Settings</h2><details><summary>config.yaml</summary><pre>{escape(mask(config))}</pre>"
            "</details>"
            if config
            else "",
        ],
    )


def _findings(
    evaluations: Sequence[Evaluation], lines: Sequence[Line], settings: Mapping[str, Any]
) -> str:
    verdict = findings.verdict_on(evaluations)
    chosen_by = _select(settings, "checkpoint.best")
    warnings = findings.warnings(evaluations, control_of(lines), chosen_by)
    shares = [line.get("score/failed") for line in lines]
    if failed := failing([share for share in shares if share is not None]):
        warnings = [failed, *warnings]
    unsaid = findings.unsaid(verdict, warnings)
    told = "".join(f"<li>{escape(warning)}</li>" for warning in unsaid)
    sentence = escape(verdict.sentence)
    if len(unsaid) < len(warnings):
        sentence += ' <a href="#answers">Read the answers.</a>'
    return f'<p class="verdict {verdict.style}" id="verdict">{sentence}</p>' + (
        f'<ul class="warnings">{told}</ul>' if told else ""
    )


def _facts(settings: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """The run in one row: the settings that tell runs apart, and the steps and time it took."""
    facts: dict[str, Any] = {}
    aligning = {
        "loss": "loss._target_",
        "labels": "labels._target_",
        "scorer": "scorer.score._target_",
    }
    if _select(settings, "align.steps") == 0:  # which nothing came of
        aligning = {}
    for title, key in {"student": "model.path", **aligning, "seed": "seed"}.items():
        value = _select(settings, key)
        if value is not None:
            name = str(value)
            facts[title] = ".".join(name.split(".")[-2:]) if key.endswith("_target_") else name
    if aligning and only_preferred(settings):
        facts["scorer"] = "none: scores are given"
    layers = _select(settings, "model.shape.layers")
    if layers:
        facts["student"] = f"random, {layers} layers"
    for stage in STAGES:
        seconds = [line.get("time/step_s") or 0.0 for line in lines if line["stage"] == stage]
        if seconds:
            facts[STAGE_TITLES[stage]] = (
                f"{counted(len(seconds), 'step')}, {_minutes(sum(seconds))}"
            )
    items = "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(str(value))}</dd></div>"
        for title, value in facts.items()
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def _select(settings: Mapping[str, Any], key: str) -> Any:
    """A setting, or None where the tree has no such branch."""
    node: Any = settings
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _evaluation(
    evaluations: Sequence[Evaluation], lines: Sequence[Line], settings: Mapping[str, Any]
) -> str:
    longer = findings.sft_for_as_long(lines)
    evaluations = tables.changed(evaluations)
    header, rows = tables.cells(evaluations)
    shown = shown_by(evaluations)
    ceiling = findings.teacher(evaluations[0])
    models = len(evaluations)
    if ceiling:
        header = [*header[:models], whose_anchors(settings), *header[models:]]
    body = []
    for metric, row in rows.items():
        cells: list[str | Difference] = list(row)
        if ceiling:
            top = tables.number(shown[metric], ceiling[metric]) if metric in ceiling else ""
            cells = [*row[:models], top, *row[models:]]
        body.append((shown[metric].title, [compared(shown[metric], cell) for cell in cells]))
    kinds_header, kinds = tables.kind_cells(evaluations)
    by_kind = [(kind, map(plain, cells)) for kind, *cells in kinds]
    models_in_order = escape(" → ".join(evaluation.model for evaluation in evaluations))
    few = ""
    if len(evaluations) > 1 and len(evaluations[0].rows) < FEW:
        few = ' None is called clear, <a href="#verdict">as said above</a>.'
    return (
        "<h2>Held-out evaluation</h2>"
        + table(["", *header], body)
        + f"<p>{escape(tables.note(evaluations, few=False))}{few}</p>"
        + (f"<p>{escape(longer[0].upper() + longer[1:])}.</p>" if longer else "")
        + (
            f"<h3>By kind of prompt: {models_in_order}</h3>" + table(kinds_header, by_kind)
            if kinds
            else ""
        )
    )


def _suites(directory: Path) -> str:
    """The costs, and whatever else has been asked of the run by a suite."""
    parts = []
    for name, answer in kept_answers(directory).items():
        rows = [(row[0], map(plain, row[1:])) for row in answer.rows]
        header = ["", *answer.header[1:]]
        parts.append(
            f"<h2>{escape(name.capitalize())}</h2>{table(header, rows)}<p>{escape(answer.note)}</p>"
        )
    return "".join(parts)


def _curves(lines: Sequence[Line], panels: Sequence[Panel]) -> str:
    """A picture a panel, so that narrow pages put them below one another."""
    pictures = []
    for panel in panels:
        light, dark = (
            "data:image/svg+xml;base64,"
            + base64.b64encode(curves(lines, theme, "svg", [panel], columns=1)).decode()
            for theme in (LIGHT, DARK)
        )
        pictures.append(
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{escape(panel.title)} over the steps"></picture>'
        )
    smoothed = any(sum(line["stage"] == stage for line in lines) >= SMOOTHED for stage in STAGES)
    note = "<p>Light lines are single steps, strong ones running means.</p>" if smoothed else ""
    return f'<h2>Training</h2><div class="curves">{"".join(pictures)}</div>{note}'
