"""A model on held-out prompts: one pass for the anchors, one answer by greed, some by chance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pujax.evaluation import text
from pujax.evaluation.metrics import METRICS, Metric, Reading, measure
from pujax.evaluation.results import Evaluation, Row
from pujax.evaluation.waiting import through
from pujax.method.sampling import greedy, sample
from pujax.models.decoder import LanguageModel, Prefix, packed
from pujax.models.logps import mean_logps, response_logps
from pujax.models.sharding import fetched
from pujax.records import Example
from pujax.text import counted
from pujax.types import Batch, Completions, Params

Answers = tuple[Int[Array, "B K T"], Int[Array, "B K"], Bool[Array, "B K"]]
"""Tokens, how many of them are real, and whether the last is an EOS."""


@dataclass(frozen=True)
class Draws:
    """How many answers a prompt are sampled beside the greedy one, and at which temperature."""

    samples: int = 0
    temperature: float = 0.7


NONE = Draws()


def evaluate(
    model: LanguageModel,
    params: Params,
    examples: Sequence[Example],
    *,
    name: str,
    batch: int,
    collate: Callable[[Sequence[Example]], Batch],
    decode: Callable[[Sequence[int]], str],
    metrics: Mapping[str, Metric] = METRICS,
    draws: Draws = NONE,
    say: Callable[[str], None] | None = None,
) -> Evaluation:
    """What `metrics` say of the anchors' log-probs under `params` and of its answers.

    The last batch is filled up with copies of its last row, which aren't counted: one compilation
    serves every batch and every set of parameters. Where a batch's real tokens fit the model's
    budget, its padding is not computed. The same `params` draw the same samples each time. A metric
    that no prompt has, as all of samples when none are drawn, is left out. How far it is goes to
    `say`, a line at the start and one a minute, or without that into a bar.
    """
    # A batch decodes until its longest answer ends, so those with long anchors go together.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].anchor_ids), reverse=True)
    found: dict[int, Row] = {}
    what = f"evaluating {name}"
    if say is not None:
        say(f"{what}: {counted(len(examples), 'prompt')}")
    for start in through(range(0, len(examples), batch), what, len(examples), say):
        places = order[start : start + batch]
        some = [examples[i] for i in places]
        padded = collate(some + some[-1:] * (batch - len(some)))
        key = jax.random.fold_in(jax.random.key(0), start)
        logp_B, lp_BK, best, drawn = fetched(_read(model, draws, params, padded, key))
        _, length_BK, finished_BK = best
        for b, (place, example) in enumerate(zip(places, some, strict=True)):
            (response,) = _texts(best, b, decode)
            reading = Reading(
                prompt=example.prompt,
                anchor=example.anchor,
                response=response,
                anchor_logp=float(logp_B[b]),
                length=float(length_BK[b, 0]),
                finished=float(finished_BK[b, 0]),
                samples=() if drawn is None else tuple(_texts(drawn, b, decode)),
                rated=tuple(
                    (given.score, float(lp))
                    for given, lp in zip(example.given, lp_BK[b], strict=False)
                ),
            )
            found[place] = _row(reading, metrics)
    rows = [found[place] for place in range(len(examples))]
    kept = [metric for metric in metrics if any(row.values[metric] is not None for row in rows)]
    rows = [replace(row, values={metric: row.values[metric] for metric in kept}) for row in rows]
    return Evaluation(name, tuple(rows), {metric: metrics[metric].shown for metric in kept})


def _row(reading: Reading, metrics: Mapping[str, Metric]) -> Row:
    prompt = reading.prompt
    return Row(
        id=prompt.id,
        kind=prompt.kind,
        prompt=text.shown(prompt),
        answer=prompt.answer,
        anchor=reading.anchor,
        response=reading.response,
        values=measure(reading, metrics),
        samples=reading.samples,
    )


def _texts(answers: Any, b: int, decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The texts of prompt `b`'s answers."""
    tokens_BKT, length_BK, _ = answers
    return [
        decode(tokens[:count].tolist())
        for tokens, count in zip(tokens_BKT[b], length_BK[b], strict=True)
    ]


@partial(jax.jit, static_argnums=(0, 1))
def _read(
    model: LanguageModel,
    draws: Draws,
    params: Params,
    batch: Batch,
    key: Array,
) -> tuple[Float[Array, " B"], Float[Array, "B K"], Answers, Answers | None]:
    """The anchors' mean log-probs, the given responses' summed ones, and the model's own answers.

    Those are the greedy ones, and the sampled ones where any are wanted. Jitted here, once: the
    parameters of base, sft and aligned are arguments of one program.
    """
    tokens, mask = batch.anchors.ids[:, None], batch.anchors.mask[:, None]
    size = tokens.shape[-1]
    if batch.given is not None:
        tokens = jnp.concatenate([tokens, batch.given.tokens], axis=1)
        mask = jnp.concatenate([mask, batch.given.mask], axis=1)

    def read(model: LanguageModel) -> tuple[Prefix, Float[Array, "B 1 T"]]:
        prefix = model.prefill(params, batch.prompts)
        return prefix, response_logps(model, params, prefix, tokens, mask)

    prefix, logps = packed(model, batch.prompts.lengths, mask, read)
    best = _answers(greedy(model, params, prefix, size=size))
    drawn = None
    if draws.samples:
        made = sample(
            model,
            params,
            prefix,
            key,
            size=size,
            candidates=draws.samples,
            temperature=draws.temperature,
        )
        drawn = _answers(made)
    return mean_logps(logps, mask)[:, 0], logps[:, 1:].sum(axis=-1), best, drawn


def _answers(made: Completions) -> Answers:
    return made.tokens, made.mask.sum(axis=-1), made.finished
