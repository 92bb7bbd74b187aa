"""The optimizer of a stage, and how its updates reach the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from pujax.types import Params, TrainState

Applied = tuple[Params, optax.OptState, Bool[Array, ""]]


def make_optimizer(
    lr: float,
    steps: int,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
    warmup: float,
    schedule: str,
) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping. `steps` counts updates, inner epochs included."""
    rising = round(warmup * steps)
    if schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(
            0.0 if rising else lr, lr, rising, max(steps, rising + 1), end_value=0.1 * lr
        )
    else:
        rate = optax.join_schedules(
            [optax.linear_schedule(0.0, lr, max(rising, 1)), optax.constant_schedule(lr)], [rising]
        )
    return optax.chain(
        optax.clip_by_global_norm(clip_norm), optax.adamw(rate, b1, b2, weight_decay=weight_decay)
    )


def on_one_cpu(shardings: Params) -> bool:
    """Whether everything that `shardings` places lies on one CPU device."""
    devices = set().union(*(sharding.device_set for sharding in jax.tree.leaves(shardings)))
    return [device.platform for device in devices] == ["cpu"]


def apply(
    optimizer: optax.GradientTransformation,
    grads: Params,
    state: TrainState,
    finite: Bool[Array, ""],
) -> Applied:
    """Parameters and optimizer state after an update, and whether there was one.

    Without `finite`, or where new parameters have no finite norm, both stay as they were.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    finite &= jnp.isfinite(optax.tree.norm(params))
    return _where(finite, params, state.params), _where(finite, opt_state, state.opt_state), finite


def apply_in_place(
    optimizer: optax.GradientTransformation,
    grads: Params,
    state: TrainState,
    finite: Bool[Array, ""],
) -> Applied:
    """The same as `apply` on one CPU device, where new values overwrite the old as they are made.

    For optimizers that treat each value alone, as AdamW does. A norm of the new parameters would
    need them whole in memory beside the old. So each array's first value goes ahead: a step size
    that isn't sound spoils them all. A value that alone would not stay finite is kept as it was.
    """
    first = [jax.tree.map(lambda x: x[(slice(1),) * x.ndim], tree) for tree in (grads, state)]
    updates, _ = optimizer.update(first[0], first[1].opt_state, first[1].params)
    ahead = jax.tree.leaves(optax.apply_updates(first[1].params, updates))
    finite &= jnp.stack([_sound(x).all() for x in ahead]).all()

    # Chosen value by value, in the optimizer's own pass over them: a branch would copy the state.
    updates, _ = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(
        lambda new, old: jnp.where(finite & _sound(new), new, old),
        optax.apply_updates(state.params, updates),
        state.params,
    )
    # XLA would share what parameters and moments have in common through memory: twice the
    # parameters' size. Behind the barrier the moments are made from the gradient once more.
    _, opt_state = optimizer.update(
        jax.lax.optimization_barrier(grads), state.opt_state, state.params
    )
    # Unless the parameters that read the old moments are known to be done, those are copied first.
    # Of finite parameters this is always true.
    done = [jnp.isfinite(leaf.ravel()[0]) for leaf in jax.tree.leaves(params)]
    return params, _where(finite & jnp.stack(done).all(), opt_state, state.opt_state), finite


def _sound(x: Array) -> Bool[Array, "..."]:
    """Whether values are finite, and their squares too, as a norm needs."""
    return jnp.isfinite(jnp.square(x))


def _where(chosen: Array, new: Any, old: Any) -> Any:
    """One of two trees, leaf by leaf."""
    return jax.tree.map(lambda new, old: jnp.where(chosen, new, old), new, old)
