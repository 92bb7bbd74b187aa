"""Losses of what is preferred to what: DPO and its family.

A pair rule weighs the pairs of a group, w preferred to l; Delta_i = lp_policy(y_i) - lp_ref(y_i).
`length_normalized` takes means over a response's tokens in place of sums.

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
>>> print(dpo(ref_logps, group)[0])  # log 2
[0.6931472]
>>> better = ref_logps.at[0, 1].add(2.0)  # of the candidate that scored higher
>>> print(dpo(better, group, beta=0.5)[0].round(4))  # softplus(-0.5 * 4)
[0.1269]
"""

import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from pujax.errors import require
from pujax.method.labels import best_and_worst, best_vs_worst, candidates
from pujax.method.terms import deltas, gaps, masked, means, nll, preference_metrics, sums
from pujax.types import Group, LossAndMetrics, PairRule, SideRule

ReferencePoint = Callable[[Float[Array, "B G"], Group], Float[Array, "B G"]]
"""Delta of each response, and the group, to the point that its gain is measured from."""

# Above this mean log-prob a token, log(1 - p) has no digits left in float32.
_CERTAIN = -1e-6


def dpo(
    logps: Float[Array, "B G T"],
    group: Group,
    *,
    pairs: PairRule = best_vs_worst,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    nll_weight: float = 0.0,
) -> LossAndMetrics:
    """-log sigmoid(beta (Delta_w - Delta_l)), weighted over pairs (Rafailov et al., 2023, eq. 7).

    With `label_smoothing` (cDPO, Mitchell, 2023) it ends at beta (Delta_w - Delta_l) =
    logit(1 - label_smoothing). The chosen's likelihood holds up what the margin alone lets sink
    (Pang et al., 2024, eq. 1).

    Settings:
        pairs: which of a group's responses are preferred to which.
        beta: the implied reward for a nat of log-ratio to the reference: the smaller, the further
            the policy goes.
        label_smoothing: how often a preference is taken to be the wrong way round, in [0, 0.5).
        length_normalized: divide each response's log-ratio by its length.
        nll_weight: of the chosen response's mean negative log-prob, in the loss beside the margin.
    """
    _check_beta(beta)
    require(
        0 <= label_smoothing < 0.5,
        "loss.label_smoothing",
        label_smoothing,
        "must lie in [0, 0.5)",
    )
    _check_weight("nll_weight", nll_weight)
    weights_BGG = pairs(group.scores)
    rewards_BG = beta * deltas(logps, group, length_normalized=length_normalized)
    margins_BGG = gaps(rewards_BG)
    losses_BGG = (1 - label_smoothing) * jax.nn.softplus(-margins_BGG)
    losses_BGG += label_smoothing * jax.nn.softplus(margins_BGG)
    nll_BG = nll(logps, group)
    loss_B = jnp.sum(weights_BGG * (losses_BGG + nll_weight * nll_BG[:, :, None]), axis=(1, 2))
    return loss_B, preference_metrics(logps, group, rewards_BG, weights_BGG)


def ipo(
    logps: Float[Array, "B G T"],
    group: Group,
    *,
    pairs: PairRule = best_vs_worst,
    beta: float = 0.1,
    length_normalized: bool = False,
) -> LossAndMetrics:
    """(Delta_w - Delta_l - 1 / (2 beta))^2, weighted over pairs (Azar et al., 2023, eq. 17).

    Settings:
        pairs: which of a group's responses are preferred to which.
        beta: a pair is right where the chosen's log-ratio is ahead by 1 / (2 beta) nats.
        length_normalized: divide each response's log-ratio by its length, as TRL does.
    """
    _check_beta(beta)
    weights_BGG = pairs(group.scores)
    delta_BG = deltas(logps, group, length_normalized=length_normalized)
    loss_B = jnp.sum(weights_BGG * (gaps(delta_BG) - 1 / (2 * beta)) ** 2, axis=(1, 2))
    return loss_B, preference_metrics(logps, group, beta * delta_BG, weights_BGG)


def slic(
    logps: Float[Array, "B G T"],
    group: Group,
    *,
    pairs: PairRule = best_vs_worst,
    beta: float = 0.1,
    length_normalized: bool = False,
    nll_weight: float = 0.0,
) -> LossAndMetrics:
    """max(0, 1 - beta (Delta_w - Delta_l)), weighted over pairs (SLiC, Zhao et al., 2023).

    The form is that of Liu et al., 2024 (RSO, hinge-norm), which measures from the reference as DPO
    does; Zhao's max(0, delta - lp_w + lp_l) is delta = 1 / beta times this under a reference that
    finds both equally likely. A pair whose margin is beyond 1 / beta has no gradient.

    Settings:
        pairs: which of a group's responses are preferred to which.
        beta: a pair is left alone once the chosen's log-ratio is ahead by 1 / beta nats.
        length_normalized: divide each response's log-ratio by its length.
        nll_weight: of the chosen response's mean negative log-prob, Zhao's regularisation towards a
            target.
    """
    _check_beta(beta)
    _check_weight("nll_weight", nll_weight)
    weights_BGG = pairs(group.scores)
    rewards_BG = beta * deltas(logps, group, length_normalized=length_normalized)
    losses_BGG = jax.nn.relu(1 - gaps(rewards_BG)) + nll_weight * nll(logps, group)[:, :, None]
    loss_B = jnp.sum(weights_BGG * losses_BGG, axis=(1, 2))
    return loss_B, preference_metrics(logps, group, rewards_BG, weights_BGG)


def simpo(
    logps: Float[Array, "B G T"],
    group: Group,
    *,
    pairs: PairRule = best_vs_worst,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> LossAndMetrics:
    """-log sigmoid(beta (m_w - m_l) - gamma), weighted over pairs (SimPO, Meng et al., 2024).

    m is a response's mean log-prob a token; there is no reference. At a lead m_w - m_l of exactly
    gamma / beta a pair costs log 2, whatever the lengths.

    Settings:
        pairs: which of a group's responses are preferred to which.
        beta: the reward for a nat of mean log-prob a token.
        gamma: how far the chosen's reward is to be ahead.
    """
    _check_beta(beta)
    _check_weight("gamma", gamma)
    weights_BGG = pairs(group.scores)
    rewards_BG = -beta * nll(logps, group)
    loss_B = jnp.sum(weights_BGG * jax.nn.softplus(gamma - gaps(rewards_BG)), axis=(1, 2))
    return loss_B, preference_metrics(logps, group, rewards_BG, weights_BGG)


def orpo(
    logps: Float[Array, "B G T"],
    group: Group,
    *,
    pairs: PairRule = best_vs_worst,
    odds_weight: float = 0.1,
) -> LossAndMetrics:
    """NLL of the chosen less odds_weight log sigmoid(log odds ratio) (ORPO, Hong et al., 2024).

    The odds are p / (1 - p), p = exp(mean log-prob a token) (eq. 4 and 7). There is no reference.

    Settings:
        pairs: which of a group's responses are preferred to which.
        odds_weight: of the odds beside the chosen's likelihood, the paper's lambda.
    """
    _check_weight("odds_weight", odds_weight)
    weights_BGG = pairs(group.scores)
    nll_BG = nll(logps, group)
    mean_BG = jnp.minimum(-nll_BG, _CERTAIN)
    log_odds_BG = mean_BG - jnp.log(-jnp.expm1(mean_BG))
    losses_BGG = nll_BG[:, :, None] + odds_weight * jax.nn.softplus(-gaps(log_odds_BG))
    loss_B = jnp.sum(weights_BGG * losses_BGG, axis=(1, 2))
    return loss_B, preference_metrics(logps, group, log_odds_BG, weights_BGG)


def gamma_dpo(
    logps: Float[Array, "B G T"],
    group: Group,
    *,
    pairs: PairRule = best_vs_worst,
    beta: float = 0.1,
    gamma: float = 0.5,
    length_normalized: bool = False,
) -> LossAndMetrics:
    """-log sigmoid(beta (D_w - D_l)), D = lp_policy - gamma lp_ref (Chen et al., 2024, eq. 4).

    Less of the reference than DPO, which is gamma 1: at gamma 0 the loss falls only as the policy
    itself ranks the pair right. With c = lp_ref(y_l) - lp_ref(y_w), the policy gives the chosen at
    least the rejected's probability if and only if the loss is at most -log sigmoid(beta gamma c)
    (their Theorem 4.1, which is for DPO).

    Settings:
        pairs: which of a group's responses are preferred to which.
        beta: the implied reward for a nat of D.
        gamma: how much of the reference counts: 1 is DPO, 0 none.
        length_normalized: divide each response's D by its length.
    """
    _check_beta(beta)
    _check_weight("gamma", gamma)
    weights_BGG = pairs(group.scores)
    terms = masked(logps, group.mask) - gamma * masked(group.ref_logps, group.mask)
    rewards_BG = beta * (means(terms, group.mask) if length_normalized else sums(terms))
    loss_B = jnp.sum(weights_BGG * jax.nn.softplus(-gaps(rewards_BG)), axis=(1, 2))
    return loss_B, preference_metrics(logps, group, rewards_BG, weights_BGG)


def spo(
    logps: Float[Array, "B G T"],
    group: Group,
    *,
    pairs: PairRule = best_vs_worst,
    beta: float = 0.1,
    gamma: float = 0.1,
    length_normalized: bool = False,
) -> LossAndMetrics:
    """`dpo` plus gamma times how far implied rewards are from the order of all degrees.

    After SPO (arXiv 2409.17791), where a module learns to tell the degree of preference of each
    side and its loss is added to the alignment's: known second-hand, its form L_align + gamma
    (L_degree,w + L_degree,l) recalled. Ours: that no head classifies the degree from hidden states.
    The implied rewards r do, by Plackett and Luce's likelihood of the order of the scores: the mean
    over candidates i that any is below of -log(exp r_i / sum over j with s_j <= s_i of exp r_j). Of
    two candidates that is DPO's own loss. `data.degrees` makes responses of known degree.

    Settings:
        pairs: which of a group's responses are preferred to which.
        beta: the implied reward for a nat of log-ratio to the reference.
        gamma: the weight of the degrees' order beside the pairs.
        length_normalized: divide each response's log-ratio by its length.
    """
    _check_beta(beta)
    _check_weight("gamma", gamma)
    loss_B, metrics = dpo(logps, group, pairs=pairs, beta=beta, length_normalized=length_normalized)
    rewards_BG = beta * deltas(logps, group, length_normalized=length_normalized)
    there, scores = candidates(group.scores), group.scores
    both = there[:, :, None] & there[:, None, :]
    no_better = both & (scores[:, None, :] <= scores[:, :, None])  # j is, than i
    above = jnp.any(both & (scores[:, None, :] < scores[:, :, None]), axis=-1)
    # A floor in place of -inf: what `above` leaves out must have a gradient too, of 0.
    odds = jnp.where(no_better, rewards_BG[:, None, :], jnp.finfo(jnp.float32).min)
    terms_BG = jax.nn.logsumexp(odds, axis=-1) - rewards_BG
    degree_B = means(terms_BG, above)
    return loss_B + gamma * degree_B, metrics | {"loss/degree": stop_gradient(degree_B).mean()}


def distill(
    logps: Float[Array, "B G T"],
    group: Group,
    *,
    beta: float = 0.1,
    length_normalized: bool = False,
) -> LossAndMetrics:
    """(r_i - r_j - beta (Delta_i - Delta_j))^2, the mean over pairs of candidates, r the scores.

    Reward-model distillation (d-DPO, Fisch et al., 2024, arXiv 2405.19316): not who wins but by how
    much. It ends where policy ~ ref exp(r / beta), so the scale of the scores counts.

    Settings:
        beta: the implied reward, on the scores' scale, for a nat of log-ratio to the reference.
        length_normalized: divide each response's log-ratio by its length.
    """
    _check_beta(beta)
    delta_BG = deltas(logps, group, length_normalized=length_normalized)
    candidate = candidates(group.scores)
    errors_BG = jnp.where(candidate, group.scores, 0) - beta * delta_BG
    both = (
        candidate[:, :, None]
        & candidate[:, None, :]
        & ~jnp.eye(candidate.shape[1], dtype=bool)[None]
    )
    count_B = jnp.maximum(both.sum(axis=(1, 2)), 1)
    loss_B = jnp.sum(gaps(errors_BG) ** 2, axis=(1, 2), where=both) / count_B
    pairs_BGG = best_vs_worst(group.scores)
    return loss_B, preference_metrics(logps, group, beta * delta_BG, pairs_BGG)


def e_dpo(
    logps: Float[Array, "B G T"],
    group: Group,
    *,
    beta: float = 0.1,
    pessimism: float = 0.0,
    length_normalized: bool = False,
) -> LossAndMetrics:
    """The least of `distill`'s losses over a family of rewards, plus pessimism KL(ref || policy).

    After Fisch et al., 2024 (arXiv 2405.19316): a family is likelier to have the true reward than
    any one of it, so every policy ref exp(r / beta) of a member r is a minimum; and of these the
    KL, weighed little, chooses the one that stays nearest. The paper's are the family, the squared
    differences and the direction of the KL; ours, for want of the paper's text, is that the least
    is each prompt's own, so that a prompt's loss does not depend on its neighbours.

    The KL is the candidates' mean of -Delta, each weighed by ref / old policy, weights that sum to
    one (self-normalised importance sampling, ours). It is exact as candidates grow in number; of a
    few it may well be negative. The family is `Group.members`; without it, the scores alone, which
    `pujax train` refuses.

    Settings:
        beta: the implied reward, on the scores' scale, for a nat of log-ratio to the reference.
        pessimism: the weight of KL(ref || policy), which draws to the scorer that asks for least.
        length_normalized: divide each response's log-ratio by its length.
    """
    _check_beta(beta)
    _check_weight("pessimism", pessimism)
    family_BMG = group.scores[:, None] if group.members is None else group.members
    settings = {"beta": beta, "length_normalized": length_normalized}
    made = [
        distill(logps, replace(group, scores=family_BMG[:, m]), **settings)[0]
        for m in range(family_BMG.shape[1])
    ]
    _, metrics = distill(logps, group, **settings)
    candidate = candidates(group.scores)
    odds_BG = jnp.where(candidate, -deltas(group.old_logps, group), -jnp.inf)
    weights_BG = stop_gradient(jax.nn.softmax(odds_BG, axis=-1))
    kl_B = -sums(weights_BG * jnp.where(candidate, deltas(logps, group), 0))
    loss_B = jnp.stack(made, axis=1).min(axis=1) + pessimism * kl_B
    return loss_B, metrics | {"kl/from_ref": stop_gradient(kl_B).mean()}


# Responses that are good or bad by themselves.


def others_kl(delta: Float[Array, "B G"], group: Group) -> Float[Array, "B G"]:
    """KL(policy || ref), estimated, from which gains are measured.

    Of the policy's own samples it is max(0, the mean Delta of the prompt's other candidates): each
    is one estimate of that KL, and a response is left out of its own (ours). Given responses are no
    samples; theirs is the paper's, `step.batch_kl` of other prompts' responses, one for a batch.
    """
    if group.kl is not None:
        return jnp.broadcast_to(group.kl[:, None], delta.shape)
    candidate = group.valid.at[:, 0].set(False)
    kept = jnp.where(candidate, delta, 0)
    count = candidate.sum(axis=-1, keepdims=True) - candidate
    return jnp.maximum(0, (sums(kept)[:, None] - kept) / jnp.maximum(count, 1))


def no_kl(delta: Float[Array, "B G"], group: Group) -> Float[Array, "B G"]:
    """0: gains are measured from the reference itself (as APO-zero, D'Oosterlinck et al., 2024)."""
    return jnp.zeros_like(delta)


def kto(
    logps: Float[Array, "B G T"],
    group: Group,
    *,
    sides: SideRule = best_and_worst,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reference_point: ReferencePoint = others_kl,
) -> LossAndMetrics:
    """Expected loss of value over the good and the bad (KTO, Ethayarajh et al., 2024).

    lambda_D (1 - sigmoid(beta (Delta - z))) for a desirable response, lambda_U (1 - sigmoid(beta (z
    - Delta))) for an undesirable one, the mean over those that `sides` marks. z is the
    `reference_point`, without a gradient. No response is compared with another, so a prompt may
    have one alone; and the loss saturates: what is far above or below z has no more gradient.

    Settings:
        sides: which of a group's responses are good and which bad.
        beta: the implied reward for a nat of log-ratio to the reference.
        desirable_weight: lambda_D, of the good.
        undesirable_weight: lambda_U, of the bad.
        reference_point: z, the log-ratio from which gains and losses are measured.
    """
    _check_beta(beta)
    _check_weight("desirable_weight", desirable_weight)
    _check_weight("undesirable_weight", undesirable_weight)
    sides_BG = sides(group.scores)
    delta_BG = deltas(logps, group)
    point_BG = stop_gradient(reference_point(stop_gradient(delta_BG), group))
    weights_BG = jnp.where(
        sides_BG > 0, desirable_weight * sides_BG, -undesirable_weight * sides_BG
    )
    losses_BG = jax.nn.sigmoid(-jnp.sign(sides_BG) * beta * (delta_BG - point_BG))
    marked_B = sums(jnp.abs(sides_BG))
    loss_B = sums(weights_BG * losses_BG) / jnp.where(marked_B > 0, marked_B, 1)
    good_BG, bad_BG = jnp.maximum(sides_BG, 0), jnp.maximum(-sides_BG, 0)
    pairs_BGG = _shares(good_BG)[:, :, None] * _shares(bad_BG)[:, None, :]
    metrics = preference_metrics(logps, group, beta * delta_BG, pairs_BGG)
    return loss_B, metrics | {"kto/reference_point": _mean_of(point_BG, jnp.abs(sides_BG))}


def _shares(weights: Float[Array, "B G"]) -> Float[Array, "B G"]:
    total_B1 = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total_B1 > 0, total_B1, 1)


def _mean_of(x: Float[Array, "B G"], weights: Float[Array, "B G"]) -> Float[Array, ""]:
    return sums(x * _shares(weights)).mean()


def _check_beta(beta: float) -> None:
    require(0 < beta < math.inf, "loss.beta", beta, "must be positive and finite")


def _check_weight(name: str, value: float) -> None:
    require(0 <= value < math.inf, f"loss.{name}", value, "must be finite and not negative")
