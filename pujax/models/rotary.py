"""Rotary position embedding (Su et al., 2021), with Llama 3's scaling and Gemma 3's two bases."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pujax.models.parameters import DecoderConfig, RopeScaling


def rotations(config: DecoderConfig, positions: Int[Array, "*N"]) -> dict[bool, Array]:
    """Cosines and sines [2, *N, 1, H/2] at `positions`, for global and for local layers."""

    def angles(base: float, scaling: RopeScaling | None) -> Array:
        half = config.head_width // 2
        frequency = base ** -(jnp.arange(half, dtype=jnp.float32) / half)
        if scaling is not None:
            frequency = _scaled(frequency, scaling)
        angle = positions[..., None, None].astype(jnp.float32) * frequency.reshape(
            (1,) * positions.ndim + (1, half)
        )
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)])

    made = {False: angles(config.rope_base, config.rope_scaling)}
    if any(config.local_layers):
        made[True] = angles(config.rope_local_base, None)
    return made


def rotate(x: Float[Array, "*N X H"], angles: Float[Array, "2 *N 1 F"]) -> Array:
    """Rotary embedding (Su et al., 2021) in the half-split layout of Hugging Face checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = angles[0], angles[1]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def for_layer(choices: dict[bool, Array], local: Array | bool | None) -> Array:
    """The entry for this layer: a global one unless its flag says local."""
    if local is None or isinstance(local, bool):
        return choices[bool(local)]
    return jnp.where(local, choices[True], choices[False])


def _scaled(frequency: Float[Array, " F"], scaling: RopeScaling) -> Float[Array, " F"]:
    """Llama 3.1's rule: long wavelengths divided by `factor`, a linear blend in between."""
    wavelength = 2 * math.pi / frequency
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (scaling.original_positions / wavelength - low) / (high - low)
    blend = jnp.clip(blend, 0.0, 1.0)
    return frequency * (blend + (1 - blend) / scaling.factor)
