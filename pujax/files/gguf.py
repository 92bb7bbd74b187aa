"""GGUF files: their metadata and tensors, read one at a time as float32, and written.

The header is parsed here because `gguf.GGUFReader` builds several Python objects for every token
and merge: seconds for a vocabulary of 150 000, where this takes tenths. Blocks are decoded by
gguf's own `dequantize`.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize

import pujax
from pujax.errors import WeightsError
from pujax.files.durable import written_whole
from pujax.files.tensors import (
    Checkpoint,
    Entry,
    TreePath,
    entries,
    interleave,
    tensor,
    uninterleave,
)
from pujax.files.weight_files import require_gguf
from pujax.models.decoder import DecoderConfig
from pujax.models.families import FAMILIES, from_gguf, rope_factors, to_gguf
from pujax.types import Params

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
"""The kinds of tokens."""

MADE_BY = "pujax.version"
"""The key by which a file is known as one that this package wrote; llama.cpp passes it over."""

TIED = "pujax.tied"
"""Whether the two tables of tokens are one: with virtual tokens they differ in a few rows alone."""

# Endings of a turn or a text, by the names that GGUF files give them (as llama.cpp takes them).
_ENDINGS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<eos>",
)

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"} | {
    12: "d"
}

_STRING, _ARRAY = 8, 9

_RANKS = range(1, 5)  # GGML knows tensors of no other

_AGAIN = "the file is truncated: fetch it again"

_FILE_TYPES = {
    "F16": LlamaFileType.MOSTLY_F16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
}
"""The kinds of files that are written, those with a quantiser in the package `gguf`."""


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
        """The tensor, dequantised to float32. Raises `WeightsError` for a kind that can't be."""
        return self.rows(name, self.tensors[name].shape[0])

    def rows(self, name: str, count: int) -> np.ndarray:
        """The tensor's first `count` rows, as `read` gives them."""
        tensor = self.tensors[name]
        stored = _stored_shape((count, *tensor.shape[1:]), tensor.kind)
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        dtype = np.dtype(plain.get(tensor.kind, np.uint8))
        try:
            raw = np.fromfile(self.path, dtype, prod(stored), offset=tensor.offset).reshape(stored)
            return dequantize(raw, tensor.kind)
        except (NotImplementedError, ValueError, OSError) as error:
            raise WeightsError(
                f"{self.path}: tensor {name} can't be read as {tensor.kind.name} ({error}): use a "
                "file in another quantisation, as Q8_0 or F16"
            ) from error

    def vocabulary(self) -> tuple[list[str], list[int]]:
        """The tokens and their kinds. Raises `WeightsError` for a file without a tokenizer.

        A file may leave the kinds out: then those that end a text or a turn are known by name.
        """
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
            raise WeightsError(
                f"{self.path}: no tokenizer.ggml.tokens in it: use a file with its tokenizer, as "
                "llama.cpp's converter writes it"
            )
        kinds = self.metadata.get("tokenizer.ggml.token_type")
        if kinds is None:
            kinds = [CONTROL if token in _ENDINGS else NORMAL for token in tokens]
        if not isinstance(kinds, list) or len(kinds) != len(tokens):
            raise WeightsError(
                f"{self.path}: tokenizer.ggml.token_type does not name a kind for each of the "
                f"{len(tokens)} tokens: convert the model again"
            )
        return tokens, kinds

    def token_id(self, name: str) -> int | None:
        """The id under `tokenizer.ggml.NAME_token_id`. Raises `WeightsError` for no token's."""
        key = f"tokenizer.ggml.{name}_token_id"
        index = self.metadata.get(key)
        count = len(self.vocabulary()[0])
        if index is not None and not (type(index) is int and 0 <= index < count):
            raise WeightsError(
                f"{self.path}: {key}={index!r} is none of its {count} tokens: convert the model "
                "again"
            )
        return index

    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a turn or a text, the one that the file names first.

        GGUF names one; the others are control tokens with a known name, as llama.cpp finds them.
        """
        named = [self.token_id(name) for name in ("eos", "eot", "eom")]
        tokens, kinds = self.vocabulary()
        known = [i for i, t in enumerate(tokens) if t in _ENDINGS and kinds[i] == CONTROL]
        return tuple(dict.fromkeys([i for i in named if i is not None] + known))


def read(path: Path) -> GgufFile:
    """Parse the header of a little-endian GGUF file, version 2 or 3.

    Raises `WeightsError` naming the file, and the tensor where a tensor's data is cut off.
    """
    require_gguf(path)
    try:
        size = path.stat().st_size
        if size < 24:
            raise WeightsError(f"{path}: {_AGAIN}")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data, size)
    except (struct.error, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: the header ends too early: {_AGAIN}") from error
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror})") from error


def _parse(path: Path, data: mmap.mmap, size: int) -> GgufFile:
    version, tensor_count, key_count = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise WeightsError(f"{path}: GGUF version {version}: convert it with a current llama.cpp")
    at = 24
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        try:
            metadata[key], at = _value(data, at + 4, kind)
        except _UnknownValue as error:
            raise WeightsError(f"{path}: {key} {error}: fetch the file again") from error
    tensors = {}
    for _ in range(tensor_count):
        name, at = _string(data, at)
        (rank,) = struct.unpack_from("<I", data, at)
        if rank not in _RANKS:
            raise WeightsError(f"{path}: {name} has {rank} dimensions: fetch the file again")
        *shape, kind, offset = struct.unpack_from(f"<{rank}QIQ", data, at + 4)
        at += 4 + 8 * rank + 12
        try:
            tensors[name] = GgufTensor(tuple(reversed(shape)), GGMLQuantizationType(kind), offset)
        except ValueError as error:
            raise WeightsError(f"{path}: {name} has the unknown tensor type {kind}") from error
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise WeightsError(
            f"{path}: general.alignment={alignment!r} must be a positive whole number: fetch the "
            "file again"
        )
    start = -(-at // alignment) * alignment
    placed = {}
    for name, one in tensors.items():
        try:
            stored = _stored_shape(one.shape, one.kind)
        except (ValueError, KeyError) as error:
            raise WeightsError(f"{path}: {name}: {error}: fetch the file again") from error
        width = {GGMLQuantizationType.F32: 4, GGMLQuantizationType.F16: 2}.get(one.kind, 1)
        end = start + one.offset + prod(stored) * width
        if end > size:
            raise WeightsError(f"{path}: {name} ends at byte {end} of {size}: {_AGAIN}")
        placed[name] = GgufTensor(one.shape, one.kind, start + one.offset)
    return GgufFile(path, metadata, placed)


def _stored_shape(shape: tuple[int, ...], kind: GGMLQuantizationType) -> tuple[int, ...]:
    """The shape of the array that `dequantize` takes: bytes for all but F32 and F16."""
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return shape
    return quant_shape_to_byte_shape(shape, kind)


class _UnknownValue(Exception):
    """A metadata value of a kind that isn't GGUF's."""


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
        return _array(data, at)
    if kind not in _SCALARS:
        raise _UnknownValue(f"is of the unknown kind {kind}")
    form = f"<{_SCALARS[kind]}"
    return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)


def _array(data: mmap.mmap, at: int) -> tuple[list[Any], int]:
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner in _SCALARS:
        size = count * struct.calcsize(f"<{_SCALARS[inner]}")
        if at + size > len(data):
            raise struct.error("array past the end")
        return list(struct.unpack_from(f"<{count}{_SCALARS[inner]}", data, at)), at + size
    if inner != _STRING:  # llama.cpp takes no arrays of arrays either
        raise _UnknownValue(f"is an array of the unknown kind {inner}")
    values = []
    for _ in range(count):
        value, at = _string(data, at)
        values.append(value)
    return values, at


# ---------------------------------------------------------------------- a model in a file


@dataclass(frozen=True)
class _Gguf:
    """A GGUF file as a checkpoint."""

    file: GgufFile
    config: DecoderConfig

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.file.tensors.items()}

    @property
    def optional(self) -> frozenset[str]:
        # Of two roundings of one tied matrix the output's is the better, so it is the one read.
        return frozenset({"rope_freqs.weight", "token_embd.weight"})

    def name(self, path: TreePath, layer: int | None) -> str:
        if path == ("embed",) and self.config.tied and "output.weight" in self.file.tensors:
            return "output.weight"
        return FAMILIES[self.config.family].names["/".join(path)].gguf.format(layer)

    def where(self, name: str) -> Path:
        return self.file.path

    def read(self, path: TreePath, name: str) -> np.ndarray:
        tensor = self.file.read(name)
        if FAMILIES[self.config.family].permuted and path[-1] in ("q", "k"):
            heads = self.config.heads if path[-1] == "q" else self.config.kv_heads
            return uninterleave(tensor, heads)
        return tensor


def open_model(path: Path) -> Checkpoint:
    """The model in a GGUF file. Raises `WeightsError`."""
    return model_of(read(path))


def model_of(file: GgufFile) -> Checkpoint:
    """The model whose metadata and tensors a file holds. Raises `WeightsError`."""
    freqs = file.read("rope_freqs.weight") if "rope_freqs.weight" in file.tensors else None
    vocab, eos_ids, bos_id = len(file.vocabulary()[0]), file.eos_ids(), file.token_id("bos")
    try:
        config = from_gguf(
            file.metadata,
            vocab=vocab,
            eos_ids=eos_ids,
            bos_id=bos_id,
            tied=_is_tied(file),
            rope_factors=freqs,
        )
    except WeightsError as error:
        raise WeightsError(f"{file.path}: {error}") from error
    return _Gguf(file, config)


def _is_tied(file: GgufFile) -> bool:
    """Whether one matrix embeds and unembeds: a file may hold two roundings of it."""
    if file.metadata.get(TIED) is False:
        return False
    if "output.weight" not in file.tensors or "token_embd.weight" not in file.tensors:
        return True
    if file.tensors["output.weight"].shape != file.tensors["token_embd.weight"].shape:
        return False
    count = min(64, file.tensors["output.weight"].shape[0])
    output, embed = file.rows("output.weight", count), file.rows("token_embd.weight", count)
    # Roundings differ by percents; two matrices that were trained apart by their whole size.
    return bool(np.linalg.norm(output - embed) < 0.2 * np.linalg.norm(output))


def write(
    path: Path,
    config: DecoderConfig,
    params: Params,
    tokenizer: Mapping[str, Any],
    *,
    kind: str = "F16",
) -> None:
    """Write a model as one file, its matrices in `kind`, `tokenizer`'s keys inside.

    `kind` is F16, Q8_0, Q4_1 or Q4_0. With 4 bits the table of tokens and the one that unembeds
    have 8, since a rounding of those is felt most.

    Tensors are written one at a time, to a name of its own that becomes `path` at the end. Raises
    `WeightsError` for traits that GGUF can't say, and `DiskError`.
    """
    architecture = FAMILIES[config.family].gguf
    with written_whole(path) as beside:
        writer = GGUFWriter(beside, architecture)
        writer.add_type("model")
        writer.add_file_type(_FILE_TYPES[kind])
        writer.add_quantization_version(2)
        writer.add_string(MADE_BY, pujax.__version__)
        writer.add_bool(TIED, config.tied)
        for key, value in (to_gguf(config) | dict(tokenizer)).items():
            _add(writer, key, value)
        for name, shape, tensor_kind in _shapes(config, kind):
            writer.add_tensor_info(
                name,
                shape,
                np.dtype(np.float16 if tensor_kind == GGMLQuantizationType.F16 else np.float32),
                _stored_bytes(shape, tensor_kind),
                raw_dtype=tensor_kind,
            )
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for (_, _, tensor_kind), one in zip(
                _shapes(config, kind), _tensors(config, params), strict=True
            ):
                writer.write_tensor_data(quantize(one, tensor_kind))
        finally:
            writer.close()
        written = open_model(beside).config
        # The tokenizer's ids and a run's scale are not the architecture's, which families share.
        own = {"family": config.family, "lora_scale": config.lora_scale}
        own |= {"eos_ids": config.eos_ids, "bos_id": config.bos_id}
        if replace(written, **own) != config:
            raise WeightsError(f"GGUF can't say all of {config}; it would be read as {written}")


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _shapes(
    config: DecoderConfig, kind: str
) -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType]]:
    """Every tensor's name, shape [out, in] and type; vectors stay float32."""
    if config.rope_scaling is not None:
        yield "rope_freqs.weight", (config.head_width // 2,), GGMLQuantizationType.F32
    for entry in entries(config):
        yield _name(config, entry), entry.shape, _kind(entry, kind)


def _kind(entry: Entry, kind: str) -> GGMLQuantizationType:
    """The type of a tensor in a file of that kind."""
    if len(entry.shape) == 1:
        return GGMLQuantizationType.F32
    if kind.startswith("Q4") and entry.path[-1] in ("embed", "unembed"):
        kind = "Q8_0"
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return GGMLQuantizationType["F16" if entry.shape[-1] % block else kind]


def _tensors(config: DecoderConfig, params: Params) -> Iterator[np.ndarray]:
    """The tensors of `_shapes`, one after the other, in float32."""
    if config.rope_scaling is not None:
        yield rope_factors(config.rope_scaling, config.rope_base, config.head_width)
    for entry in entries(config):
        one = tensor(params, entry).astype(np.float32)
        if FAMILIES[config.family].permuted and entry.path[-1] in ("q", "k"):
            one = interleave(one, config.heads if entry.path[-1] == "q" else config.kv_heads)
        yield np.ascontiguousarray(one)


def _name(config: DecoderConfig, entry: Entry) -> str:
    return FAMILIES[config.family].names["/".join(entry.path)].gguf.format(entry.layer)


def _stored_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size
