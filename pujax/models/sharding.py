"""Devices as a mesh with the `AXES`, and how arrays lie on it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from pujax.errors import ConfigError, require
from pujax.models.parameters import AXES, DATA, FSDP, TENSOR, DecoderConfig, mesh_axes
from pujax.types import Batch, Params

BATCH_AXES = (DATA, FSDP)
"""The axes along which the prompts of a batch are split, both together."""

Rows = TypeVar("Rows")
"""A tree of arrays whose first dimension is that of a batch's prompts."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The mesh over all processes' devices; three times 1 takes the first of them alone.

    An axis of -1 takes all that the others leave; of several that are -1 the last one does. Raises
    `ConfigError` when the sizes don't multiply to the number of devices, and for one device among
    several processes.
    """
    sizes, devices = [data, fsdp, tensor], jax.devices()
    if sizes == [1, 1, 1]:
        require(
            jax.process_count() == 1,
            "mesh",
            "single",
            f"{jax.process_count()} processes have a device each at least: choose another mesh, or "
            "start one process",
        )
        devices = devices[:1]
    for place in reversed(range(len(AXES))):
        if sizes[place] == -1:
            sizes[place] = len(devices) // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.tensor={tensor} is not the number of "
            f"devices, {len(devices)}: choose from {_listed(_divisors(len(devices)))} so that it "
            "is; -1 takes what the others leave"
        )
    return jax.make_mesh(
        tuple(sizes),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices,
    )


def check_heads(mesh: Mesh, model: DecoderConfig) -> None:
    """Refuse to split heads in their midst. Raises `ConfigError` that says what would fit."""
    shares = _divisors(math.gcd(model.heads, model.kv_heads))
    fit = [size for size in shares if mesh.size % size == 0]
    require(
        mesh.shape[TENSOR] in shares,
        "mesh.tensor",
        mesh.shape[TENSOR],
        f"must divide the model's {model.heads} query heads and {model.kv_heads} key-value heads: "
        f"of {mesh.size} devices choose {_listed(fit)}, and leave the others to mesh.data or fsdp",
    )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def sharding_of(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where the parameter at `path` ("layers/q") lies.

    A dimension that its axis does not divide stays whole, and so does a scalar. Raises
    `ConfigError` for a name that the table of parameters lacks.
    """
    if not shape:
        return NamedSharding(mesh, P())
    axes = mesh_axes(path.rsplit("/", 1)[-1])
    if axes is None:
        raise ConfigError(
            f"parameter {path!r} has no mesh axes: give it a row in "
            "pujax.models.parameters.PARAMETERS"
        )
    kept = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes or (None,) * len(shape), shape, strict=True)
    ]
    return NamedSharding(mesh, P(*kept))


def tree_shardings(mesh: Mesh, tree: Params) -> Params:
    """The sharding of every leaf of a tree of parameters, or of an optimizer state over one."""

    def one(path: tuple, leaf: Array) -> NamedSharding:
        names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
        named = [name for name in names if name]
        return sharding_of(mesh, "/".join(named), leaf.shape)

    return jax.tree_util.tree_map_with_path(one, tree)


def placer(mesh: Mesh) -> Callable[[str, np.ndarray], Array]:
    """A function that puts one parameter, named by its path, straight onto its sharding."""

    def place(path: str, value: np.ndarray) -> Array:
        return put(value, sharding_of(mesh, path, value.shape))

    return place


def put(tree: Any, shardings: Any) -> Any:
    """A tree of whole arrays where `shardings` say, one of them or a tree of them.

    Of several processes each places what its own devices hold; all need the same values.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def own(leaf: Array | np.ndarray, sharding: NamedSharding) -> Array:
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: own(leaf, shardings), tree)
    return jax.tree.map(own, tree, shardings)


def fetched(tree: Any) -> Any:
    """A tree's arrays on the host, whole in every process; each of them has to ask."""

    def whole(leaf: Any) -> Any:
        here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if here or leaf.is_fully_replicated:
            return leaf
        return process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def ways(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Prompts are split over `BATCH_AXES`; all else of a batch stays whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def split_rows(mesh: Mesh | None, x: Array, axis: int = 0) -> Array:
    """`x`, whose prompts lie along `axis`, split as a batch is; as it is without several devices.

    Left to itself XLA follows the parameters: it would split what a layer sums over, give every
    device all prompts, and add up what each made of them after every product.
    """
    if mesh is None or x.shape[axis] % ways(mesh):
        return x
    dimensions: list = [P.UNCONSTRAINED] * x.ndim
    dimensions[axis] = BATCH_AXES
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*dimensions)))


def gathered(mesh: Mesh | None, name: str, kernel: Array) -> Array:
    """A layer's kernel [in, out], or the table `name` [V, D], with nothing split along `fsdp`."""
    if mesh is None:
        return kernel
    axes = mesh_axes(name) or ()
    kept = [
        axis if axis == TENSOR and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes[-kernel.ndim :], kernel.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, P(*kept)))


def put_batch(mesh: Mesh, batch: Rows, size: int) -> Rows:
    """A batch of `size` prompts on the mesh, filled up to what that can split evenly.

    The rows that fill it up are copies of the last one; a `Batch` knows them as its `padding`.
    """
    padding = padding_of(mesh, size)
    batch = _filled(batch, padding)
    if isinstance(batch, Batch) and padding:
        batch = replace(batch, padding=padding)
    return put(batch, batch_sharding(mesh))


def padding_of(mesh: Mesh, size: int) -> int:
    """How many rows fill a batch of `size` prompts up to what the mesh can split evenly."""
    return -size % ways(mesh)


def _filled(tree: Rows, padding: int) -> Rows:
    if not padding:
        return tree
    return jax.tree.map(
        lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], padding, axis=0)]),
        tree,
    )


def spread(mesh: Mesh | None, tree: Rows) -> Rows:
    """Rows within a jitted function split evenly over the mesh, filled up as `put_batch` does.

    Without a mesh they are left as they are.
    """
    if mesh is None:
        return tree
    filled = _filled(tree, padding_of(mesh, jax.tree.leaves(tree)[0].shape[0]))
    return jax.lax.with_sharding_constraint(filled, batch_sharding(mesh))
