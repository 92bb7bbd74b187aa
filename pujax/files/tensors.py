"""A model's tensors: which ones files hold, and how they come together as its parameters.

Tensors stream. A file's tensors are read one at a time into the stack [L, ...] they belong to, and
each stack goes to its devices before the next is begun, so that at the peak there is the model,
one stack more, and one tensor.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from pujax.errors import WeightsError
from pujax.models.decoder import DecoderConfig, param_shapes
from pujax.types import Params

TreePath = tuple[str, ...]

Placer = Callable[[str, np.ndarray], jax.Array]
"""Puts the finished parameter at a path, "embed" or "layers/q", on its devices."""


class Checkpoint(Protocol):
    """A model on disk: its settings, its tensors' shapes, and the tensors one at a time."""

    @property
    def config(self) -> DecoderConfig:
        """The model's settings."""
        ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape [out, in] of every tensor in the files."""
        ...

    @property
    def optional(self) -> frozenset[str]:
        """Tensors that may lie in the files without being parameters."""
        ...

    def name(self, path: TreePath, layer: int | None) -> str:
        """The name in the files of one tensor of the parameter at `path`."""
        ...

    def where(self, name: str) -> Path:
        """The file that holds the tensor or ought to."""
        ...

    def read(self, path: TreePath, name: str) -> np.ndarray:
        """The tensor as the tree holds it, but for the transposition of kernels."""
        ...


def read_params(checkpoint: Checkpoint, *, dtype: Any, place: Placer) -> Params:
    """The parameters [L, ...] of a checkpoint in `dtype`, each handed to `place` once whole.

    Raises `WeightsError` for a tensor that is missing, has no place or another shape.
    """
    _check(checkpoint)
    params: dict[str, Any] = {"layers": {}}
    for path, shape in leaves(param_shapes(checkpoint.config)):
        parent = params["layers"] if path[0] == "layers" else params
        parent[path[-1]] = place("/".join(path), _stack(checkpoint, path, shape, dtype))
    return params


def leaves(tree: Params) -> Iterator[tuple[TreePath, Any]]:
    """Every parameter with its path, layer by name and not by number."""
    for name, leaf in tree.items():
        if isinstance(leaf, dict):
            yield from ((((name, *path)), inner) for path, inner in leaves(leaf))
        else:
            yield (name,), leaf


def is_norm(path: TreePath) -> bool:
    """Whether the parameter at `path` is a norm's scale."""
    return path[-1].endswith("norm")


def _is_kernel(path: TreePath, shape: tuple[int, ...]) -> bool:
    return path[0] == "layers" and len(shape) == 3


def _layers(path: TreePath, shape: tuple[int, ...]) -> list[int | None]:
    return list(range(shape[0])) if path[0] == "layers" else [None]


def _check(checkpoint: Checkpoint) -> None:
    """Hold the files' tensors against the parameters before any is read."""
    wanted = {
        checkpoint.name(entry.path, entry.layer): entry.shape
        for entry in entries(checkpoint.config)
    }
    held = checkpoint.shapes
    family = checkpoint.config.family
    for name, shape in wanted.items():
        if name not in held:
            raise WeightsError(
                f"{checkpoint.where(name)}: tensor {name} is missing from this {family} model: "
                "fetch all of its files again"
            )
        if held[name] != shape:
            raise WeightsError(
                f"{checkpoint.where(name)}: tensor {name} has shape {list(held[name])}, but the "
                f"config says {list(shape)}: config and weights are of different models"
            )
    extra = sorted(held.keys() - wanted.keys() - checkpoint.optional)
    if extra:
        raise WeightsError(
            f"{checkpoint.where(extra[0])}: tensor {extra[0]} has no place in a {family} model "
            f"({len(extra)} such): the architecture is not the one that its config names"
        )


def _stack(
    checkpoint: Checkpoint, path: TreePath, shape: tuple[int, ...], dtype: Any
) -> np.ndarray:
    stack = _aligned(shape, np.dtype(dtype))
    for layer in _layers(path, shape):
        name = checkpoint.name(path, layer)
        tensor = checkpoint.read(path, name)
        stack[... if layer is None else layer] = tensor.T if _is_kernel(path, shape) else tensor
    return stack


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX on CPU takes over as it is; any other it would copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Entry:
    """One tensor of a model's files: its parameter, the layer of a stack, its shape [out, in]."""

    path: TreePath
    layer: int | None
    shape: tuple[int, ...]


def entries(config: DecoderConfig) -> Iterator[Entry]:
    """Every tensor that a file of this model holds."""
    for path, shape in leaves(param_shapes(config)):
        one = shape[1:] if path[0] == "layers" else shape
        stored = one[::-1] if _is_kernel(path, shape) else one
        for layer in _layers(path, shape):
            yield Entry(path, layer, stored)


def tensor(params: Params, entry: Entry) -> np.ndarray:
    """The tensor of one entry as files hold it but for its family's conventions."""
    stack = params["layers"][entry.path[1]] if entry.path[0] == "layers" else params[entry.path[0]]
    one = np.asarray(stack if entry.layer is None else stack[entry.layer])
    return one.T if _is_kernel(entry.path, stack.shape) else one


def interleave(kernel: np.ndarray, heads: int) -> np.ndarray:
    """Rows [out, in] in interleaved rotary order, as Llama's GGUF files hold q and k."""
    split = kernel.reshape(heads, 2, kernel.shape[0] // heads // 2, -1)
    return split.swapaxes(1, 2).reshape(kernel.shape)


def uninterleave(kernel: np.ndarray, heads: int) -> np.ndarray:
    """Undo `interleave`."""
    split = kernel.reshape(heads, kernel.shape[0] // heads // 2, 2, -1)
    return split.swapaxes(1, 2).reshape(kernel.shape)
