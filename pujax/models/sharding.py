"""Devices as a mesh of (data, fsdp, tensor), and the one table of how arrays lie on it."""

import re
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from pujax.errors import ConfigError
from pujax.types import Params

# A parameter's path, matched from its end, to the mesh axis of each of its dimensions. Kernels are
# [L, in, out]. `tensor` splits heads and MLP units; `fsdp` splits what is left of a matrix.
RULES: tuple[tuple[str, P], ...] = (
    (r"(embed|unembed)", P("tensor", "fsdp")),
    (r"(q|k|v|gate|up)", P(None, "fsdp", "tensor")),
    (r"(o|down)", P(None, "tensor", "fsdp")),
    (r"(q|k|v)_bias", P(None, "tensor")),
    (r"(q|k|v|gate|up)_lora_a", P(None, "fsdp", None)),
    (r"(q|k|v|gate|up)_lora_b", P(None, None, "tensor")),
    (r"(o|down)_lora_a", P(None, "tensor", None)),
    (r"(o|down)_lora_b", P(None, None, "fsdp")),
    (r".*norm|count|step|skipped", P()),
)


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

    A dimension that its axis does not divide stays whole. Raises `ConfigError` for a path that no
    rule names.
    """
    name = path.rsplit("/", 1)[-1]
    for pattern, spec in RULES:
        if re.fullmatch(pattern, name):
            axes = [*spec, *[None] * (len(shape) - len(spec))][: len(shape)]
            kept = [
                axis if axis is not None and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(axes, shape, strict=True)
            ]
            return NamedSharding(mesh, P(*kept))
    raise ConfigError(
        f"parameter {path!r} has no sharding rule: add one to pujax.models.sharding.RULES"
    )


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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Prompts are split over `data` and `fsdp` together; all else of a batch stays whole."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def put_batch(mesh: Mesh, batch: Params, size: int) -> Params:
    """A batch of `size` prompts on the mesh. Raises `ConfigError` when it can't be split evenly."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % ways:
        raise ConfigError(
            f"a batch of {size} prompts can't be split over mesh.data x mesh.fsdp = {ways}: "
            "make it a multiple"
        )
    return jax.device_put(batch, batch_sharding(mesh))
