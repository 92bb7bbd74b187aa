"""Anchors that are not to be trusted, found before the student learns them (ours)."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pujax.config.settings import GateConfig
from pujax.errors import DataError
from pujax.evaluation import text
from pujax.records import Example
from pujax.run.workers import Outcome

REFUSAL = re.compile(
    r"\W*(?:(?:i'?m|i am|we'?re) (?:very |really |so )?(?:sorry|afraid)|sorry\b|apologies\b|"
    r"i (?:do |must )?apologi[sz]e\W+but\b|"
    r"(?:unfortunately\W+)?i (?:cannot|can'?t|can not|could not|couldn'?t|won'?t|will not|must "
    r"decline|am unable|am not able)"
    # What is said for emphasis: I could not agree more.
    r"(?! (?:agree more|lie|wait|help but|overstate|be (?:happier|prouder|more))\b|"
    r" (?:stress|emphasi[sz]e|recommend|praise|thank)\b[^.!?\n]* enough\b)|"
    r"i'?m (?:unable|not able)|(?:i'?m|i am) not comfortable|i (?:do not|don'?t) feel comfortable|"
    r"as an? (?:ai|large language model|language model)(?: (?:language )?(?:model|assistant|system|"
    r"chatbot))?(?=,| i\b| (?:developed|created|trained|made|built|designed)\b))"
)
"""How a refusal begins, in English."""

SHINGLE = 3  # words that stand for a place in a text

LEAST = 10  # words below which equal answers are no sign of anything


def gated(
    examples: Sequence[Example], gate: GateConfig, checked: Sequence[Outcome] | None = None
) -> tuple[tuple[Example, ...], dict[str, int]]:
    """The examples without those whose anchor `gate` distrusts, or with these weighed down.

    `checked` is what the gate's check said of each anchor; where it has no number, it lacks what it
    needs and distrusts none. Also how many those are, by reason. Raises `DataError` where no
    example is left.
    """
    copies = near_duplicates(examples, gate.near_duplicates) if gate.near_duplicates else set()
    kept, counts = [], Counter()
    for place, example in enumerate(examples):
        if example.given and not example.anchor_ids:  # nobody called an answer good
            kept.append(example)
            continue
        why = _distrusted(example, gate)
        if why is None and checked is not None:
            why = _failed(checked[place], gate)
        if why is None and place in copies:
            why = "near duplicates"
        if why is not None:
            counts[why] += 1
            example = replace(example, weight=gate.weight)
        if example.weight > 0:
            kept.append(example)
    if not kept:
        raise DataError(
            f"data.gate leaves no anchor ({in_words(counts)} of {len(examples)}): loosen it"
        )
    return tuple(kept), dict(counts)


def in_words(counts: Mapping[str, int]) -> str:
    """The counts in words: "3 refusals, 2 near duplicates"."""
    return ", ".join(f"{count} {why}" for why, count in counts.items())


def _distrusted(example: Example, gate: GateConfig) -> str | None:
    if gate.answer != "off" and example.prompt.answer is not None:
        right = {"exact": text.exact, "contains": text.contains}[gate.answer]
        if not right(example.prompt, example.anchor):
            return "without the true answer"
    if gate.refusals and refuses(example.anchor):
        return "refusals"
    return None


def refuses(answer: str) -> bool:
    """Whether an answer begins as refusals do."""
    return REFUSAL.match(answer.casefold().replace("’", "'")) is not None


def _failed(outcome: Outcome, gate: GateConfig) -> str | None:
    if outcome.failure is not None:
        return "that data.gate.check failed on"
    if outcome.value is not None and outcome.value < gate.least:
        return "below data.gate.least"
    return None


def near_duplicates(examples: Iterable[Example], least: float) -> set[int]:
    """The places of anchors that share `least` of their word triples with an earlier one.

    The share is Jaccard's, of the triples that either has. Short answers may well be equal, and
    are none.
    """
    copies: set[int] = set()
    holders: dict[tuple[str, ...], list[int]] = {}
    sizes: dict[int, int] = {}
    for place, example in enumerate(examples):
        words = text.words(example.anchor)
        if len(words) < LEAST:
            continue
        triples = {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}
        shared = Counter(before for triple in triples for before in holders.get(triple, ()))
        if any(n >= least * (len(triples) + sizes[i] - n) for i, n in shared.items()):
            copies.add(place)
            continue  # so that no text has many holders
        sizes[place] = len(triples)
        for triple in triples:
            holders.setdefault(triple, []).append(place)
    return copies
