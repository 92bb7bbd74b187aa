"""Batches without their padding: how many real tokens a pass takes, and where they stand."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class TokenBudget:
    """How many real tokens of prompts and of responses a packed pass takes; chosen before jit."""

    prompts: int
    responses: int

    def fits(self, prompt_lengths: Int[Array, " B"], mask: Bool[Array, "B G T"]) -> Bool[Array, ""]:
        """Whether a batch's real tokens are no more than that."""
        return (prompt_lengths.sum() <= self.prompts) & (mask.sum() <= self.responses)

    def share(self, part: int, whole: int) -> "TokenBudget":
        """The budget of `part` of `whole` prompts, rounded up."""
        return TokenBudget(-(-self.prompts * part // whole), -(-self.responses * part // whole))


def places(mask: Bool[Array, "..."], budget: int) -> Int[Array, " C"]:
    """Where the marked tokens stand in the flattened grid; what is left points beyond its end."""
    return jnp.nonzero(mask.ravel(), size=budget, fill_value=mask.size)[0]


@dataclass(frozen=True)
class Grid:
    """Tokens as the grid [B, S] that attention needs, or packed [C] as all else may be.

    Norms, projections and the MLP treat each token alone, so where padding is much of the grid
    they run on the real tokens only. Without `pack` the two forms are one.
    """

    shape: tuple[int, int]
    pack: Int[Array, " C"] | None

    def taken(self, x: Float[Array, "B S *F"]) -> Array:
        """[B, S, ...] to [C, ...]; unused places are 0."""
        if self.pack is None:
            return x
        flat = x.reshape(math.prod(self.shape), *x.shape[2:])
        return flat.at[self.pack].get(mode="fill", fill_value=0)

    def spread(self, x: Array) -> Float[Array, "B S *F"]:
        """[C, ...] to [B, S, ...]; tokens that were not taken are 0."""
        if self.pack is None:
            return x
        flat = jnp.zeros((math.prod(self.shape), *x.shape[1:]), x.dtype)
        return flat.at[self.pack].set(x, mode="drop").reshape(*self.shape, *x.shape[1:])

    def taken_angles(self, rotations: dict[bool, Array]) -> dict[bool, Array]:
        """Cosines and sines [2, B, S, 1, F] to [2, C, 1, F]."""
        if self.pack is None:
            return rotations
        return {
            local: jnp.stack([self.taken(angles[0]), self.taken(angles[1])])
            for local, angles in rotations.items()
        }
