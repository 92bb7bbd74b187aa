"""A scorer that learns beside the student to tell the anchor from the student's candidates.

Generative adversarial distillation (GAD, Ye et al., 2025, arXiv 2511.10643). The paper's: D gives
an answer a number; it learns -log sigmoid(D(anchor) - D(candidate)), Bradley and Terry's loss of
the preference for the anchor, on what the student samples now; and D(candidate) is the reward that
the student learns from, there by GRPO. Ours: what D is. There it is a language model, warmed up
while the student imitates; here it is w . h / rms(h), h the student's final hidden state at a
response's last token, which costs a vector and rides on a pass that is made anyway. No gradient
goes from D into the student. A bias would cancel in every difference. w begins at 0, where scores
are equal: the first step trains D alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pujax.errors import ConfigError, require
from pujax.method.scoring import ScoringContext, found_in
from pujax.types import Head, Metrics, Params

LR, WEIGHT_DECAY = 1e-3, 0.0


def discriminator(
    context: ScoringContext, *, lr: float = LR, weight_decay: float = WEIGHT_DECAY
) -> Float[Array, "B G"]:
    """D of each response, by what the head has learnt in the steps before this one.

    Settings:
        lr: the constant learning rate of the head's own AdamW, in (0, 1).
        weight_decay: of that, a share of the learning rate.

    Raises `ConfigError` where nothing trains a head, as in a suite or a loop of one's own.
    """
    require(0 < lr < 1, "scorer.score.lr", lr, "must lie in (0, 1)")
    require(0 <= weight_decay < 1, "scorer.score.weight_decay", weight_decay, "must lie in [0, 1)")
    if context.head is None:
        raise ConfigError(
            "scorer.score: the discriminator learns in training's own step, and nothing trains it "
            "here: choose another scorer"
        )
    return scores_of(context.head, context.last_states())


def scores_of(head: Params, states: Float[Array, "B G D"]) -> Float[Array, "B G"]:
    """w . h / rms(h): a step of the optimizer then means the same to every model."""
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(states), axis=-1) + 1e-12)
    return scale * (states @ head["discriminator"])


def bradley_terry(head: Params, states: Float[Array, "B G D"]) -> Float[Array, ""]:
    """-log sigmoid(D(anchor) - D(candidate)), the mean over candidates and prompts."""
    scores_BG = scores_of(head, states)
    return jax.nn.softplus(scores_BG[:, 1:] - scores_BG[:, :1]).mean()


def new_head(scorer: Any, width: int) -> Head | None:
    """The untrained head of a scorer, for states of that width; None where it has none.

    Raises `ConfigError` for a scorer with several discriminators.
    """
    found = found_in(scorer, discriminator)
    if not found:
        return None
    require(len(found) == 1, "scorer.score", f"{len(found)} discriminators", "keep one of them")
    params = {"discriminator": jnp.zeros(width)}
    return Head(params, _optimizer(scorer).init(params))


def learn(scorer: Any, head: Head, states: Float[Array, "B G D"]) -> tuple[Head, Metrics]:
    """The head after a step on a batch's states, and its loss and accuracy on them before.

    A loss, a gradient or new parameters that aren't finite leave it as it was.
    """
    states = jax.lax.stop_gradient(states)
    loss, grads = jax.value_and_grad(bradley_terry)(head.params, states)
    updates, opt_state = _optimizer(scorer).update(grads, head.opt_state, head.params)
    learnt = Head(optax.apply_updates(head.params, updates), opt_state)
    norms = jnp.stack([optax.tree.norm(tree) for tree in (grads, learnt.params)])
    finite = jnp.isfinite(loss) & jnp.isfinite(norms).all()
    learnt = jax.tree.map(lambda new, old: jnp.where(finite, new, old), learnt, head)
    scores_BG = scores_of(head.params, states)
    above = scores_BG[:, :1] > scores_BG[:, 1:]
    return learnt, {"discriminator/loss": loss, "discriminator/accuracy": above.mean()}


def _optimizer(scorer: Any) -> optax.GradientTransformation:
    """AdamW with the settings that are bound in the scorer's discriminator."""
    (found,) = found_in(scorer, discriminator)
    lr, weight_decay = (
        found.keywords.get("lr", LR),
        found.keywords.get("weight_decay", WEIGHT_DECAY),
    )
    return optax.adamw(lr, weight_decay=weight_decay)
