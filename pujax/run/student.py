"""A student on its mesh: what is frozen of it, what is trained, and the state of its training."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pujax.config.settings import LoraConfig, ModelConfig
from pujax.errors import ConfigError
from pujax.files import weights
from pujax.files.chat import Chat
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.models.lora import init_adapter
from pujax.models.sharding import placer, tree_shardings
from pujax.types import Params, TrainState


@dataclass(frozen=True)
class Student:
    """The model with what is frozen of it and what is trained.

    Without LoRA `base` is None and `trainable` is every parameter.
    """

    model: LanguageModel
    base: Params | None
    trainable: Params


def shape_of(config: ModelConfig, chat: Chat) -> DecoderConfig:
    """What `load_student` will load, without reading a weight.

    Raises `ConfigError` where tokenizer and embedding don't match, and `WeightsError`.
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
    settings = weights.open_model(config.path).config
    if chat.vocab > settings.vocab:
        raise ConfigError(
            f"model.path={config.path!r}: the tokenizer has {chat.vocab} tokens but the embedding "
            f"{settings.vocab} rows: take both from one source"
        )
    return dataclasses.replace(settings, eos_ids=chat.eos_ids)


def load_student(config: ModelConfig, chat: Chat, mesh: Mesh, seed: int) -> Student:
    """The model at `config.path`, or a random one of `config.shape` with its tokenizer.

    Raises as `shape_of` does, and `WeightsError`.
    """
    dtype, settings = compute_dtype(config.dtype), shape_of(config, chat)
    if config.shape.layers:
        params = LanguageModel(settings).init_params(jax.random.key(seed))
        params = jax.device_put(params, tree_shardings(mesh, params))
    else:
        # Trained parameters are float32; a LoRA's frozen base is kept in what it computes in.
        kept = dtype if config.lora.rank else jnp.float32
        _, params = weights.load(config.path, dtype=kept, place=placer(mesh))
    if not config.lora.rank:
        return Student(LanguageModel(settings, dtype, config.remat), None, params)
    settings = dataclasses.replace(settings, lora_scale=config.lora.alpha / config.lora.rank)
    adapter = make_adapter(config.lora, params, mesh, seed)
    return Student(LanguageModel(settings, dtype, config.remat), params, adapter)


def make_adapter(config: LoraConfig, params: Params, mesh: Mesh, seed: int) -> Params:
    """A fresh adapter on the mesh: B is zero, so it changes nothing yet."""
    adapter = init_adapter(jax.random.key(seed), params, rank=config.rank, targets=config.targets)
    return jax.device_put(adapter, tree_shardings(mesh, adapter))


def compute_dtype(name: str) -> Any:
    """What the matrices multiply in: `auto` is float32 on CPU and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def new_state(trainable: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A stage's first state, on the mesh. It takes `trainable` over: the step donates it."""
    make = partial(_first_state, optimizer=optimizer)
    shardings = tree_shardings(mesh, jax.eval_shape(make, trainable))
    return jax.jit(make, out_shardings=shardings)(trainable)


def like_state(
    trainable: Params, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, types and places of the states that train `trainable`: both stages' are alike."""
    shapes = jax.eval_shape(partial(_first_state, optimizer=optimizer), trainable)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        tree_shardings(mesh, shapes),
    )


def _first_state(params: Params, *, optimizer: optax.GradientTransformation) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(step=zero, params=params, opt_state=optimizer.init(params), skipped=zero)
