"""What a loss learns from besides the candidates."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pujax.errors import ConfigError
from pujax.method.labels import dimensions_of, labels_of, softmax_labels
from pujax.types import Group, LabelRule, LossFn, Tokens


@dataclass(frozen=True)
class Needs:
    """What a loss learns from besides the candidates; what it doesn't is not computed.

    Without `anchor` the anchors stay out of the gradient's pass. Without `reference` there are no
    reference log-probs. With `members` it learns from several scores of a response one by one, with
    `kl` from what a batch of given responses says of KL(policy || reference).
    """

    anchor: bool = True
    reference: bool = True
    members: bool = False
    kl: bool = False


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
    reference log-probs do, or members or the KL? The groups differ in lengths, in which responses
    were cut off, in how far the policy has moved, and in level and spread of scores and log-probs;
    what a loss learns from in rarer cases alone must be said with `anchor` or `reference`
    (`loss.needs` in a YAML).

    Raises `ConfigError` for a loss that learns from nothing in such groups, and for one that
    learns from what is said not to be needed.
    """
    logps, group, (one, other), (members, others), kl = _random_groups(labels, candidates)

    def gradients(logps: Array, group: Group) -> list[Array]:
        group = _labelled(group, labels, members)
        family = {"ref_logps": one, "members": members, "kl": kl}
        variants = [
            {"ref_logps": one},
            {"ref_logps": other},
            family,
            family | {"members": others},
            family | {"kl": kl + 1},
        ]
        return [_gradient(loss_fn, logps, replace(group, **changed)) for changed in variants]

    first, second, *family = jax.jit(gradients)(logps, group)
    if not jnp.any(first):
        raise ConfigError(
            f"loss: it learns nothing from groups of {candidates} candidates under these labels, "
            "its gradient is 0: take more candidates, or a loss that learns from the anchor too "
            "(loss=dpo_anchor), or from responses alone (loss=kto, with labels.flags as its sides)"
        )
    found = Needs(
        anchor=bool(jnp.any(first[:, 0])),
        reference=bool(jnp.any(first != second)),
        members=bool(jnp.any(family[0] != family[1])),
        kl=bool(jnp.any(family[0] != family[2])),
    )
    for name, said in (("anchor", anchor), ("reference", reference)):
        if said is False and getattr(found, name):
            raise ConfigError(f"loss.needs.{name}=False: the loss learns from it: take that out")
    return replace(
        found,
        anchor=found.anchor if anchor is None else anchor,
        reference=found.reference if reference is None else reference,
    )


def ignores_labels(loss_fn: LossFn, labels: LabelRule, candidates: int) -> bool:
    """Whether `loss_fn` learns the same under the rule `labels` as under `softmax_labels`."""
    logps, group, (reference, _), (members, _), _ = _random_groups(labels, candidates)

    def gradients(logps: Array, group: Group) -> list[Array]:
        group = replace(group, ref_logps=reference)
        rules = (labels, softmax_labels)
        return [_gradient(loss_fn, logps, _labelled(group, rule, members)) for rule in rules]

    one, other = jax.jit(gradients)(logps, group)
    return not jnp.any(one != other)


def _gradient(loss_fn: LossFn, logps: Array, group: Group) -> Array:
    return jax.grad(lambda logps: loss_fn(logps, group)[0].sum())(logps)


def _labelled(group: Group, rule: LabelRule, members: Array) -> Group:
    labels, valid = labels_of(rule, group.scores, members, jax.random.key(0))
    return replace(group, labels=labels, valid=valid)


def _random_groups(
    labels: LabelRule, candidates: int
) -> tuple[Array, Group, list[Array], list[Array], Array]:
    """Log-probs and a group without labels; two each of reference log-probs and members; a KL."""
    B, G, T = 512, candidates + 1, 4
    key = iter(jax.random.split(jax.random.key(0), 16))

    def noise(*shape: int) -> Array:
        return jax.random.normal(next(key), shape)

    def any_of(values: list[float], *shape: int) -> Array:
        return jax.random.choice(next(key), jnp.array(values), shape)

    lengths = jax.random.randint(next(key), (B, G), 1, T + 1)
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
    group = Group(
        prompts=Tokens(jnp.zeros((B, 1), jnp.int32), jnp.ones((B,), jnp.int32)),
        tokens=jnp.zeros((B, G, T), jnp.int32),
        mask=Tokens(jnp.zeros((B, G, T), jnp.int32), lengths).mask,
        finished=finished,
        old_logps=old,
        ref_logps=old,
        scores=scores,
        labels=jnp.zeros((B, G)),
        valid=jnp.ones((B, G), bool),
    )
    references = [logps + noise(B, G, T) for _ in range(2)]
    members = [noise(B, dimensions_of(labels) or 2, G) for _ in range(2)]
    return logps, group, references, members, jnp.abs(noise(B))
