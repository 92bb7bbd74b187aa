"""A card of costs: what the student's answers are worth and take, beside the teacher's."""

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from rich.progress import track

from pujax.errors import EvaluationError, require
from pujax.evaluation.metrics import MetricFn, correct, of_text
from pujax.evaluation.statistics import interval_of_mean
from pujax.evaluation.subjects import Subject, SuiteAnswer
from pujax.method.sampling import greedy
from pujax.types import Completions, Params, Tokens

THOUSAND, MILLION = 1000, 1e6
UNKNOWN = "–"
RESAMPLES = 2000


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

    The first `prompts` of the held-out ones are answered by greed and the clock, after one answer
    that compiles. `hour` is what an hour of this machine costs, `input` and `output` what a million
    of the teacher's tokens do, and `latency` how many seconds it takes to answer, which no store
    tells; what is not given stays unknown. Raises `EvaluationError` without prompts that `quality`
    knows.
    """
    require(prompts > 0, "suite.prompts", prompts, "must be positive")
    for key, value in (("hour", hour), ("input", input), ("output", output), ("latency", latency)):
        known = value is None or 0 <= value < float("inf")
        require(known, f"suite.{key}", value, "must be finite and not negative, or null")
    examples = subject.examples[:prompts]

    @partial(jax.jit, static_argnames="size")
    def answered(params: Params, asked: Tokens, *, size: int) -> Completions:
        prefix = subject.model.prefill(params, asked)
        return greedy(subject.model, params, prefix, size=size)

    records: list[dict[str, Any]] = []
    for place, example in enumerate(track([examples[0], *examples], "timing", transient=True)):
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
    spent = None
    if input is not None and output is not None:
        asked = sum(r["prompt_tokens"] for r in records) / len(records)
        told = sum(r["anchor_tokens"] for r in records) / len(records)
        spent = (asked * input + told * output) / MILLION * THOUSAND
    rented = None if hour is None else float(np.mean(seconds)) / 3600 * hour * THOUSAND
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(subject.params))
    latencies = np.quantile(seconds, (0.5, 0.95))
    pace = sum(r["tokens"] for r in records) / sum(seconds)
    return SuiteAnswer(
        ("costs", "student", "teacher"),
        (
            ("quality", _interval(ours), _interval(theirs)),
            ("quality kept", kept(ours, theirs), ""),
            ("latency, p50 (s)", f"{latencies[0]:.3f}", _number(latency)),
            ("latency, p95 (s)", f"{latencies[1]:.3f}", UNKNOWN),
            ("tokens a second", f"{pace:.1f}", UNKNOWN),
            ("weights (GiB)", f"{weights / 2**30:.2f}", UNKNOWN),
            ("memory at most (GiB)", _number(peak_memory()), UNKNOWN),
            ("money, 1000 answers", _number(rented), _number(spent)),
        ),
        f"{len(records)} prompts, {len(known)} of them with a quality; 95 % intervals: bootstrap "
        f"over prompts. The student in pujax's own decoder on {jax.devices()[0].device_kind}, one "
        "prompt at a time. Money of the teacher by the student's tokens of prompts and anchors, as "
        f"far as the run reads those; {UNKNOWN} is what nobody has told (suite.hour, suite.input, "
        "suite.output, suite.latency).",
        tuple(records),
    )


def kept(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> str:
    """The student's mean quality as a share of the teacher's, with a percentile interval.

    Prompts are drawn again with both of their qualities; unknown where the teacher has none.
    """
    first, second = np.asarray(ours, float), np.asarray(theirs, float)
    if second.mean() == 0:
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
    found = interval_of_mean(values)
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3g}"
