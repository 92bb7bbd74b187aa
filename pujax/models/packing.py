"""Batches without their padding: how many real tokens a pass takes, and where they stand."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class TokenBudget:
    """How many real tokens of prompts and of responses a packed pass takes; chosen before jit.

    One that reads both at once takes `both`, and by default as many as of each. On a mesh each of
    `ways` equal parts of a batch has that budget, and is packed by itself: no token leaves its
    prompt's device.
    """

    prompts: int
    responses: int
    ways: int = 1
    both: int | None = None

    @property
    def at_once(self) -> int:
        """What a pass takes that reads both at once."""
        return self.prompts + self.responses if self.both is None else self.both

    def fits(self, prompt_lengths: Int[Array, " B"], mask: Bool[Array, "B G T"]) -> Bool[Array, ""]:
        """Whether a batch's real tokens, or those of each of its parts, are no more than that."""
        mask = through_last(mask)
        prompts, responses = (x.reshape(self.ways, -1).sum(axis=1) for x in (prompt_lengths, mask))
        fit = (prompts <= self.prompts) & (responses <= self.responses)
        return for_all(jnp.all(fit & (prompts + responses <= self.at_once)))

    def share(self, part: int, whole: int) -> "TokenBudget":
        """The budget of `part` of `whole` prompts, rounded up."""
        part, whole = (-(-count // self.ways) for count in (part, whole))
        counts = (self.prompts, self.responses, self.at_once)
        prompts, responses, both = (-(-count * part // whole) for count in counts)
        return replace(self, prompts=prompts, responses=responses, both=both)


@custom_vmap
def for_all(holds: Bool[Array, ""]) -> Bool[Array, ""]:
    """The same; under `jax.vmap`, as of several runs in one program, whether it holds for all.

    A branch or a loop that goes by it is then one for all of them: each for itself, `vmap` would
    compute both branches, and copy what a loop carries each time round.
    """
    return holds


@for_all.def_vmap
def _(size: int, batched: list[bool], holds: Bool[Array, " runs"]) -> tuple[Array, bool]:
    del size, batched
    return for_all(jnp.all(holds)), False


def through_last(mask: Bool[Array, "*N T"]) -> Bool[Array, "*N T"]:
    """Each response's tokens up to its last marked one: a gap is read, if not learnt."""
    return jax.lax.cummax(mask.astype(jnp.int8), axis=mask.ndim - 1, reverse=True) > 0


def places(mask: Bool[Array, "B S"], budget: int, ways: int = 1) -> Int[Array, "*W C"]:
    """Where the marked tokens stand in the flattened grid; what is left points beyond its end.

    With several `ways` that is told of each of so many parts of the grid.
    """

    def found(flat: Bool[Array, " N"]) -> Int[Array, " C"]:
        return jnp.nonzero(flat, size=budget, fill_value=flat.size)[0]

    return found(mask.ravel()) if ways == 1 else jax.vmap(found)(mask.reshape(ways, -1))


@dataclass(frozen=True)
class Grid:
    """Tokens as the grid [B, S] that attention needs, or packed [C] as all else may be.

    Norms, projections and the MLP treat each token alone, so where padding is much of the grid
    they run on the real tokens only. Without `pack` the two forms are one. Where it is [W, C], each
    of W parts of the batch is packed by itself, and what is packed is [W, C, ...].
    """

    shape: tuple[int, int]
    pack: Int[Array, "*W C"] | None

    def taken(self, x: Float[Array, "B S *F"]) -> Array:
        """[B, S, ...] to [C, ...]; unused places are 0."""
        if self.pack is None:
            return x

        def take(flat: Array, pack: Array) -> Array:
            return flat.at[pack].get(mode="fill", fill_value=0)

        *ways, _ = self.pack.shape
        flat = x.reshape(*ways, math.prod(self.shape) // math.prod(ways), *x.shape[2:])
        return jax.vmap(take)(flat, self.pack) if ways else take(flat, self.pack)

    def spread(self, x: Array) -> Float[Array, "B S *F"]:
        """[C, ...] to [B, S, ...]; tokens that were not taken are 0."""
        if self.pack is None:
            return x

        def put(x: Array, pack: Array) -> Array:
            flat = jnp.zeros((size, *x.shape[1:]), x.dtype)
            return flat.at[pack].set(x, mode="drop")

        *ways, _ = self.pack.shape
        size = math.prod(self.shape) // math.prod(ways)
        flat = jax.vmap(put)(x, self.pack) if ways else put(x, self.pack)
        return flat.reshape(*self.shape, *x.shape[len(ways) + 1 :])

    def taken_angles(self, rotations: dict[bool, Array]) -> dict[bool, Array]:
        """Cosines and sines [2, B, S, 1, F] to [2, C, 1, F]."""
        if self.pack is None:
            return rotations
        return {
            local: jnp.stack([self.taken(angles[0]), self.taken(angles[1])])
            for local, angles in rotations.items()
        }
