"""A decoder's settings, and the one table of its parameters: shape, first value, mesh axes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pujax.types import Params


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling (its "llama3" rope type): slow rotations are slowed further."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class DecoderConfig:
    """A family's traits as settings; widths and counts in numbers of units.

    `window` and `pattern` describe Gemma 3's local attention: every `pattern`-th layer is global,
    the others see `window` positions back and rotate with `rope_local_base`. `window=0`: all
    layers are global.
    """

    family: str
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm_eps: float
    rope_base: float
    tied: bool
    eos_ids: tuple[int, ...]
    bos_id: int | None = None
    max_positions: int = 8192
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    gelu: bool = False
    embed_scale: float = 1.0
    query_scale: float | None = None
    window: int = 0
    pattern: int = 0
    rope_local_base: float = 10_000.0
    lora_scale: float = 1.0

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Which layers attend to the last `window` positions alone."""
        return tuple(
            self.window > 0 and (i + 1) % self.pattern != 0 if self.pattern else self.window > 0
            for i in range(self.layers)
        )


DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
"""The axes of a mesh, by what is split along them: see `sharding` for batches."""

Start = Callable[[Array, tuple[int, ...]], Array]
"""A key and a shape to a parameter's first value."""


def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    return 0.02 * jax.random.normal(key, shape, jnp.float32)


def _ones(key: Array, shape: tuple[int, ...]) -> Array:
    del key
    return jnp.ones(shape)


def _zeros(key: Array, shape: tuple[int, ...]) -> Array:
    del key
    return jnp.zeros(shape)


class Parameter(NamedTuple):
    """One row of the table: dimensions by letter, first value, and the mesh axis of each dimension.

    L layers, V vocabulary, D width, F MLP units, Q and KV the units of all heads, H those of one.
    Without `axes` a parameter stays whole on every device. `of` says which models have it.
    """

    dims: str
    start: Start
    axes: tuple[str | None, ...] = ()
    of: Callable[[DecoderConfig], bool] = lambda config: True


# TENSOR splits heads, MLP units and the vocabulary; FSDP splits what is left of a matrix.
_IN_OUT, _OUT_IN = (None, FSDP, TENSOR), (None, TENSOR, FSDP)

# The order is that of the random keys. Kernels are [L, in, out].
LAYERS: dict[str, Parameter] = {
    "attn_norm": Parameter("L D", _ones),
    "q": Parameter("L D Q", _normal, _IN_OUT),
    "k": Parameter("L D KV", _normal, _IN_OUT),
    "v": Parameter("L D KV", _normal, _IN_OUT),
    "o": Parameter("L Q D", _normal, _OUT_IN),
    "mlp_norm": Parameter("L D", _ones),
    "gate": Parameter("L D F", _normal, _IN_OUT),
    "up": Parameter("L D F", _normal, _IN_OUT),
    "down": Parameter("L F D", _normal, _OUT_IN),
    "q_bias": Parameter("L Q", _zeros, (None, TENSOR), lambda config: config.qkv_bias),
    "k_bias": Parameter("L KV", _zeros, (None, TENSOR), lambda config: config.qkv_bias),
    "v_bias": Parameter("L KV", _zeros, (None, TENSOR), lambda config: config.qkv_bias),
    "q_norm": Parameter("L H", _ones, of=lambda config: config.qk_norm),
    "k_norm": Parameter("L H", _ones, of=lambda config: config.qk_norm),
    "post_attn_norm": Parameter("L D", _ones, of=lambda config: config.post_norms),
    "post_mlp_norm": Parameter("L D", _ones, of=lambda config: config.post_norms),
}
PARAMETERS: dict[str, Parameter | dict[str, Parameter]] = {
    "embed": Parameter("V D", _normal, (TENSOR, FSDP)),
    "layers": LAYERS,
    "final_norm": Parameter("D", _ones),
    "unembed": Parameter("V D", _normal, (TENSOR, FSDP), lambda config: not config.tied),
}
# Of scorers that are trained beside a decoder and read its states: see `method.discriminator`.
HEADS: dict[str, Parameter] = {"discriminator": Parameter("D", _zeros)}
# Of N virtual tokens, whose ids lie behind the vocabulary: see `soft_prompt`.
VIRTUAL: dict[str, Parameter] = {"soft_prompt": Parameter("N D", _normal)}
KERNELS = tuple(name for name, row in LAYERS.items() if len(row.dims.split()) == 3)


def param_shapes(config: DecoderConfig) -> Params:
    """The shape of every parameter, as the tree that a `LanguageModel` takes."""
    return {
        name: _shape(row, config)
        if isinstance(row, Parameter)
        else {inner: _shape(one, config) for inner, one in row.items() if one.of(config)}
        for name, row in PARAMETERS.items()
        if not isinstance(row, Parameter) or row.of(config)
    }


def first_value(config: DecoderConfig, name: str, key: Array) -> Params:
    """A random parameter, or the tree of the layers' stacked ones, in float32."""
    row, shape = PARAMETERS[name], param_shapes(config)[name]
    if isinstance(row, Parameter):
        return row.start(key, shape)
    keys = jax.random.split(key, len(shape))
    return {
        inner: row[inner].start(key, shape[inner]) for key, inner in zip(keys, shape, strict=True)
    }


def mesh_axes(name: str) -> tuple[str | None, ...] | None:
    """The mesh axis of each dimension of a parameter or of a low-rank factor of one.

    A factor [L, in, r] or [L, r, out] is split as its kernel is. None for a name that is in no
    table.
    """
    kernel, _, factor = name.partition("_lora_")
    tables = (LAYERS, PARAMETERS, HEADS, VIRTUAL)
    row = next((table[kernel] for table in tables if kernel in table), None)
    if not isinstance(row, Parameter):
        return None
    if not factor:
        return row.axes
    _, of_in, of_out = row.axes
    return (None, of_in, None) if factor == "a" else (None, None, of_out)


def _shape(row: Parameter, config: DecoderConfig) -> tuple[int, ...]:
    sizes = {
        "L": config.layers,
        "V": config.vocab,
        "D": config.width,
        "F": config.mlp_width,
        "Q": config.heads * config.head_width,
        "KV": config.kv_heads * config.head_width,
        "H": config.head_width,
    }
    return tuple(sizes[letter] for letter in row.dims.split())
