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


def needs_of(
    loss_fn: LossFn,
    labels: LabelRule,
    candidates: int,
    *,
    anchor: bool | None = None,
    reference: bool | None = None,
) -> Needs:
    """What `loss_fn` needs under the rule `labels`, found by looking at its gradient.

    On many random groups: is there any gradient at the anchor, and does any move when the
    reference log-probs do? The groups differ in lengths, in which responses were cut off, in how
    far the policy has moved, and in level and spread of scores and log-probs; what a loss learns
    from in rarer cases alone must be said with `anchor` or `reference` (`loss.needs` in a YAML).

    Raises `ConfigError` for a loss that learns from nothing in such groups, and for one that
    learns from what is said not to be needed.
    """
    B, G, T = 512, candidates + 1, 4
    key = iter(jax.random.split(jax.random.key(0), 16))

    def noise(*shape: int) -> Array:
        return jax.random.normal(next(key), shape)

    def any_of(values: list[float], *shape: int) -> Array:
        return jax.random.choice(next(key), jnp.array(values), shape)

    def gradients(logps: Array, old: Array, scores: Array, *references: Array) -> list[Array]:
        row, valid = labels(scores)
        group = Group(
            prompts=Tokens(jnp.zeros((B, 1), jnp.int32), jnp.ones((B,), jnp.int32)),
            tokens=jnp.zeros((B, G, T), jnp.int32),
            mask=mask,
            finished=finished,
            old_logps=old,
            ref_logps=old,
            scores=scores,
            labels=row,
            valid=valid,
        )

        def total(logps: Array, reference: Array) -> Array:
            return loss_fn(logps, replace(group, ref_logps=reference))[0].sum()

        return [jax.grad(total)(logps, reference) for reference in references]

    lengths = jax.random.randint(next(key), (B, G), 1, T + 1)
    mask = Tokens(jnp.zeros((B, G, T), jnp.int32), lengths).mask
    # Whole groups that ended, or were cut off, appear too.
    finished = jax.random.uniform(next(key), (B, G)) < any_of([0.0, 0.5, 0.9, 1.0], B, 1)
    logps = any_of([0.0, -1.0, -5.0], B, 1, 1) - jnp.abs(noise(B, G, T)) * any_of(
        [0.1, 1.0, 5.0], B, 1, 1
    )
    # Mostly near the policy, so that no ratio is clipped.
    old = logps + noise(B, G, T) * any_of([0.0, 0.02, 0.02, 0.5], B, 1, 1)
    scores = any_of([0.0, 0.0, 1.0, 5.0, 30.0, -1.0, -5.0, -30.0], B, 1) + noise(B, G) * any_of(
        [0.01, 1.0, 1.0, 10.0], B, 1
    )
    first, second = jax.jit(gradients)(
        logps, old, scores, logps + noise(B, G, T), logps + noise(B, G, T)
    )
    if not jnp.any(first):
        raise ConfigError(
            f"loss: it learns nothing from groups of {candidates} candidates under these labels, "
            "its gradient is 0: take more candidates, or a loss that learns from the anchor too "
            "(loss=dpo_anchor), or from responses alone (loss=kto, with labels.flags as its sides)"
        )
    found = Needs(anchor=bool(jnp.any(first[:, 0])), reference=bool(jnp.any(first != second)))
    for name, said in (("anchor", anchor), ("reference", reference)):
        if said is False and getattr(found, name):
            raise ConfigError(f"loss.needs.{name}=False: the loss learns from it: take that out")
    return Needs(
        anchor=found.anchor if anchor is None else anchor,
        reference=found.reference if reference is None else reference,
    )
