"""Weights in and out: Hugging Face safetensors and GGUF to parameters, parameters to safetensors.

Tensors stream. A file's tensors are read one at a time into the stack [L, ...] they belong to, and
each stack goes to its devices before the next is begun, so that at the peak there is the model,
one stack more, and one tensor.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pujax.errors import WeightsError
from pujax.files import gguf
from pujax.files.locate import locate
from pujax.models.decoder import DecoderConfig, param_shapes
from pujax.models.families import FAMILIES, Settings, from_gguf, from_hf, hf_config
from pujax.types import Params

TreePath = tuple[str, ...]

Place = Callable[[str, np.ndarray], jax.Array]
"""Puts the finished parameter at a path, "embed" or "layers/q", on its devices."""

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

_SHARD_BYTES = 5 * 2**30


class _Checkpoint(Protocol):
    """A model on disk: its settings, its tensors' shapes, and the tensors one at a time."""

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

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


def load(
    path: str | os.PathLike[str], *, dtype: Any = np.float32, place: Place | None = None
) -> tuple[DecoderConfig, Params]:
    """The model at `path`, its parameters [L, ...] stacked over layers, in `dtype`.

    `path` is a hub id, a Hugging Face directory, a GGUF file, OWNER/REPO/FILE.gguf on the hub or
    package://NAME/FILE. `place` puts each parameter on its sharding; without it they go to the
    default device. Raises `WeightsError` for an unknown architecture, a missing or an extra
    tensor, a wrong shape or a truncated file.
    """
    checkpoint = _open(locate(path))
    config = checkpoint.config
    _check(checkpoint)
    put = place or (lambda _, array: jnp.asarray(array))
    params: dict[str, Any] = {"layers": {}}
    for tree_path, shape in _leaves(param_shapes(config)):
        parent = params["layers"] if tree_path[0] == "layers" else params
        parent[tree_path[-1]] = put(
            "/".join(tree_path), _stack(checkpoint, tree_path, shape, dtype)
        )
    return config, params


def read_config(path: str | os.PathLike[str]) -> DecoderConfig:
    """The settings of the model at `path` (as in `load`), without its weights."""
    local = locate(path)
    return _open_gguf(local).config if local.is_file() else _hf_config(local)


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
    `params` does not fit `config` or still has an adapter beside its kernels.
    """
    leaves = dict(_leaves(param_shapes(config)))
    held = {path: tuple(array.shape) for path, array in _leaves(params)}
    adapters = [path for path in held if "_lora_" in path[-1]]
    if adapters:
        raise WeightsError(f"{'/'.join(adapters[0])} is an adapter: merge it before saving")
    if held != leaves:
        wrong = sorted("/".join(path) for path, _ in held.items() ^ leaves.items())
        raise WeightsError(f"parameters do not fit the {config.family} config: {wrong[:4]}")

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for stale in ("config.json", "model.safetensors.index.json"):
        (directory / stale).unlink(missing_ok=True)
    for stale in directory.glob("model*.safetensors"):
        stale.unlink()
    dtype = np.dtype(dtype)
    shards = list(_shards(config, dtype.itemsize, shard_bytes))
    index = {}
    for number, shard in enumerate(shards, 1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        tensors = dict(_saved(config, params, entry, dtype) for entry in shard)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # as the files beside it; safetensors keeps them private
        index |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum(int(np.prod(shape)) for shape in leaves.values()) * dtype.itemsize
        _write_json(
            directory / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": index},
        )
    generation = {"eos_token_id": list(config.eos_ids), "bos_token_id": config.bos_id}
    _write_json(
        directory / "generation_config.json",
        {key: value for key, value in generation.items() if value not in (None, [])},
    )
    _write_json(directory / "config.json", hf_config(config) | {"torch_dtype": dtype.name})


# ---------------------------------------------------------------------- the two kinds of files


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
        return tensor.astype(np.float32) + offset if offset and _is_norm(path) else tensor


@dataclass(frozen=True)
class _Gguf:
    """A GGUF file."""

    file: gguf.GgufFile
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


def interleave(kernel: np.ndarray, heads: int) -> np.ndarray:
    """Rows [out, in] in interleaved rotary order, as Llama's GGUF files hold q and k."""
    split = kernel.reshape(heads, 2, kernel.shape[0] // heads // 2, -1)
    return split.swapaxes(1, 2).reshape(kernel.shape)


def uninterleave(kernel: np.ndarray, heads: int) -> np.ndarray:
    """Undo `interleave`."""
    split = kernel.reshape(heads, kernel.shape[0] // heads // 2, 2, -1)
    return split.swapaxes(1, 2).reshape(kernel.shape)


def _open(path: Path) -> _Checkpoint:
    if path.is_file():
        return _open_gguf(path)
    return _open_directory(path)


def _open_gguf(path: Path) -> _Gguf:
    file = gguf.read(path)
    freqs = file.read("rope_freqs.weight") if "rope_freqs.weight" in file.tensors else None
    try:
        config = from_gguf(
            file.metadata, tied=_is_tied(file), rope_factors=freqs, eos_ids=gguf_eos_ids(file)
        )
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    return _Gguf(file, config)


def gguf_eos_ids(file: gguf.GgufFile) -> tuple[int, ...]:
    """Every id that ends a turn or a text, the one that the file names first.

    GGUF names one; the others are control tokens with a known name, as llama.cpp finds them.
    """
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    named = [file.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    tokens, control = file.metadata["tokenizer.ggml.tokens"], 3
    kinds = file.metadata["tokenizer.ggml.token_type"]
    known = [i for i, token in enumerate(tokens) if token in _ENDINGS and kinds[i] == control]
    return tuple(dict.fromkeys([i for i in named if i is not None] + known))


def _is_tied(file: gguf.GgufFile) -> bool:
    """Whether one matrix embeds and unembeds: a file may hold two roundings of it."""
    if "output.weight" not in file.tensors or "token_embd.weight" not in file.tensors:
        return True
    if file.tensors["output.weight"].shape != file.tensors["token_embd.weight"].shape:
        return False
    count = min(64, file.tensors["output.weight"].shape[0])
    output, embed = file.rows("output.weight", count), file.rows("token_embd.weight", count)
    # Roundings differ by percents; two matrices that were trained apart by their whole size.
    return bool(np.linalg.norm(output - embed) < 0.2 * np.linalg.norm(output))


def _open_directory(directory: Path) -> _HuggingFace:
    config = _hf_config(directory)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        placed = _read_json(index).get("weight_map", {})
        names = sorted(set(placed.values()))
    else:
        names = [path.name for path in sorted(directory.glob("*.safetensors"))]
    if not names:
        raise WeightsError(
            f"{directory}: no *.safetensors in it: convert the checkpoint with transformers' "
            "save_pretrained, or give a GGUF file's own path"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for name in names:
        path = directory / name
        if not path.is_file():
            raise WeightsError(f"{path}: named by {index.name} but missing: fetch it again")
        try:
            with safe_open(path, "np") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    shapes[key] = tuple(file.get_slice(key).get_shape())
                    files[key] = path
        except SafetensorError as error:
            raise WeightsError(f"{path}: {error}: the file is truncated: fetch it again") from error
    return _HuggingFace(directory, config, shapes, files)


def _hf_config(directory: Path) -> DecoderConfig:
    path = directory / "config.json"
    if not path.is_file():
        raise WeightsError(
            f"{directory}: no config.json in it: not a model, or one that was never fully written"
        )
    try:
        return from_hf(hf_settings(directory))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def hf_settings(directory: Path) -> Settings:
    """config.json, with every EOS id of generation_config.json; empty where neither is."""
    path, generation = directory / "config.json", directory / "generation_config.json"
    settings = dict(_read_json(path)) if path.is_file() else {}
    eos = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    return settings if eos is None else settings | {"eos_token_id": eos}


# ---------------------------------------------------------------------- the tree


def _leaves(tree: Params) -> Iterator[tuple[TreePath, Any]]:
    """Every parameter with its path, layer by name and not by number."""
    for name, leaf in tree.items():
        if isinstance(leaf, dict):
            yield from ((((name, *path)), inner) for path, inner in _leaves(leaf))
        else:
            yield (name,), leaf


def _is_norm(path: TreePath) -> bool:
    return path[-1].endswith("norm")


def _is_kernel(path: TreePath, shape: tuple[int, ...]) -> bool:
    return path[0] == "layers" and len(shape) == 3


def _layers(path: TreePath, shape: tuple[int, ...]) -> list[int | None]:
    return list(range(shape[0])) if path[0] == "layers" else [None]


def _check(checkpoint: _Checkpoint) -> None:
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
    checkpoint: _Checkpoint, path: TreePath, shape: tuple[int, ...], dtype: Any
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
    for path, shape in _leaves(param_shapes(config)):
        one = shape[1:] if path[0] == "layers" else shape
        stored = one[::-1] if _is_kernel(path, shape) else one
        for layer in _layers(path, shape):
            yield Entry(path, layer, stored)


def tensor(params: Params, entry: Entry) -> np.ndarray:
    """The tensor of one entry as files hold it but for its family's conventions."""
    stack = params["layers"][entry.path[1]] if entry.path[0] == "layers" else params[entry.path[0]]
    one = np.asarray(stack if entry.layer is None else stack[entry.layer])
    return one.T if _is_kernel(entry.path, stack.shape) else one


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
    if family.norm_offset and _is_norm(entry.path):
        one = one.astype(np.float32) - family.norm_offset
    name = family.names["/".join(entry.path)].hf.format(entry.layer)
    return name, np.ascontiguousarray(one).astype(dtype)


def _read_json(path: Path) -> Settings:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: not JSON ({error}): fetch it again") from error


def _write_json(path: Path, value: Settings) -> None:
    """Write whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
