"""Tables and figures from the raw JSON alone: python -m experiments.paper.tables RESULTS."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from experiments.paper import figures, raw
from pujax.errors import EvaluationError, PujaxError, one_of, require
from pujax.evaluation.judging import SAID
from pujax.evaluation.metrics import Shown
from pujax.evaluation.results import Evaluation, Row
from pujax.evaluation.statistics import Difference, compare_runs, interval_over_runs
from pujax.evaluation.tables import number
from pujax.evaluation.winrate import preferred_of, wins_of
from pujax.files.durable import write_whole

# Columns of the tables, as far as the results have them.
METRICS = (
    "sampled_exact",
    "sampled_contains",
    "exact",
    "contains",
    "rouge_l",
    "anchor_logp",
    "length",
    "finished",
)

COMPARED = ("sampled_exact", "sampled_contains", "rouge_l", "anchor_logp")

# What the cost table assumes, in one currency.
PRICE = {"prompt_tokens": 0.5e-6, "completion_tokens": 1.5e-6}
HOUR, PAIR_S, REWARD_PAIRS = 20.0, 30.0, 10_000


@dataclass(frozen=True)
class Line:
    """The runs of one arm with one choice of settings, on one split: a line of a table."""

    title: str
    runs: tuple[raw.Raw, ...]

    @property
    def first(self) -> raw.Raw:
        """What all the runs share, as the first one has it."""
        return self.runs[0]

    @property
    def shown(self) -> dict[str, Shown]:
        """How the metrics are shown that the runs have."""
        return {name: Shown(**told) for name, told in self.first["shown"].items()}

    def means(self, metric: str) -> list[float]:
        """A metric's mean in each run that has it."""
        known = [
            run for run in self.runs if any(v is not None for v in run["values"].get(metric, []))
        ]
        return [raw.mean(run, metric) for run in known]

    def evaluations(self, metrics: Sequence[str] = COMPARED) -> list[Evaluation]:
        """The runs' values as the statistics take them."""
        shown = {name: told for name, told in self.shown.items() if name in metrics}
        return [Evaluation(run["name"], tuple(_rows(run, shown)), shown) for run in self.runs]


def _rows(run: raw.Raw, metrics: Iterable[str]) -> Iterator[Row]:
    for i, (name, kind, answer) in enumerate(
        zip(run["id"], run["kind"], run["answer"], strict=True)
    ):
        values = {metric: run["values"][metric][i] for metric in metrics}
        yield Row(name, kind, "", answer, "", run["response"][i], values)


def lines_of(results: Mapping[raw.Key, raw.Raw], split: str) -> list[Line]:
    """The results on a split as lines, in the order of the arms; each choice of an arm is one."""
    runs: dict[str, list[raw.Raw]] = {}
    for (name, _, of), result in sorted(results.items()):
        if of == split and result["group"] not in (raw.PACE, raw.COURSE):
            runs.setdefault(name, []).append(result)
    groups = sorted(
        runs.values(), key=lambda some: (raw.GROUPS.index(some[0]["group"]), some[0]["place"])
    )
    arms = [some[0]["arm"] for some in groups]
    return [
        Line(
            first["title"] + (f" ({raw.chosen(first)})" if arms.count(first["arm"]) > 1 else ""),
            (first, *others),
        )
        for first, *others in groups
    ]


def of_group(lines: Iterable[Line], *groups: str) -> list[Line]:
    """The lines of some groups of arms."""
    return [line for line in lines if line.first["group"] in groups]


# --- tables ---------------------------------------------------------------------------------------


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(shown: Shown, values: Sequence[float]) -> str:
    """Mean ± standard error over seeds; the mean alone of one."""
    if not values:
        return "–"
    mean = number(shown, fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {number(shown, float(np.std(values, ddof=1)) / len(values) ** 0.5)}"


def cell(line: Line, metric: str) -> str:
    """A metric over the seeds, and of how many that is where some have no value of it."""
    values = line.means(metric)
    text = spread(line.shown[metric], values)
    return f"{text} (of {len(values)})" if 0 < len(values) < len(line.runs) else text


def interval(shown: Shown, found: Difference | None) -> str:
    """A difference with its interval, bold where that excludes 0."""
    if found is None:
        return "–"
    low, high = number(shown, found.low), number(shown, found.high)
    text = f"{number(shown, found.mean, sign=True)} [{low}, {high}]"
    return f"**{text}**" if found.clear else text


def quality(lines: Sequence[Line]) -> str:
    """Each arm's metrics, mean ± standard error over seeds."""
    shown = lines[0].shown
    metrics = [metric for metric in METRICS if metric in shown]
    rows = [
        [line.title, str(len(line.runs)), *(cell(line, metric) for metric in metrics)]
        for line in lines
    ]
    return grid(["arm", "seeds", *(shown[metric].title for metric in metrics)], rows)


def against(lines: Sequence[Line], by_arm: Mapping[str, Line]) -> str:
    """How far each arm is above the one that it is against, over seeds and prompts.

    That is by the seeds that both have, where these began with the same models, and else by all.
    """
    pairs = []
    for line in lines:
        other = by_arm.get(line.first["against"])
        if other is not None and other.first["arm"] != line.first["arm"]:
            shared = _in_pairs(line, other)
            pairs.append((*(shared or (line, other)), shared is not None))
    text = _differences(lines[0].shown, pairs)
    return text or "What they are compared with has no results yet."


def above_origin(lines: Sequence[Line], others: Sequence[Line]) -> str:
    """How far each arm is above the model that it starts from, by the seeds that both have."""
    named = {line.first["name"]: line for line in others}
    origins = ((line, named.get(line.first["origin"] or "")) for line in lines)
    found = [_in_pairs(line, origin) for line, origin in origins if origin is not None]
    return _differences(lines[0].shown, [(*pair, True) for pair in found if pair is not None])


def _in_pairs(line: Line, other: Line) -> tuple[Line, Line] | None:
    """The runs of both whose seed and whose model to begin with are the same; None for no such.

    A model that others start from begins with itself.
    """

    def begun(run: raw.Raw) -> tuple[int, str]:
        return run["seed"], run["origin"] or run["name"]

    shared = {begun(run) for run in line.runs} & {begun(run) for run in other.runs}
    if not shared:
        return None
    one, two = (
        Line(each.title, tuple(run for run in each.runs if begun(run) in shared))
        for each in (line, other)
    )
    return one, two


def _differences(shown: Mapping[str, Shown], pairs: Sequence[tuple[Line, Line, bool]]) -> str:
    """How far the first of each pair is above the second, `matched` or not; nothing of no pairs."""
    if not pairs:
        return ""
    metrics = [metric for metric in COMPARED if metric in shown]
    rows = []
    for line, other, matched in pairs:
        runs = [sorted(each.runs, key=lambda run: run["seed"]) for each in (other, line)]
        values = (Line("", tuple(some)).evaluations() for some in runs)
        found = compare_runs(*values, matched=matched)
        seeds = str(len(line.runs)) + ("" if matched else f" and {len(other.runs)}")
        cells = [interval(shown[metric], found.get(metric)) for metric in metrics]
        rows.append([f"{line.title} − {other.title}", seeds, *cells])
    return grid(["difference", "seeds", *(shown[metric].title for metric in metrics)], rows)


def methods(
    lines: Sequence[Line], chosen: Sequence[Line], results: Mapping[raw.Key, raw.Raw]
) -> str:
    """Each method on validation, seed 0, against what it starts from and what it is held against.

    And how it ranks the candidates, a dash where that was not asked.
    """
    shown, best = lines[0].shown, best_of_arms(chosen)
    metrics = [metric for metric in COMPARED if metric in shown]
    named = {line.first["name"]: line for line in chosen}
    first = metrics[0]

    def above(line: Line, other: Line | None, matched: bool) -> Mapping[str, Difference]:
        if other is None:
            return {}
        pair = [Line("", each.runs[:1]).evaluations() for each in (other, line)]
        return compare_runs(*pair, matched=matched)

    rows = []
    for line in lines:
        begun = above(line, named.get(line.first["origin"] or ""), True)
        found = above(line, best.get(line.first["against"]), False)
        ranking = results.get((line.first["name"], 0, "ranking"))
        ranked = ["–"] * 3
        if ranking is not None:
            model, _, optimum = ranking["rows"]
            ranked = [*model[1:], optimum[1]]
        cells = [interval(shown[metric], found.get(metric)) for metric in metrics]
        start = interval(shown[first], begun.get(first))
        value = number(shown[first], line.means(first)[0])
        rows.append([line.title, value, start, *cells, *ranked])
    header = ["method", shown[first].title, "above its start"]
    ranked = ["by log-prob", "by log-prob a token", "DPO's optimum by log-prob"]
    over = [f"{shown[metric].title}: over the other" for metric in metrics]
    return grid([*header, *over, *ranked], rows)


def best_of_arms(lines: Sequence[Line]) -> dict[str, Line]:
    """Of each arm the line that does best by what decides; of equals the first.

    That is the mean over the seeds that all lines of an arm have.
    """
    arms: dict[str, list[Line]] = {}
    for line in lines:
        arms.setdefault(line.first["arm"], []).append(line)
    return {arm: _best(some) for arm, some in arms.items()}


def _best(lines: Sequence[Line]) -> Line:
    def score(line: Line) -> float:
        runs = _of_shared_seeds(line, lines) or line.runs[:1]
        return fmean(raw.mean(run, run["metric"]) for run in runs)

    return max(lines, key=score)


def _of_shared_seeds(line: Line, others: Sequence[Line]) -> tuple[raw.Raw, ...]:
    """The line's runs of the seeds that all of the others have."""
    shared = set.intersection(*({run["seed"] for run in each.runs} for each in (line, *others)))
    return tuple(run for run in line.runs if run["seed"] in shared)


def chosen_of_arms(lines: Sequence[Line], chosen: Sequence[Line]) -> dict[str, Line]:
    """Of each arm that one of `lines` which the validation results, `chosen`, like best."""
    names = {line.first["name"] for line in lines}
    asked = [line for line in chosen if line.first["name"] in names]
    best = {arm: line.first["name"] for arm, line in best_of_arms(asked).items()}
    found: dict[str, Line] = {}
    for line in lines:
        arm = line.first["arm"]
        if best.get(arm, line.first["name"]) == line.first["name"]:
            found.setdefault(arm, line)
    return found


def by_kind(lines: Sequence[Line]) -> str:
    """The metric that decides by kind of prompt, and ROUGE-L of the kinds that haven't it."""
    first = lines[0].first
    metrics = {}
    for kind in sorted({kind for kind in first["kind"] if kind is not None}):
        known = _values(_only(first, kind), first["metric"])
        metrics[kind] = first["metric"] if known else "rouge_l"
    rows = []
    for line in lines:
        columns = [[_values(_only(run, k), m) for run in line.runs] for k, m in metrics.items()]
        means = [[fmean(values) for values in column if values] for column in columns]
        rows.append([line.title, *(spread(Shown("", 3), column) for column in means)])
    shown = lines[0].shown
    return grid(["arm", *(f"{kind}: {shown[m].title}" for kind, m in metrics.items())], rows)


def _only(run: raw.Raw, kind: str) -> dict[str, list[float | None]]:
    at = [i for i, each in enumerate(run["kind"]) if each == kind]
    return {metric: [values[i] for i in at] for metric, values in run["values"].items()}


def _values(columns: Mapping[str, Sequence[float | None]], metric: str) -> list[float]:
    return [value for value in columns.get(metric, []) if value is not None]


def training(lines: Sequence[Line]) -> str:
    """What the arms' last stages took: steps, seconds, and what was chosen."""
    rows = []
    for line in lines:
        cells = []
        for stage in ("sft", "align"):
            cells.append(str(max(run["steps"][stage] for run in line.runs)))
        for kind in ("wall", "processor"):
            spent = [sum((s[kind] or 0) for s in run["seconds"].values()) for run in line.runs]
            cells.append(f"{fmean(spent) / 60:.1f}")
        prompts = str(line.first["teacher"]["queries"])
        rows.append([line.title, *cells, prompts, raw.chosen(line.first) or "–"])
    header = ["arm", "SFT steps", "alignment steps", "minutes", "processor minutes"]
    return grid([*header, "anchors", "chosen"], rows)


def paces(results: Mapping[raw.Key, raw.Raw]) -> str:
    """How long SFT may continue, where that was measured."""
    found = [result for result in results.values() if result["group"] == raw.PACE]
    if not found:
        return ""
    clock, of = ("wall", "") if found[0].get("device") else ("processor", "processor ")
    told = []
    for title, runs in groupby(found, lambda result: result["title"]):
        steps = [result["step_s"] for result in runs]
        sft, align = (fmean(step[stage][clock] for step in steps) for stage in ("sft", "align"))
        told.append(
            f"* {title}: a step of SFT {sft:.3g} {of}seconds, one of alignment {align:.3g}, which "
            f"is worth {align / sft:.2f} of SFT"
        )
    return "\n\nMeasured side by side, both stages in one run:\n\n" + "\n".join(told)


def anchors_curve(lines: Sequence[Line], by_arm: Mapping[str, Line]) -> str:
    """The arms of the curve by the number of anchors, and how far above what they start from.

    And above what they are against, where that has as many anchors.
    """
    small = of_group(lines, "anchors")
    names = list(dict.fromkeys(raw.arm_of(line.first) for line in small))
    some = [line for line in lines if raw.arm_of(line.first) in names]
    places = {name: place for place, name in enumerate(names)}
    some.sort(key=lambda r: (r.first["prompts"]["training"], places[raw.arm_of(r.first)]))
    shown = some[0].shown
    metrics = [metric for metric in COMPARED if metric in shown]
    rows = []
    for line in some:
        cells = [cell(line, metric) for metric in metrics]
        count = str(line.first["prompts"]["training"])
        rows.append([count, line.title.partition(",")[0], str(len(line.runs)), *cells])
    parts = [grid(["anchors", "arm", "seeds", *(shown[metric].title for metric in metrics)], rows)]
    if above := above_origin(small, small):
        parts.append(above)
    as_many = {arm: line for arm, line in by_arm.items() if line.first["group"] == "anchors"}
    if others := [line for line in small if line.first["against"] in as_many]:
        parts.append(against(others, as_many))
    return "\n\n".join(parts)


def cost(line: Line) -> str:
    """What an arm's labels took of the teacher, beside what other ways to them would ask."""
    result, settings = line.first, line.first["settings"]
    teacher = result["teacher"]
    visits = settings["align.steps"] * settings["align.prompts"]
    judged = visits * settings["sampling.candidates"]
    words = teacher["prompt_tokens"] / teacher["queries"]
    answer = teacher["completion_tokens"] / teacher["queries"]
    tokens = {"prompt_tokens": judged * (words + 2 * answer), "completion_tokens": float(judged)}
    person = PAIR_S / 3600 * HOUR
    rows = [
        ("one anchor a prompt", teacher["queries"], teacher, 0),
        ("the teacher judges every candidate beside the anchor", judged, tokens, 0),
        ("people compare one pair a prompt and step", 0, {}, visits),
        ("people compare pairs for a reward model", 0, {}, REWARD_PAIRS),
    ]
    made = []
    for what, queries, spent, pairs in rows:
        money = sum(spent.get(key, 0) * price for key, price in PRICE.items()) + pairs * person
        counts = [round(spent.get(key, 0)) for key in PRICE]
        made.append(
            [
                what,
                *(f"{n:,}" for n in (queries, *counts, pairs)),
                f"{money:,.2f}" if money > 1 else f"{money:.4f}",
            ]
        )
    header = ["labels", "queries", "tokens in", "tokens out", "pairs by people", "money"]
    return grid(header, made)


def sections(results: Mapping[raw.Key, raw.Raw]) -> Iterator[str]:
    """The parts of tables.md."""
    yield "# Results\n\nMade of `raw/` alone by `python -m experiments.paper.tables`; do not edit."
    tested, chosen = lines_of(results, "test"), lines_of(results, "validation")
    arms = of_group(tested, "main", "others")
    by_arm = chosen_of_arms(tested, chosen)
    default, fresh = of_group(tested, "default"), of_group(tested, "fresh")
    if trained := [*default, *arms, *fresh]:
        size = trained[0].first["prompts"]
        runs = [run for line in tested for run in line.runs]
        machines = sorted({run.get("device") or run["machine"]["processor"] for run in runs})
        yield (
            f"{size['evaluated']} test prompts, {size['with an answer']} of them with a true "
            "answer. Sampled: the mean over answers at "
            f"temperature 0.7. Machine: {'; '.join(machines)}.\n\nMean ± standard error over "
            "seeds. 95 % intervals: crossed bootstrap over seeds and prompts, 10,000 resamples; "
            "where two arms began with the same models, as an arm and the model of its own seed "
            "did, over the seeds that both have, together; bold where they exclude 0, which one in "
            "twenty does by chance. With one seed a side they are over prompts alone."
        )
    if default:
        yield (
            "## What `make train` does\n\nThe same settings, on more prompts of more kinds.\n\n"
            + "\n\n".join(
                [quality(default), against(default, by_arm), above_origin(default, tested)]
            )
        )
    if arms:
        yield "## Arms\n\n" + quality(arms)
        yield "## Against SFT continued\n\n" + against(arms, by_arm)
        if text := above_origin(arms, tested):
            yield (
                "## Against the model that an arm starts from\n\nBy the seeds that both have.\n\n"
                + text
            )
    if any(line.first["against"] in by_arm for line in fresh):
        yield (
            "## Prompts that SFT has not seen\n\nSFT on one half of the prompts; the other half is "
            "aligned on, or SFT continues on it.\n\n"
            + quality(fresh)
            + "\n\n"
            + against(fresh, by_arm)
        )
    if default or arms:
        yield "## By kind of prompt\n\n" + by_kind([*default, *arms])
    if trained:
        yield (
            "## What training took\n\nAfter the model that an arm starts from: steps times the "
            "mean step, those that compiled left out. Processor minutes are of all cores; other "
            "work on the machine lengthens them too.\n\n" + training(trained) + paces(results)
        )
    if of_group(tested, "anchors"):
        yield "## Few anchors\n\n" + anchors_curve(tested, by_arm)
    at_best = best_of_arms(chosen)
    for text, of in (("", by_arm), ("On the validation split.\n\n", at_best)):
        if ablations := of_group(of.values(), "ablations"):
            bases = {line.first["against"] for line in ablations}
            arms_of = {name: of[name] for name in sorted(bases & of.keys())}
            arms_of |= {line.first["arm"]: line for line in ablations}
            shown = quality([*_and_by_seed(arms_of.values(), ablations)])
            yield f"## Ablations\n\n{text}{shown}\n\n{against(ablations, of)}"
            break
    aligned = [line for line in [*default, *arms] if line.first["steps"]["align"]]
    if aligned:
        yield (
            "## What the labels cost\n\n" + cost(aligned[0]) + "\n\nAssumed: "
            f"{PRICE['prompt_tokens'] * 1e6:g} and {PRICE['completion_tokens'] * 1e6:g} a million "
            f"tokens in and out; a judge reads prompt, anchor and candidate and answers one token; "
            f"people are paid {HOUR:g} an hour and take {PAIR_S:g} s a pair; a reward model is "
            f"trained on {REWARD_PAIRS:,} pairs. The teacher here ran on a machine of one's own."
        )
    if asked := [
        line
        for line in chosen
        if line.first["group"] in ("methods", "others")
        or (line.first["name"], 0, "ranking") in results
    ]:
        others = {at_best[arm].title for line in asked if (arm := line.first["against"]) in at_best}
        yield (
            "## Methods\n\nOn the validation split, seed 0: the metric that decides, how far it is "
            "above the model that the method starts from, and how far each metric is above "
            f"{' or '.join(sorted(others)) or 'what it is held against'}; then of the pairs of "
            "candidates that the oracle orders the share that the model ranks rightly "
            "(`suite=ranking`; a dash: not asked).\n\n" + methods(asked, chosen, results)
        )
    for (_, seed, split), result in sorted(results.items()):
        if split == "signal":
            yield (
                f"## How well scores rank\n\n{result['title']}, seed {seed}: its own candidates "
                "for the validation prompts, held against an oracle (`suite=signal`). "
                f"{result['note']}\n\n{grid(result['header'], result['rows'])}"
            )
    chosen = [line for line in chosen if line.first["group"] != "methods"]
    if chosen:
        named = [Line(_named(line), line.runs) for line in chosen]
        text = "## Validation\n\nWhat was compared to choose settings.\n\n" + quality(named)
        best = best_of_arms(named)
        if len(best) > 1:
            text += (
                "\n\nThe better choice of each arm, over the prompts that it was chosen by: leads, "
                "not results.\n\n" + against([*best.values()], best)
            )
        if above := above_origin(named, named):
            text += "\n\nOf each choice, against the model that it starts from.\n\n" + above
        yield text


def _and_by_seed(lines: Iterable[Line], others: Sequence[Line]) -> Iterator[Line]:
    """Each line; one with seeds that some against it lack once more, by the shared ones alone."""
    for line in lines:
        yield line
        held = [other for other in others if other.first["against"] == line.first["arm"]]
        runs = _of_shared_seeds(line, held)
        if 0 < len(runs) < len(line.runs):
            named = ", ".join(str(run["seed"]) for run in runs)
            yield Line(f"{line.title}, seed {named}", runs)


def _named(line: Line) -> str:
    chosen = raw.chosen(line.first)
    return line.first["title"] + (f": {chosen}" if chosen else "")


def _question(judged: raw.Raw) -> tuple[str, str, str]:
    """Who is judged, against whom and by whom, whatever the seed."""
    return judged["title"], judged["against"]["title"], judged["judge"]


PARTS = {"win rate": wins_of, "preferred, the lean taken out": preferred_of}
"""What is said of all seeds at once, by how surely the judge took what was shown first."""


def _over_seeds(found: Sequence[raw.Raw], part: Callable[[np.ndarray, np.ndarray], Any]) -> str:
    """A mean over the prompts that every seed has, with its interval over seeds and prompts.

    Equal answers were not judged and are a tie; a pair of which a verdict failed is left out.
    """
    tie = (0.5, 0.5)
    seeds = [
        {
            record["id"]: verdicts
            for record in one["records"]
            if None not in (verdicts := record.get(SAID[1], tie))
        }
        for one in found
    ]
    ids = [id for id in seeds[0] if all(id in other for other in seeds)]
    if not ids:  # as of seeds that were asked of other prompts each
        return ""
    firsts = np.array([[each[id] for id in ids] for each in seeds])
    mean = interval_over_runs(part(firsts[..., 0], firsts[..., 1]))
    return f"{mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def judged(folder: Path) -> str:
    """What a judge prefers, as `experiments.paper.judge` left it; nothing where it wasn't asked."""
    found = [raw.read_judged(path) for path in sorted(folder.glob("judged/*.json"))]
    if not found:
        return ""
    rows = [
        [
            f"{one['title']}, seed {one['seed']}",
            f"{one['against']['title']}, seed {one['against']['seed']}",
            *(value for _, value in one["rows"]),
        ]
        for one in found
    ]
    notes = "\n".join(f"* {row[0]}: {one['note']}" for row, one in zip(rows, found, strict=True))
    for (title, other, _), some in groupby(sorted(found, key=_question), _question):
        if len(of := [*some]) > 1:
            means = {name: _over_seeds(of, part) for name, part in PARTS.items()}
            cells = (means.get(name, "") for name, _ in found[0]["rows"])
            seeds = ", ".join(str(seed) for seed in sorted({one["against"]["seed"] for one in of}))
            rows.append([f"{title}, {len(of)} seeds together", f"{other}, seed {seeds}", *cells])
    names = ", ".join(sorted({one["judge"] for one in found}))
    header = ["arm", "against", *(name for name, _ in found[0]["rows"])]
    title = f"## The judge\n\nWriting prompts of the test split, judged by {names}."
    return "\n\n".join([title, grid(header, rows), notes])


def build(folder: Path) -> None:
    """Write tables.md and the figures of the results in `folder`.

    Raises `EvaluationError` where there are none, as in a folder that isn't one of results.
    """
    results = raw.read_all(folder)
    if not results:
        raise EvaluationError(f"{folder}/raw: no results in it: name a folder that has some")
    text = "\n\n".join(filter(None, [*sections(results), judged(folder)])) + "\n"
    write_whole(folder / "tables.md", text.encode())
    chosen = chosen_of_arms(*(lines_of(results, split) for split in ("test", "validation")))
    for name, image in figures.drawn(results, {line.first["name"] for line in chosen.values()}):
        write_whole(folder / name, image)


def compared(results: Mapping[raw.Key, raw.Raw], names: Sequence[str]) -> str:
    """How far an arm is above another, seed by seed, on each split that has both.

    A name is an arm's, which stands for the choice that validation likes best, or that of one
    choice, such as grpo-lr1e-05. Runs of one seed are compared with each other whatever model they
    began with; the tables do so where it was the same. Raises `ConfigError` for an arm that there
    is not, and `EvaluationError` for two that share no split or no seed.
    """
    parts = []
    splits = {split: lines_of(results, split) for split in ("test", "validation")}
    for split, lines in splits.items():
        known = {line.first["name"]: line for line in lines}
        known |= chosen_of_arms(lines, splits["validation"])
        if not all(name in known for name in names):
            continue
        both = [known[name] for name in names]
        pair = [Line(line.title, _of_shared_seeds(line, both)) for line in both]
        if not pair[0].runs:
            raise EvaluationError(f"--compare {','.join(names)}: they share no seed on {split}")
        difference = _differences(pair[0].shown, [(pair[0], pair[1], True)])
        parts.append(f"On {split}:\n\n{quality(pair)}\n\n{difference}")
    if not parts:
        firsts = [line.first for lines in splits.values() for line in lines]
        for name in names:
            if name not in {first["name"] for first in firsts}:
                one_of("--compare", name, sorted({first["arm"] for first in firsts}))
        raise EvaluationError(f"--compare {','.join(names)}: no split has results of both")
    return "\n\n".join(parts)


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit status is 1 where something is wrong with the results."""
    parser = argparse.ArgumentParser(prog="tables", description="Tables and figures of results.")
    parser.add_argument("folder", type=Path, help="such as experiments/paper/results")
    parser.add_argument(
        "--compare",
        metavar="ARM,OTHER",
        help="print how far one arm is above another, seed by seed, and write nothing",
    )
    options = parser.parse_args(words)
    try:
        if options.compare is None:
            build(options.folder)
        else:
            names = [name.strip() for name in options.compare.split(",")]
            require(len({*names}) == len(names) == 2, "--compare", options.compare, "name two arms")
            print(compared(raw.read_all(options.folder), names))
    except (PujaxError, OSError) as error:
        print(f"tables: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
