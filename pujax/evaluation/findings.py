"""What a reader must know before the numbers: a verdict in a sentence, and warnings."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from pujax.evaluation import text
from pujax.evaluation.metrics import METRICS, PAIRS, QUALITY
from pujax.evaluation.results import LARGEST, Evaluation, Row, of_run, shown_by
from pujax.evaluation.signal import UNKNOWN, Control
from pujax.evaluation.statistics import FEW
from pujax.evaluation.tables import Column, changed, difference, interval, runs_of, verdict
from pujax.files.durable import Line
from pujax.records import STAGES, Prompt
from pujax.text import blank, counted, printable

SAME = 0.5  # share of one answer among a model's from which it says the same to most prompts

BEYOND = 0.25  # by which that share exceeds the teacher's own, so that it isn't the task's

ONE = 0.9  # share of one answer from which a model says one thing, whatever its teacher repeats

READ = ": read the answers"  # what to do about a collapse

LEAST = 4  # prompts below which answers may well be equal by chance


@dataclass(frozen=True)
class Verdict:
    """A sentence, and `gain`, `loss` or `` for its colour."""

    sentence: str
    style: str


def verdict_on(evaluations: Sequence[Evaluation]) -> Verdict:
    """How a run's last model does against the one before it.

    Before any gain goes NaN, a collapse, that it no longer stops, and that it is clearly worse than
    what the run began with: a stage may win back only a part of what the one before it lost. Where
    it tells the better of rated responses more surely, that is what the losses were for. Models
    that were put beside the run's own are spoken of after those, and colour nothing. A stage that
    changed nothing, as one of no steps, has no model of its own: it is said, and not compared.
    """
    made = of_run(evaluations)
    own = changed(made)
    last = own[-1]
    if ruin := next(iter(broken(last) + collapses(last) + endless(own)), None):
        found = Verdict(f"Not a success, whatever the averages say: {ruin}.", "loss")
    elif len(own) < 2:
        alone = f"Only {last.model} has been evaluated, on {len(last.rows)} prompts."
        found = Verdict(alone if len(evaluations) == len(made) else "", "")
    else:
        found = against(own[-2], last)
        if len(own) > 2:
            since = _clear(own[0], last)
            if since["loss"] and not _of_pairs(since["gain"]):
                lost = ", ".join(since["loss"].values())
                lead = f"Not a success: {last.model} is worse than {own[0].model} in {lost}."
                found = Verdict(f"{lead} {found.sentence}", "loss")
    same = [f"{one.model} is {last.model}, unchanged." for one in made[-1:] if one is not last]
    beside = same + [against(last, o).sentence for o in evaluations if o not in made]
    return Verdict(" ".join(filter(None, [found.sentence, *beside])), found.style)


def against(before: Column, last: Column) -> Verdict:
    """How `last` does against `before`, over prompts, and over seeds where there are several."""
    prompts = len(runs_of(last)[0].rows)
    found = _clear(before, last)
    parts = [
        f"{words} in {', '.join(found[style].values())}"
        for style, words in (
            ("gain", "better"),
            ("loss", "worse"),
            ("", "no clear difference"),
        )
        if found[style]
    ]
    few = f", too few to call any difference clear (at least {FEW})" if prompts < FEW else ""
    sentence = f"{last.model} against {before.model} on {prompts} held-out prompts{few}: "
    if found["loss"]:
        style = "" if _of_pairs(found["gain"]) else "loss"
    else:
        style = "gain" if found["gain"] else ""
    return Verdict(sentence + ("; ".join(parts) or "nothing to compare") + ".", style)


def _clear(before: Column, last: Column) -> dict[str, dict[str, str]]:
    """The qualities in which `last` is clearly better (`gain`), worse (`loss`) and neither (``).

    Each is told in words, by its metric.
    """
    differences, titles = difference(before, last), shown_by(runs_of(last))
    found: dict[str, dict[str, str]] = {"gain": {}, "loss": {}, "": {}}
    for metric in (metric for metric in QUALITY if metric in differences):
        shown, found_here = titles[metric], differences[metric]
        style = verdict(shown, found_here)
        told = f"{shown.title} {interval(shown, found_here)}" if style else shown.title
        found[style][metric] = told.replace("*", "")
    return found


def _of_pairs(gained: Mapping[str, str]) -> bool:
    """Whether what is gained is what preference losses are for, at some cost in likelihood."""
    return not gained.keys().isdisjoint(PAIRS)


def warnings(
    evaluations: Sequence[Evaluation], control: Control = UNKNOWN, chosen_by: str | None = None
) -> list[str]:
    """What speaks against taking the table at its word, each in a sentence with its remedy.

    `control` is the score's that the run learnt from, `chosen_by` its `checkpoint.best`.
    """
    own = of_run(evaluations)
    first = evaluations[0]
    looked_at = [own[-1], *(other for other in evaluations if other not in own)]
    found = [] if control.warning is None else [control.warning]
    found += [f"{collapse}{READ}" for one in looked_at for collapse in collapses(one)]
    found += [f"{same}: look at what is learnt from" for same in repetitions(first)]
    found += endless(own)
    found += [] if chosen_by is None else [selected(chosen_by)]
    if len(first.rows) < FEW:
        found.append(
            f"the table rests on {len(first.rows)} prompts: give at least {FEW}, better some "
            "hundreds, in data.heldout"
        )
    answers = sum(row.answer is not None for row in first.rows)
    if 0 < answers < FEW <= len(first.rows):
        found.append(f"exact and contains rest on {answers} prompts with a true answer")
    models = {evaluation.model: evaluation for evaluation in evaluations}
    if {"base", "sft"} <= models.keys():
        base, sft = (models[name].values("anchor_logp") for name in ("base", "sft"))
        if base and sft and np.mean(sft) < np.mean(base):
            found.append(
                "SFT is worse than the base by its own loss (anchor log-prob "
                f"{np.mean(sft):.3f} against {np.mean(base):.3f}): lower sft.lr"
            )
    return found


def chosen(steps: Mapping[str, int], of: Mapping[str, int]) -> str:
    """Of which step of each stage, of so many in all, the model is that a run ends with."""
    told = [f"{stage} step {step} of {of[stage]}" for stage, step in steps.items()]
    return f"the model is that of {', begun from that of '.join(reversed(told))}"


def selected(metric: str) -> str:
    """What a table says too well of models that its own prompts chose by `metric`."""
    return (
        f"checkpoint.best={metric} chose each stage's state on these same prompts, which flatters "
        "it: a claim needs others (pujax evaluate data.heldout=FILE)"
    )


def remarks(
    evaluations: Sequence[Evaluation], control: Control = UNKNOWN, chosen_by: str | None = None
) -> list[str]:
    """The verdict, the warnings and the ceiling as lines of text."""
    found = verdict_on(evaluations)
    lines = [found.sentence]
    told = unsaid(found, warnings(evaluations, control, chosen_by))
    lines += [f"warning: {warning}" for warning in told]
    if ceiling := teacher(evaluations[0]):
        scores = ", ".join(f"{METRICS[name].shown.title} {v:.3f}" for name, v in ceiling.items())
        lines.append(f"the teacher's own answers: {scores}")
    return lines


def sft_for_as_long(lines: Iterable[Line]) -> str | None:
    """What no run compares by itself, and how to: the steps of SFT that took as long as alignment.

    `lines` are those of metrics.jsonl. A stage's steps count with the median time of those after
    the first, which compiled. None where one of the stages has no such step.
    """
    took: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for line in lines:
        if line["stage"] in took and line.get("time/step_s"):
            took[line["stage"]].append(line["time/step_s"])
    if any(len(some) < 2 for some in took.values()):
        return None
    sft, align = (median(took[stage][1:]) for stage in STAGES)
    if sft * LARGEST < align:  # no clock measured that
        return None
    more = round(len(took["align"]) * align / sft)
    return (
        f"not in the table: SFT for as long as alignment took, about {counted(more, 'step')} more, "
        "which is what alignment has to beat: the same command with another run.name, "
        f"sft.steps={len(took['sft']) + more} and align.steps=0 makes it, and pujax report "
        "'run=[THIS,THAT]' shows both"
    )


def unsaid(found: Verdict, told: Sequence[str]) -> list[str]:
    """The warnings that the verdict has not said: each thing is said once."""
    return [warning for warning in told if warning.removesuffix(READ) not in found.sentence]


def collapses(evaluation: Evaluation) -> list[str]:
    """Where a model says the same to most prompts, of a kind or of all, and its teacher doesn't.

    A teacher that repeats itself excuses that, but not from `ONE` on where the prompts want
    different answers, by the teacher's or by the true ones. Of a kind nothing is told that is told
    of all.
    """
    found, of_all = [], None
    for kind, rows in _parts(evaluation):
        answer, count = _most_frequent([row.response for row in rows])
        if of_all == answer:
            continue
        _, of_teacher = _most_frequent([row.anchor for row in rows])
        truths = [row.answer for row in rows if row.answer is not None]
        _, of_truth = _most_frequent(truths or [""])
        told = f"the most frequent anchor is to {of_teacher}"
        wanted = of_teacher / len(rows)
        if len(truths) >= LEAST:
            wanted = min(wanted, of_truth / len(truths))
            told += f", the most frequent true one to {of_truth} of {len(truths)}"
        share = count / len(rows)
        more = share >= SAME and share - of_teacher / len(rows) >= BEYOND
        if more or share >= ONE > wanted:
            of_all = of_all if kind else answer
            distinct = counted(len({_plain(row.response) for row in rows}), "distinct answer")
            found.append(
                f"{evaluation.model} says the same to {count} of {len(rows)} prompts{kind}, "
                f"{_quoted(answer)} ({distinct}; {told})"
            )
    return found


def broken(evaluation: Evaluation) -> list[str]:
    """The metrics that are NaN on some prompts, which no mean or difference counts."""
    counts = {
        shown.title: sum(np.isnan(evaluation.values(metric)))
        for metric, shown in evaluation.shown.items()
    }
    return [
        f"{evaluation.model}'s {title} is not a number on {counted(int(count), 'prompt')} of "
        f"{len(evaluation.rows)}"
        for title, count in counts.items()
        if count
    ]


def endless(evaluations: Sequence[Evaluation]) -> list[str]:
    """Where a run's last model ends far fewer answers by itself than one before it did."""
    ended = [(one.model, one.values("finished")) for one in evaluations]
    if len(ended) < 2 or not all(values for _, values in ended):
        return []
    (last, values), earlier = ended[-1], ended[:-1]
    most = max(earlier, key=lambda one: float(np.mean(one[1])))
    share, before = float(np.mean(values)), float(np.mean(most[1]))
    if len(values) < LEAST or share > before / 2 or before - share < BEYOND:
        return []
    return [
        f"{last} ends {share:.0%} of its answers by itself, {most[0]} {before:.0%}: it forgot when "
        "to stop: read the answers, lower the learning rate of the stage that did it, or take "
        "fewer steps"
    ]


def repetitions(evaluation: Evaluation) -> list[str]:
    """Where nearly all prompts have one anchor, so that nothing is learnt."""
    found = []
    for kind, rows in _parts(evaluation):
        answer, count = _most_frequent([row.anchor for row in rows])
        if count / len(rows) >= SAME + BEYOND:
            found.append(
                f"{count} of {len(rows)} prompts{kind} have the same anchor, {_quoted(answer)}"
            )
    return found


def teacher(evaluation: Evaluation) -> dict[str, float]:
    """The teacher's own `exact` and `contains`, the ceiling; empty without true answers."""
    rows = [row for row in evaluation.rows if row.answer is not None]
    if not rows:
        return {}
    return {
        "exact": float(np.mean([text.exact(as_prompt(row), row.anchor) for row in rows])),
        "contains": float(np.mean([text.contains(as_prompt(row), row.anchor) for row in rows])),
    }


def as_prompt(row: Row) -> Prompt:
    """What the checks of `evaluation.text` want to know of a row."""
    return Prompt(row.id, (), row.answer, row.kind)


def _parts(evaluation: Evaluation) -> list[tuple[str, tuple[Row, ...]]]:
    """All rows, and those of each kind, with what to call them; none of fewer than `LEAST`."""
    kinds = evaluation.by_kind()
    parts = [("", evaluation.rows)]
    if len(kinds) > 1:
        parts += [(f" of kind {kind}", part.rows) for kind, part in kinds.items()]
    return [(kind, rows) for kind, rows in parts if len(rows) >= LEAST]


def _most_frequent(texts: Sequence[str]) -> tuple[str, int]:
    """What is said most often, as it was said first, and how often; letters' case is one."""
    plain, count = Counter(map(_plain, texts)).most_common(1)[0]
    return next(text for text in texts if _plain(text) == plain), count


def _plain(answer: str) -> str:
    return " ".join(answer.casefold().split())


def _quoted(answer: str) -> str:
    if blank(answer):
        return "nothing that can be seen"
    shown = printable(answer, 61)
    return f"“{shown[:60]}{'…' if len(shown) > 60 else ''}”"
