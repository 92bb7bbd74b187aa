"""What the values of a config.json must be for the decoder to have them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pujax.errors import WeightsError


@dataclass(frozen=True)
class Kind:
    """What a setting must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def or_null(kind: Kind) -> Kind:
    """A value of that kind, or null."""
    return Kind(f"{kind.words} or null", lambda x: x is None or kind.holds(x))


_LAYERS = 10_000  # more than any model has: lists of that many entries are made

WHOLE = Kind("a positive whole number", lambda x: type(x) is int and 0 < x < 2**31)
POSITIVE = Kind("a positive number", lambda x: type(x) in (int, float) and 0 < x < 2**63)
TRUTH = Kind("true or false", lambda x: type(x) is bool)
MAPPING = Kind("an object", lambda x: isinstance(x, dict))

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

_KINDS = dict.fromkeys(_SIZES, WHOLE) | {
    "num_key_value_heads": or_null(WHOLE),
    "head_dim": or_null(WHOLE),
    "max_position_embeddings": WHOLE,
    "rms_norm_eps": POSITIVE,
    "rope_theta": POSITIVE,
    "rope_local_base_freq": POSITIVE,
    "query_pre_attn_scalar": POSITIVE,
    "sliding_window": or_null(WHOLE),
    "sliding_window_pattern": WHOLE,
    "tie_word_embeddings": TRUTH,
    "rope_scaling": or_null(MAPPING),
    "rope_parameters": or_null(MAPPING),
}


def check_settings(config: Mapping[str, Any]) -> None:
    """Raise `WeightsError` naming a key whose value is missing or of another kind."""
    for key in _SIZES:
        if key not in config:
            raise WeightsError(f"{key} is missing: fetch the file again")
    for key, kind in _KINDS.items():
        if key in config:
            check(key, config[key], kind)
    layers, vocab = config["num_hidden_layers"], config["vocab_size"]
    check("num_hidden_layers", layers, Kind(f"at most {_LAYERS}", lambda x: x <= _LAYERS))
    token = Kind(f"a token's id from 0 to {vocab - 1}", lambda x: type(x) is int and 0 <= x < vocab)
    eos, bos, types = (config.get(key) for key in ("eos_token_id", "bos_token_id", "layer_types"))
    for i in eos if isinstance(eos, list) else [eos]:
        check("eos_token_id", i, or_null(token))
    check("bos_token_id", bos, or_null(token))
    known = ("full_attention", "sliding_attention")
    listed = Kind(
        f"a list that says {' or '.join(known)} for each of the {layers} layers",
        lambda x: isinstance(x, list) and len(x) == layers and all(kind in known for kind in x),
    )
    check("layer_types", types, or_null(listed))


def check(key: str, value: object, kind: Kind) -> None:
    """Raise `WeightsError` unless the value of `key` is of that kind."""
    if not kind.holds(value):
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        raise WeightsError(f"{key}={shown} must be {kind.words}")


def refuse_others(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raise `WeightsError` for a trait that the decoder lacks: it would compute something else."""
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise WeightsError(f"{key}={config[key]!r} is not supported: only {value!r} is")
