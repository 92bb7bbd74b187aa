"""The dimension key, and the records and function types that cross a module boundary.

One letter, one meaning, in the whole code base:

    B  prompts in a batch          P  prompt length (padded)
    K  candidates a prompt         R  reference-prompt length (padded)
    G  responses a prompt, K + 1   T  response length (padded)
    V  vocabulary                  D  model width
    L  layers                      M  scores of a response, one by one

Index 0 of G is the anchor, the teacher's answer; the others are the student's candidates.
Everything is right-padded, and every mask comes from a length, never from a token's value.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

Params = Any  # a nested dict of arrays

Metrics = dict[str, Array]


@flax.struct.dataclass
class Tokens:
    """Right-padded sequences; of each the first `lengths` tokens are real, and the rest unread."""

    ids: Int[Array, "*N S"]
    lengths: Int[Array, "*N"]

    @property
    def mask(self) -> Bool[Array, "*N S"]:
        """True over the real tokens."""
        at = jnp.arange(self.ids.shape[-1]).reshape((1,) * self.lengths.ndim + (-1,))
        return at < self.lengths[..., None]


def right_padded(rows: Sequence[Sequence[int]], size: int) -> Tokens:
    """Token ids as [B S], S the `size`; none of the `rows` is longer. Padding is 0."""
    ids = np.zeros((len(rows), size), np.int32)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    return Tokens(jnp.asarray(ids), jnp.array([len(row) for row in rows], jnp.int32))


@flax.struct.dataclass
class Batch:
    """B prompts with their anchors, and their candidates where someone gives those.

    `references` holds, for each prompt, the chat prompt that is about to show a reference answer:
    the tokens up to where that answer's text begins (see `Frames`).
    """

    prompts: Tokens  # [B P], each of at least one token
    anchors: Tokens  # [B T], EOS included
    anchor_finished: Bool[Array, " B"]
    references: Tokens  # [B R]
    given: "Completions | None" = None  # candidates that no sampling need make
    rewards: tuple[Float[Array, "B G"], ...] = ()  # what the host says of them, see `rewards_of`
    ref_logps: Float[Array, "B G T"] | None = None  # the reference's, where they are known
    mix: Float[Array, "B M"] | None = None  # how the prompt says to weigh its dimensions
    anchor_weights: Float[Array, " B"] | None = None  # in SFT; None weighs all alike
    # So many rows at the end fill a mesh: copies of the last prompt, which count for nothing.
    padding: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def counted(self) -> "Batch":
        """The rows that count."""
        if not self.padding:
            return self
        rows = len(self.anchor_finished) - self.padding
        return jax.tree.map(lambda x: x[:rows], self).replace(padding=0)


@flax.struct.dataclass
class Completions:
    """K responses a prompt, with the log-probs of the untempered policy that made them.

    `logps` is None where that is not known: preference data, another model's answers. `scores` are
    someone's own, which no scorer then need find, and `members` their ratings by dimension: -inf
    for a response that isn't there.
    """

    tokens: Int[Array, "B K T"]
    mask: Bool[Array, "B K T"]  # EOS included
    finished: Bool[Array, "B K"]  # ended by an EOS within T tokens
    logps: Float[Array, "B K T"] | None
    scores: Float[Array, "B K"] | None = None
    members: Float[Array, "B M K"] | None = None


@flax.struct.dataclass
class Group:
    """The waist of the hourglass: what every loss learns from, whoever made it.

    Rows of `labels` sum to one over the responses that `valid` marks and are zero elsewhere.
    The anchor was never sampled, so its `old_logps` are the sampling policy's own reading of it;
    without `has_old_logps` nobody knows any, and `update` gives a loss the policy's own for all.
    Responses carry a mask and not lengths: a loss reduces with `where=mask`, and may be given one
    with holes. A given group with fewer candidates than K has empty masks and scores of -inf for
    the rest, which are neither valid nor in any pair (see `labels.absent_candidates`).
    """

    prompts: Tokens  # [B P]
    tokens: Int[Array, "B G T"]
    mask: Bool[Array, "B G T"]
    finished: Bool[Array, "B G"]
    old_logps: Float[Array, "B G T"]
    ref_logps: Float[Array, "B G T"]
    scores: Float[Array, "B G"]
    labels: Float[Array, "B G"]
    valid: Bool[Array, "B G"]
    has_old_logps: bool = flax.struct.field(pytree_node=False, default=True)
    members: Float[Array, "B M G"] | None = None  # scores one by one: a family's, or ratings
    kl: Float[Array, " B"] | None = None  # the batch's KL(policy || reference), see `batch_kl`


@flax.struct.dataclass
class Head:
    """What a scorer has learnt that is trained beside the student, and its optimizer's state."""

    params: Params
    opt_state: optax.OptState


@flax.struct.dataclass
class TrainState:
    """What changes from step to step. `skipped` counts non-finite updates in a row.

    `head` is that of a trained scorer; no other has one.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    skipped: Int[Array, ""]
    head: Head | None = None


Labels = tuple[Float[Array, "B G"], Bool[Array, "B G"]]

LabelRule = Callable[..., Labels]
"""Scores [B G] to (labels, valid); `labels.mixed_labels` is given more, see `labels_of`."""

PairRule = Callable[[Float[Array, "B G"]], Float[Array, "B G G"]]
"""Scores to pair weights: entry (i, j) weighs "i is preferred to j"; they sum to one a prompt."""

SideRule = Callable[[Float[Array, "B G"]], Float[Array, "B G"]]
"""Scores to which responses are good (a positive weight), bad (a negative one) or neither (0)."""

LossAndMetrics = tuple[Float[Array, " B"], Metrics]

LossFn = Callable[[Float[Array, "B G T"], Group], LossAndMetrics]
"""Policy log-probs and the group to one loss a prompt; hyper-parameters are bound keywords."""

Advantage = Callable[[Group], Float[Array, "B K"]]
"""A group to one advantage a candidate; zero for candidates that are not valid."""

Scorer = Callable[[Any], Float[Array, "B G"]]
"""A `scoring.ScoringContext`, what the student sees of a batch, to one score a response."""


@dataclass(frozen=True)
class Frames:
    """The constant tokens of the prompts that show a model two answers to a question.

    A reference prompt is `reference_head(messages)`, the answer shown, `reference_tail`; then
    comes the response that is scored. A rating prompt is the same head, the reference answer,
    `judge_middle`, the candidate, `judge_tail`; then come the logits of `rating_ids`, 1 to 5.
    """

    reference_tail: Int[np.ndarray, " N"]
    judge_middle: Int[np.ndarray, " N2"]
    judge_tail: Int[np.ndarray, " N3"]
    rating_ids: Int[np.ndarray, "5"]
