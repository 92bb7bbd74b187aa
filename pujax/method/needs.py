"""What a loss learns from besides the candidates."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pujax.errors import ConfigError
from pujax.method.labels import dimensions_of, labels_of, softmax_labels
from pujax.types import Group, LabelRule, LossFn, Metrics, Tokens


@dataclass(frozen=True)
class Needs:
    """What a loss learns from besides the candidates; what it doesn't is not computed.

    Without `anchor` the anchors stay out of the gradient's pass. Without `reference` there are no
    reference log-probs. With `members` it learns from several scores of a response one by one, with
    `kl` from what a batch of given responses says of KL(policy || reference). `unmade` are the
    loss's metrics that would tell of what is not computed, and so are not logged.
    """

    anchor: bool = True
    reference: bool = True
    members: bool = False
    kl: bool = False
    unmade: frozenset[str] = field(default=frozenset(), compare=False)


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
    were cut off, in how far the policy has moved, in level and spread of scores and log-probs, and
    in whether scores are tied; what a loss learns from in rarer cases alone must be said with
    `anchor` or `reference` (`loss.needs` in a YAML).

    Raises `ConfigError` for a loss that learns from nothing in such groups, and for one that
    learns from what is said not to be needed.
    """
    logps, group, (one, other), (members, others), kl = _random_groups(labels, candidates)

    def looked_at(logps: Array, group: Group) -> tuple[list[Array], list[Metrics]]:
        group = _labelled(group, labels, members)
        family = {"ref_logps": one, "members": members, "kl": kl}
        variants = [
            {"ref_logps": one},
            {"ref_logps": other},
            family,
            family | {"members": others},
            family | {"kl": kl + 1},
        ]
        gradients, told = zip(
            *(_gradient(loss_fn, logps, replace(group, **changed)) for changed in variants),
            strict=True,
        )
        elsewhere = logps.at[:, 0].add(other[:, 0] - one[:, 0])
        _, of_anchor = loss_fn(elsewhere, replace(group, ref_logps=one))
        return [*gradients], [*told[:2], of_anchor]

    (first, second, *family), told = jax.jit(looked_at)(logps, group)
    if not jnp.any(first):
        raise ConfigError(
            f"loss: it learns nothing from groups of {candidates} candidates under these labels, "
            "its gradient is 0: take more candidates, or a loss that learns from the anchor too "
            "(loss=dpo_anchor), or from flagged responses alone (loss=kto "
            "loss.sides._target_=pujax.method.labels.flags)"
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
    found = replace(
        found,
        anchor=found.anchor if anchor is None else anchor,
        reference=found.reference if reference is None else reference,
    )
    unmade = set[str]()
    for kept, others in ((found.reference, told[1]), (found.anchor, told[2])):
        unmade |= {name for name in others if not kept and _differ(told[0][name], others[name])}
    return replace(found, unmade=frozenset(unmade))


def ignores_labels(loss_fn: LossFn, labels: LabelRule, candidates: int) -> bool:
    """Whether `loss_fn` learns the same under the rule `labels` as under `softmax_labels`."""
    logps, group, (reference, _), (members, _), _ = _random_groups(labels, candidates)

    def gradients(logps: Array, group: Group) -> list[Array]:
        group = replace(group, ref_logps=reference)
        rules = (labels, softmax_labels)
        return [_gradient(loss_fn, logps, _labelled(group, rule, members))[0] for rule in rules]

    one, other = jax.jit(gradients)(logps, group)
    return not jnp.any(one != other)


def learns_from_ties(loss_fn: LossFn, labels: LabelRule, candidates: int) -> bool:
    """Whether `loss_fn` learns anything from groups in which all responses score alike."""
    logps, group, (reference, _), (members, _), kl = _random_groups(labels, candidates)
    tied = jnp.broadcast_to(group.scores[:, :1], group.scores.shape)
    group = replace(group, scores=tied, ref_logps=reference, kl=kl)
    members = jnp.broadcast_to(members[..., :1], members.shape)

    def gradient(logps: Array, group: Group) -> Array:
        group = _labelled(replace(group, members=members), labels, members)
        return _gradient(loss_fn, logps, group)[0]

    return bool(jnp.any(jax.jit(gradient)(logps, group)))


def _gradient(loss_fn: LossFn, logps: Array, group: Group) -> tuple[Array, Metrics]:
    def summed(logps: Array) -> tuple[Array, Metrics]:
        loss, metrics = loss_fn(logps, group)
        return loss.sum(), metrics

    return jax.grad(summed, has_aux=True)(logps)


def _differ(one: Array, other: Array) -> bool:
    return not np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True)


def _labelled(group: Group, rule: LabelRule, members: Array) -> Group:
    labels, valid = labels_of(rule, group.scores, members, jax.random.key(0))
    return replace(group, labels=labels, valid=valid)


def _random_groups(
    labels: LabelRule, candidates: int
) -> tuple[Array, Group, list[Array], list[Array], Array]:
    """Log-probs and a group without labels; two each of reference log-probs and members; a KL."""
    B, G, T = 512, candidates + 1, 12
    key = iter(jax.random.split(jax.random.key(0), 32))

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
    # As a reward of right and wrong gives them: all candidates tied, with the anchor or without.
    tied = any_of([0.0, 0.0, 0.0, 1.0, 2.0], B, 1)
    scores = jnp.where((tied > 0) & (jnp.arange(G)[None] > 0), scores[:, 1:2], scores)
    scores = jnp.where(tied > 1, jnp.round(scores[:, 1:2]), scores)
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
