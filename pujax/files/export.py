"""A run or a model in the forms that transformers, vLLM, PEFT and llama.cpp load."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from safetensors.numpy import save_file

from pujax.errors import WeightsError
from pujax.files import weights
from pujax.files.chat import Chat
from pujax.models import lora
from pujax.models.decoder import DecoderConfig
from pujax.models.families import FAMILIES, rope_factors
from pujax.types import Params

_FILE_TYPES = {"F16": LlamaFileType.MOSTLY_F16, "Q8_0": LlamaFileType.MOSTLY_Q8_0}

_Q8_BLOCK = 32

ADAPTER = "adapter"


def export_hf(
    config: DecoderConfig,
    params: Params,
    chat: Chat,
    directory: str | os.PathLike[str],
    card: Mapping[str, Any],
    *,
    dtype: Any = np.float32,
) -> None:
    """Write what transformers and vLLM load, with a model card that lists `card`.

    An adapter in `params` is merged, and lies by itself in adapter/ as PEFT loads it. config.json
    comes last: without it the directory is no model.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    shutil.rmtree(directory / ADAPTER, ignore_errors=True)
    if lora.split(params)[1]["layers"]:
        export_peft(config, params, directory / ADAPTER, base=_student(card))
    chat.save(directory)
    (directory / "README.md").write_text(_model_card(config, card), encoding="utf-8")
    weights.save(directory, config, _merged(config, params), dtype=dtype)


def export_gguf(
    config: DecoderConfig,
    params: Params,
    chat: Chat,
    path: str | os.PathLike[str],
    *,
    kind: str = "F16",
) -> None:
    """Write what llama.cpp loads: one file, matrices in `kind` (F16 or Q8_0), tokenizer inside.

    Tensors are written one at a time, to a name of its own that becomes `path` at the end. An
    adapter in `params` is merged. Raises `WeightsError` for traits that GGUF can't say.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    params = _merged(config, params)
    writer = GGUFWriter(partial, FAMILIES[config.family].gguf)
    _describe(writer, config, kind)
    for key, value in chat.gguf_metadata().items():
        _add(writer, f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}", value)
    for name, shape, tensor_kind in _gguf_shapes(config, kind):
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
        for (_, _, tensor_kind), tensor in zip(
            _gguf_shapes(config, kind), _gguf_tensors(config, params), strict=True
        ):
            writer.write_tensor_data(quantize(tensor, tensor_kind))
        writer.close()
        written = weights.read_config(partial)
        # The tokenizer's own ids and a run's scale are not the architecture's.
        own = {"eos_ids": config.eos_ids, "bos_id": config.bos_id, "lora_scale": config.lora_scale}
        if replace(written, **own) != config:
            raise WeightsError(f"GGUF can't say all of {config}; it would be read as {written}")
        os.replace(partial, path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def export_peft(
    config: DecoderConfig, params: Params, directory: str | os.PathLike[str], *, base: str
) -> None:
    """Write a LoRA adapter as PEFT loads it onto the model `base`.

    Raises `WeightsError` when `params` has no adapter.
    """
    _, adapter = lora.split(params)
    stacks = {name: np.asarray(stack, np.float32) for name, stack in adapter["layers"].items()}
    if not stacks:
        raise WeightsError("this model has no adapter: export format=hf or format=gguf")
    names = FAMILIES[config.family].names
    tensors: dict[str, np.ndarray] = {}
    targets = []
    for stack_name, stack in stacks.items():
        kernel, part = stack_name[:-2].removesuffix("_lora"), stack_name[-1].upper()
        module = names[f"layers/{kernel}"].hf.removesuffix(".weight")
        targets.append(module.rpartition(".")[2])
        for layer, matrix in enumerate(stack):
            key = f"base_model.model.{module.format(layer)}.lora_{part}.weight"
            tensors[key] = np.ascontiguousarray(matrix.T)
    rank = next(stack.shape[2] for name, stack in stacks.items() if name.endswith("_a"))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": config.lora_scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(set(targets)),
        "bias": "none",
        "inference_mode": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "adapter_model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _merged(config: DecoderConfig, params: Params) -> Params:
    base, adapter = lora.split(params)
    return lora.merge(base, adapter, config.lora_scale) if adapter["layers"] else base


def _model_card(config: DecoderConfig, card: Mapping[str, Any]) -> str:
    """A README.md with the front matter of the model hub and the run's settings as a table."""
    student = _student(card)
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [pujax]"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", student) and not Path(student).exists():
        front.append(f"base_model: {student}")
    rows = "\n".join(f"| {key} | {value} |" for key, value in _flat(card))
    return "\n".join(front) + (
        "\n---\n"
        f"A {config.family} model of {config.layers} layers, written by pujax. The licence of the "
        "model that it was trained from applies.\n\n"
        f"| setting | value |\n|---|---|\n{rows}\n"
    )


def _student(card: Mapping[str, Any]) -> str:
    """Where the trained model came from: a card's own word, or the run's settings'."""
    return str(card["student"] if "student" in card else card.get("model", {}).get("path", ""))


def _flat(card: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A nested card's entries under dotted keys."""
    for key, value in card.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in _flat(value))
        else:
            yield key, value


# ---------------------------------------------------------------------- GGUF


def _describe(writer: GGUFWriter, config: DecoderConfig, kind: str) -> None:
    """The architecture's settings, in the keys that llama.cpp reads."""
    writer.add_type("model")
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.window:
        writer.add_sliding_window(config.window)
        writer.add_sliding_window_pattern(config.pattern)
        writer.add_rope_freq_base_swa(config.rope_local_base)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _gguf_shapes(
    config: DecoderConfig, kind: str
) -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType]]:
    """Every tensor's name, shape [out, in] and type; vectors stay float32."""
    if config.rope_scaling is not None:
        yield "rope_freqs.weight", (config.head_width // 2,), GGMLQuantizationType.F32
    for entry in weights.entries(config):
        name, shape = _gguf_name(config, entry), entry.shape
        if len(shape) == 1:
            yield name, shape, GGMLQuantizationType.F32
        elif kind == "Q8_0" and shape[-1] % _Q8_BLOCK == 0:
            yield name, shape, GGMLQuantizationType.Q8_0
        else:
            yield name, shape, GGMLQuantizationType.F16


def _gguf_tensors(config: DecoderConfig, params: Params) -> Iterator[np.ndarray]:
    """The tensors of `_gguf_shapes`, one after the other, in float32."""
    if config.rope_scaling is not None:
        yield rope_factors(config.rope_scaling, config.rope_base, config.head_width)
    for entry in weights.entries(config):
        one = weights.tensor(params, entry).astype(np.float32)
        if FAMILIES[config.family].permuted and entry.path[-1] in ("q", "k"):
            one = weights.interleave(
                one, config.heads if entry.path[-1] == "q" else config.kv_heads
            )
        yield np.ascontiguousarray(one)


def _gguf_name(config: DecoderConfig, entry: weights.Entry) -> str:
    return FAMILIES[config.family].names["/".join(entry.path)].gguf.format(entry.layer)


def _stored_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    count = int(np.prod(shape))
    if kind == GGMLQuantizationType.Q8_0:
        return count // _Q8_BLOCK * (_Q8_BLOCK + 2)  # a half-precision scale a block
    return count * (2 if kind == GGMLQuantizationType.F16 else 4)
