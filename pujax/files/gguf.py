"""GGUF files: their metadata, and their tensors one at a time as float32.

The header is parsed here because `gguf.GGUFReader` builds several Python objects for every token
and merge: seconds for a vocabulary of 150 000, where this takes tenths. Blocks are decoded by
gguf's own `dequantize`.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quant_shape_to_byte_shape

from pujax.errors import WeightsError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"} | {
    12: "d"
}

_STRING, _ARRAY = 8, 9

_AGAIN = "the file is truncated: fetch it again"


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in numpy's order: kernels are [out, in]."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int


@dataclass(frozen=True)
class GgufFile:
    """A file's metadata and where its tensors are; nothing of them is in memory."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def read(self, name: str) -> np.ndarray:
        """The tensor, dequantised to float32."""
        return self.rows(name, self.tensors[name].shape[0])

    def rows(self, name: str, count: int) -> np.ndarray:
        """The tensor's first `count` rows, dequantised to float32."""
        tensor = self.tensors[name]
        stored = _stored_shape((count, *tensor.shape[1:]), tensor.kind)
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        dtype = np.dtype(plain.get(tensor.kind, np.uint8))
        raw = np.fromfile(self.path, dtype, prod(stored), offset=tensor.offset).reshape(stored)
        return dequantize(raw, tensor.kind)


def read(path: Path) -> GgufFile:
    """Parse the header of a little-endian GGUF file, version 2 or 3.

    Raises `WeightsError` naming the file, and the tensor where a tensor's data is cut off.
    """
    size = path.stat().st_size
    if size < 24:
        raise WeightsError(f"{path}: {_AGAIN}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise WeightsError(f"{path}: not a GGUF file, it starts with {data[:4]!r}")
        try:
            return _parse(path, data, size)
        except (struct.error, UnicodeDecodeError) as error:
            raise WeightsError(f"{path}: the header ends too early: {_AGAIN}") from error


def _parse(path: Path, data: mmap.mmap, size: int) -> GgufFile:
    version, tensor_count, key_count = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise WeightsError(f"{path}: GGUF version {version}: convert it with a current llama.cpp")
    at = 24
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        metadata[key], at = _value(data, at + 4, kind)
    tensors = {}
    for _ in range(tensor_count):
        name, at = _string(data, at)
        (rank,) = struct.unpack_from("<I", data, at)
        *shape, kind, offset = struct.unpack_from(f"<{rank}QIQ", data, at + 4)
        at += 4 + 8 * rank + 12
        try:
            tensors[name] = GgufTensor(tuple(reversed(shape)), GGMLQuantizationType(kind), offset)
        except ValueError as error:
            raise WeightsError(f"{path}: {name} has the unknown tensor type {kind}") from error
    alignment = metadata.get("general.alignment", 32)
    start = -(-at // alignment) * alignment
    placed = {}
    for name, tensor in tensors.items():
        stored = _stored_shape(tensor.shape, tensor.kind)
        width = {GGMLQuantizationType.F32: 4, GGMLQuantizationType.F16: 2}.get(tensor.kind, 1)
        end = start + tensor.offset + prod(stored) * width
        if end > size:
            raise WeightsError(f"{path}: {name} ends at byte {end} of {size}: {_AGAIN}")
        placed[name] = GgufTensor(tensor.shape, tensor.kind, start + tensor.offset)
    return GgufFile(path, metadata, placed)


def _stored_shape(shape: tuple[int, ...], kind: GGMLQuantizationType) -> tuple[int, ...]:
    """The shape of the array that `dequantize` takes: bytes for all but F32 and F16."""
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return shape
    assert kind in GGML_QUANT_SIZES
    return quant_shape_to_byte_shape(shape, kind)


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data):
        raise struct.error("string past the end")
    return data[at + 8 : end].decode("utf-8"), end


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(data, at)
    if kind == _ARRAY:
        inner, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if inner in _SCALARS:
            form = f"<{count}{_SCALARS[inner]}"
            return list(struct.unpack_from(form, data, at)), at + struct.calcsize(form)
        values = []
        for _ in range(count):
            value, at = _value(data, at, inner)
            values.append(value)
        return values, at
    form = f"<{_SCALARS[kind]}"
    return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
