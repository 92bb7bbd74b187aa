"""Scores to soft labels, and scores to pairs.

The abstract of arXiv 2601.20687 fixes that preferences are pairwise or listwise, order-consistent
and concentrated on near-optimal candidates. How scores become labels or pairs is ours.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pujax.errors import ConfigError, require
from pujax.types import LabelRule, Labels

# Scores closer than this share of the largest are float32 noise, not a preference.
_RESOLUTION = 1e-6

_MIX = 1  # what a step's key is folded with for lambda, so that no score is drawn from the same


def candidates(scores: Float[Array, "B G"]) -> Bool[Array, "B G"]:
    """True where a response is a candidate: not the anchor, nor an absent one."""
    candidate = jnp.broadcast_to(jnp.arange(scores.shape[-1]) > 0, scores.shape)
    return candidate & (scores != -jnp.inf) if _absent.get() else candidate


_absent = ContextVar("absent", default=False)


@contextmanager
def absent_candidates(are: bool = True) -> Iterator[None]:
    """While a step is traced in it, a candidate that scored -inf is absent: groups may be uneven.

    Where every group is full nothing depends on the scores but the ranking, and XLA compiles the
    same program, to the last bit, as if this did not exist.
    """
    token = _absent.set(are)
    try:
        yield
    finally:
        _absent.reset(token)


def standardize(scores: Float[Array, "B G"], mask: Bool[Array, "B G"]) -> Float[Array, "B G"]:
    """Scores with mean 0 and (population) deviation 1 over `mask` in each row, zero outside it.

    Rows whose scores are all equal, to float32's resolution, become zeros.

    >>> scores = jnp.array([[9.0, 1.0, 3.0], [9.0, 2.0, 2.0]])
    >>> print(standardize(scores, candidates(scores)))
    [[ 0. -1.  1.]
     [ 0.  0.  0.]]
    """
    scores = jnp.where(mask, scores.astype(jnp.float32), 0)
    count_B1 = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
    centred = jnp.where(mask, scores - scores.sum(axis=-1, keepdims=True) / count_B1, 0)
    std_B1 = jnp.sqrt(jnp.sum(centred**2, axis=-1, keepdims=True) / count_B1)
    equal_B1 = std_B1 <= _RESOLUTION * jnp.abs(scores).max(axis=-1, keepdims=True)
    return jnp.where(equal_B1, 0, centred / jnp.where(equal_B1, 1, std_B1))


def softmax_labels(
    scores: Float[Array, "B G"],
    *,
    tau: float = 0.5,
    standardized: bool = True,
    anchor_mass: float = 0.0,
) -> Labels:
    """Labels softmax(z / tau) over the candidates, and which responses take part (ours).

    z is the score, `standardized` within the candidates of its prompt or as it is. The anchor, the
    one known positive, gets `anchor_mass` and the candidates share the rest; with none it is out.

    Settings:
        tau: temperature of the softmax: towards 0 the best candidate gets it all.
        standardized: give each group's scores mean 0 and deviation 1 first.
        anchor_mass: the anchor's share, in [0, 1); 0 leaves it out.

    If every |s_i - r_i| <= eps, then r_i - r_j > 2 eps puts label i above label j, the argmax has
    regret at most 2 eps, and (for z = s) the mass on {r_i < r* - delta} is at most
    (K - 1) exp(-(delta - 2 eps) / tau).

    >>> labels, valid = softmax_labels(jnp.array([[9.0, 1.0, 3.0]]), anchor_mass=0.2)
    >>> print(labels.round(3))  # 0.8 / (1 + exp(4)) and the rest of 0.8: z is -1 and 1, tau 0.5
    [[0.2   0.014 0.786]]
    """
    _check_labels(tau, anchor_mass)
    candidate = candidates(scores)
    z = standardize(scores, candidate) if standardized else scores.astype(jnp.float32)
    shares = jax.nn.softmax(jnp.where(candidate, z / tau, -jnp.inf), axis=-1)
    labels = jnp.where(candidate, (1 - anchor_mass) * shares, anchor_mass)
    valid = candidate | (anchor_mass > 0)
    if not _absent.get():
        return labels, valid
    there = candidate | (jnp.arange(scores.shape[-1]) == 0)[None]
    return jnp.where(there, labels, 0), valid & there


def mixed_labels(
    scores: Float[Array, "B G"],
    members: Float[Array, "B M G"] | None,
    key: Array,
    mix: Float[Array, "B M"] | None = None,
    *,
    weights: Sequence[float] | None = None,
    tau: float = 1.0,
    standardized: bool = False,
    drawn: bool = False,
    anchor_mass: float = 0.0,
) -> Labels:
    """Labels sum_k lambda_k q_k, q_k those of each of a response's scores (arXiv 2506.19780).

    The cross-entropy is linear in labels, so under them `losses.listwise` is, but for a constant,
    that paper's sum over dimensions k of lambda_k times the listwise DPO loss of each; there q_k is
    the softmax of a rating column at temperature 1. The dimensions are the ratings of preference
    data, or a family of scorers (ours). At a corner of the simplex this is the one dimension's own.
    `mix` is each prompt's lambda where the prompt itself states it; lambda is else `weights`, or
    drawn, the same for a whole batch as there. Which batch gets which is a matter of its `key`.

    Settings:
        weights: lambda, made to sum to one, in the order of the dimensions; null weighs all alike.
        tau: temperature of each dimension's softmax.
        standardized: give each dimension mean 0 and deviation 1 within a group first.
        drawn: draw lambda for each batch, from the Dirichlet distribution of `weights`.
        anchor_mass: the anchor's share, in [0, 1); 0 leaves it out.
    """
    _check_labels(tau, anchor_mass)
    _check_weights(weights, drawn)
    if members is None:
        raise ConfigError(
            "labels: mixed_labels weighs several scores of a response, and here is one: take "
            "scorer=family, data.preferences with ratings by dimension, or labels=softmax"
        )
    B, M, _ = members.shape
    if mix is None:
        given = list(weights or [1.0] * M)
        require(len(given) == M, "labels.weights", given, f"there are {M} dimensions: one for each")
        one = jnp.asarray(given, jnp.float32)
        one = jax.random.dirichlet(key, one) if drawn else one / one.sum()
        mix = jnp.broadcast_to(one, (B, M))
    made = [
        softmax_labels(members[:, m], tau=tau, standardized=standardized, anchor_mass=anchor_mass)
        for m in range(M)
    ]
    labels = jnp.stack([each for each, _ in made], axis=1)
    return jnp.sum(mix[:, :, None] * labels, axis=1), made[0][1]


def _check_labels(tau: float, anchor_mass: float) -> None:
    require(0 < tau < math.inf, "labels.tau", tau, "must be positive and finite")
    require(0 <= anchor_mass < 1, "labels.anchor_mass", anchor_mass, "must lie in [0, 1)")


def _check_weights(weights: Sequence[float] | None, drawn: bool) -> None:
    """Null is as many as there are dimensions, and so is none at all."""
    given = list(weights or [1.0])
    require(
        all(0 < each < math.inf for each in given)
        if drawn
        else all(0 <= each < math.inf for each in given) and any(given),
        "labels.weights",
        given,
        "all must be positive to be drawn" if drawn else "none may be negative, nor all 0",
    )


def takes_members(rule: LabelRule) -> bool:
    """Whether a label rule asks for a response's scores one by one."""
    return rule is mixed_labels or (isinstance(rule, partial) and rule.func is mixed_labels)


def dimensions_of(rule: LabelRule) -> int | None:
    """How many scores a response must have for a label rule that says so."""
    if not isinstance(rule, partial) or not takes_members(rule):
        return None
    return len(rule.keywords.get("weights") or ()) or None


def labels_of(
    rule: LabelRule,
    scores: Float[Array, "B G"],
    members: Float[Array, "B M G"] | None,
    key: Array,
    mix: Float[Array, "B M"] | None = None,
) -> Labels:
    """The labels that `rule` makes of scores, or of `members`; `key` is the step's."""
    if takes_members(rule):
        return rule(scores, members, jax.random.fold_in(key, _MIX), mix)
    return rule(scores)


def best(scores: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """A weight of one a row on the best candidate; ties share it.

    >>> print(best(jnp.array([[9.0, 1.0, 3.0], [9.0, 2.0, 2.0]])))
    [[0.  0.  1. ]
     [0.  0.5 0.5]]
    """
    best_BG, _, _ = _ends(scores, candidates(scores))
    return _share(best_BG)


def extremes(values: Float[Array, "B G"], mask: Bool[Array, "B G"]) -> Float[Array, "B G G"]:
    """Pair weights for the best over the worst within `mask`; ties share their weight evenly.

    A row of equal values holds no preference: its weights are zero.
    """
    best_BG, worst_BG, apart_B1 = _ends(values, mask)
    return _share(best_BG & apart_B1)[:, :, None] * _share(worst_BG)[:, None, :]


def best_vs_worst(scores: Float[Array, "B G"]) -> Float[Array, "B G G"]:
    """The best candidate is preferred to the worst; ties share, equal scores weigh nothing.

    >>> print(best_vs_worst(jnp.array([[9.0, 1.0, 3.0]])))  # candidate 2 over candidate 1
    [[[0. 0. 0.]
      [0. 0. 0.]
      [0. 1. 0.]]]
    """
    return extremes(scores, candidates(scores))


def anchor_vs_worst(scores: Float[Array, "B G"]) -> Float[Array, "B G G"]:
    """The anchor is preferred to the worst candidate; ties share.

    Equal scores keep their weight: that the anchor is preferred does not come from the scores.
    """
    _, worst_BG, _ = _ends(scores, candidates(scores))
    return _anchor_over(_share(worst_BG))


def anchor_vs_all(scores: Float[Array, "B G"]) -> Float[Array, "B G G"]:
    """The anchor is preferred to every candidate, each with weight 1 / K.

    >>> print(anchor_vs_all(jnp.array([[9.0, 1.0, 3.0]])))
    [[[0.  0.5 0.5]
      [0.  0.  0. ]
      [0.  0.  0. ]]]
    """
    return _anchor_over(_share(candidates(scores)))


def best_and_worst(scores: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """The best candidate is good, the worst bad; ties share, equal scores are neither.

    >>> print(best_and_worst(jnp.array([[9.0, 1.0, 3.0, 1.0]])))
    [[ 0.  -0.5  1.  -0.5]]
    """
    pairs = best_vs_worst(scores)
    return pairs.sum(axis=2) - pairs.sum(axis=1)


def anchor_and_candidates(scores: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """The anchor is good, the candidates are bad, with the same weight in all."""
    pairs = anchor_vs_all(scores)
    return pairs.sum(axis=2) - pairs.sum(axis=1)


def flags(scores: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """A candidate that scored above 0 is good, below 0 bad: for responses that someone flagged.

    >>> print(flags(jnp.array([[9.0, 1.0, -3.0]])))
    [[ 0.  1. -1.]]
    """
    return jnp.where(candidates(scores), jnp.sign(scores), 0)


def _ends(
    values: Float[Array, "B G"], mask: Bool[Array, "B G"]
) -> tuple[Bool[Array, "B G"], Bool[Array, "B G"], Bool[Array, "B 1"]]:
    """Where the best and the worst within `mask` are, and whether they differ.

    All to float32's resolution, and not by equality: a compiled program may compute a score twice,
    once for the extreme and once to be held against it, and round it in two ways.
    """
    values = jnp.where(mask, values.astype(jnp.float32), 0)
    near_B1 = _RESOLUTION * jnp.abs(values).max(axis=-1, keepdims=True)
    best_B1 = values.max(axis=-1, keepdims=True, where=mask, initial=-jnp.inf)
    worst_B1 = values.min(axis=-1, keepdims=True, where=mask, initial=jnp.inf)
    best_BG = mask & (values >= best_B1 - near_B1)
    worst_BG = mask & (values <= worst_B1 + near_B1)
    return best_BG, worst_BG, best_B1 - worst_B1 > near_B1


def _share(chosen: Bool[Array, "B G"]) -> Float[Array, "B G"]:
    """A weight of one a row, split evenly over `chosen`; zeros where nothing is."""
    return chosen / jnp.maximum(chosen.sum(axis=-1, keepdims=True), 1).astype(jnp.float32)


def _anchor_over(rejected: Float[Array, "B G"]) -> Float[Array, "B G G"]:
    anchor_G = jnp.arange(rejected.shape[-1]) == 0
    return jnp.where(anchor_G[None, :, None], rejected[:, None, :], 0)
