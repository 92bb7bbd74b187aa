"""Hugging Face model directories: settings in config.json, tensors in safetensors files."""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pujax.errors import WeightsError
from pujax.files.durable import on_disk, write_whole, written_whole
from pujax.files.tensors import Checkpoint, Entry, TreePath, entries, is_norm, leaves, tensor
from pujax.files.weight_files import INDEX, SHARD, WHOLE, read_json, require_config, weight_files
from pujax.models.decoder import DecoderConfig, param_shapes
from pujax.models.families import FAMILIES, Settings, from_hf, hf_config
from pujax.types import Params

"""The names that a model's weights have."""

LAID_OUT = {"format": "pt"}
"""Of a model's file: transformers takes none that doesn't say so."""

_SHARD_BYTES = 5 * 2**30

_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_FLOATS = tuple(_KINDS.values())


@dataclass(frozen=True)
class _HuggingFace:
    """A directory of safetensors files: `files` says which tensor lies where."""

    directory: Path
    config: DecoderConfig
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]

    @property
    def optional(self) -> frozenset[str]:
        buffers = {name for name in self.shapes if name.endswith("rotary_emb.inv_freq")}
        head = FAMILIES[self.config.family].names["unembed"].hf
        return frozenset(buffers | {head} if self.config.tied else buffers)

    def name(self, path: TreePath, layer: int | None) -> str:
        return FAMILIES[self.config.family].names["/".join(path)].hf.format(layer)

    def where(self, name: str) -> Path:
        return self.files.get(name, self.directory)

    def read(self, path: TreePath, name: str) -> np.ndarray:
        with safe_open(self.files[name], "np") as file:
            tensor = file.get_tensor(name)
        offset = FAMILIES[self.config.family].norm_offset
        return tensor.astype(np.float32) + offset if offset and is_norm(path) else tensor


def open_model(directory: Path) -> Checkpoint:
    """The model in `directory`: its settings, and where its tensors lie.

    Raises `WeightsError` for a file that is missing, damaged, or holds anything but plain floats.
    """
    config = read_config(directory)
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, "np") as file:
                for key in sorted(file.keys()):
                    if key in files:
                        raise WeightsError(
                            f"{path}: tensor {key} lies in {files[key].name} too: keep one of the "
                            "two files"
                        )
                    part = file.get_slice(key)
                    if part.get_dtype() not in _FLOATS:
                        raise WeightsError(
                            f"{path}: tensor {key} is stored as {part.get_dtype()}, which is "
                            f"quantised: use the model's files in {', '.join(_FLOATS)}, or a GGUF"
                        )
                    shapes[key] = tuple(part.get_shape())
                    files[key] = path
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path}: {error}: the file is damaged or truncated: fetch it again"
            ) from error
    return _HuggingFace(directory, config, shapes, files)


def read_config(directory: Path) -> DecoderConfig:
    """The decoder that a directory's config.json describes. Raises `WeightsError`."""
    path = require_config(directory)
    settings = read_settings(directory)
    try:
        return from_hf(settings)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def read_settings(directory: Path) -> Settings:
    """config.json, with every EOS id of generation_config.json; empty where neither is.

    Raises `WeightsError` for EOS ids that are none, or a vocabulary's size that is none.
    """
    path, generation = directory / "config.json", directory / "generation_config.json"
    settings = dict(read_json(path)) if path.is_file() else {}
    vocab = settings.get("vocab_size")
    if vocab is not None and (type(vocab) is not int or vocab < 1):
        raise WeightsError(f"{path}: vocab_size={vocab!r} must be a positive whole number")
    for file in (path, generation):
        eos = read_json(file).get("eos_token_id") if file.is_file() else None
        if eos is None:
            continue
        ids = eos if isinstance(eos, list) else [eos]
        if not all(type(i) is int and 0 <= i < (vocab or 2**31) for i in ids):
            raise WeightsError(
                f"{file}: eos_token_id={eos!r} must be one or several ids of tokens, from 0 to "
                f"{vocab - 1 if vocab else 'the last one'}"
            )
        settings["eos_token_id"] = eos
    return settings


def save(
    directory: str | os.PathLike[str],
    config: DecoderConfig,
    params: Params,
    *,
    dtype: Any = np.float32,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a Hugging Face model: safetensors, config.json and generation_config.json.

    Files of at most `shard_bytes` (one tensor at least) with an index where there are several.
    config.json comes last, so that a directory with one is whole. Raises `WeightsError` when
    `params` does not fit `config` or still has an adapter beside its kernels, and `DiskError`.
    """
    wanted = dict(leaves(param_shapes(config)))
    held = {path: tuple(array.shape) for path, array in leaves(params)}
    adapters = [path for path in held if "_lora_" in path[-1]]
    if adapters:
        raise WeightsError(f"{'/'.join(adapters[0])} is an adapter: merge it before saving")
    if held != wanted:
        wrong = sorted("/".join(path) for path, _ in held.items() ^ wanted.items())
        raise WeightsError(f"parameters do not fit the {config.family} config: {wrong[:4]}")

    directory = Path(directory)
    with on_disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").unlink(missing_ok=True)
    dtype = np.dtype(dtype)
    shards = list(_shards(config, dtype.itemsize, shard_bytes))
    index = {}
    for number, shard in enumerate(shards, 1):
        file = WHOLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = dict(_saved(config, params, entry, dtype) for entry in shard)
        write_tensors(directory / file, tensors)
        index |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum(int(np.prod(shape)) for shape in wanted.values()) * dtype.itemsize
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    remove_stale(directory, kept={*index.values(), *([INDEX] if len(shards) > 1 else [])})
    generation = {"eos_token_id": list(config.eos_ids), "bos_token_id": config.bos_id}
    write_json(
        directory / "generation_config.json",
        {key: value for key, value in generation.items() if value not in (None, [])},
    )
    write_json(directory / "config.json", hf_config(config) | {"torch_dtype": dtype.name})


def remove_stale(directory: Path, *, kept: Collection[str]) -> None:
    """Remove a model's weights, by the names that `save` gives them, but for those `kept`.

    The index goes first: without it `model.safetensors` alone counts.
    """
    with on_disk(directory):
        ours = [path for path in directory.iterdir() if SHARD.fullmatch(path.name)]
        for path in (directory / INDEX, directory / WHOLE, *ours):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: dict[str, np.ndarray], metadata: Mapping[str, str] = LAID_OUT
) -> None:
    """Write a safetensors file whole, one tensor after the other. Raises `DiskError`.

    By hand, since the library (0.8) writes to a file and a name of its own, which a kill leaves.
    """
    # Aligned, as those that read it in place want it, and byte for byte what the library writes.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    told: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        kind, shape = _KINDS[tensors[name].dtype.name], tensors[name].shape
        told[name] = {"dtype": kind, "shape": shape, "data_offsets": (begin, end)}
    header = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with written_whole(path) as beside, beside.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def write_json(path: Path, value: Settings) -> None:
    """Write an object as JSON, whole or not at all. Raises `DiskError`."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def _shards(config: DecoderConfig, itemsize: int, limit: int) -> Iterator[list[Entry]]:
    """The entries of each file."""
    shard: list[Entry] = []
    size = 0
    for entry in entries(config):
        one = int(np.prod(entry.shape)) * itemsize
        if shard and size + one > limit:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += one
    yield shard


def _saved(
    config: DecoderConfig, params: Params, entry: Entry, dtype: np.dtype
) -> tuple[str, np.ndarray]:
    """The tensor's name and value in a Hugging Face file."""
    family = FAMILIES[config.family]
    one = tensor(params, entry)
    if family.norm_offset and is_norm(entry.path):
        one = one.astype(np.float32) - family.norm_offset
    name = family.names["/".join(entry.path)].hf.format(entry.layer)
    return name, np.ascontiguousarray(one).astype(dtype)
