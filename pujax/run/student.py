"""A student on its mesh: what is frozen of it, what is trained, and the state of its training."""

import dataclasses
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pujax.config.model_settings import LoraConfig, ModelConfig
from pujax.errors import ConfigError
from pujax.files import weights
from pujax.files.chat import Chat
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.models.lora import init_adapter
from pujax.models.parameters import param_shapes
from pujax.models.sharding import check_heads, placer, put, tree_shardings
from pujax.types import Head, Params, TrainState


@dataclass(frozen=True)
class Student:
    """The model with what is frozen of it and what is trained.

    Without LoRA `base` is None and `trainable` is every parameter.
    """

    model: LanguageModel
    base: Params | None
    trainable: Params


def shape_of(config: ModelConfig, chat: Chat, *, tensors: bool = True) -> DecoderConfig:
    """What `load_student` will load, without reading a weight.

    Without `tensors` it doesn't matter whether they are here. Raises `ConfigError` where tokenizer
    and embedding don't match, and `WeightsError`.
    """
    if config.shape.layers:
        shape = config.shape
        return DecoderConfig(
            family="llama",
            vocab=chat.vocab,
            width=shape.width,
            layers=shape.layers,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_width=shape.width // shape.heads,
            mlp_width=shape.mlp_width,
            norm_eps=1e-5,
            rope_base=10_000.0,
            tied=True,
            eos_ids=chat.eos_ids,
        )
    path = config.path
    settings = weights.open_model(path).config if tensors else weights.read_config(path)
    if chat.vocab > settings.vocab:
        raise ConfigError(
            f"model.path={config.path!r}: the tokenizer has {chat.vocab} tokens but the embedding "
            f"{settings.vocab} rows: take both from one source"
        )
    return dataclasses.replace(settings, eos_ids=chat.eos_ids)


def load_student(config: ModelConfig, chat: Chat, mesh: Mesh, seed: int) -> Student:
    """The model at `config.path`, or a random one of `config.shape` with its tokenizer.

    Raises as `shape_of` does, `ConfigError` where heads and mesh don't match, and `WeightsError`.
    """
    dtype, settings = compute_dtype(config.dtype), shape_of(config, chat)
    model = _model(config, settings, dtype, mesh)
    if config.shape.layers:
        params = LanguageModel(settings).init_params(jax.random.key(seed))
        params = put(params, tree_shardings(mesh, params))
    else:
        kept = _kept_dtype(config, dtype)
        _, params = weights.load(config.path, dtype=kept, place=placer(mesh))
    if not config.lora.rank:
        return Student(model, None, params)
    return Student(model, params, make_adapter(config.lora, params, mesh, seed))


def abstract_student(
    config: ModelConfig, settings: DecoderConfig, mesh: Mesh, dtype: Any
) -> Student:
    """The student that `load_student` makes, computing in `dtype`, as shapes, types and places.

    `settings` are those of `shape_of`; no weight is read. Raises `ConfigError` where heads and mesh
    don't match.
    """
    model, kept = _model(config, settings, dtype, mesh), _kept_dtype(config, dtype)
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, kept),
        param_shapes(settings),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    if not config.lora.rank:
        return Student(model, None, placed(params, mesh))
    start = partial(init_adapter, rank=config.lora.rank, targets=config.lora.targets)
    adapter = jax.eval_shape(start, jax.random.key(0), params)
    return Student(model, placed(params, mesh), placed(adapter, mesh))


def placed(shapes: Params, mesh: Mesh) -> Params:
    """Shapes and types of parameters or of a state, with the places where they lie on `mesh`."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        tree_shardings(mesh, shapes),
    )


def held(tree: Params | None) -> int:
    """The bytes of a tree on each of its devices."""
    return sum(
        prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def check_memory(config: ModelConfig, settings: DecoderConfig, mesh: Mesh) -> None:
    """Raise `ConfigError` for a model of which not even parameters and AdamW fit a device.

    They are the trained parameters, their gradient and two moments in float32, and the frozen base
    of a LoRA; activations come on top.
    """
    student = abstract_student(config, settings, mesh, compute_dtype(config.dtype))
    least, room = 4 * held(student.trainable) + held(student.base), memory_of(mesh)
    if room is not None and least > room:
        raise ConfigError(
            f"model.path={config.path!r}: parameters, gradient and AdamW's moments take "
            f"{least / 2**30:.1f} GiB a device, which has {room / 2**30:.1f}: train adapters alone "
            "(model.lora.rank=16), split it (mesh.fsdp, mesh.tensor), or take a smaller model; "
            "`pujax benchmark plan=true` says what would fit"
        )


def memory_of(mesh: Mesh) -> float | None:
    """The bytes that each of this process's devices has; None where nobody says."""
    device, count = mesh.local_devices[0], len(mesh.local_devices)
    if device.platform == "cpu":
        return machine_memory() / count
    return (device.memory_stats() or {}).get("bytes_limit")


def machine_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """The bytes that this process may have: the machine's, or fewer where a container has a limit.

    Linux tells that in the root of its control `groups`, of either version.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # none there, or the word "max"
            limits.append(int((groups / name).read_text(encoding="ascii")))
    return min(limits)


def fast_bfloat16(info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor has instructions for products of bfloat16, as far as Linux tells."""
    with suppress(OSError):
        return "avx512_bf16" in info.read_text(encoding="ascii", errors="replace").split()
    return False


def _kept_dtype(config: ModelConfig, dtype: Any) -> Any:
    """Trained parameters are float32; a LoRA's frozen base is kept in what it computes in."""
    return dtype if config.lora.rank else jnp.float32


def _model(config: ModelConfig, settings: DecoderConfig, dtype: Any, mesh: Mesh) -> LanguageModel:
    check_heads(mesh, settings)
    if config.lora.rank:
        settings = dataclasses.replace(settings, lora_scale=config.lora.alpha / config.lora.rank)
    return LanguageModel(settings, dtype, config.remat, mesh=mesh if mesh.size > 1 else None)


def make_adapter(config: LoraConfig, params: Params, mesh: Mesh, seed: int) -> Params:
    """A fresh adapter on the mesh: B is zero, so it changes nothing yet."""
    adapter = init_adapter(jax.random.key(seed), params, rank=config.rank, targets=config.targets)
    return put(adapter, tree_shardings(mesh, adapter))


def compute_dtype(name: str) -> Any:
    """What the matrices multiply in: `auto` is float32 on CPU and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def new_state(
    trainable: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    head: Head | None = None,
) -> TrainState:
    """A stage's first state, on the mesh. It takes `trainable` over: the step donates it."""
    make = partial(_first_state, optimizer=optimizer)
    shardings = tree_shardings(mesh, jax.eval_shape(make, trainable, head))
    return jax.jit(make, out_shardings=shardings)(trainable, head)


def like_state(
    trainable: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    head: Head | None = None,
) -> TrainState:
    """Shapes, types and places of the states that train `trainable`: both stages' are alike."""
    return placed(jax.eval_shape(partial(_first_state, optimizer=optimizer), trainable, head), mesh)


def _first_state(
    params: Params, head: Head | None, *, optimizer: optax.GradientTransformation
) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), zero, head)
