"""What a loss learns from besides the candidates."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pujax.errors import ConfigError
from pujax.types import Group, LabelRule, LossFn, Tokens


@dataclass(frozen=True)
class Needs:
    """What a loss learns from besides the candidates; what it doesn't is not computed.

    Without `anchor` the anchors stay out of the gradient's pass. Without `reference` there are no
    reference log-probs.
    """

    anchor: bool = True
    reference: bool = True


def needs_of(loss_fn: LossFn, labels: LabelRule, candidates: int) -> Needs:
    """What `loss_fn` needs under the rule `labels`, found by looking at its gradient.

    On many random groups: is there any gradient at the anchor, and does any move when the
    reference log-probs do? A loss with a fixed rule answers with exact zeros or it does not.
    Raises `ConfigError` for a loss that learns from nothing in such groups.
    """
    B, G, T = 64, candidates + 1, 3
    key = iter(jax.random.split(jax.random.key(0), 8))

    def noise(*shape: int) -> Array:
        return jax.random.normal(next(key), shape)

    def gradients(logps: Array, old: Array, scores: Array, *references: Array) -> list[Array]:
        row, valid = labels(scores)
        group = Group(
            prompts=Tokens(jnp.zeros((B, 1), jnp.int32), jnp.ones((B,), jnp.int32)),
            tokens=jnp.zeros((B, G, T), jnp.int32),
            mask=jnp.ones((B, G, T), bool),
            finished=jnp.ones((B, G), bool),
            old_logps=old,
            ref_logps=old,
            scores=scores,
            labels=row,
            valid=valid,
        )

        def total(logps: Array, reference: Array) -> Array:
            return loss_fn(logps, replace(group, ref_logps=reference))[0].sum()

        return [jax.grad(total)(logps, reference) for reference in references]

    logps = noise(B, G, T)
    old = logps + 0.02 * noise(B, G, T)  # near the policy, so that no ratio is clipped
    first, second = jax.jit(gradients)(
        logps, old, noise(B, G), logps + noise(B, G, T), logps + noise(B, G, T)
    )
    if not jnp.any(first):
        raise ConfigError(
            f"loss: it learns nothing from groups of {candidates} candidates under these labels, "
            "its gradient is 0: take more candidates, or a loss that learns from the anchor too "
            "(loss=dpo_anchor)"
        )
    return Needs(anchor=bool(jnp.any(first[:, 0])), reference=bool(jnp.any(first != second)))
