"""The optimizer of a stage."""

import optax


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
