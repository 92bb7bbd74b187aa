"""What losses are made of: sums and means within masks, log-ratios, the metrics of pairs.

Log-probs outside a mask may be anything, NaN included: what is made here never sees them.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from pujax.method.labels import candidates
from pujax.types import Group, Metrics


def masked(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Values in float32, zero outside the mask, so that nothing there reaches a gradient."""
    return jnp.where(mask, x.astype(jnp.float32), 0)


def sums(x: Float[Array, "*shape n"]) -> Float[Array, "*shape"]:
    """Sums over the last axis."""
    return jnp.sum(x, axis=-1)


def means(x: Float[Array, "*shape n"], mask: Bool[Array, "*shape n"]) -> Float[Array, "*shape"]:
    """The mean over the last axis within the mask; zero where the mask is empty."""
    return jnp.sum(x, axis=-1, where=mask) / jnp.maximum(mask.sum(axis=-1), 1)


def log_ratios(logps: Float[Array, "B G T"], group: Group) -> Float[Array, "B G T"]:
    """log policy - log ref of each token, zero outside the mask."""
    return masked(logps - group.ref_logps, group.mask)


def deltas(
    logps: Float[Array, "B G T"], group: Group, *, length_normalized: bool = False
) -> Float[Array, "B G"]:
    """Delta of each response: its log-ratios summed, or their mean a token."""
    ratios = log_ratios(logps, group)
    return means(ratios, group.mask) if length_normalized else sums(ratios)


def gaps(x: Float[Array, "B G"]) -> Float[Array, "B G G"]:
    """x_i - x_j at (i, j), the place of a pair's weight."""
    return x[:, :, None] - x[:, None, :]


def nll(logps: Float[Array, "B G T"], group: Group) -> Float[Array, "B G"]:
    """The mean negative log-prob a token of each response."""
    return -means(masked(logps, group.mask), group.mask)


def log_p(rewards: Float[Array, "B G"], valid: Bool[Array, "B G"]) -> Float[Array, "B G"]:
    """Log softmax over the valid responses. Outside it is finite: 0 * -inf would be NaN."""
    floor = jnp.finfo(jnp.float32).min
    return jax.nn.log_softmax(jnp.where(valid, rewards, floor), axis=-1)


def preference_metrics(
    logps: Float[Array, "B G T"],
    group: Group,
    rewards_BG: Float[Array, "B G"],
    weights_BGG: Float[Array, "B G G"],
) -> Metrics:
    """Implied rewards and summed log-probs of the chosen and the rejected under pair weights.

    A tie counts half in the accuracy. A prompt without pairs counts as a tie of its candidates.
    """
    rewards_BG = stop_gradient(rewards_BG)
    lp_BG = sums(masked(stop_gradient(logps), group.mask))
    paired_B = weights_BGG.sum(axis=(1, 2))
    rest_BG = (1 - paired_B)[:, None] * candidates(group.scores) / max(lp_BG.shape[-1] - 1, 1)
    margins_BGG = gaps(rewards_BG)
    return {
        "reward/margin": jnp.sum(weights_BGG * margins_BGG, axis=(1, 2)).mean(),
        "reward/accuracy": jnp.sum(weights_BGG * jnp.sign(margins_BGG), axis=(1, 2)).mean() / 2
        + 0.5,
        "logps/chosen": sums((weights_BGG.sum(axis=2) + rest_BG) * lp_BG).mean(),
        "logps/rejected": sums((weights_BGG.sum(axis=1) + rest_BG) * lp_BG).mean(),
        "group/no_signal": (paired_B == 0).mean(),
    }
