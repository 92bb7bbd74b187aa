"""A run's curves as `curves.png`, and all that it left behind on one page, `report.html`."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from omegaconf import OmegaConf

from pujax.evaluation import tables
from pujax.evaluation.results import Evaluation, Row, load_all, shown_by
from pujax.files.durable import Line, read_jsonl
from pujax.records import STAGES

STAGE_TITLES = {"sft": "SFT", "align": "alignment"}

GROUPS_SHOWN = 3  # sample groups of the first step, and as many of the last

ANSWERS_SHOWN = 2  # held-out prompts of each kind


@dataclass(frozen=True)
class Panel:
    """One small plot: a metric's course over the steps of some stages."""

    title: str
    metric: str
    unit: str
    stages: tuple[str, ...] = ("align",)
    span: tuple[float, float] | None = None


PANELS = (
    Panel("SFT loss", "loss", "nats per token", ("sft",)),
    Panel("Alignment loss", "loss", "loss"),
    Panel("Score of the candidates", "score/mean", "mean score"),
    Panel("KL to the reference", "kl/ref", "nats"),
    Panel("Entropy of the labels", "label/entropy", "nats"),
    Panel("Response length", "samples/length", "tokens"),
    Panel("Responses finished", "samples/finished", "share", span=(0.0, 1.0)),
    Panel("Gradient norm", "grad_norm", "norm", STAGES),
    Panel("Throughput", "time/tokens_per_s", "tokens per second", STAGES),
)


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; the stages' are from Okabe and Ito's palette for all kinds of sight."""

    ink: str
    faint: str
    paper: str
    stages: dict[str, str]


LIGHT = Theme("#1f2328", "#d9dee3", "#ffffff", {"sft": "#d55e00", "align": "#0072b2"})

DARK = Theme("#e6edf3", "#343b44", "none", {"sft": "#e69f00", "align": "#56b4e9"})


def write(directory: Path) -> Path:
    """Write `curves.png` and `report.html` into a run's directory; returns the page's path.

    Files that an unfinished run doesn't have yet are left out. Raises FileNotFoundError without
    `metrics.jsonl`, and ValueError naming file and line for a log that can't be read.
    """
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: is {directory} the directory of a run?")
    lines = [line for line in read_jsonl(path) if line.get("stage") in STAGES]
    (directory / "curves.png").write_bytes(curves(lines, LIGHT, "png"))
    page = directory / "report.html"
    page.write_text(_page(directory, lines), encoding="utf-8", errors="xmlcharrefreplace")
    return page


def curves(lines: Sequence[Line], theme: Theme, form: str) -> bytes:
    """The run's metrics as small plots side by side, as a `png` or an `svg`."""
    panels = [panel for panel in PANELS if any(_series(lines, panel, s) for s in panel.stages)]
    columns = 3
    rows = max(1, -(-len(panels) // columns))
    style: dict[Any, Any] = {
        "font.size": 9.5,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.ink,
        "axes.facecolor": "none",
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "grid.color": theme.faint,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "svg.hashsalt": "pujax",
    }
    with matplotlib.rc_context(style):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.04, hspace=0.04)
        figure = Figure(figsize=(11, 2.6 * rows), layout=layout, facecolor=theme.paper)
        FigureCanvasAgg(figure)
        for place, panel in enumerate(panels, 1):
            _draw(figure.add_subplot(rows, columns, place), panel, lines, theme)
        image = io.BytesIO()
        metadata = {"Date": None} if form == "svg" else None
        figure.savefig(image, format=form, dpi=160, metadata=metadata)
    return image.getvalue()


def _draw(axes: Axes, panel: Panel, lines: Sequence[Line], theme: Theme) -> None:
    """The metric step by step in a light line, its running mean in a strong one."""
    start = 0
    drawn = [stage for stage in panel.stages if _series(lines, panel, stage)]
    for stage in drawn:
        steps, values = map(np.array, zip(*_series(lines, panel, stage), strict=True))
        colour = theme.stages[stage]
        if start:
            axes.axvline(start + 0.5, color=theme.ink, linewidth=0.8, linestyle=(0, (2, 3)))
        smooth = running_mean(values, len(values) // 30)
        axes.plot(steps + start, values, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(steps + start, smooth, color=colour, linewidth=1.8, label=STAGE_TITLES[stage])
        start += int(steps[-1])
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_ylabel(panel.unit)
    axes.set_xlabel(", then ".join(STAGE_TITLES[stage] for stage in drawn) + " step")
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.01, y=0.08)
    axes.set_xlim(left=0)
    if panel.span is not None:
        low, high = panel.span
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    if len(drawn) > 1:
        axes.legend(frameon=False, fontsize=9, loc="best", handlelength=1.2)


def _series(lines: Sequence[Line], panel: Panel, stage: str) -> list[tuple[int, float]]:
    """(step, value) where the stage has one; a value that wasn't finite is a gap."""
    return [
        (line["step"], float("nan") if line[panel.metric] is None else line[panel.metric])
        for line in lines
        if line["stage"] == stage and panel.metric in line
    ]


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value and the `reach` on either side, or as many as there are; skips NaN."""
    known = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    starts, ends = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    count = counts[ends] - counts[starts]
    return np.where(count, (totals[ends] - totals[starts]) / np.maximum(count, 1), np.nan)


def _page(directory: Path, lines: Sequence[Line]) -> str:
    """The whole HTML page; needs nothing from anywhere else, follows the reader's colour scheme."""
    evaluations = load_all(directory)
    samples_path, config_path = directory / "samples.jsonl", directory / "config.yaml"
    samples = read_jsonl(samples_path) if samples_path.is_file() else []
    config = config_path.read_text(encoding="utf-8") if config_path.is_file() else ""
    name = escape("/".join(directory.resolve().parts[-2:]))
    sections = [
        f"<h1>{name}</h1>",
        _facts(config, lines),
        _evaluation(evaluations) if evaluations else "",
        _curves(lines) if lines else "",
        _answers(evaluations) if evaluations else "",
        _groups(samples) if samples else "",
        f"<h2>Settings</h2><details><summary>config.yaml</summary><pre>{escape(config)}</pre>"
        "</details>"
        if config
        else "",
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )


def _facts(config: str, lines: Sequence[Line]) -> str:
    """The run in one row: the settings that tell runs apart, and the steps and time it took."""
    settings = OmegaConf.create(config)
    facts: dict[str, Any] = {}
    for title, key in {
        "student": "model.path",
        "loss": "loss._target_",
        "labels": "labels._target_",
        "scorer": "scorer.score._target_",
        "seed": "seed",
    }.items():
        value = OmegaConf.select(settings, key)
        if value is not None:
            name = str(value)
            facts[title] = ".".join(name.split(".")[-2:]) if key.endswith("_target_") else name
    for stage in STAGES:
        seconds = [line["time/step_s"] for line in lines if line["stage"] == stage]
        if seconds:
            facts[STAGE_TITLES[stage]] = f"{len(seconds)} steps, {_minutes(sum(seconds))}"
    items = "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(str(value))}</dd></div>"
        for title, value in facts.items()
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _evaluation(evaluations: Sequence[Evaluation]) -> str:
    header, rows = tables.cells(evaluations)
    shown = shown_by(evaluations)
    body = []
    for metric, row in rows.items():
        texts = [f"<th>{escape(shown[metric].title)}</th>"]
        for cell in row:
            if isinstance(cell, str):
                texts.append(f"<td>{cell}</td>")
            else:
                mean, _, limits = tables.interval(shown[metric], cell).partition(" ")
                style = tables.verdict(shown[metric], cell)
                texts.append(f'<td class="{style}">{mean} <small>{limits}</small></td>')
        body.append(f"<tr>{''.join(texts)}</tr>")
    kinds_header, kinds = tables.kind_cells(evaluations)
    return (
        "<h2>Held-out evaluation</h2>"
        + _table(["", *header], body)
        + f"<p>{escape(tables.note(evaluations))}</p>"
        + (
            f"<h3>By kind of prompt: {escape(' → '.join(e.model for e in evaluations))}</h3>"
            + _table(
                kinds_header,
                [
                    f"<tr><th>{escape(row[0])}</th>"
                    + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
                    + "</tr>"
                    for row in kinds
                ],
            )
            if kinds
            else ""
        )
    )


def _table(header: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _curves(lines: Sequence[Line]) -> str:
    light, dark = (
        "data:image/svg+xml;base64," + base64.b64encode(curves(lines, theme, "svg")).decode()
        for theme in (LIGHT, DARK)
    )
    return (
        '<h2>Training</h2><div class="wide"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="The run\'s metrics over its steps"></picture></div>'
        "<p>Light lines are single steps, strong ones running means.</p>"
    )


def _answers(evaluations: Sequence[Evaluation]) -> str:
    """The first held-out prompts of each kind with every model's answer."""
    kinds: dict[str | None, list[int]] = {}
    for index, row in enumerate(evaluations[0].rows):
        kinds.setdefault(row.kind, []).append(index)
    cards = []
    for kind, indices in kinds.items():
        for index in indices[:ANSWERS_SHOWN]:
            rows = [evaluation.rows[index] for evaluation in evaluations]
            first = rows[0]
            answers = [_answer("teacher", first.anchor, ("", ""), anchor=True)]
            answers += [
                _answer(evaluation.model, row.response, _mark(row))
                for evaluation, row in zip(evaluations, rows, strict=True)
            ]
            truth = f" · answer: {escape(first.answer)}" if first.answer is not None else ""
            title = f'<p class="kind">{escape(kind or "prompt")}{truth}</p>'
            cards.append(_card(title, first.prompt, answers))
    return "<h2>Held-out answers</h2><p>The first of each kind.</p>" + "".join(cards)


def _mark(row: Row) -> tuple[str, str]:
    """How the answer did, by the truth where there is one and else by ROUGE-L, and its style."""
    if row.values.get("exact") is None:
        rouge = row.values.get("rouge_l")
        return "" if rouge is None else f"ROUGE-L {rouge:.2f}", ""
    if row.values["exact"]:
        return "exact", "gain"
    return ("contains it", "") if row.values.get("contains") else ("wrong", "loss")


def _groups(samples: Sequence[Line]) -> str:
    """Groups of the first and the last step that have any: responses by falling label."""
    first, last = ((samples[end]["stage"], samples[end]["step"]) for end in (0, -1))
    cards = []
    for stage, step in dict.fromkeys([first, last]):
        groups = [line for line in samples if (line["stage"], line["step"]) == (stage, step)]
        for group in groups[:GROUPS_SHOWN]:
            responses = [group["anchor"], *group["candidates"]]
            order = sorted(range(len(responses)), key=lambda i: -(group["labels"][i] or 0))
            answers = []
            for i in order:
                label, score = group["labels"][i], group["scores"][i]
                values = " · ".join(
                    f"{name} " + ("not finite" if value is None else f"{value:.2f}")
                    for name, value in (("label", label), ("score", score))
                )
                who = "anchor" if i == 0 else f"#{i}"
                answers.append(_answer(who, responses[i], (values, ""), label, anchor=i == 0))
            title = f'<p class="kind">{escape(STAGE_TITLES[stage])} step {step}</p>'
            cards.append(_card(title, group["prompt"], answers))
    return (
        "<h2>Training groups</h2><p>The student's candidates and the teacher's anchor, by falling "
        "label; the bar is the label.</p>" + "".join(cards)
    )


def _card(title: str, prompt: str, answers: Iterable[str]) -> str:
    return (
        f'<article>{title}<p class="prompt">{escape(prompt)}</p>'
        f'<div class="answers">{"".join(answers)}</div></article>'
    )


def _answer(
    who: str, text: str, mark: tuple[str, str], label: float | None = None, *, anchor: bool = False
) -> str:
    bar = "" if label is None else f'<i style="width:{100 * label:.1f}%"></i>'
    verdict, style = mark
    return (
        f'<div class="who{" anchor" if anchor else ""}">{escape(who)}</div>'
        f'<div class="text">{escape(text)}</div>'
        f'<div class="mark"><span class="{style}">{escape(verdict)}</span>{bar}</div>'
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #ffffff;
  --line: #d9dee3; --box: #f6f8fa; --gain: #00694f; --loss: #a84300; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line: #343b44; --box: #151b23;
    --gain: #3fc79a; --loss: #f0883e; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .5rem 0; color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0; }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 400; }
small { color: var(--soft); font-weight: 400; }
.gain { color: var(--gain); font-weight: 600; }
.loss { color: var(--loss); font-weight: 600; }
img { width: 100%; min-width: 700px; height: auto; display: block; }
article { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; margin: .8rem 0; }
.kind { font-size: .8rem; margin: 0; }
.prompt { color: var(--ink); font-weight: 600; margin: .15rem 0 .6rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: auto 1fr auto; }
.answers > div { padding: .3rem .6rem; border-top: 1px solid var(--line); }
.who { color: var(--soft); }
.who.anchor { color: var(--accent); font-weight: 600; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0; }
.mark { color: var(--soft); font-size: .85rem; min-width: 9.5rem; text-align: right;
  font-variant-numeric: tabular-nums; }
.mark i { display: block; height: 4px; margin: .2rem 0 0 auto; border-radius: 2px;
  background: var(--accent); }
pre { background: var(--box); padding: 1rem; border-radius: 8px; overflow-x: auto;
  font-size: .85rem; }
summary { cursor: pointer; }
"""
