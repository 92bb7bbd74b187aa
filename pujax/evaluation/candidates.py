"""A prompt's candidates as suites ask about them: drawn, or given with it; and their worth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

from pujax.errors import EvaluationError
from pujax.evaluation.metrics import MetricFn, of_text
from pujax.evaluation.subjects import Subject
from pujax.method.sampling import sample
from pujax.records import Example
from pujax.types import Batch, Params, Tokens, right_padded


@dataclass(frozen=True)
class Candidates:
    """A prompt with its candidates, drawn or given, and what they are worth where that is known."""

    example: Example
    ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    oracle: tuple[float, ...] = ()
    by: str = ""  # which oracle
    anchor: float | None = None  # what the anchor is worth by it


Regard = Callable[[Example, str], tuple[float | None, str]]
"""A prompt and a response to what that is worth, None where nothing is known, and who says so."""

Draw = Callable[[Sequence[Example], int], list[Candidates]]
"""At most a batch of prompts, and the first one's place, to candidates of each."""


def drawing(subject: Subject, samples: int, temperature: float, seed: int) -> Draw:
    """What draws `samples` responses to a prompt, as the subject makes them.

    The same ones for a prompt of the same place and `seed`, whoever asks.
    """

    @jax.jit
    def made(params: Params, batch: Batch, key: Array) -> Any:
        prefix = subject.model.prefill(params, batch.prompts)
        size = batch.anchors.ids.shape[-1]
        drawn = sample(
            subject.model,
            params,
            prefix,
            key,
            size=size,
            candidates=samples,
            temperature=temperature,
        )
        return drawn.tokens, drawn.mask.sum(axis=-1)

    def draw(some: Sequence[Example], start: int) -> list[Candidates]:
        batch = subject.collate([*some, *[some[-1]] * (subject.batch - len(some))])
        key = jax.random.fold_in(jax.random.key(seed), start)
        tokens, lengths = jax.device_get(made(subject.params, batch, key))
        found = []
        for b, example in enumerate(some):
            ids = [tuple(tokens[b, k, : lengths[b, k]].tolist()) for k in range(samples)]
            found.append(
                Candidates(example, tuple(ids), tuple(subject.decode(each) for each in ids))
            )
        return found

    return draw


def given_with(some: Sequence[Example], start: int) -> list[Candidates]:
    """The responses that someone rated in the place of candidates, ordered by their scores."""
    return [
        Candidates(
            example,
            tuple(given.ids for given in example.given),
            tuple(given.text for given in example.given),
            tuple(given.score for given in example.given),
        )
        for example in some
    ]


def stacked(rows: Sequence[Sequence[Sequence[int]]], size: int) -> Tokens:
    """Responses [B K T] from their tokens, right-padded to T = `size`."""
    flat = right_padded([tokens for row in rows for tokens in row], size)
    return jax.tree.map(lambda x: x.reshape(len(rows), -1, *x.shape[1:]), flat)


def regarding(oracle: MetricFn, otherwise: MetricFn | None) -> Regard:
    """What says what a response is worth: `oracle`, or where that knows nothing, `otherwise`."""

    def regard(example: Example, text: str) -> tuple[float | None, str]:
        reading = of_text(example.prompt, example.anchor, text)
        known = oracle(reading)
        if known is not None or otherwise is None:
            return known, _name(oracle)
        return otherwise(reading), _name(otherwise)

    return regard


def _name(function: Any) -> str:
    return getattr(function, "func", function).__name__


def check_enough(prompts: int) -> None:
    """Raise `EvaluationError` where fewer than two prompts are left to ask about."""
    if prompts < 2:
        raise EvaluationError(
            f"{prompts} held-out prompts have what the oracle needs: give them an `answer`, or set "
            "suite.otherwise"
        )
