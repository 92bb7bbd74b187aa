"""A ranker of latent reward heads that are held to a prior, taught by a noisy ranker.

After *Reinforcement learning from diverse human preferences* (Xue et al., 2023, arXiv 2301.11774).
The paper's: a reward model's latent is strongly held to a prior, which keeps it from fitting what
noisy preferences contradict each other in, and an ensemble is weighed by confidence. Recalled, not
checked: preferences teach -log sigmoid(d(z_w) - d(z_l)) + phi KL(p(z | y) || N(0, I)), and each
member's weight comes from its KL. Ours: what reads a response, and when it learns. There it is a
network over states and actions, trained throughout; here p(z | y) = N(W h, s^2), with h the
student's final hidden state at a response's last token over its rms, and d(z) = v . z, fitted anew
to each batch's pairs: what a ranker says of one prompt's candidates, where it is no noise, it says
of like candidates of the others. So there is nothing to keep between steps. No gradient goes into
the student.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pujax.errors import require
from pujax.method.labels import candidates
from pujax.method.scoring import ScoringContext
from pujax.types import Params, Scorer


def latent(
    context: ScoringContext,
    *,
    score: Scorer,
    heads: int = 4,
    latents: int = 4,
    phi: float = 0.1,
    steps: int = 60,
    lr: float = 0.03,
) -> Float[Array, "B G"]:
    """What the heads make of each response once `score` has taught them on this batch.

    Settings:
        score: the noisy ranker that teaches, a function by `_target_`: every candidate over every
            one that it scores lower.
        heads: how many there are, of different beginnings.
        latents: numbers in each head's latent.
        phi: the weight of the KL that holds the latent to N(0, I).
        steps: of AdamW, by which the heads are fitted to a batch.
        lr: its learning rate, in (0, 1).
    """
    for key, value in (("heads", heads), ("latents", latents), ("steps", steps)):
        require(value > 0, f"scorer.score.{key}", value, "must be positive")
    require(0 <= phi < math.inf, "scorer.score.phi", phi, "must be finite and not negative")
    require(0 < lr < 1, "scorer.score.lr", lr, "must lie in (0, 1)")
    states = context.last_states()
    pairs = every_pair(score(context))
    params = fitted(
        states, pairs, context.key, heads=heads, latents=latents, phi=phi, steps=steps, lr=lr
    )
    return rewards(params, states)


def every_pair(scores: Float[Array, "B G"]) -> Float[Array, "B G G"]:
    """Every candidate is preferred to each that scored lower; the pairs of a prompt share one.

    >>> print(every_pair(jnp.array([[9.0, 1.0, 3.0]])))
    [[[0. 0. 0.]
      [0. 0. 0.]
      [0. 1. 0.]]]
    """
    there = candidates(scores)
    above = scores[:, :, None] > scores[:, None, :]
    pairs = (above & there[:, :, None] & there[:, None, :]).astype(jnp.float32)
    return pairs / jnp.maximum(pairs.sum(axis=(1, 2), keepdims=True), 1)


def fitted(
    states: Float[Array, "B G D"],
    pairs: Float[Array, "B G G"],
    key: Array,
    *,
    heads: int,
    latents: int,
    phi: float,
    steps: int,
    lr: float,
) -> Params:
    """Heads after so many steps on these pairs: weights of "i is preferred to j"."""
    begin, draws = jax.random.split(key)
    width = states.shape[-1]
    params = {
        "mean": jax.random.normal(begin, (heads, width, latents)) / jnp.sqrt(width),
        "log_var": jnp.zeros((heads, latents)),
        "reward": jnp.zeros((heads, latents)),  # no opinion
    }
    optimizer = optax.adamw(lr, weight_decay=0.0)

    def step(i: Array, carry: tuple) -> tuple:
        params, state = carry
        grads = jax.grad(cost)(params, states, pairs, jax.random.fold_in(draws, i), phi=phi)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, _ = jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))
    return params


def cost(
    params: Params,
    states: Float[Array, "B G D"],
    pairs: Float[Array, "B G G"],
    key: Array,
    *,
    phi: float,
) -> Float[Array, ""]:
    """-log sigmoid(d(z_w) - d(z_l)) + phi KL, the mean over heads and prompts, with z drawn."""
    means = _means(params, states)
    spread = jnp.exp(params["log_var"] / 2)[:, None, None]
    z = means + spread * jax.random.normal(key, means.shape)
    rewards_HBG = jnp.einsum("hbgz,hz->hbg", z, params["reward"])
    margins = rewards_HBG[..., :, None] - rewards_HBG[..., None, :]
    wrong = jnp.sum(pairs[None] * jax.nn.softplus(-margins), axis=(-1, -2))
    return wrong.mean() + phi * _kl(params, means).mean()


def rewards(params: Params, states: Float[Array, "B G D"]) -> Float[Array, "B G"]:
    """d(E z) of each response: the heads' mean, each weighed by its confidence in the group.

    That is the mean over responses of KL(p(z | y) || N(0, I)): a latent that is the prior says
    nothing.
    """
    means = _means(params, states)
    nats = _kl(params, means)[:, :, 1:].mean(axis=-1)
    shares = nats / jnp.maximum(nats.sum(axis=0), 1e-12)[None]
    return jnp.einsum("hbgz,hz,hb->bg", means, params["reward"], shares)


def _means(params: Params, states: Float[Array, "B G D"]) -> Float[Array, "H B G Z"]:
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(states), axis=-1, keepdims=True) + 1e-12)
    return jnp.einsum("bgd,hdz->hbgz", states * scale, params["mean"])


def _kl(params: Params, means: Float[Array, "H B G Z"]) -> Float[Array, "H B G"]:
    """KL(N(mean, s^2) || N(0, I)) of each latent."""
    log_var = params["log_var"][:, None, None]
    return 0.5 * jnp.sum(means**2 + jnp.exp(log_var) - 1 - log_var, axis=-1)
