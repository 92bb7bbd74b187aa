"""Devices as a mesh of (data, fsdp, tensor), and how arrays lie on it."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from pujax.errors import ConfigError
from pujax.models.parameters import mesh_axes
from pujax.types import Params


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The mesh over this process's devices; `data=-1` takes all that the other axes leave.

    Raises `ConfigError` when the sizes don't multiply to the number of devices.
    """
    devices = jax.devices()
    rest = fsdp * tensor
    data = len(devices) // rest if data == -1 else data
    if data * rest != len(devices):
        raise ConfigError(
            f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.tensor={tensor} is not the "
            f"number of devices, {len(devices)}"
        )
    return jax.make_mesh(
        (data, fsdp, tensor),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
    )


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
        return jax.device_put(value, sharding_of(mesh, path, value.shape))

    return place


def ways(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Prompts are split over `data` and `fsdp` together; all else of a batch stays whole."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def split_rows(mesh: Mesh | None, x: Array, axis: int = 0) -> Array:
    """`x`, whose prompts lie along `axis`, split as a batch is; as it is without several devices.

    Left to itself XLA follows the parameters: it would split what a layer sums over, give every
    device all prompts, and add up what each made of them after every product.
    """
    if mesh is None or x.shape[axis] % ways(mesh):
        return x
    dimensions: list = [P.UNCONSTRAINED] * x.ndim
    dimensions[axis] = ("data", "fsdp")
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*dimensions)))


def gathered(mesh: Mesh | None, name: str, kernel: Array) -> Array:
    """A layer's kernel [in, out], or the table `name` [V, D], with nothing split along `fsdp`."""
    if mesh is None:
        return kernel
    axes = mesh_axes(name) or ()
    kept = [
        axis if axis == "tensor" and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes[-kernel.ndim :], kernel.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, P(*kept)))


def put_batch(mesh: Mesh, batch: Params, size: int) -> Params:
    """A batch of `size` prompts on the mesh. Raises `ConfigError` when it can't be split evenly."""
    if size % ways(mesh):
        raise ConfigError(
            f"a batch of {size} prompts can't be split over mesh.data x mesh.fsdp = {ways(mesh)}: "
            "make it a multiple"
        )
    return jax.device_put(batch, batch_sharding(mesh))
