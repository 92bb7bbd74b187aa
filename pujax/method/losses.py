"""Policy log-probs and a group to one loss a prompt.

Delta_i = lp_policy(y_i) - lp_ref(y_i), summed over tokens. That training uses DPO, GRPO or a
label-distribution variant of GRPO is from the abstract of arXiv 2601.20687; their exact form here,
and everything else, is ours or from the source that a docstring names.

The losses of pairs are in `pair_losses`.

Log-probs outside the mask may be anything, NaN included: neither a loss nor its gradient sees them.
Losses return means that are exact under averaging over microbatches of equal size, metrics too.

A group of one prompt, its anchor and two candidates of two tokens; the policy is the reference:

>>> from pujax.types import Tokens
>>> ref_logps = jnp.array([[[-1.0, -2.0], [-3.0, -1.0], [-2.0, -2.0]]])
>>> group = Group(
...     prompts=Tokens(jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)),
...     tokens=jnp.zeros((1, 3, 2), jnp.int32),
...     mask=jnp.ones((1, 3, 2), bool),
...     finished=jnp.ones((1, 3), bool),
...     old_logps=ref_logps,
...     ref_logps=ref_logps,
...     scores=jnp.array([[0.0, 1.0, -1.0]]),
...     labels=jnp.array([[0.0, 0.75, 0.25]]),
...     valid=jnp.array([[False, True, True]]),
... )
>>> print(sft(ref_logps, group)[0])
[1.5]
>>> print(listwise(ref_logps, group)[0].round(4))  # log 2 - entropy of (3/4, 1/4)
[0.1308]
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.scipy.special import xlogy
from jaxtyping import Array, Bool, Float, Int

from pujax.errors import require
from pujax.method.labels import (
    anchor_vs_all,
    best,
    best_vs_worst,
    candidates,
    extremes,
    standardize,
)
from pujax.method.terms import (
    deltas,
    log_p,
    log_ratios,
    masked,
    means,
    nll,
    preference_metrics,
    sums,
)
from pujax.types import Advantage, Group, LossAndMetrics, LossFn, Metrics

Aggregate = Callable[
    [Float[Array, "B K T"], Bool[Array, "B K T"], Int[Array, " B"]], Float[Array, " B"]
]
"""Token terms, their mask and each prompt's number of candidates to one value a prompt.

A candidate whose tokens are all left out is counted, an absent one isn't."""

Surrogate = Callable[[Float[Array, "..."]], Float[Array, "..."]]
"""A classifier's output times its label (+1 or -1) to a loss."""

Clip = Callable[..., tuple[Float[Array, "B n T"], Bool[Array, "B n T"]]]
"""(logps, old_logps, advantages [B n], mask, clip_low, clip_high) to token terms and where the
clip binds."""

# Advantages and label differences below this are float32 rounding, not a signal.
_NO_SIGNAL = 1e-6

# Supervised losses.


def sft(logps: Float[Array, "B G T"], group: Group) -> LossAndMetrics:
    """Mean negative log-prob of the anchor's tokens."""
    return -means(masked(logps, group.mask)[:, 0], group.mask[:, 0]), {}


def weighted_sft(logps: Float[Array, "B G T"], group: Group) -> LossAndMetrics:
    """Mean negative log-prob of the responses' tokens, weighted by the labels.

    As `labels.tau` goes to 0 it is SFT on the best of the student's own candidates (RAFT: Dong et
    al., 2023, with one kept a prompt), which is the simplest use of a ranking; with soft labels it
    is the weighted regression of Peters and Schaal (2007). A valid anchor takes part.
    """
    return jnp.sum(group.labels * nll(logps, group), axis=-1, where=group.valid), {}


def raft(logps: Float[Array, "B G T"], group: Group) -> LossAndMetrics:
    """Mean negative log-prob of the candidate that scored best (RAFT, Dong et al., 2023).

    The student's own best is imitated as the anchor is by `sft`: reward-ranked fine-tuning without
    a loss on any other candidate. Candidates that tie share the weight, all of them where no score
    differs.
    """
    weights_BG = best(group.scores)
    pairs_BGG = best_vs_worst(group.scores)
    metrics = preference_metrics(logps, group, deltas(logps, group), pairs_BGG)
    return sums(weights_BG * nll(logps, group)), metrics


# Positive-unlabeled risk.


def sigmoid_loss(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """sigmoid(-z): bounded, and l(z) + l(-z) = 1 (the surrogate of Kiryo et al., 2017).

    >>> print(sigmoid_loss(jnp.array([0.0, 100.0])))
    [0.5 0. ]
    """
    return jax.nn.sigmoid(-z)


def logistic_loss(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 + exp(-z)): convex and unbounded, l(-z) - l(z) = z."""
    return jax.nn.softplus(-z)


def nnpu(
    logps: Float[Array, "B G T"],
    group: Group,
    *,
    beta: float = 0.1,
    prior: float = 0.3,
    surrogate: Surrogate = sigmoid_loss,
) -> LossAndMetrics:
    """Non-negative PU risk of the implied reward h = beta Delta (Kiryo et al., 2017, eq. 6).

    prior l(h(a)) + max(0, E_U l(-h(y)) - prior l(-h(a))): the anchor a is the positive, the
    candidates are the unlabeled. Where the max is at 0 the candidates get no gradient; with
    `sigmoid_loss` and h(a) large that is where their mean sigmoid(h) has come down to `prior`.

    Ours: the classifier, and the max within each prompt (in the paper within each batch), so that
    a prompt's loss does not depend on its neighbours. This is eq. 6 itself, without the paper's
    gradient switch below the max. Scores and labels are not used.

    Settings:
        beta: the implied reward for a nat of log-ratio to the reference.
        prior: the share of the candidates that is as good as the anchor, in (0, 1).
        surrogate: l, the loss of a classifier's output.
    """
    require(0 < beta < math.inf, "loss.beta", beta, "must be positive and finite")
    require(0 < prior < 1, "loss.prior", prior, "must lie in (0, 1)")
    rewards_BG = beta * deltas(logps, group)
    anchor_B = rewards_BG[:, 0]
    unlabeled_B = means(surrogate(-rewards_BG[:, 1:]), group.valid[:, 1:])
    negative_B = jnp.maximum(0, unlabeled_B - prior * surrogate(-anchor_B))
    metrics = preference_metrics(logps, group, rewards_BG, anchor_vs_all(group.scores))
    return prior * surrogate(anchor_B) + negative_B, metrics


# Listwise loss.


def listwise(
    logps: Float[Array, "B G T"],
    group: Group,
    *,
    beta: float = 0.1,
    length_normalized: bool = False,
) -> LossAndMetrics:
    """KL(q || p), q the labels and p = softmax(beta Delta) over the valid responses (ours).

    Zero where beta Delta = log q + const. At the reference p is uniform over the G valid responses,
    so the gradient there is the policy gradient with advantages beta (q_i - 1 / G).
    Under `labels.mixed_labels` it is lambda-weighted listwise DPO.

    Settings:
        beta: the implied reward for a nat of log-ratio to the reference: the smaller, the further
            the policy goes.
        length_normalized: divide each response's log-ratio by its length.
    """
    require(0 < beta < math.inf, "loss.beta", beta, "must be positive and finite")
    rewards_BG = beta * deltas(logps, group, length_normalized=length_normalized)
    terms_BG = xlogy(group.labels, group.labels) - group.labels * log_p(rewards_BG, group.valid)
    loss_B = jnp.sum(terms_BG, axis=-1, where=group.valid)
    return loss_B, _label_metrics(logps, group, rewards_BG, group.valid)


# Policy-gradient losses: advantages, aggregations, clips, and the two losses.


def mean_std(group: Group) -> Float[Array, "B K"]:
    """Scores standardised within the candidates of a prompt (Shao et al., 2024, section 4.1.2)."""
    return standardize(group.scores[:, 1:], group.valid[:, 1:])


def mean(group: Group) -> Float[Array, "B K"]:
    """Scores less their mean over the candidates of a prompt (Dr. GRPO, Liu et al., 2025)."""
    valid = group.valid[:, 1:]
    scores = group.scores[:, 1:].astype(jnp.float32)
    return jnp.where(valid, scores - means(masked(scores, valid), valid)[:, None], 0)


def from_labels(group: Group) -> Float[Array, "B K"]:
    """K q - 1, q the labels made to sum to one over the candidates (ours)."""
    valid = group.valid[:, 1:]
    share = means(masked(group.labels[:, 1:], valid), valid)[:, None]
    return jnp.where(valid & (share > 0), group.labels[:, 1:] / jnp.maximum(share, 1e-30) - 1, 0)


def token_mean(
    terms: Float[Array, "B K T"], mask: Bool[Array, "B K T"], count: Int[Array, " B"] | None = None
) -> Float[Array, " B"]:
    """The mean over all tokens of a prompt's candidates (DAPO, Yu et al., 2025).

    >>> mask = jnp.array([[[True, True, True], [True, False, False]]])
    >>> print(token_mean(jnp.array([[[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]]]), mask))
    [4.]
    """
    del count  # tokens are what is counted
    return jnp.sum(terms, axis=(1, 2), where=mask) / jnp.maximum(mask.sum(axis=(1, 2)), 1)


def sequence_mean(
    terms: Float[Array, "B K T"], mask: Bool[Array, "B K T"], count: Int[Array, " B"] | None = None
) -> Float[Array, " B"]:
    """The mean over candidates of each one's mean over tokens (GRPO, Shao et al., 2024).

    A token of a long response weighs less, so long bad responses are punished less.

    >>> mask = jnp.array([[[True, True, True], [True, False, False]]])
    >>> print(sequence_mean(jnp.array([[[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]]]), mask))
    [6.]
    """
    del count  # the mean is over candidates that have tokens
    return means(means(terms, mask), mask.any(axis=-1))


def constant(
    terms: Float[Array, "B K T"],
    mask: Bool[Array, "B K T"],
    count: Int[Array, " B"] | None = None,
    *,
    length: float = 1.0,
) -> Float[Array, " B"]:
    """The mean over candidates of each one's sum over tokens, divided by a constant `length`.

    Free of length bias (Dr. GRPO, Liu et al., 2025); at length 1 it is the policy gradient itself.

    Settings:
        length: what the sums are divided by, in tokens: a step size.

    >>> mask = jnp.array([[[True, True, True], [True, False, False]]])
    >>> print(constant(jnp.array([[[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]]]), mask, length=2.0))
    [4.]
    """
    require(0 < length < math.inf, "loss.aggregate.length", length, "must be positive and finite")
    each = sums(masked(terms, mask))
    return (each.mean(axis=-1) if count is None else sums(each) / jnp.maximum(count, 1)) / length


def token_clip(
    logps: Float[Array, "B n T"],
    old_logps: Float[Array, "B n T"],
    advantages: Float[Array, "B n"],
    mask: Bool[Array, "B n T"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "B n T"], Bool[Array, "B n T"]]:
    """-min(r A, clip(r) A), r the ratio of each token (PPO, Schulman et al., 2017, eq. 7)."""
    ratio = jnp.exp(masked(logps - old_logps, mask))
    return _pessimistic(ratio, advantages, mask, clip_low, clip_high)


def sequence_clip(
    logps: Float[Array, "B n T"],
    old_logps: Float[Array, "B n T"],
    advantages: Float[Array, "B n"],
    mask: Bool[Array, "B n T"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "B n T"], Bool[Array, "B n T"]]:
    """-min(s A, clip(s) A), the same at every token of a response (GSPO, Zheng et al., 2025).

    s = (policy(y) / old(y))^(1 / |y|), the response's own ratio, length-normalised. Aggregated by
    `sequence_mean` it is the paper's objective.
    """
    log_ratio = means(masked(logps - old_logps, mask), mask)
    ratio = jnp.broadcast_to(jnp.exp(log_ratio)[:, :, None], mask.shape)
    return _pessimistic(ratio, advantages, mask, clip_low, clip_high)


def weight_clip(
    logps: Float[Array, "B n T"],
    old_logps: Float[Array, "B n T"],
    advantages: Float[Array, "B n"],
    mask: Bool[Array, "B n T"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "B n T"], Bool[Array, "B n T"]]:
    """-clip(r) A log policy, no gradient through clip(r) (CISPO, MiniMax, 2025, section 3.1).

    Every token keeps a gradient: the clip bounds its weight alone.
    """
    ratio = jnp.exp(masked(stop_gradient(logps) - old_logps, mask))
    weight = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    terms = -weight * advantages[:, :, None] * masked(logps, mask)
    return masked(terms, mask), mask & (weight != ratio)


def _pessimistic(
    ratio: Float[Array, "B n T"],
    advantages: Float[Array, "B n"],
    mask: Bool[Array, "B n T"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "B n T"], Bool[Array, "B n T"]]:
    """The worse of the free and the clipped surrogate, and where that is the clipped one."""
    advantages = advantages[:, :, None]
    free = ratio * advantages
    bound = jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages
    return masked(-jnp.minimum(free, bound), mask), mask & (bound < free)


def grpo(
    logps: Float[Array, "B G T"],
    group: Group,
    *,
    advantage: Advantage = mean_std,
    aggregate: Aggregate = constant,
    clip: Clip = token_clip,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.04,
    mask_unfinished: bool = False,
) -> LossAndMetrics:
    """Clipped surrogate over the candidates plus KL to the reference (Shao et al., 2024, eq. 3).

    The paper's mean over a response's tokens is `sequence_mean`; `constant` is Dr. GRPO's sum. The
    anchor takes no part: it was never sampled. The bounds [1 - low, 1 + high] are DAPO's (Yu et
    al., 2025). The KL term is `kl_terms`, not the paper's k3, whose gradient is not the KL's. The
    metrics' rewards take beta = 1.

    With `constant` and on-policy, its gradient is that of -E[A] + kl_coef KL(policy || ref), so for
    fixed advantages training ends at policy ~ ref exp(A / kl_coef).

    Settings:
        advantage: from a group's scores or labels to each candidate's advantage.
        aggregate: from the terms of a prompt's tokens to its loss.
        clip: which ratio of policy to old policy is bounded, and how.
        clip_low: how far that ratio may fall below 1, in (0, 1]; 1 is no lower bound.
        clip_high: how far it may rise above 1.
        kl_coef: the weight of the KL to the reference; 0 is none.
        mask_unfinished: drop the tokens of responses that were cut off; their scores stay in the
            baseline (as in DAPO).
    """
    _check_surrogate(clip_low, clip_high, kl_coef)
    mask = _candidate_mask(group, mask_unfinished)
    advantages = stop_gradient(advantage(group))
    surrogate, clipped = clip(
        logps[:, 1:], group.old_logps[:, 1:], advantages, mask, clip_low, clip_high
    )
    candidate_BG = candidates(group.scores)
    terms = surrogate + kl_coef * kl_terms(logps, group, mask)
    loss_B = aggregate(terms, mask, candidate_BG.sum(axis=-1))
    metrics = _label_metrics(logps, group, deltas(logps, group), group.valid & candidate_BG)
    return loss_B, metrics | {
        "policy/clip_fraction": token_mean(clipped.astype(jnp.float32), mask).mean(),
        "group/no_signal": (jnp.abs(advantages).max(axis=-1) <= _NO_SIGNAL).mean(),
    }


def ldl_grpo(
    logps: Float[Array, "B G T"],
    group: Group,
    *,
    beta: float = 0.1,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.04,
    mask_unfinished: bool = False,
) -> LossAndMetrics:
    """GRPO whose advantage is a label distribution's: A_i = G (q_i - p_i) (ours).

    q are the labels, p = softmax(beta Delta) at the sampling policy over the G valid responses; a
    valid anchor takes part. The clipped surrogate is summed over tokens and over the G responses,
    so with kl_coef = 0 the first gradient (policy = old policy) is that of `listwise` times
    G / beta, and it vanishes where p = q. The KL term is G times that of `grpo`, so that `kl_coef`
    weighs the same in both: at the reference, with the anchor left out, the gradient is G times
    that of `grpo` with `from_labels`, which never stops.

    Settings:
        beta: the implied reward for a nat of log-ratio to the reference: the smaller, the further
            the policy goes.
        clip_low: how far a token's ratio of policy to old policy may fall below 1, in (0, 1]; 1 is
            no lower bound.
        clip_high: how far it may rise above 1.
        kl_coef: the weight of the KL to the reference, of a candidate; 0 is none.
        mask_unfinished: drop the tokens of responses that were cut off; they stay in q and p.
    """
    require(0 < beta < math.inf, "loss.beta", beta, "must be positive and finite")
    _check_surrogate(clip_low, clip_high, kl_coef)
    valid = group.valid
    candidate_mask = _candidate_mask(group, mask_unfinished)
    anchor_mask = group.mask[:, :1] & valid[:, :1, None]
    mask = jnp.concatenate([anchor_mask, candidate_mask], axis=1)
    count_B = jnp.maximum(valid.sum(axis=-1), 1)
    p_BG = jnp.exp(log_p(beta * deltas(group.old_logps, group), valid))
    advantages = jnp.where(valid, count_B[:, None] * (group.labels - p_BG), 0)
    surrogate, clipped = token_clip(
        logps, group.old_logps, stop_gradient(advantages), mask, clip_low, clip_high
    )
    terms = kl_terms(logps, group, candidate_mask)
    kl_B = constant(terms, candidate_mask, candidates(group.scores).sum(axis=-1))
    loss_B = sums(sums(surrogate)) + kl_coef * count_B * kl_B
    rewards_BG = beta * deltas(logps, group)
    return loss_B, _label_metrics(logps, group, rewards_BG, valid) | {
        "policy/clip_fraction": token_mean(clipped.astype(jnp.float32), mask).mean()
    }


def beside_anchor(
    logps: Float[Array, "B G T"], group: Group, *, loss: LossFn = grpo, weight: float = 1.0
) -> LossAndMetrics:
    """Another `loss` plus `weight` times the anchor's mean negative log-prob: both in one step.

    What `pair_losses.dpo` has as `nll_weight` (Pang et al., 2024), for a loss of candidates alone
    (ours).

    Settings:
        loss: the other loss.
        weight: of the anchor's mean negative log-prob.
    """
    require(0 < weight < math.inf, "loss.weight", weight, "must be positive and finite")
    loss_B, metrics = loss(logps, group)
    nll_B, _ = sft(logps, group)
    return loss_B + weight * nll_B, metrics | {"loss/anchor": stop_gradient(nll_B).mean()}


def _check_surrogate(clip_low: float, clip_high: float, kl_coef: float) -> None:
    require(0 < clip_low <= 1, "loss.clip_low", clip_low, "must lie in (0, 1]: 1 is no bound")
    require(0 < clip_high < math.inf, "loss.clip_high", clip_high, "must be positive and finite")
    require(0 <= kl_coef < math.inf, "loss.kl_coef", kl_coef, "must be finite and not negative")


def kl_terms(
    logps: Float[Array, "B G T"], group: Group, mask: Bool[Array, "B K T"]
) -> Float[Array, "B K T"]:
    """Token terms that sum to an estimate of KL(policy || reference), in value and in gradient.

    The value of a term is l_t = log policy - log ref at the sampled token (k1). Its gradient is
    ratio_t (L_t - b_t) grad log policy_t, with L_t = sum_{u >= t} l_u, b_t the mean of L_t over the
    prompt's other candidates (a baseline: it lowers the variance and not the mean), and ratio_t =
    policy / old policy of the token.

    For candidates sampled independently from the policy, the expected sum over tokens is exactly
    the gradient of the KL between the distributions over whole responses of up to T tokens. That
    includes how a token changes the states that later tokens see, which l_t alone in place of L_t
    (k2, or k3 times the ratio) leaves out. For samples of an older policy, ratio_t corrects the
    choice of the token but not the odds of the tokens before it: exact for one-token responses and
    PPO's approximation beyond. Tempered sampling, or a mask that drops candidates, shifts the
    expectation to what was kept. (Ours, from the policy gradient theorem; Tang & Munos, 2025.)
    """
    log_ratio = stop_gradient(masked(logps[:, 1:] - group.ref_logps[:, 1:], mask))
    ratio = jnp.exp(masked(logps[:, 1:] - group.old_logps[:, 1:], mask))
    to_go = jnp.cumsum(log_ratio[..., ::-1], axis=-1)[..., ::-1]
    others_B = jnp.maximum(candidates(group.scores).sum(axis=-1) - 1, 1)
    others = (to_go.sum(axis=1, keepdims=True) - to_go) / others_B[:, None, None]
    return log_ratio + (ratio - stop_gradient(ratio)) * (to_go - others)


# Metrics.


def group_metrics(logps: Float[Array, "B G T"], group: Group) -> Metrics:
    """What is logged whichever the loss: means over prompts.

    `kl/ref` is the mean over a prompt's candidate tokens of log policy - log ref (k1, per token),
    apart from any KL that is trained; `logps/anchor` is the anchor's summed log-prob;
    `label/entropy` is in nats.
    """
    logps, labels = stop_gradient(logps), group.labels
    return {
        "kl/ref": token_mean(log_ratios(logps, group)[:, 1:], group.mask[:, 1:]).mean(),
        "logps/anchor": sums(masked(logps, group.mask))[:, 0].mean(),
        "label/entropy": -xlogy(labels, labels).sum(axis=-1, where=group.valid).mean(),
        "label/top1_mass": labels.max(axis=-1, where=group.valid, initial=0).mean(),
    }


def _label_metrics(
    logps: Float[Array, "B G T"],
    group: Group,
    rewards_BG: Float[Array, "B G"],
    mask_BG: Bool[Array, "B G"],
) -> Metrics:
    """The same for the response with the highest label over the one with the lowest."""
    return preference_metrics(logps, group, rewards_BG, extremes(group.labels, mask_BG))


# What several policy-gradient losses share.


def _candidate_mask(group: Group, mask_unfinished: bool) -> Bool[Array, "B K T"]:
    kept = group.valid & group.finished if mask_unfinished else group.valid
    return group.mask[:, 1:] & kept[:, 1:, None]
