"""A card of costs: what the student's answers are worth and take, beside the teacher's."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from pujax.errors import EvaluationError, require
from pujax.evaluation.findings import as_prompt
from pujax.evaluation.metrics import MetricFn, correct, of_text
from pujax.evaluation.results import Evaluation
from pujax.evaluation.statistics import few, interval_of_mean
from pujax.evaluation.subjects import Subject, SuiteAnswer
from pujax.evaluation.waiting import through
from pujax.method.sampling import greedy
from pujax.records import Example
from pujax.text import counted
from pujax.types import Completions, Params, Tokens

THOUSAND, MILLION = 1000, 1e6
UNKNOWN = "–"
NOT_STORED, NO_PRICE = "not stored", "no price"  # why a store doesn't tell
RESAMPLES = 2000

HEADER = ("costs", "student", "teacher")


@dataclass(frozen=True)
class _Taken:
    """What answers took: seconds each, tokens a second, and the money of a thousand of them.

    `untimed` and `unpriced` stand where that is not known.
    """

    seconds: Sequence[float] = ()
    pace: float | None = None
    money: float | None = None
    untimed: str = UNKNOWN
    unpriced: str = UNKNOWN


def _check_known(key: str, value: float | None) -> None:
    known = value is None or 0 <= value < math.inf
    require(known, key, value, "must be finite and not negative, or null")


def costs(
    subject: Subject,
    *,
    quality: MetricFn = correct,
    prompts: int = 64,
    hour: float | None = None,
    input: float | None = None,
    output: float | None = None,
    latency: float | None = None,
) -> SuiteAnswer:
    """Quality, latency, pace, memory and money of the student, answering one prompt at a time.

    The first of the held-out prompts are answered by greed and the clock, after one answer that
    compiles. What the teacher took is what the store kept of it, unless that is given here. What is
    not known stays so. Raises `EvaluationError` without prompts that `quality` knows.

    Settings:
        quality: a metric of texts, of the student's answers and the teacher's.
        prompts: how many of the held-out ones are answered, one at a time.
        hour: what an hour of this machine costs.
        input: what a million tokens of the teacher's prompts cost.
        output: what a million tokens of its answers cost.
        latency: how many seconds it takes to answer.
    """
    require(prompts > 0, "suite.prompts", prompts, "must be positive")
    for key, value in (("hour", hour), ("input", input), ("output", output), ("latency", latency)):
        _check_known(f"suite.{key}", value)
    examples = subject.examples[:prompts]

    @partial(jax.jit, static_argnames="size")
    def answered(params: Params, asked: Tokens, *, size: int) -> Completions:
        prefix = subject.model.prefill(params, asked)
        return greedy(subject.model, params, prefix, size=size)

    records: list[dict[str, Any]] = []
    for place in through(range(len(examples) + 1), "timing", len(examples)):
        example = examples[max(0, place - 1)]
        batch = subject.collate([example])
        size = batch.anchors.ids.shape[-1]
        begun = time.perf_counter()
        made = jax.block_until_ready(answered(subject.params, batch.prompts, size=size))
        seconds = time.perf_counter() - begun
        if place == 0:
            continue  # it compiled
        tokens = int(made.mask.sum())
        text = subject.decode(np.asarray(made.tokens)[0, 0, :tokens].tolist())

        def regard(response: str, example: Any = example) -> float | None:
            return quality(of_text(example.prompt, example.anchor, response))

        records.append(
            {
                "id": example.prompt.id,
                "response": text,
                "seconds": seconds,
                "tokens": tokens,
                "prompt_tokens": len(example.prompt_ids),
                "anchor_tokens": len(example.anchor_ids),
                "quality": regard(text),
                "anchor_quality": regard(example.anchor),
            }
        )
    known = [r for r in records if None not in (r["quality"], r["anchor_quality"])]
    if not known:
        raise EvaluationError(
            f"none of the first {len(records)} held-out prompts has what the quality needs: give "
            "them an `answer`, or raise suite.prompts"
        )
    ours, theirs = ([r[key] for r in known] for key in ("quality", "anchor_quality"))
    seconds = [r["seconds"] for r in records]
    student = _Taken(
        seconds,
        pace=sum(r["tokens"] for r in records) / sum(seconds),
        money=None if hour is None else float(np.mean(seconds)) / 3600 * hour * THOUSAND,
    )
    stored = teacher = _stored(examples)
    if input is not None and output is not None:
        asked = sum(r["prompt_tokens"] for r in records) / len(records)
        told = sum(r["anchor_tokens"] for r in records) / len(records)
        spent = (asked * input + told * output) / MILLION * THOUSAND
        teacher = replace(stored, money=spent)
    rows = _rows(ours, theirs, student, teacher, subject.params, peak_memory())
    if latency is not None:
        rows = tuple(
            (name, one, _number(latency) if name == "latency, p50 (s)" else other)
            for name, one, other in rows
        )
    return SuiteAnswer(
        HEADER,
        rows,
        f"{len(records)} prompts, {len(known)} of them with a quality; 95 % intervals: bootstrap "
        f"over prompts.{few(len(known))} The student in pujax's own decoder on "
        f"{jax.devices()[0].device_kind}, one prompt at a time.{_as_stored(stored)} Money of the "
        "teacher by suite.input and suite.output is of the student's tokens of prompts and "
        f"anchors, as far as the run reads those; {UNKNOWN} is what nobody has told (suite.hour, "
        "suite.input, suite.output, suite.latency).",
        tuple(records),
    )


def measured_anyway(
    evaluation: Evaluation, examples: Sequence[Example], params: Params
) -> SuiteAnswer:
    """The card as far as a run knows it at its end, with nothing measured for its sake.

    `evaluation` is that of the model with `params` on `examples`, or on the first of them. What
    takes a clock, `costs` adds.
    """
    both = [
        [correct(of_text(as_prompt(row), row.anchor, said)) for said in (row.response, row.anchor)]
        for row in evaluation.rows
    ]
    known = [pair for pair in both if None not in pair]
    ours, theirs = zip(*known, strict=True) if known else ((), ())
    stored = _stored(examples[: len(evaluation.rows)])
    rows = _rows(ours, theirs, _Taken(), stored, params, None)
    return SuiteAnswer(
        HEADER,
        tuple(row for row in rows if set(row[1:]) - {UNKNOWN, ""}),
        f"{counted(len(both), 'prompt')}, {len(known)} of them with a true answer: quality is 1 "
        "for that alone and 1/2 where it is contained; 95 % intervals: bootstrap over prompts."
        f"{few(len(known))}{_as_stored(stored)} How fast the student answers, "
        "in which memory and for how much money: pujax evaluate run=… suite=costs.",
        (),
    )


def _stored(examples: Sequence[Example]) -> _Taken:
    """What the teacher took for the examples' anchors, as far as the store tells."""
    asked = [example.asked for example in examples if example.asked is not None]
    timed = [anchor for anchor in asked if anchor.seconds is not None]
    paced = [(a.tokens, a.seconds) for a in timed if a.tokens is not None and a.seconds]
    paid = [anchor.cost for anchor in asked if anchor.cost is not None]
    return _Taken(
        [anchor.seconds for anchor in timed if anchor.seconds is not None],
        pace=sum(t for t, _ in paced) / sum(s for _, s in paced) if paced else None,
        money=sum(paid) / len(paid) * THOUSAND if paid else None,
        untimed=NOT_STORED if asked else UNKNOWN,
        unpriced=NO_PRICE if asked else UNKNOWN,
    )


def _as_stored(stored: _Taken) -> str:
    if not stored.seconds:
        if stored.untimed == UNKNOWN:
            return ""
        return (
            " The teacher's store does not say how long its answers took: an older pujax made it."
        )
    return (
        f" The teacher's latency and pace are those of {counted(len(stored.seconds), 'answer')} as "
        "they were collected, whatever was asked beside them."
    )


def _rows(
    ours: Sequence[float],
    theirs: Sequence[float],
    student: _Taken,
    teacher: _Taken,
    params: Params,
    memory: float | None,
) -> tuple[tuple[str, str, str], ...]:
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def latency(share: float) -> tuple[str, str]:
        one, other = (
            f"{np.quantile(taken.seconds, share):.3f}" if taken.seconds else taken.untimed
            for taken in (student, teacher)
        )
        return one, other

    def pace(taken: _Taken) -> str:
        return taken.untimed if taken.pace is None else f"{taken.pace:.1f}"

    def money(taken: _Taken) -> str:
        return _number(taken.money, taken.unpriced)

    return (
        ("quality", _interval(ours), _interval(theirs)),
        ("quality kept", kept(ours, theirs), ""),
        ("latency, p50 (s)", *latency(0.5)),
        ("latency, p95 (s)", *latency(0.95)),
        ("tokens a second", pace(student), pace(teacher)),
        ("weights (GiB)", f"{weights / 2**30:.2f}", UNKNOWN),
        ("memory at most (GiB)", _number(memory), UNKNOWN),
        ("money, 1000 answers", money(student), money(teacher)),
    )


def kept(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> str:
    """The student's mean quality as a share of the teacher's, with a percentile interval.

    Prompts are drawn again with both of their qualities; unknown where the teacher has none.
    """
    first, second = np.asarray(ours, float), np.asarray(theirs, float)
    if not second.any():
        return UNKNOWN
    drawn = np.random.default_rng(seed).integers(len(first), size=(RESAMPLES, len(first)))
    of, over = first[drawn].mean(axis=1), second[drawn].mean(axis=1)
    low, high = np.quantile(of[over > 0] / over[over > 0], (0.025, 0.975))
    return f"{first.mean() / second.mean():.0%} [{low:.0%}, {high:.0%}]"


def peak_memory() -> float | None:
    """The most memory so far, in GiB: an accelerator's own, else this process's; None if untold."""
    told = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in told:
        return told["peak_bytes_in_use"] / 2**30
    try:
        import resource
    except ImportError:  # no Unix
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _interval(values: Sequence[float]) -> str:
    if not values:
        return UNKNOWN
    found = interval_of_mean(values)
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _number(value: float | None, unknown: str = UNKNOWN) -> str:
    return unknown if value is None else f"{value:.3g}"
