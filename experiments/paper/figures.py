"""The figures: held-out curves, KL against gain, seeds, few anchors, and how well scores rank."""

import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.paper import raw
from pujax.evaluation.signal import SHUFFLED

# Okabe and Ito's palette, for all kinds of sight, and markers for more arms than it has colours.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vP*X"
HOLLOW: dict[str, Any] = {"linestyle": "none", "mfc": "none"}

_plain = matplotlib.rc_context({"text.parse_math": False})  # a dollar in a title is one

Arms = dict[str, list[raw.Raw]]

MAIN = ("default", "main", "others")  # the groups of the figures that have no group of their own


def drawn(
    results: Mapping[raw.Key, raw.Raw], chosen: Collection[str]
) -> Iterator[tuple[str, bytes]]:
    """Each figure that there is something for, as a file's name and a PNG.

    `chosen` are the runs, by name, of what validation likes best of each arm that is tested.
    """
    validated, tested = (
        _by_name([run for (_, _, of), run in sorted(results.items()) if of == split])
        for split in ("validation", "test")
    )
    final = {n: runs for n, runs in validated.items() if n in tested and n in chosen} or validated
    started = _started(final, MAIN)
    if asked_on_the_way := _started(validated, (raw.COURSE,)) or started:
        yield "curves.png", curves(asked_on_the_way)
    moved = {name: runs for name, runs in started.items() if _last(runs[0]).get("kl") is not None}
    if moved:
        yield "kl.png", kl_against_gain(moved)
    arms = {n: runs for n, runs in tested.items() if runs[0]["group"] in MAIN}
    if arms:
        yield "seeds.png", seeds(arms)
    if any(runs[0]["group"] == "anchors" for runs in tested.values()):
        yield "anchors.png", anchors({n: tested[n] for n in tested if n in chosen})
    asked = [run for (_, _, of), run in sorted(results.items()) if of == "signal"]
    if asked and (panels := _ranked(asked[0])):
        yield "signal.png", signal(panels)


def _by_name(runs: Sequence[raw.Raw]) -> Arms:
    found: Arms = {}
    for run in sorted(runs, key=lambda run: (run["place"], run["name"], run["seed"])):
        found.setdefault(run["name"], []).append(run)
    return found


def _started(arms: Arms, groups: Collection[str]) -> Arms:
    """Those of some groups that start from another's model and were asked what decides."""
    return {
        name: runs
        for name, runs in arms.items()
        if runs[0]["origin"] and runs[0]["group"] in groups and all(map(_course, runs))
    }


def _last(run: raw.Raw) -> raw.Raw:
    return run["course"][-1]


def _style(place: int) -> dict[str, Any]:
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def _names(arms: Arms) -> list[str]:
    """What each is called: its arm, and its settings where an arm is there with several."""
    titles = [runs[0]["title"] for runs in arms.values()]
    return [
        title + (f": {raw.chosen(runs[0])}" if titles.count(title) > 1 else "")
        for title, runs in zip(titles, arms.values(), strict=True)
    ]


def _title(arms: Arms) -> str:
    """What the metric that decides is called."""
    (first, *_), *_ = arms.values()
    told = first["shown"].get(first["metric"])
    return told["title"] if told else first["metric"]


@_plain
def curves(arms: Arms) -> bytes:
    """What an arm gained on validation over its steps, and over its processor minutes.

    Over what each of its seeds started from: arms with other seeds begin at other heights. The
    names are in the order in which the arms end.
    """
    figure = _figure(13, 4.2)
    for column, (label, at) in enumerate(
        (
            ("steps after the model that it starts from", lambda point: point["step"]),
            ("processor minutes", lambda point: point["seconds"]["processor"] / 60),
        ),
        1,
    ):
        axes, ends = figure.add_subplot(1, 2, column), []
        for place, (name, runs) in enumerate(zip(_names(arms), arms.values(), strict=True)):
            points = [*zip(*map(_course, runs), strict=False)]  # by time, a seed each
            x = [fmean(at(point) for point in each) for each in points]
            y = [fmean(map(_gain, runs, each)) for each in points]
            (line,) = axes.plot(x, y, label=f"{name} ({len(runs)})", **_style(place), ms=4)
            ends.append((y[-1], line))
        axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)
        _label(axes, label, f"gain in {_title(arms)}")
    named = [line for _, line in sorted(ends, key=lambda end: -end[0])]  # alike in both
    figure.legend(handles=named, loc="outside right upper", frameon=False, fontsize=8)
    return _png(figure)


def _course(run: raw.Raw) -> list[raw.Raw]:
    """The evaluations of a run's one stage, from the model that it starts with on."""
    last = "aligned" if run["steps"]["align"] else "sft"
    return [
        point
        for point in run["course"]
        if point["model"] in ("base", last) and f"eval/{run['metric']}" in point
    ]


def _value(run: raw.Raw, point: raw.Raw) -> float:
    """The metric that decides, at an evaluation of a run's course."""
    return point[f"eval/{run['metric']}"]


def _gain(run: raw.Raw, point: raw.Raw) -> float:
    """What a run has gained by an evaluation of its course over what it started from."""
    return _value(run, point) - _value(run, _course(run)[0])


@_plain
def kl_against_gain(arms: Arms) -> bytes:
    """Every run's gain on validation over what it started from, against its KL to that."""
    figure = _figure(8.5, 4.2)
    axes = figure.add_subplot()
    for place, (name, runs) in enumerate(zip(_names(arms), arms.values(), strict=True)):
        x = [_last(run)["kl"] for run in runs]
        y = [_gain(run, _course(run)[-1]) for run in runs]
        axes.plot(x, y, linestyle="none", label=name, **_style(place), ms=6)
    axes.axhline(0, color="#999999", linewidth=0.8)
    _label(axes, "KL to the model that it starts from (nats a token)", f"gain in {_title(arms)}")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return _png(figure)


@_plain
def seeds(arms: Arms) -> bytes:
    """Every seed of every arm on the test prompts, and the arms' means."""
    figure = _figure(8, 0.42 * len(arms) + 1.2)
    axes = figure.add_subplot()
    for place, runs in enumerate(reversed(arms.values())):
        values = [raw.mean(run, run["metric"]) for run in runs]
        axes.plot(values, [place] * len(values), "o", color=COLOURS[0], alpha=0.6, ms=6)
        axes.plot([fmean(values)], [place], "|", color=COLOURS[1], ms=18, mew=2)
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.set_yticks(range(len(arms)), [*reversed(_names(arms))])
    _label(axes, f"{_title(arms)}, test; a point a seed, a bar their mean", "")
    axes.grid(axis="x", linewidth=0.6, color="#dddddd")
    return _png(figure)


Point = tuple[int, float]
"""A number of anchors, and the mean of what decides."""


def by_anchors(tested: Arms) -> dict[str, tuple[list[Point], list[Point]]]:
    """Each arm of the curve, by title: its points, and those made with other settings.

    What differs beside what validation chooses for each number is another setting, and no line may
    join it to the rest.
    """
    small = [runs for runs in tested.values() if runs[0]["group"] == "anchors"]
    found = {}
    for name in dict.fromkeys(raw.arm_of(runs[0]) for runs in small):
        own = [runs for runs in tested.values() if raw.arm_of(runs[0]) == name]
        whole = next((runs for runs in own if runs[0]["arm"] == name), own[0])
        tuned = {key for runs in own for run in runs for key in run["chosen"]} | {"model.path"}

        def fixed(run: raw.Raw, tuned: Collection[str] = tuned) -> raw.Raw:
            return {key: value for key, value in run["settings"].items() if key not in tuned}

        points: tuple[list[Point], list[Point]] = ([], [])
        for runs in own:
            mean = fmean(raw.mean(run, run["metric"]) for run in runs)
            apart = fixed(runs[0]) != fixed(whole[0])
            points[apart].append((runs[0]["prompts"]["training"], mean))
        title = whole[0]["title"].partition(",")[0]
        found[title] = tuple(map(sorted, points))
    return found


@_plain
def anchors(tested: Arms) -> bytes:
    """The arms of the curve on the test prompts over the number of anchors."""
    figure = _figure(6.5, 4.2)
    axes = figure.add_subplot()
    arms = by_anchors(tested)
    for place, (title, (points, apart)) in enumerate(arms.items()):
        axes.plot(*zip(*points, strict=True), label=title, **_style(place))
        if apart:
            axes.plot(*zip(*apart, strict=True), **_style(place) | HOLLOW)
    if any(apart for _, apart in arms.values()):
        axes.plot(
            [], [], color="#777777", marker="o", label="hollow: with other settings", **HOLLOW
        )
    axes.set_xscale("log")
    ticks = sorted({count for each in arms.values() for count, _ in [*each[0], *each[1]]})
    axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
    axes.minorticks_off()
    _label(axes, "anchors", _title(tested))
    axes.legend(frameon=False)
    return _png(figure)


Ranked = dict[str, dict[str, list[tuple[bool, list[float]]]]]
"""By oracle and scorer: whether it is the control, and the share of pairs with its interval."""


def _ranked(asked: raw.Raw) -> Ranked:
    column = asked["header"].index("pairs")
    panels: Ranked = {}
    for row in asked["rows"]:
        named = re.fullmatch(rf"(.+?)({SHUFFLED})?(?: \((\w+)\))?", row[0])
        values = re.findall(r"-?\d+\.\d+", row[column])  # the mean and its interval, or a dash
        if named and values:
            scorer, control, oracle = named.groups()
            some = panels.setdefault(oracle or "the oracle", {}).setdefault(scorer, [])
            some.append((control is not None, [float(value) for value in values]))
    return panels


@_plain
def signal(panels: Ranked) -> bytes:
    """How many pairs of candidates each score orders as the oracle does, and its control."""
    most = max(len(scorers) for scorers in panels.values())
    figure = _figure(5.5 * len(panels), 0.3 * most + 1.2)
    for number, (oracle, scorers) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        for place, points in enumerate(reversed(scorers.values())):
            for control, (mean, low, high) in points:
                y, look = place - 0.2 * control, _style(int(control))
                axes.plot([low, high], [y, y], color=look["color"], linewidth=1.2)
                axes.plot([mean], [y], ms=5, mfc="white" if control else None, **look)
        axes.axvline(0.5, color="#999999", linewidth=0.8)
        axes.set_ylim(-0.8, len(scorers) - 0.4)
        axes.set_yticks(range(len(scorers)), [*reversed(scorers)])
        _label(axes, f"pairs ranked as by {oracle}; hollow: another prompt's anchor", "")
        axes.grid(axis="x", linewidth=0.6, color="#dddddd")
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=140)
    return image.getvalue()
