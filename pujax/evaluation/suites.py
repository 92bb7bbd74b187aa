"""Suites: larger questions to a model than what a metric asks of each answer.

A suite is a function of a `Subject`, its settings keywords, and a YAML in `conf/tools/suite/`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.progress import track

from pujax.errors import EvaluationError, require
from pujax.evaluation.metrics import MetricFn, Reading, correct
from pujax.evaluation.signal import Signal
from pujax.evaluation.signal import signal as signal_of
from pujax.evaluation.statistics import interval_of_mean
from pujax.method.sampling import sample
from pujax.method.scoring import ScoringContext
from pujax.models.decoder import LanguageModel
from pujax.records import Example
from pujax.types import Batch, Frames, LabelRule, Params, Scorer


@dataclass(frozen=True)
class Subject:
    """A model, and the held-out prompts that a suite asks it about, `batch` at once."""

    model: LanguageModel
    params: Params
    examples: Sequence[Example]
    batch: int
    collate: Callable[[Sequence[Example]], Batch]
    decode: Callable[[Sequence[int]], str]
    frames: Frames


@dataclass(frozen=True)
class Answer:
    """What a suite found: a table's header and rows, a note, and the raw records behind it."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    records: tuple[dict[str, Any], ...]


def signal(
    subject: Subject,
    *,
    scorers: Mapping[str, Scorer],
    labels: LabelRule,
    oracle: MetricFn = correct,
    samples: int = 8,
    temperature: float = 0.7,
    margin: float = 0.0,
    seed: int = 0,
) -> Answer:
    """How well each scorer ranks the model's own candidates, held against an oracle.

    `samples` candidates a prompt are drawn once, and all scorers see the same. Prompts that the
    oracle does not know are left out; groups in which it finds all candidates equal count for
    entropy and mass alone. Raises `EvaluationError` when fewer than two prompts are left.
    """
    require(samples >= 2, "suite.samples", samples, "needs at least 2")
    require(temperature > 0, "suite.temperature", temperature, "must be positive")
    known = [example for example in subject.examples if _regard(oracle, example, "") is not None]
    if len(known) < 2:
        raise EvaluationError(
            f"{len(known)} held-out prompts have what the oracle needs: give them an `answer`"
        )

    @jax.jit
    def scored(params: Params, batch: Batch, key: Array) -> Any:
        """The candidates' tokens and lengths, and each scorer's scores and labels, [B K]."""
        draw, judge = jax.random.split(key)
        prefix = subject.model.prefill(params, batch.prompts)
        size = batch.anchors.ids.shape[-1]
        made = sample(
            subject.model,
            params,
            prefix,
            draw,
            size=size,
            candidates=samples,
            temperature=temperature,
        )
        tokens = jnp.concatenate([batch.anchors.ids[:, None], made.tokens], axis=1)
        mask = jnp.concatenate([batch.anchors.mask[:, None], made.mask], axis=1)
        # One for all scorers: they share its passes over the responses.
        context = ScoringContext(
            reader=subject.model,
            params=params,
            frames=subject.frames,
            batch=batch,
            after=prefix,
            tokens=tokens,
            mask=mask,
            key=judge,
            wants_logps=False,
        )
        found = {}
        for name, scorer in scorers.items():
            scores = scorer(context)
            shares = labels(scores)[0][:, 1:]
            found[name] = scores[:, 1:], shares / jnp.maximum(shares.sum(-1, keepdims=True), 1e-9)
        return made.tokens, made.mask.sum(axis=-1), found

    records = []
    for start in track(range(0, len(known), subject.batch), "scoring candidates", transient=True):
        some = known[start : start + subject.batch]
        # Filled up with other prompts, not with copies: a shuffled anchor must be another's.
        filled = [*some, *(known * subject.batch)[: subject.batch - len(some)]]
        key = jax.random.fold_in(jax.random.key(seed), start)
        tokens, lengths, found = jax.device_get(
            scored(subject.params, subject.collate(filled), key)
        )
        for b, example in enumerate(some):
            texts = [subject.decode(tokens[b, k, : lengths[b, k]].tolist()) for k in range(samples)]
            records.append(
                {
                    "id": example.prompt.id,
                    "candidates": texts,
                    "oracle": [_regard(oracle, example, text) for text in texts],
                    "scores": {name: s[b].tolist() for name, (s, _) in found.items()},
                    "labels": {name: q[b].tolist() for name, (_, q) in found.items()},
                }
            )
    ordered = sum(len(set(record["oracle"])) > 1 for record in records)
    return Answer(
        ("scorer", "Kendall τ-b", "top-1", "pairs", "label entropy", "q near best"),
        tuple(_row(name, records, margin) for name in scorers),
        f"{len(records)} prompts, {samples} candidates each at temperature {temperature}; the "
        f"oracle orders {ordered} groups. 95 % intervals: BCa bootstrap over groups.",
        tuple(records),
    )


def _regard(oracle: MetricFn, example: Example, text: str) -> float | None:
    return oracle(Reading(example.prompt, example.anchor, text, 0.0, 0.0, 0.0))


def _row(name: str, records: Sequence[Mapping[str, Any]], margin: float) -> tuple[str, ...]:
    groups = [
        signal_of(each["scores"][name], each["oracle"], each["labels"][name], margin=margin)
        for each in records
    ]
    columns = ("tau", "top", "pairs", "entropy", "near")
    return (name, *(_mean(groups, column) for column in columns))


def _mean(groups: Sequence[Signal], column: str) -> str:
    values = [value for group in groups if (value := getattr(group, column)) is not None]
    if not values or not np.isfinite(values).all():
        return "–"
    found = interval_of_mean(values)
    return f"{found.mean:z.3f} [{found.low:z.3f}, {found.high:z.3f}]"
