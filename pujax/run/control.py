"""A score beside its control, in a run's first groups: does it rank better for seeing the anchor?

Ours. A score that ranks as well with another prompt's anchor in view teaches nothing of the
teacher: it sharpens what the student thinks already. It is asked once a group, after the step that
learnt from it or a later one, so that no step is another for it: groups that can tell wait until
there are as many as a step has, since in most all candidates may be equally good.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pujax.evaluation.metrics import correct, of_text, rouge_l
from pujax.evaluation.signal import Control, pair_accuracy
from pujax.evaluation.statistics import FEW
from pujax.method.discriminator import new_head
from pujax.method.scoring import ScoringContext, rewards_of
from pujax.method.step import Recipe
from pujax.models.decoder import LanguageModel
from pujax.models.sharding import fetched, put_batch
from pujax.records import Example
from pujax.run.data import Dataset
from pujax.types import Batch, Group, Params, Tokens, right_padded

LOOKED = 4 * FEW  # groups that are looked at, at most: in many all candidates may be equally good

TRIES = 8  # other prompts that are looked at for one with another anchor


@dataclass(frozen=True)
class _Telling:
    """A group whose candidates differ in worth, as one row, with another prompt's anchor."""

    batch: Batch
    tokens: Any
    mask: Any
    other: tuple[int, ...]
    worth: Sequence[float]


Controlled = Callable[[int, Params, Batch, Sequence[Example], Group], Control]
"""A step's number, what it trained, and its groups, to what is found in these."""


def make_control(
    recipe: Recipe,
    model: LanguageModel,
    scoring: Callable[[Params], Params],
    data: Dataset,
    *,
    mesh: Mesh,
    decode: Callable[[Sequence[int]], str],
    seed: int,
) -> Controlled | None:
    """What holds the groups of a run against their control; None where there is none.

    `scoring` makes the whole model that scores from what is trained. There is no control where the
    host scores, where what scores is learnt, and where candidates come with their scores or all
    anchors are the same.
    """
    learnt = new_head(recipe.scorer, model.config.width) is not None
    anchors = {example.anchor_ids for example in data.examples}
    if rewards_of(recipe.scorer) or learnt or data.candidates or len(anchors) < 2:
        return None
    scores = jax.jit(partial(_scores, model.unpacked, recipe))
    waiting: list[_Telling] = []

    def controlled(
        step: int, trainable: Params, batch: Batch, examples: Sequence[Example], group: Group
    ) -> Control:
        tokens, mask = np.asarray(group.tokens), np.asarray(group.mask)
        worth = [
            [_worth(example, decode(ids[real].tolist())) for ids, real in zip(*pair, strict=True)]
            for example, *pair in zip(examples, tokens[:, 1:], mask[:, 1:], strict=True)
        ]
        rng = np.random.default_rng([seed, step])
        others = [_another(example, data.examples, rng) for example in examples]
        rows = fetched(batch).counted
        for b, (values, other) in enumerate(zip(worth, others, strict=True)):
            if other is not None and max(values) > min(values):
                row = jax.tree.map(lambda x, b=b: x[b : b + 1], rows)
                here = slice(b, b + 1)
                waiting.append(_Telling(row, tokens[here], mask[here], other, values))
        if len(waiting) < len(examples):
            return Control()
        some = waiting[: len(examples)]
        del waiting[: len(examples)]
        trees = [(each.batch, each.tokens, each.mask) for each in some]
        whole, tokens, mask = jax.tree.map(lambda *each: np.concatenate(each), *trees)
        longest = max(int(mask.sum(axis=-1).max()), *(len(each.other) for each in some))
        size = next(s for s in _sizes(tokens.shape[-1]) if s >= longest)
        shuffled = right_padded([each.other for each in some], size)
        given = (whole, tokens[..., :size], mask[..., :size], shuffled)
        placed = put_batch(mesh, jax.tree.map(jnp.asarray, given), len(examples))
        key = jax.random.fold_in(jax.random.key(seed), step)
        found = fetched(scores(scoring(trainable), *placed, key))
        of = [
            [pair_accuracy(s[b], np.array(each.worth)) for b, each in enumerate(some)]
            for s in found
        ]
        return Control(len(some), *(float(np.mean(values)) for values in of))

    return controlled


def _scores(
    model: LanguageModel,
    recipe: Recipe,
    params: Params,
    batch: Batch,
    tokens: Array,
    mask: Array,
    others: Tokens,
    key: Array,
) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    size = tokens.shape[-1]
    context = ScoringContext(
        reader=model,
        params=params,
        frames=recipe.frames,
        batch=replace(batch, anchors=Tokens(batch.anchors.ids[:, :size], batch.anchors.lengths)),
        after=model.prefill(params, batch.prompts),
        tokens=tokens,
        mask=mask,
        key=key,
        wants_logps=False,
    )
    own = recipe.scorer(context)
    return own[:, 1:], recipe.scorer(context.with_anchors(others))[:, 1:]


def _sizes(whole: int) -> list[int]:
    """Lengths that responses are cut to: three, so that no more programs are compiled."""
    return sorted({-(-whole // 4), -(-whole // 2), whole})


def _worth(example: Example, response: str) -> float:
    """How good a response is: by the true answer where it is known, else by the anchor."""
    reading = of_text(example.prompt, example.anchor, response)
    right = correct(reading)
    return rouge_l(reading) if right is None else right


def _another(
    example: Example, examples: Sequence[Example], rng: np.random.Generator
) -> tuple[int, ...] | None:
    """The anchor of some other prompt, which is another text; None where none was found."""
    drawn = (examples[i].anchor_ids for i in rng.integers(len(examples), size=TRIES))
    return next((ids for ids in drawn if ids and ids != example.anchor_ids), None)
