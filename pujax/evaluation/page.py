"""All that a run left behind on one page, `report.html`, that needs nothing from elsewhere."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from pujax.errors import EvaluationError
from pujax.evaluation import findings, tables, text
from pujax.evaluation.curves import DARK, LIGHT, SMOOTHED, STAGE_TITLES, curves, drawable
from pujax.evaluation.results import Evaluation, Row, load_all, shown_by
from pujax.evaluation.statistics import Difference
from pujax.files.durable import Line, read_jsonl, refuse_unwritable, write_whole
from pujax.files.settings import SETTINGS, kept_settings
from pujax.method import labels as rules
from pujax.records import STAGES
from pujax.text import blank, mask

PAGE = 4  # cards of a browser shown at once; page.js has the number from the page

CHANGE = 0.05  # in ROUGE-L, from which an answer without a truth has gained or lost


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
    lines = _steps(path)
    page = directory / "report.html"
    drawn = curves(lines, LIGHT, "png", drawable(lines))
    html = _page(directory, lines).encode(errors="xmlcharrefreplace")
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


def _steps(path: Path) -> list[Line]:
    """The lines of the stages' steps; each number is one, or null where it wasn't finite."""
    lines = []
    for number, line in enumerate(read_jsonl(path), 1):
        stage = line.get("stage")
        if stage == "eval":
            continue
        if stage not in STAGES:
            raise EvaluationError(
                f"{path}:{number}: {str(stage)[:80]!r} is no stage of a run: is {path.parent} a "
                "run's directory? If so, remove this line"
            )
        numbers = {name: value for name, value in line.items() if name != "stage"}
        wrong = [
            name
            for name, value in numbers.items()
            if not isinstance(value, int | float | None) or isinstance(value, bool)
        ]
        if wrong or not isinstance(line.get("step"), int):
            raise EvaluationError(
                f"{path}: {wrong[0] if wrong else 'step'} is no number in {str(line)[:80]}: remove "
                "this line"
            )
        lines.append(line)
    return lines


@dataclass(frozen=True)
class _Group:
    """A training group's responses, the anchor first, with what was thought of each."""

    stage: str
    step: int
    prompt: str
    texts: list[str]
    scores: list[float | None]
    labels: list[float | None]


def _samples(path: Path) -> list[_Group]:
    groups = []
    for number, line in enumerate(read_jsonl(path) if path.is_file() else [], 1):
        try:
            group = _Group(
                stage=line["stage"],
                step=line["step"],
                prompt=line["prompt"],
                texts=[line["anchor"], *line["candidates"]],
                scores=line["scores"],
                labels=line["labels"],
            )
            numbers = [*group.scores, *group.labels]
            whole = len(numbers) == 2 * len(group.texts) and group.stage in STAGE_TITLES
            whole &= all(isinstance(told, str) for told in [group.prompt, *group.texts])
            whole &= all(isinstance(n, int | float | None) for n in [*numbers, group.step])
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"{path}:{number}: no {error}: remove this line") from error
        if not whole:
            raise EvaluationError(f"{path}:{number}: not a group of samples: remove this line")
        groups.append(group)
    return groups


# The page.


def _page(directory: Path, lines: Sequence[Line]) -> str:
    """The whole HTML page; needs nothing from anywhere else, follows the reader's colour scheme."""
    evaluations = load_all(directory)
    path = directory / SETTINGS
    config = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    settings = kept_settings(directory) if path.is_file() else {}
    groups = _samples(directory / "samples.jsonl")
    name = escape("/".join(directory.resolve().parts[-2:]))
    sections = [
        f"<h1>{name}</h1>",
        _findings(evaluations) if evaluations else "",
        _facts(settings, lines),
        _evaluation(evaluations) if evaluations else "",
        _curves(lines) if lines else "",
        _answers(evaluations) if evaluations else "",
        _groups(groups, settings) if groups else "",
        f"<h2>Settings</h2><details><summary>config.yaml</summary><pre>{escape(mask(config))}</pre>"
        "</details>"
        if config
        else "",
    ]
    body = "\n".join(section for section in sections if section)
    style, script = (
        files("pujax.evaluation").joinpath(f"page.{kind}").read_text(encoding="utf-8")
        for kind in ("css", "js")
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _findings(evaluations: Sequence[Evaluation]) -> str:
    verdict = findings.verdict_on(evaluations)
    told = "".join(f"<li>{escape(warning)}</li>" for warning in findings.warnings(evaluations))
    return f'<p class="verdict {verdict.style}">{escape(verdict.sentence)}</p>' + (
        f'<ul class="warnings">{told}</ul>' if told else ""
    )


def _facts(settings: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """The run in one row: the settings that tell runs apart, and the steps and time it took."""
    facts: dict[str, Any] = {}
    for title, key in {
        "student": "model.path",
        "loss": "loss._target_",
        "labels": "labels._target_",
        "scorer": "scorer.score._target_",
        "seed": "seed",
    }.items():
        value = _select(settings, key)
        if value is not None:
            name = str(value)
            facts[title] = ".".join(name.split(".")[-2:]) if key.endswith("_target_") else name
    layers = _select(settings, "model.shape.layers")
    if layers:
        facts["student"] = f"random, {layers} layers"
    for stage in STAGES:
        seconds = [line.get("time/step_s") or 0.0 for line in lines if line["stage"] == stage]
        if seconds:
            facts[STAGE_TITLES[stage]] = f"{len(seconds)} steps, {_minutes(sum(seconds))}"
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


def _evaluation(evaluations: Sequence[Evaluation]) -> str:
    header, rows = tables.cells(evaluations)
    shown = shown_by(evaluations)
    ceiling = findings.teacher(evaluations[0])
    models = len(evaluations)
    if ceiling:
        header = [*header[:models], "teacher", *header[models:]]
    body = []
    for metric, row in rows.items():
        cells: list[str | Difference] = list(row)
        if ceiling:
            top = tables.number(shown[metric], ceiling[metric]) if metric in ceiling else ""
            cells = [*row[:models], top, *row[models:]]
        marked = []
        for cell in cells:
            if isinstance(cell, str):
                marked.append(("", escape(cell)))
            else:
                mean, _, limits = tables.interval(shown[metric], cell).partition(" ")
                style = tables.verdict(shown[metric], cell)
                marked.append((style, f"{mean} <small>{limits}</small>"))
        body.append(_row(shown[metric].title, header, marked))
    kinds_header, kinds = tables.kind_cells(evaluations)
    by_kind = [_row(row[0], kinds_header[1:], [("", escape(c)) for c in row[1:]]) for row in kinds]
    models_in_order = escape(" → ".join(evaluation.model for evaluation in evaluations))
    return (
        "<h2>Held-out evaluation</h2>"
        + _table(["", *header], body)
        + f"<p>{escape(tables.note(evaluations))}</p>"
        + (
            f"<h3>By kind of prompt: {models_in_order}</h3>" + _table(kinds_header, by_kind)
            if kinds
            else ""
        )
    )


def _row(title: str, header: Sequence[str], cells: Iterable[tuple[str, str]]) -> str:
    """A table's row: styles and HTML of its cells, each with its column's name for narrow pages."""
    marked = "".join(
        f'<td class="{style}" data-column="{escape(column)}">{cell}</td>'
        for column, (style, cell) in zip(header, cells, strict=True)
    )
    return f"<tr><th>{escape(title)}</th>{marked}</tr>"


def _table(header: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _curves(lines: Sequence[Line]) -> str:
    """A picture a panel, so that narrow pages put them below one another."""
    pictures = []
    for panel in drawable(lines):
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


# Browsers: cards with filters, a few at a time.


@dataclass(frozen=True)
class _Card:
    """An article of a browser; `marks` are what its filters look at."""

    title: str
    prompt: str
    answers: list[str]
    marks: dict[str, str]


def _browser(name: str, title: str, note: str, cards: Sequence[_Card]) -> str:
    """All cards in one section; page.js shows those that pass its filters, `PAGE` at a time."""
    filters = []
    for mark in cards[0].marks:
        values = list(dict.fromkeys(card.marks[mark] for card in cards))
        if len(values) > 1:
            options = "".join(
                f'<option value="{escape(value)}">{escape(value)}</option>' for value in values
            )
            filters.append(
                f'<label>{escape(mark)} <select data-mark="{escape(mark)}">'
                f'<option value="">all</option>{options}</select></label>'
            )
    articles = "".join(
        f'<article data-marks="{escape(_joined(card.marks.values()))}">'
        f'<p class="kind">{escape(card.title)}</p><p class="prompt">{escape(card.prompt)}</p>'
        f'<div class="answers">{"".join(card.answers)}</div></article>'
        for card in cards
    )
    order = escape(_joined(cards[0].marks))
    return (
        f'<section class="browser" id="{name}" tabindex="-1" data-page="{PAGE}" '
        f'data-order="{order}"><h2>{title}</h2><p>{note} Keys: <kbd>n</kbd> or <kbd>→</kbd> next, '
        "<kbd>p</kbd> or <kbd>←</kbd> previous.</p>"
        f'<div class="controls" hidden>{"".join(filters)}<span class="pager">'
        '<button type="button" data-turn="-1">← previous</button> <output></output> '
        '<button type="button" data-turn="1">next →</button></span></div>'
        f'<div class="cards">{articles}</div></section>'
    )


def _joined(parts: Iterable[str]) -> str:
    """Parts as one attribute; a unit separator is in none of them."""
    return "\x1f".join(part.replace("\x1f", " ") for part in parts)


def _answers(evaluations: Sequence[Evaluation]) -> str:
    """Every held-out prompt with every model's answer."""
    last = evaluations[-1]
    cards = []
    for index, first in enumerate(evaluations[0].rows):
        rows = [evaluation.rows[index] for evaluation in evaluations]
        answers = [_answer("teacher", first.anchor, *_teacher_mark(first), anchor=True)]
        answers += [
            _answer(evaluation.model, row.response, *_mark(row))
            for evaluation, row in zip(evaluations, rows, strict=True)
        ]
        marks = {"kind": first.kind or "none"}
        if len(rows) > 1:
            marks["change"] = _change(rows[-2], rows[-1])
        marks[f"{last.model} is"] = {1.0: "right", 0.0: "wrong"}.get(
            _right(rows[-1]), "no true answer"
        )
        truth = f" · answer: {first.answer}" if first.answer is not None else ""
        cards.append(_Card(f"{first.kind or 'prompt'}{truth}", first.prompt, answers, marks))
    note = f"All {len(cards)} prompts."
    if len(evaluations) > 1:
        note += f" Changes are from {escape(evaluations[-2].model)} to {escape(last.model)}."
    return _browser("answers", "Held-out answers", note, cards)


def _right(row: Row) -> float:
    """1 for a right answer, 0 for a wrong one, NaN where there is no truth."""
    value = row.values.get("exact")
    return float("nan") if value is None else value


def _change(before: Row, after: Row) -> str:
    one, other = _right(before), _right(after)
    least = 0.0
    if np.isnan(one) or np.isnan(other):
        one, other = (row.values.get("rouge_l") or 0.0 for row in (before, after))
        least = CHANGE
    return "gained" if other - one > least else "lost" if one - other > least else "same"


def _mark(row: Row) -> tuple[str, str]:
    """How the answer did, by the truth where there is one and else by ROUGE-L, and its style."""
    if row.values.get("exact") is None:
        rouge = row.values.get("rouge_l")
        return "" if rouge is None else f"ROUGE-L {rouge:.2f}", ""
    if row.values["exact"]:
        return "exact", "gain"
    return ("contains it", "") if row.values.get("contains") else ("wrong", "loss")


def _teacher_mark(row: Row) -> tuple[str, str]:
    if row.answer is None:
        return "", ""
    prompt = findings.as_prompt(row)
    if text.exact(prompt, row.anchor):
        return "exact", "gain"
    return ("contains it", "") if text.contains(prompt, row.anchor) else ("wrong", "loss")


def _groups(groups: Sequence[_Group], settings: Mapping[str, Any]) -> str:
    """Every training group, responses by what the loss prefers."""
    rule = str(_select(settings, "loss.pairs._target_")).split(".")[-1]
    pairs = getattr(rules, rule, None) if "pairs" in (_select(settings, "loss") or {}) else None
    cards = []
    for group in groups:
        size = range(len(group.texts))
        if pairs is not None:
            chosen, rejected = _preferred(pairs, group.scores)
            order = sorted(size, key=lambda i: rejected[i] - chosen[i])
            told = [_weight(chosen[i], rejected[i]) for i in size]
            bars = [chosen[i] or None for i in size]
        else:
            order = sorted(size, key=lambda i: -(group.labels[i] or 0))
            told = [(f"label {_number(group.labels[i])}", "") for i in size]
            bars = group.labels
        answers = [
            _answer(
                "anchor" if i == 0 else f"#{i}",
                group.texts[i],
                f"{told[i][0]} · score {_number(group.scores[i])}",
                told[i][1],
                bars[i],
                anchor=i == 0,
            )
            for i in order
        ]
        known = {score for score in group.scores[1:] if score is not None}
        marks = {
            "step": f"{STAGE_TITLES[group.stage]} step {group.step}",
            "signal": "scores differ" if len(known) > 1 else "scores are equal",
        }
        cards.append(_Card(marks["step"], group.prompt, answers, marks))
    how = (
        "by falling preference: the loss raises the chosen over the rejected; the bar is the "
        "weight."
        if pairs is not None
        else "by falling label; the bar is the label."
    )
    note = f"All {len(cards)}: the student's candidates and the teacher's anchor, {how}"
    return _browser("groups", "Training groups", note, cards)


def _preferred(pairs: Any, scores: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """How much of the pairs' weight has each response as its chosen, and as its rejected one."""
    values = np.array([[np.nan if score is None else score for score in scores]], np.float32)
    weights = np.nan_to_num(np.asarray(pairs(values)[0]))
    return weights.sum(axis=1).tolist(), weights.sum(axis=0).tolist()


def _weight(chosen: float, rejected: float) -> tuple[str, str]:
    """What a pair loss makes of a response, and its style."""
    if chosen == rejected:
        return "not used", ""
    name, weight, style = (
        ("chosen", chosen, "gain") if chosen > rejected else ("rejected", rejected, "loss")
    )
    return (name if weight == 1 else f"{name} {weight:.2f}"), style


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}"


def _answer(
    who: str, said: str, mark: str, style: str, bar: float | None = None, *, anchor: bool = False
) -> str:
    shown = "" if bar is None else f'<i style="width:{100 * bar:.1f}%"></i>'
    words = "<em>nothing that can be seen</em>" if blank(said) else escape(said)
    return (
        f'<div class="answer"><div class="who{" anchor" if anchor else ""}">{escape(who)}</div>'
        f'<div class="text">{words}</div>'
        f'<div class="mark"><span class="{style}">{escape(mark)}</span>{shown}</div></div>'
    )
