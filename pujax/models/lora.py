"""Low-rank adapters (Hu et al., 2021, arXiv 2106.09685): kernel + scale · A · B, A and B trained.

An adapter is a tree of its own, {"layers": {"q_lora_a": [L, in, r], "q_lora_b": [L, r, out], …}}.
Beside the base's kernels the decoder applies it; without it the same base is the reference.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pujax.errors import ConfigError
from pujax.models.parameters import KERNELS
from pujax.models.sharding import fetched
from pujax.types import Params

_A, _B = "_lora_a", "_lora_b"
ALL = "|".join(KERNELS)


def init_adapter(key: Array, params: Params, *, rank: int, targets: str = ALL) -> Params:
    """A float32 adapter that changes nothing yet: A uniform within 1/√in (as PEFT's), B zero.

    Raises `ConfigError` when `targets` matches no kernel of `params`.
    """
    layers = params["layers"]
    names = [name for name in KERNELS if re.fullmatch(targets, name)]
    if not names:
        raise ConfigError(
            f"model.lora.targets={targets!r} matches none of the kernels "
            f"{', '.join(KERNELS)}: it must match whole names, as q|v does"
        )
    adapter = {}
    keys = jax.random.split(key, len(names))
    for its_key, name in zip(keys, names, strict=True):
        L, fan_in, fan_out = layers[name].shape
        limit = fan_in**-0.5
        adapter[name + _A] = jax.random.uniform(
            its_key, (L, fan_in, rank), jnp.float32, -limit, limit
        )
        adapter[name + _B] = jnp.zeros((L, rank, fan_out), jnp.float32)
    return {"layers": adapter}


def with_adapter(base: Params, adapter: Params) -> Params:
    """The base's parameters with the adapter's beside its kernels; nothing is copied.

    An adapter may be, or have, a `soft_prompt` too.
    """
    return base | adapter | {"layers": base["layers"] | adapter.get("layers", {})}


def split(params: Params) -> tuple[Params, Params]:
    """Undo `with_adapter`: the base and the adapter, whose layers are empty if there is none."""
    layers = params["layers"]
    adapter = {name: leaf for name, leaf in layers.items() if name.endswith((_A, _B))}
    rest = {name: leaf for name, leaf in layers.items() if name not in adapter}
    return params | {"layers": rest}, {"layers": adapter}


def without_idle(params: Params) -> Params:
    """The parameters without an adapter that changes nothing, every B of it zero as at first."""
    base, adapter = split(params)
    changes = [leaf for name, leaf in adapter["layers"].items() if name.endswith(_B)]
    return params if any(np.any(leaf) for leaf in fetched(changes)) else base


def merge(base: Params, adapter: Params, scale: float) -> Params:
    """The base with the adapter added into its kernels, in the base's dtypes."""
    layers = dict(base["layers"])
    for name in [key.removesuffix(_A) for key in adapter["layers"] if key.endswith(_A)]:
        a, b = adapter["layers"][name + _A], adapter["layers"][name + _B]
        change = scale * jnp.einsum("lir,lro->lio", a, b, preferred_element_type=jnp.float32)
        layers[name] = (layers[name].astype(jnp.float32) + change).astype(layers[name].dtype)
    return base | {"layers": layers}
