"""A judge's choice between two models' held-out answers: what it is asked, and what came of it."""

import re
from collections.abc import Sequence

import numpy as np

from pujax.errors import EvaluationError, require
from pujax.evaluation.results import Evaluation, Row
from pujax.evaluation.statistics import few, interval_of_mean, same_prompts
from pujax.evaluation.subjects import Judge, SuiteAnswer
from pujax.evaluation.winrate import controlled_interval, win_rate
from pujax.records import Prompt, messages_key

LETTERS = ("A", "B")
"""What stands for the answer shown first, and for the other."""

VERDICT = re.compile(
    r"(?:\W* is|\W*+(?:the )?(?:better |best )?(?:answer|verdict|winner|choice)?(?: is)?)"
    r"\W*([AB])\W*",
    re.IGNORECASE,
)
"""A letter alone. Two of `\\W*` that may share marks are quadratic: `\\W*+` gives none back."""

SAID = ("said", "first is better")
"""A record's keys beside `id` and the two models' names, both orders each."""

QUESTION = (
    "Which of two answers to a question is better?\n\n"
    "Question:\n{x}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}\n\n"
    "The better one does what the question asks, is correct, and says no more than it should. "
    "Reply with one letter and nothing else: A or B."
)


def question(name: str, prompt: str, first: str, second: str) -> Prompt:
    """What the judge is asked of two answers to `prompt`, the first of them as A.

    Its id is made of what is asked, led by `name`.
    """
    parts = {"x": prompt, "a": first, "b": second}
    told = re.sub(r"\{([xab])\}", lambda found: parts[found[1]], QUESTION)
    messages = ({"role": "user", "content": told},)
    return Prompt(f"{name} {messages_key(messages)[:16]}", messages)


def first_is_better(said: str) -> float | None:
    """How surely the first answer was taken, in [0, 1]; None where that can't be read.

    Either a share, `A=0.8`, or one of the two letters alone, be it quoted, emphasised or led by
    words such as "Answer:".
    """
    if share := re.fullmatch(r"A=(0\.\d+|1\.0+)", said):
        return float(share[1])
    letter = VERDICT.fullmatch(said)
    return None if letter is None else float(letter[1].upper() == "A")


def winrate(
    answers: Sequence[Evaluation],
    judge: Judge,
    *,
    model: str | None = None,
    against: str | None = None,
    prompts: int | None = None,
    kinds: Sequence[str] | None = None,
) -> SuiteAnswer:
    """How often `model`'s answers are preferred to `against`'s, in both orders.

    Equal answers are a tie that nobody is asked about. A pair of which a verdict failed is left
    out. Raises `EvaluationError` for a model that has no answers, other prompts, and when no pair
    was judged.

    Settings:
        model: which of those that have been evaluated; null is the last.
        against: which other; null is the one before it.
        prompts: how many of the prompts; null is all.
        kinds: which kinds of prompts; null is all.
    """
    require(prompts is None or prompts > 0, "suite.prompts", prompts, "must be positive")
    one, other = _pair(answers, model, against)
    same_prompts(other, one)
    pairs = [
        (a, b)
        for a, b in zip(one.rows, other.rows, strict=True)
        if kinds is None or a.kind in kinds
    ][:prompts]
    if not pairs:
        known = ", ".join(sorted({str(row.kind) for row in one.rows}))
        wanted = list(kinds or ())
        raise EvaluationError(f"suite.kinds={wanted}: no prompt is of these: choose of {known}")
    if all(a.response == b.response for a, b in pairs):
        raise EvaluationError(
            f"{one.model} and {other.model} say the same to all of {len(pairs)} prompts, so nobody "
            "is asked: choose two that differ, by suite.model and suite.against"
        )
    asked: list[tuple[Row, Row, Prompt, Prompt]] = []
    for a, b in pairs:
        if a.response != b.response:
            forward = question(a.id, a.prompt, a.response, b.response)
            backward = question(a.id, a.prompt, b.response, a.response)
            asked.append((a, b, forward, backward))
    said = judge([each for _, _, forward, backward in asked for each in (forward, backward)])
    records, firsts = [], []
    for a, b, *questions in asked:
        verdicts = [said.get(each.id) for each in questions]
        shares = [None if text is None else first_is_better(text) for text in verdicts]
        record = {"id": a.id, one.model: a.response, other.model: b.response}
        records.append(record | dict(zip(SAID, (verdicts, shares), strict=True)))
        firsts.append(shares)
    kept = [place for place, shares in enumerate(firsts) if None not in shares]
    ties = [(a, b) for a, b in pairs if a.response == b.response]
    records += [{"id": a.id, one.model: a.response, other.model: b.response} for a, b in ties]
    if not kept:
        raise EvaluationError(
            f"{one.model} against {other.model}: no pair was judged ({len(ties)} of {len(pairs)} "
            f"are equal, of {len(asked)} a verdict failed): see what the judge said in the store"
        )
    taken = np.array([firsts[place] for place in kept] + [[0.5, 0.5]] * len(ties))
    rows = [asked[place][:2] for place in kept] + ties
    lengths = np.array([[len(a.response), len(b.response)] for a, b in rows], dtype=float)
    found = win_rate(taken[:, 0], taken[:, 1], lengths[:, 0], lengths[:, 1])
    limits, ahead = (interval_of_mean(x.tolist()) for x in (found.wins, found.preferred))
    low, high = controlled_interval(found.wins, lengths[:, 0], lengths[:, 1])
    judged = taken[: len(kept)]
    agree = np.mean(np.sign(judged[:, 0] - 0.5) == np.sign(0.5 - judged[:, 1]))
    lean = judged.mean() - 0.5
    failed = sum(share is None for shares in firsts for share in shares)
    note = (
        f"{len(kept)} pairs judged in both orders and {len(ties)} of equal answers, a tie each; "
        f"{failed} verdicts failed, their {len(asked) - len(kept)} pairs left out. 95 % intervals: "
        "bootstrap over prompts (BCa; percentiles for the length-controlled rate). Length in "
        "characters."
    )
    note += few(len(rows))
    return SuiteAnswer(
        ("judge", f"{one.model} against {other.model}"),
        (
            ("win rate", f"{limits.mean:.3f} [{limits.low:.3f}, {limits.high:.3f}]"),
            ("win rate at equal length", f"{found.controlled:.3f} [{low:.3f}, {high:.3f}]"),
            (
                "preferred, the lean taken out",
                f"{ahead.mean:.3f} [{ahead.low:.3f}, {ahead.high:.3f}]",
            ),
            ("lean to the answer shown first", f"{lean:+.3f}"),
            ("same verdict in both orders", f"{agree:.3f}"),
            ("mean length", f"{lengths[:, 0].mean():.0f} against {lengths[:, 1].mean():.0f}"),
        ),
        note,
        tuple(records),
    )


def _pair(
    answers: Sequence[Evaluation], model: str | None, against: str | None
) -> tuple[Evaluation, Evaluation]:
    """The two evaluations that are held against each other."""
    by_name = {evaluation.model: evaluation for evaluation in answers}
    names = list(by_name)
    model = model or names[-1]
    against = against or next((name for name in reversed(names) if name != model), model)
    for key, name in (("suite.model", model), ("suite.against", against)):
        if name not in by_name:
            raise EvaluationError(f"{key}={name!r}: has no answers here: choose {', '.join(names)}")
        if name in ("id", *SAID):
            raise EvaluationError(
                f"{key}={name!r}: a record has this key already: name it otherwise"
            )
    if model == against:
        raise EvaluationError(f"{model} alone has answers here: evaluate another model beside it")
    return by_name[model], by_name[against]
