"""Cards of a run's page, filtered and a few at a time: held-out answers, and training groups."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from pujax.errors import EvaluationError
from pujax.evaluation import findings, text
from pujax.evaluation.curves import STAGE_TITLES
from pujax.evaluation.preferred import Regard, preference_of, shown
from pujax.evaluation.results import Evaluation, Row, is_number
from pujax.files.durable import read_jsonl
from pujax.files.settings import only_preferred
from pujax.text import blank

PAGE = 4  # cards of a browser shown at once; page.js has the number from the page

CHANGE = 0.05  # in ROUGE-L, from which an answer without a truth has gained or lost


@dataclass(frozen=True)
class Group:
    """A training group's responses, the anchor first, with what was thought of each."""

    stage: str
    step: int
    prompt: str
    texts: list[str]
    scores: list[float | None]
    labels: list[float | None]


def samples(path: Path) -> list[Group]:
    """The groups in a `samples.jsonl`; none where there is no file.

    Raises `EvaluationError` naming the line that is none.
    """
    groups = []
    for number, line in enumerate(read_jsonl(path) if path.is_file() else [], 1):
        try:
            group = Group(
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
            whole &= all(n is None or is_number(n) for n in [*numbers, group.step])
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"{path}:{number}: no {error}: remove this line") from error
        if not whole:
            raise EvaluationError(f"{path}:{number}: not a group of samples: remove this line")
        groups.append(group)
    return groups


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


def whose_anchors(settings: Mapping[str, Any]) -> str:
    """What the held-out anchors of a run of these settings are called."""
    return "best given" if only_preferred(settings) else "teacher"


def answer_cards(evaluations: Sequence[Evaluation], settings: Mapping[str, Any]) -> str:
    """Every held-out prompt with every model's answer."""
    best = whose_anchors(settings)
    last = evaluations[-1]
    cards = []
    for index, first in enumerate(evaluations[0].rows):
        rows = [evaluation.rows[index] for evaluation in evaluations]
        answers = [_answer(best, first.anchor, *_teacher_mark(first), anchor=True)]
        answers += [
            _answer(evaluation.model, row.response, *_mark(row))
            for evaluation, row in zip(evaluations, rows, strict=True)
        ]
        marks = {"kind": first.kind or "none"}
        if len(rows) > 1:
            marks["change"] = _change(rows[-2], rows[-1])
        if (ranked := rows[-1].values.get("pair_accuracy")) is None:
            told = {1.0: "right", 0.0: "wrong"}.get(_right(rows[-1]), "no true answer")
            marks[f"{last.model} is"] = told
        else:
            told = {1.0: "rightly", 0.0: "wrongly"}.get(ranked, "in part")
            marks[f"{last.model} ranks the pairs"] = told
        truth = f" · answer: {first.answer}" if first.answer is not None else ""
        cards.append(_Card(f"{first.kind or 'prompt'}{truth}", first.prompt, answers, marks))
    note = f"All {len(cards)} prompts."
    if len(evaluations) > 1:
        note += f" Changes are from {escape(evaluations[-2].model)} to {escape(last.model)}."
    return _browser("answers", "Held-out answers", note, cards)


def _right(row: Row) -> float:
    """1 for a right answer, 0 for a wrong one, of pairs the share; NaN where there is no truth."""
    known = (row.values.get(name) for name in ("exact", "pair_accuracy"))
    return next((value for value in known if value is not None), float("nan"))


def _change(before: Row, after: Row) -> str:
    one, other = _right(before), _right(after)
    least = 0.0
    if np.isnan(one) or np.isnan(other):
        one, other = (row.values.get("rouge_l") or 0.0 for row in (before, after))
        least = CHANGE
    return "gained" if other - one > least else "lost" if one - other > least else "same"


def _mark(row: Row) -> tuple[str, str]:
    """How the answer did, by the truth where there is one and else by ROUGE-L, and its style.

    Of rated responses, by how much the better ones are the likelier, too.
    """
    if row.values.get("exact") is None:
        rouge, margin = row.values.get("rouge_l"), row.values.get("pair_margin")
        told = [] if rouge is None else [f"ROUGE-L {rouge:.2f}"]
        told += [] if margin is None else [f"pair margin {margin:+.1f}"]
        return " · ".join(told), ""
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


def group_cards(groups: Sequence[Group], settings: Mapping[str, Any]) -> str:
    """Every training group, responses by what the loss makes of them."""
    how, rule = preference_of(settings.get("loss"))
    cards = []
    for group in groups:
        found = rule(group.scores, group.labels)
        pulls = _pulls(found)
        answers = [
            _answer(
                "anchor" if i == 0 else f"#{i}",
                group.texts[i],
                f"{found[i].words} · score {shown(group.scores[i])}",
                found[i].style,
                found[i].bar,
                pulls[i],
                anchor=i == 0,
            )
            for i in sorted(range(len(group.texts)), key=lambda i: -found[i].preference)
        ]
        known = {score for score in group.scores[1:] if score is not None}
        marks = {
            "step": f"{STAGE_TITLES[group.stage]} step {group.step}",
            "signal": "scores differ" if len(known) > 1 else "scores are equal",
        }
        cards.append(_Card(marks["step"], group.prompt, answers, marks))
    whose = "the student's candidates and the teacher's anchor"
    if only_preferred(settings):
        whose = "the given responses, the best of them as the anchor too"
    note = (
        f"All {len(cards)}: {whose}, {how} A text is coloured as its tokens, which share one "
        "advantage, are raised (green) or lowered (orange): the deeper, the further of its group, "
        "as a step from the reference has it."
    )
    return _browser("groups", "Training groups", note, cards)


def _pulls(found: Sequence[Regard]) -> list[float]:
    """How far each response is raised or, negative, lowered: of its group's furthest, in [-1, 1].

    What is imitated beside all that is raised the whole way.
    """
    pulls = [each.pull for each in found]
    most = max((abs(pull) for pull in pulls if isfinite(pull)), default=0.0)
    return [pull / most if isfinite(pull) and most else float(np.sign(pull)) for pull in pulls]


def _answer(
    who: str,
    said: str,
    mark: str,
    style: str,
    bar: float | None = None,
    pull: float = 0.0,
    *,
    anchor: bool = False,
) -> str:
    drawn = "" if bar is None else f'<i style="width:{100 * bar:.1f}%"></i>'
    words = "<em>nothing that can be seen</em>" if blank(said) else escape(said)
    if pull:
        way = "raised" if pull > 0 else "lowered"
        words = f'<span class="{way}" style="--pull:{abs(pull):.2f}">{words}</span>'
    return (
        f'<div class="answer"><div class="who{" anchor" if anchor else ""}">{escape(who)}</div>'
        f'<div class="text">{words}</div>'
        f'<div class="mark"><span class="{style}">{escape(mark)}</span>{drawn}</div></div>'
    )
