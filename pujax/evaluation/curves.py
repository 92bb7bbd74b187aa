"""A run's metrics over its steps, as small plots."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from pujax.evaluation.metrics import Shown
from pujax.evaluation.results import KNOWN
from pujax.files.durable import Line
from pujax.records import STAGES

STAGE_TITLES = {"sft": "SFT", "align": "alignment"}

SMOOTHED = 30  # steps from which on a running mean is drawn over the single ones


HELD_OUT = "eval/"  # what a held-out metric's name begins with


@dataclass(frozen=True)
class Panel:
    """One small plot: a metric's course over the steps of some stages, or on held-out prompts."""

    title: str
    metric: str
    unit: str
    stages: tuple[str, ...] = ("align",)
    span: tuple[float, float] | None = None


PANELS = (
    Panel("SFT loss", "loss", "nats per token", ("sft",)),
    Panel("Alignment loss", "loss", "loss"),
    Panel("Score of the candidates", "score/mean", "mean score"),
    Panel(
        "Pairs in the right order", "reward/accuracy", "share, by implied rewards", span=(0.0, 1.0)
    ),
    Panel("Margin of the pairs", "reward/margin", "implied reward"),
    Panel("KL to the reference", "kl/ref", "nats"),
    Panel("Given responses' log-ratio", "log_ratio/ref", "nats a token, to the reference"),
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


def style_of(theme: Theme) -> dict[Any, Any]:
    """How a figure in these colours is drawn, for matplotlib."""
    return {
        "font.size": 9.5,
        "text.parse_math": False,  # a dollar in a setting or in a metric's name is one
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


NONE_SHOWN: Mapping[str, Shown] = {}


def drawable(lines: Sequence[Line], shown: Mapping[str, Shown] = NONE_SHOWN) -> list[Panel]:
    """The panels whose metric the run has: on held-out prompts first, then while it trained.

    `shown` has the titles of metrics that are not pujax's own. Those of pairs are for responses
    that someone gave: where the run scores its own, the score says more.
    """
    scored = any("score/mean" in line for line in lines)
    own = [
        panel
        for panel in PANELS
        if any(_series(lines, panel, s) for s in panel.stages)
        and not (scored and panel.metric.startswith("reward/"))
    ]
    return [*held_out_panels(lines, shown), *own]


def held_out_panels(lines: Sequence[Line], shown: Mapping[str, Shown] = NONE_SHOWN) -> list[Panel]:
    """A panel for each held-out metric with a better end, or of one's own."""
    known = {**shown, **KNOWN}
    found = dict.fromkeys(name for line in lines for name in line if name.startswith(HELD_OUT))
    metrics = {name: name.removeprefix(HELD_OUT) for name in found}
    titled = {name: known.get(metric, Shown(metric)) for name, metric in metrics.items()}
    return [
        Panel(f"Held-out {told.title}", name, "mean over prompts")
        for name, told in titled.items()
        if told.better or name.removeprefix(HELD_OUT) not in KNOWN
    ]


def curves(
    lines: Sequence[Line], theme: Theme, form: str, panels: Sequence[Panel], *, columns: int = 3
) -> bytes:
    """The run's metrics as small plots, `columns` of them side by side, as a `png` or an `svg`."""
    rows = max(1, -(-len(panels) // columns))
    with matplotlib.rc_context(style_of(theme)):
        figure = _figure(rows, columns, theme)
        for place, panel in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, place)
            (_draw_held_out if panel.metric.startswith(HELD_OUT) else _draw)(
                axes, panel, lines, theme
            )
            _dress(axes, panel)
        return _image(figure, form)


ARMS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#888888")
"""Okabe and Ito's colours, and a grey, that stand out on white and on black."""


def colour_of(arm: int) -> str:
    """The colour of an arm's lines, by its place."""
    return ARMS[arm % len(ARMS)]


def together(arms: Sequence[Sequence[Sequence[Line]]], theme: Theme, panel: Panel) -> bytes:
    """A held-out metric of several runs as an SVG: a line a run, in the colour of its arm."""
    with matplotlib.rc_context(style_of(theme)):
        figure = _figure(1, 1, theme)
        axes = figure.add_subplot()
        for at, runs in enumerate(arms):
            for lines in runs:
                points = held_out(lines, panel.metric)
                x, y = [point[0] for point in points], [point[1] for point in points]
                axes.plot(x, y, "o-", color=colour_of(at), markersize=4, linewidth=1.2, alpha=0.8)
        axes.set_xlabel("step, of both stages")
        axes.margins(x=0.04, y=0.12)
        _dress(axes, panel)
        return _image(figure, "svg")


def _figure(rows: int, columns: int, theme: Theme) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.04, hspace=0.04)
    size = (11 / 3 * columns, 2.6 * rows)
    figure = Figure(figsize=size, layout=layout, facecolor=theme.paper)
    FigureCanvasAgg(figure)
    return figure


def _image(figure: Figure, form: str) -> bytes:
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
            _part(axes, start, theme)
        smooth = running_mean(values, len(values) // SMOOTHED)
        axes.plot(steps + start, values, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(steps + start, smooth, color=colour, linewidth=1.8, label=STAGE_TITLES[stage])
        start += int(steps[-1])
    axes.set_xlabel(_in_order(drawn))
    axes.margins(x=0.01, y=0.08)
    axes.set_xlim(left=0)
    low, high = axes.dataLim.intervaly
    if np.isfinite([low, high]).all() and high - low < 1e-5 * abs(high):  # noise of six digits
        axes.set_ylim(low - 0.1 * abs(low), high + 0.1 * abs(high))
    if len(drawn) > 1:
        axes.legend(frameon=False, fontsize=9, loc="best", handlelength=1.2)


def _draw_held_out(axes: Axes, panel: Panel, lines: Sequence[Line], theme: Theme) -> None:
    """What the models scored on held-out prompts, each at the step that it is of."""
    points = held_out(lines, panel.metric)
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=theme.ink, linewidth=0.8)
    for stage, title in {"": "base", **STAGE_TITLES}.items():
        drawn = [(x, y) for x, y, of in points if of == stage]
        if drawn:
            colour = theme.stages.get(stage, theme.ink)
            axes.plot(*zip(*drawn, strict=True), "o", color=colour, markersize=4.5, label=title)
    before, stages = _sft_steps(lines), {stage for _, _, stage in points}
    if before and "align" in stages:
        _part(axes, before, theme)
    axes.set_xlabel(_in_order([stage for stage in STAGES if stage in stages] or [STAGES[0]]))
    axes.margins(x=0.04, y=0.12)
    if len(stages) > 1:
        axes.legend(frameon=False, fontsize=9, loc="best", handletextpad=0.2)


def held_out(lines: Sequence[Line], metric: str) -> list[tuple[int, float, str]]:
    """(step counted from the run's first, value, stage) of each evaluation that has `metric`.

    The base is of no stage and at step 0; a value that wasn't finite is a gap. What no step aligned
    is what it was before.
    """
    before = _sft_steps(lines)
    starts = {"base": (0, ""), "sft": (0, "sft"), "aligned": (before, "align")}
    points = [
        (start + line["step"], float("nan") if line[metric] is None else line[metric], stage)
        for line in lines
        if line["stage"] == "eval" and metric in line and line["model"] in starts
        if line["step"] or line["model"] != "aligned"
        for start, stage in [starts[line["model"]]]
    ]
    return sorted(points, key=lambda point: point[0])


def _sft_steps(lines: Sequence[Line]) -> int:
    """How many steps of SFT come before alignment's first."""
    return max((line["step"] for line in lines if line["stage"] == "sft"), default=0)


def _part(axes: Axes, step: int, theme: Theme) -> None:
    """A line between the stages."""
    axes.axvline(step + 0.5, color=theme.ink, linewidth=0.8, linestyle=(0, (2, 3)))


def _in_order(stages: Sequence[str]) -> str:
    return ", then ".join(STAGE_TITLES[stage] for stage in stages) + " step"


def in_utf8(text: str) -> str:
    """A text of others as matplotlib can draw it: half of a surrogate pair stands as an escape."""
    return text.encode(errors="backslashreplace").decode()


def _dress(axes: Axes, panel: Panel) -> None:
    """What all small plots share."""
    axes.set_title(in_utf8(panel.title), loc="left", fontsize=10.5, fontweight="bold")
    axes.set_ylabel(panel.unit)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    if panel.span is not None:
        low, high = panel.span
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))


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
