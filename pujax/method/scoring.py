"""The student's own scores of responses, with the anchor in view.

A scorer takes a `ScoringContext`, what the student sees of one batch, and returns a score for each
of the G responses; higher is better. The abstract of arXiv 2601.20687 fixes *that* the student
ranks its candidates with the anchor in view; every score below is our instantiation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Bool, Float, Int

from pujax.errors import ConfigError, require
from pujax.method.labels import standardize
from pujax.models.decoder import LanguageModel, Prefix
from pujax.models.logps import mean_logps, response_logps, token_logps
from pujax.types import Batch, Frames, Metrics, Params, Scorer, Tokens


@dataclass
class ScoringContext:
    """What the student sees of one batch while it scores. Lives while a function is traced.

    `logps`, `hidden` and `likelihood` keep what they computed, so that scorers and reference
    log-probs share one pass over the responses; where hidden states are wanted too, ask for them
    first. `reader` may hold a budget, which these responses and their prompts fit. `rewards` holds
    the scores that were made on the host, by function; `head` what a trained scorer has learnt so
    far. `notes` holds what a scorer adds to the step's metrics.
    """

    reader: LanguageModel
    params: Params
    frames: Frames
    batch: Batch
    after: Tokens | Prefix
    tokens: Int[Array, "B G T"]
    mask: Bool[Array, "B G T"]
    key: Array
    wants_logps: bool = True
    rewards: Mapping[Callable[..., Any], Array] = field(default_factory=dict)
    head: Params | None = None
    notes: Metrics = field(default_factory=dict)
    _final: Array | None = None
    _logps: Array | None = None
    _likelihood: Array | None = None
    _hidden: dict[int, Array] = field(default_factory=dict)

    @property
    def model(self) -> LanguageModel:
        """The model for prompts of a scorer's own making: the budget was not made for those."""
        return self.reader.unpacked

    def fresh(self, **changes: Any) -> "ScoringContext":
        """The same with `changes` and nothing computed yet."""
        return replace(self, _final=None, _logps=None, _likelihood=None, _hidden={}, **changes)

    def logps(self, *, anchor: bool = True) -> Float[Array, "B G T"]:
        """Log-probs of the responses after their prompts; the anchors' may be left out, and 0."""
        if self._logps is not None:
            return self._logps
        logps = response_logps(
            self.reader, self.params, self.after, self.tokens, self.mask, anchor=anchor
        )
        if anchor:
            self._logps = logps
        return logps

    def hidden(self, layers: int) -> Float[Array, "B G T D"]:
        """The residual stream of the responses after `layers` layers, prompt in view.

        Where log-probs are wanted too, the pass that makes them drops this on its way.
        """
        if layers in self._hidden:
            return self._hidden[layers]
        if self.wants_logps and self._logps is None:
            states = self.reader.extend(
                self.params, self.after, self.tokens, tap=layers, mask=self.mask
            )
            assert states.tapped is not None
            self._hidden[layers], self._final = states.tapped, states.hidden
            self._logps = token_logps(
                self.reader, self.params, states.predicting[:, :, :-1], self.tokens, self.mask
            )
        else:
            self._hidden[layers] = self.reader.read(
                self.params, self.after, self.tokens, layers=layers
            )
        return self._hidden[layers]

    def last_states(self) -> Float[Array, "B G D"]:
        """The normed final hidden state at each response's last token; 0 for an empty response."""
        if self._final is None:
            states = self.reader.extend(self.params, self.after, self.tokens, mask=self.mask)
            self._final = states.hidden
            if self.wants_logps and self._logps is None:
                self._logps = token_logps(
                    self.reader, self.params, states.predicting[:, :, :-1], self.tokens, self.mask
                )
        lengths = self.mask.sum(axis=-1)
        at = jnp.maximum(lengths - 1, 0)[..., None, None]
        last = jnp.take_along_axis(self._final, at, axis=2)[:, :, 0]
        return jnp.where((lengths > 0)[..., None], last.astype(jnp.float32), 0)

    def text_mask(self) -> Bool[Array, "B G T"]:
        """Response tokens without the EOS that ends them."""
        return self.mask & ~jnp.isin(self.tokens, jnp.array(self.model.config.eos_ids))

    def with_shuffled_anchors(self) -> "ScoringContext":
        """The same candidates beside the anchor of the batch's next prompt: the control."""

        def rolled(values: Array) -> Array:
            return values.at[:, 0].set(jnp.roll(values[:, 0], 1, axis=0))

        return self.fresh(tokens=rolled(self.tokens), mask=rolled(self.mask), wants_logps=False)

    def with_anchors(self, anchors: Tokens) -> "ScoringContext":
        """The same candidates beside other anchors; what was read of them is not read again."""
        tokens = self.tokens.at[:, 0].set(anchors.ids)
        mask = self.mask.at[:, 0].set(anchors.mask)
        other = self.fresh(tokens=tokens, mask=mask, wants_logps=False)
        alone = other.fresh(tokens=tokens[:, :1], mask=mask[:, :1])
        if self._logps is not None:
            other._logps = jnp.concatenate([alone.logps(), self._logps[:, 1:]], axis=1)
        for layers, known in self._hidden.items():
            states = [alone.hidden(layers), known[:, 1:]]
            other._hidden[layers] = jnp.concatenate(states, axis=1)
        return other


# ---------------------------------------------------------------------- scores without a new prompt


def embedding(context: ScoringContext, *, depth: float = 0.6667) -> Float[Array, "B G"]:
    """cos(h(y), h(a)): h averages the hidden state at `depth` of the layers over the response.

    Two thirds of them, to the digits that settings have: rounded to a layer it is the same.

    Settings:
        depth: the share of the layers that responses are read through, in (0, 1].
    """
    require(0 < depth <= 1, "scorer.score.depth", depth, "must lie in (0, 1]")
    layers = max(1, round(depth * context.model.config.layers))
    hidden = context.hidden(layers).astype(jnp.float32)
    count = jnp.maximum(context.mask.sum(axis=-1), 1)[..., None]
    mean = jnp.sum(hidden, axis=2, where=context.mask[..., None]) / count
    unit = mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
    return jnp.sum(unit * unit[:, :1], axis=-1)


def token_f1(context: ScoringContext) -> Float[Array, "B G"]:
    """F1 of the token multisets of response and anchor, EOS left out; 0 where either is empty."""
    mask = context.text_mask()
    same = context.tokens[..., :, None] == context.tokens[..., None, :]
    earlier = jnp.tril(jnp.ones((context.tokens.shape[-1],) * 2, bool), -1)[None, None]
    nth = jnp.sum(same & earlier, axis=-1, where=mask[..., None, :])
    in_anchor = context.tokens[..., :, None] == context.tokens[:, :1, None, :]
    available = jnp.sum(in_anchor, axis=-1, where=mask[:, :1, None, :])
    # The nth copy of a token is matched when the anchor holds more than n of it.
    shared = jnp.sum(available > nth, axis=-1, where=mask)
    return _f1(shared, mask)


def rouge(context: ScoringContext) -> Float[Array, "B G"]:
    """ROUGE-L F1 (Lin, 2004) on tokens: the longest common subsequence with the anchor."""
    mask = context.text_mask()
    B, G, T = context.tokens.shape
    anchor, anchor_mask = context.tokens[:, :1], mask[:, :1]

    def row(above: Array, t: Array) -> tuple[Array, None]:
        """One response token against the whole anchor: a row of the usual table [B, G, T + 1]."""
        token = jax.lax.dynamic_index_in_dim(context.tokens, t, axis=2)
        real = jax.lax.dynamic_index_in_dim(mask, t, axis=2)
        match = (token == anchor) & real & anchor_mask
        diagonal = above[..., :-1] + match
        best = jax.lax.cummax(jnp.maximum(above[..., 1:], diagonal), axis=2)
        return jnp.concatenate([above[..., :1], best], axis=-1), None

    table, _ = jax.lax.scan(row, jnp.zeros((B, G, T + 1), jnp.int32), jnp.arange(T))
    return _f1(table[..., -1], mask)


def _f1(shared: Int[Array, "B G"], mask: Bool[Array, "B G T"]) -> Float[Array, "B G"]:
    lengths = mask.sum(axis=-1)
    return 2.0 * shared / jnp.maximum(lengths + lengths[:, :1], 1)


def self_likelihood(context: ScoringContext) -> Float[Array, "B G"]:
    """mean-lp(y | x): `likelihood` with no anchor, the control that self-sharpening is."""
    return mean_logps(context.logps(), context.mask)


# ---------------------------------------------------------------------- scores that show the anchor


def likelihood(context: ScoringContext) -> Float[Array, "B G"]:
    """mean-lp(y | C(x, a)): C is a chat prompt that shows the anchor as the reference answer."""
    if context._likelihood is not None:
        return context._likelihood
    prompt = _join(
        context.batch.references,
        _anchor_text(context),
        _constant(context.frames.reference_tail, context.mask.shape[:1]),
    )
    logps = response_logps(context.model, context.params, prompt, context.tokens, context.mask)
    context._likelihood = mean_logps(logps, context.mask)
    return context._likelihood


def pmi(context: ScoringContext) -> Float[Array, "B G"]:
    """mean-lp(y | C(x, a)) − mean-lp(y | x): what seeing the anchor adds."""
    return likelihood(context) - self_likelihood(context)


def reconstruction(context: ScoringContext) -> Float[Array, "B G"]:
    """mean-lp(a | C(x, y)): how well the response, shown as reference, predicts the anchor.

    Every C(x, y) of a prompt starts alike, so that start is the shared prompt, and
    y + the rest of C + a is run as its response.
    """
    shown = _join(
        Tokens(context.tokens, context.text_mask().sum(axis=-1)),
        _constant(context.frames.reference_tail, context.mask.shape[:2]),
    )
    anchors = Tokens(
        jnp.broadcast_to(context.tokens[:, :1], context.tokens.shape),
        jnp.broadcast_to(context.mask[:, :1].sum(axis=-1), shown.lengths.shape),
    )
    whole = _join(shown, anchors)
    mask = whole.mask & ~Tokens(whole.ids, shown.lengths).mask
    logps = response_logps(context.model, context.params, context.batch.references, whole.ids, mask)
    return mean_logps(logps, mask)


def judge(context: ScoringContext) -> Float[Array, "B G"]:
    """Σ_r r·p(r), r = 1..5, from the next-token logits of a prompt that asks for a rating."""
    prompt = _join(
        context.batch.references,
        _anchor_text(context),
        _constant(context.frames.judge_middle, context.mask.shape[:1]),
    )
    shown = _join(
        Tokens(context.tokens, context.text_mask().sum(axis=-1)),
        _constant(context.frames.judge_tail, context.mask.shape[:2]),
    )
    hidden = context.model.extend(context.params, prompt, shown.ids).hidden
    last = jnp.take_along_axis(hidden, (shown.lengths - 1)[..., None, None], axis=2)[:, :, 0]
    logits = context.model.unembed(context.params, last)[
        ..., jnp.asarray(context.frames.rating_ids)
    ]
    ratings = jnp.arange(1, 1 + logits.shape[-1], dtype=jnp.float32)[None, None]
    return jnp.sum(jax.nn.softmax(logits, axis=-1) * ratings, axis=-1)


# ---------------------------------------------------------------------- scores made on the host


def reward(
    context: ScoringContext,
    *,
    function: Callable[..., Any],
    batched: bool = False,
    seconds: float = 10.0,
    workers: int = 4,
) -> Float[Array, "B G"]:
    """What `function`, plain Python, says of each response: see `pujax.rewards`.

    It runs on the host, between sampling and the rest of the step (`pujax.run.rewarding`).

    Settings:
        function: the reward: higher is better.
        batched: call it once a step, with a list for each argument, for a list.
        seconds: that a call may take.
        workers: processes that call it.

    Raises `ConfigError` where nobody has run it, as in a benchmark or a suite.
    """
    require(seconds > 0, "scorer.score.seconds", seconds, "must be positive")
    require(workers > 0, "scorer.score.workers", workers, "must be positive")
    if function not in context.rewards:
        raise ConfigError(
            f"scorer.score: the reward {_name(function)} runs on the host, as training does and "
            "this does not: choose another scorer, or give Batch.rewards"
        )
    return context.rewards[function]


def found_in(scorer: Any, function: Callable[..., Any]) -> tuple[partial, ...]:
    """Where a scorer, or what is bound in it, is a bound `function`; in their order."""
    if isinstance(scorer, Mapping):
        scorer = list(scorer.values())
    if isinstance(scorer, Sequence) and not isinstance(scorer, str):
        return tuple(found for part in scorer for found in found_in(part, function))
    if not isinstance(scorer, partial):
        return ()
    return (scorer,) if scorer.func is function else found_in(scorer.keywords, function)


def rewards_of(scorer: Any) -> tuple[partial, ...]:
    """The rewards in a scorer, bound, in the order of `Batch.rewards`.

    Raises `ConfigError` for one in `shuffled`: anchors are shuffled on the device.
    """
    if any(found_in(control.keywords, reward) for control in found_in(scorer, shuffled)):
        raise ConfigError(
            "scorer.score: shuffled moves anchors on the device, and a reward runs on the host: "
            "shuffle another score"
        )
    return found_in(scorer, reward)


# ---------------------------------------------------------------------- combinations and controls


def blend(
    context: ScoringContext, *, scores: Sequence[Scorer], weights: Sequence[float]
) -> Float[Array, "B G"]:
    """Weighted sum of `scores`, each standardised over its group's candidates first.

    That sum's mean is 0 in every group and tells nothing, so two metrics are noted in its place:
    the candidates' mean of each score as it came, `score/<name>`, and the weighted sum of those
    means, `score/mean`.

    Settings:
        scores: the scores, each a function by `_target_`.
        weights: of each.
    """
    _check_weights(scores, weights)
    candidates = _candidates(context)
    total = mean = jnp.zeros(())
    for score, weight in zip(scores, weights, strict=True):
        raw = score(context)
        noted = raw[: raw.shape[0] - context.batch.padding, 1:].mean()
        context.notes[f"score/{_name(score)}"] = noted
        mean += weight * noted
        total += weight * standardize(raw, candidates)
    context.notes["score/mean"] = mean
    return total


def _check_weights(scores: Sequence[Any], weights: Sequence[float]) -> None:
    count = len(scores)
    require(count > 0, "scorer.score.scores", scores, "give one at least")
    remedy = f"there are {count} scores: give each a finite number, and not 0 to all"
    fits = len(weights) == count and all(map(math.isfinite, weights)) and any(weights)
    require(fits, "scorer.score.weights", weights, remedy)


def _check_tau(tau: float) -> None:
    require(0 < tau < math.inf, "scorer.score.tau", tau, "must be positive and finite")


def _candidates(context: ScoringContext) -> Bool[Array, "B G"]:
    """True but for the anchors: what is sampled is there, whatever it scores."""
    return jnp.ones(context.mask.shape[:2], bool).at[:, 0].set(False)


def _name(score: Callable[..., Any]) -> str:
    """What a score is called: a reward as its function is."""
    if isinstance(score, partial):
        return _name(score.keywords["function"] if score.func is reward else score.func)
    return score.__name__


def mixture(
    context: ScoringContext,
    *,
    scores: Sequence[Scorer],
    weights: Sequence[float],
    tau: float = 0.5,
    drawn: bool = False,
) -> Float[Array, "B G"]:
    """log sum_k lambda_k q_k: several preferences at once, q_k = softmax(z_k / tau) of each score.

    Labels at tau 1 of these scores, unstandardised, are sum_k lambda_k q_k, and the cross-entropy
    is linear in labels: `listwise` on them is, but for a constant, sum_k lambda_k times the
    listwise DPO loss of each score (lambda-weighted listwise DPO, arXiv 2506.19780; there the q_k
    are of rating columns, here of scorers). The anchor is as good as the best.

    Settings:
        scores: the scores, each a function by `_target_`.
        weights: lambda, made to sum to one.
        tau: temperature of each score's softmax.
        drawn: draw lambda for each batch, from the Dirichlet distribution of `weights`.
    """
    _check_weights(scores, weights)
    require(
        all(weight > 0 for weight in weights),
        "scorer.score.weights",
        weights,
        "all must be positive",
    )
    _check_tau(tau)
    candidates = _candidates(context)
    mix = jnp.asarray(weights, jnp.float32)
    mix = jax.random.dirichlet(context.key, mix) if drawn else mix / mix.sum()
    total = jnp.zeros(candidates.shape)
    for score, weight in zip(scores, mix, strict=True):
        z = standardize(score(context), candidates) / tau
        total += weight * jax.nn.softmax(jnp.where(candidates, z, -jnp.inf), axis=-1)
    total = jnp.where(candidates, total, total.max(axis=-1, keepdims=True))
    return jnp.log(jnp.maximum(total, 1e-30))


def confident(
    context: ScoringContext, *, scores: Sequence[Scorer], tau: float = 0.5
) -> Float[Array, "B G"]:
    """Several noisy rankers merged by how sure each is of a group (ours, after arXiv 2301.11774).

    Each score, standardised, counts as much as its soft labels q = softmax(z / tau) say of the
    group: log K - H(q) nats, so a ranker that finds all candidates alike has no say. (The paper
    weighs an ensemble of reward models by confidence, whose latent heads `latent.latent` may be one
    of the scores.)

    Settings:
        scores: the scores, each a function by `_target_`.
        tau: temperature of the soft labels that tell how sure a score is.
    """
    _check_tau(tau)
    candidates = _candidates(context)
    total, said = jnp.zeros(candidates.shape), jnp.zeros((candidates.shape[0], 1))
    for score in scores:
        z = standardize(score(context), candidates)
        q = jax.nn.softmax(jnp.where(candidates, z / tau, -jnp.inf), axis=-1)
        entropy = -xlogy(q, q).sum(axis=-1, keepdims=True)
        weight = jnp.maximum(jnp.log(candidates.shape[1] - 1) - entropy, 0)
        total, said = total + weight * z, said + weight
    return total / jnp.where(said > 0, said, 1)


def family(
    context: ScoringContext, *, scores: Sequence[Scorer], standardized: bool = True
) -> Float[Array, "B G"]:
    """The mean of several scores, which a loss is also given one by one, as `Group.members`.

    That scorers of one group stand for the reward models of arXiv 2405.19316 is ours.

    Settings:
        scores: the scores, each a function by `_target_`.
        standardized: give each score mean 0 and deviation 1 within a group, so that none is the
            nearest for being flat.
    """
    return _members(context, scores, standardized).mean(axis=1)


def members_of(scorer: Scorer, context: ScoringContext) -> Float[Array, "B M G"] | None:
    """The scores of a bound `family`, one by one; None for any other scorer."""
    if not isinstance(scorer, partial) or scorer.func is not family:
        return None
    return _members(context, scorer.keywords["scores"], scorer.keywords.get("standardized", True))


def _members(
    context: ScoringContext, scores: Sequence[Scorer], standardized: bool
) -> Float[Array, "B M G"]:
    candidates = _candidates(context)
    made = [score(context) for score in scores]
    return jnp.stack([standardize(s, candidates) if standardized else s for s in made], axis=1)


def shuffled(context: ScoringContext, *, score: Scorer) -> Float[Array, "B G"]:
    """`score` with another prompt's anchor in view: what of it does not come from the anchor.

    Settings:
        score: the score, a function by `_target_`.
    """
    return score(context.with_shuffled_anchors())


def random(context: ScoringContext) -> Float[Array, "B G"]:
    """Uniform noise: the control that carries nothing."""
    return jax.random.uniform(context.key, context.mask.shape[:2])


def length(context: ScoringContext) -> Float[Array, "B G"]:
    """The number of tokens: the control that a score must not reduce to."""
    return context.mask.sum(axis=-1).astype(jnp.float32)


# ---------------------------------------------------------------------- putting tokens together


def _join(*parts: Tokens) -> Tokens:
    """Parts as one, each starting where the last one's real tokens end."""
    whole = parts[0]
    for more in parts[1:]:
        ids, length = whole.ids, whole.lengths
        size = ids.shape[-1] + more.ids.shape[-1]
        at = jnp.arange(size).reshape((1,) * (ids.ndim - 1) + (size,))
        at = jnp.broadcast_to(at, (*ids.shape[:-1], size))
        first = jnp.take_along_axis(ids, jnp.minimum(at, ids.shape[-1] - 1), axis=-1)
        offset = jnp.clip(at - length[..., None], 0, more.ids.shape[-1] - 1)
        second = jnp.take_along_axis(more.ids, offset, axis=-1)
        ids = jnp.where(at < length[..., None], first, second)
        whole = Tokens(ids, length + more.lengths)
    return whole


def _anchor_text(context: ScoringContext) -> Tokens:
    """The anchors without the EOS that ends them."""
    return Tokens(context.tokens[:, 0], context.text_mask()[:, 0].sum(axis=-1))


def _constant(ids: Int[np.ndarray, " N"], shape: tuple[int, ...]) -> Tokens:
    """The same tokens for each of `shape` prompts or responses."""
    row = jnp.asarray(ids, jnp.int32).reshape((1,) * len(shape) + (len(ids),))
    return Tokens(jnp.broadcast_to(row, (*shape, len(ids))), jnp.full(shape, len(ids), jnp.int32))
