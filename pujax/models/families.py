"""Model families as settings of the one decoder, and the names of their tensors in files.

A family is one settings function (a Hugging Face config to a `DecoderConfig`) and one name map
(our parameter to its Hugging Face and its GGUF name). GGUF metadata is first put into the words of
a Hugging Face config, so that both kinds of file go through the same settings function.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pujax.errors import WeightsError
from pujax.models.checks import POSITIVE, check, check_settings, refuse_others
from pujax.models.parameters import DecoderConfig, RopeScaling

Settings = Mapping[str, Any]  # a config.json, every key of its family present


@dataclass(frozen=True)
class Name:
    """One parameter's name in files; `{}` stands for the layer. Kernels lie there as [out, in]."""

    hf: str
    gguf: str


@dataclass(frozen=True)
class Family:
    """What tells one family from another, outside of the decoder.

    `architecture` is its name in a config.json, `gguf` that in a GGUF file, which families that
    compute the same may share: the first of them reads those. `norm_offset` is what its Hugging
    Face norm weights lack: our tree (and GGUF) holds 1 + w where it is 1. `permuted` says that its
    GGUF files hold the rows of q and k in interleaved order. `fixed` are settings of a config.json
    for which the decoder has one value alone: it is written, and another is refused. `own` is what
    its files say beyond all that.
    """

    settings: Callable[[Settings], DecoderConfig]
    names: Mapping[str, Name]
    architecture: str
    gguf: str
    norm_offset: float = 0.0
    permuted: bool = False
    fixed: Settings = field(default_factory=dict)
    own: "Own | None" = None


@dataclass(frozen=True)
class Own:
    """A family's own settings in files, both ways.

    `to_hf` makes them entries of a config.json, `to_gguf` GGUF keys without their architecture's
    name, and `from_gguf` entries of a config.json out of those keys.
    """

    to_hf: Callable[[DecoderConfig], Settings]
    to_gguf: Callable[[DecoderConfig], Settings]
    from_gguf: Callable[["GgufKeys"], Settings]


def llama(config: Settings) -> DecoderConfig:
    """Llama 2, Llama 3.x (with its rope scaling) and SmolLM2."""
    return _decoder(config, "llama")


def qwen2(config: Settings) -> DecoderConfig:
    """Qwen 2.5: biases on the queries, keys and values."""
    return _decoder(config, "qwen2", qkv_bias=True)


def qwen3(config: Settings) -> DecoderConfig:
    """Qwen 3 (dense): normed queries and keys, a head width of its own."""
    return _decoder(config, "qwen3", qk_norm=True)


def gemma3(config: Settings) -> DecoderConfig:
    """Gemma 3, text alone: local and global layers, four norms a layer, scaled embeddings."""
    pattern = _pattern(config["layer_types"])
    return _decoder(
        config,
        "gemma3_text",
        qk_norm=True,
        post_norms=True,
        gelu=True,
        embed_scale=config["hidden_size"] ** 0.5,
        query_scale=config["query_pre_attn_scalar"] ** -0.5,
        window=config["sliding_window"],
        pattern=pattern,
        rope_local_base=_rope(config, "sliding_attention")["rope_theta"],
    )


def _gemma3_to_hf(config: DecoderConfig) -> Settings:
    assert config.query_scale is not None
    kinds = ("full_attention", "sliding_attention")
    own = {
        "query_pre_attn_scalar": round(config.query_scale**-2),
        "sliding_window": config.window,
        "layer_types": [kinds[local] for local in config.local_layers],
        "rope_local_base_freq": config.rope_local_base,
    }
    return own | ({"sliding_window_pattern": config.pattern} if config.pattern else {})


def _gemma3_to_gguf(config: DecoderConfig) -> Settings:
    return {
        "attention.sliding_window": config.window,
        "attention.sliding_window_pattern": config.pattern,
        "rope.freq_base_swa": config.rope_local_base,
    }


def _gemma3_from_gguf(keys: "GgufKeys") -> Settings:
    head_width = keys.number("attention.key_length", keys.width // keys.heads)
    return {
        # llama.cpp fixes what the file leaves out; 62 layers are the 27B model.
        "query_pre_attn_scalar": keys.width // keys.heads if keys.layers == 62 else head_width,
        "sliding_window": keys.number("attention.sliding_window"),
        "sliding_window_pattern": keys.number("attention.sliding_window_pattern", 6),
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10_000.0),
    }


_PLAIN = {
    "embed": Name("model.embed_tokens.weight", "token_embd.weight"),
    "unembed": Name("lm_head.weight", "output.weight"),
    "final_norm": Name("model.norm.weight", "output_norm.weight"),
    "layers/attn_norm": Name("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    "layers/q": Name("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    "layers/k": Name("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    "layers/v": Name("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    "layers/o": Name("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    "layers/mlp_norm": Name(
        "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"
    ),
    "layers/gate": Name("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    "layers/up": Name("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    "layers/down": Name("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
}

_BIASES = {
    "layers/q_bias": Name("model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
    "layers/k_bias": Name("model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
    "layers/v_bias": Name("model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
}

_QK_NORMS = {
    "layers/q_norm": Name("model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
    "layers/k_norm": Name("model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
}

_FOUR_NORMS = {
    "layers/post_attn_norm": Name(
        "model.layers.{}.post_attention_layernorm.weight", "blk.{}.post_attention_norm.weight"
    ),
    "layers/mlp_norm": Name(
        "model.layers.{}.pre_feedforward_layernorm.weight", "blk.{}.ffn_norm.weight"
    ),
    "layers/post_mlp_norm": Name(
        "model.layers.{}.post_feedforward_layernorm.weight", "blk.{}.post_ffw_norm.weight"
    ),
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        llama,
        _PLAIN,
        "LlamaForCausalLM",
        "llama",
        permuted=True,
        fixed={"attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": Family(
        qwen2,
        _PLAIN | _BIASES,
        "Qwen2ForCausalLM",
        "qwen2",
        fixed={"use_sliding_window": False},
    ),
    "qwen3": Family(
        qwen3,
        _PLAIN | _QK_NORMS,
        "Qwen3ForCausalLM",
        "qwen3",
        fixed={"use_sliding_window": False, "attention_bias": False},
    ),
    "gemma3_text": Family(
        gemma3,
        _PLAIN | _QK_NORMS | _FOUR_NORMS,
        "Gemma3ForCausalLM",
        "gemma3",
        norm_offset=1.0,
        fixed={
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        own=Own(_gemma3_to_hf, _gemma3_to_gguf, _gemma3_from_gguf),
    ),
}


def from_hf(config: Settings) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises `WeightsError` for an unknown architecture, a value that is missing or of another kind,
    or a trait that the decoder lacks.
    """
    from transformers import AutoConfig

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise WeightsError(
            f"model_type {kind!r} is not a known architecture: choose one of {sorted(FAMILIES)}"
        )
    check_settings(config)
    try:
        # transformers knows each family's defaults and both generations of rope keys.
        whole = AutoConfig.for_model(**config).to_dict()
        refuse_others(whole, FAMILIES[kind].fixed)
        decoder = FAMILIES[kind].settings(whole)
    except WeightsError:
        raise
    except Exception as error:  # what transformers raises for a value it can't use is its own
        told = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"not the settings of a {kind} model ({told})") from error
    if decoder.heads % decoder.kv_heads or decoder.head_width % 2:
        raise WeightsError(
            f"{decoder.heads} heads of width {decoder.head_width} with {decoder.kv_heads} of keys "
            "and values: the heads must be a multiple of those, and their width even"
        )
    return decoder


@dataclass(frozen=True)
class GgufKeys:
    """A GGUF file's metadata under its architecture's name; the keys are without it."""

    metadata: Settings
    architecture: str

    def number(self, key: str, default: float | None = None) -> Any:
        """The number under `key`, or `default`. Raises `WeightsError` where there is none."""
        full = f"{self.architecture}.{key}"
        if full not in self.metadata and default is None:
            raise WeightsError(f"GGUF key {full} is missing: fetch the file again")
        value = self.metadata.get(full, default)
        if type(value) not in (int, float) or not 0 < value < 2**31:
            raise WeightsError(f"GGUF key {full}={value!r} must be a positive number")
        return value

    @property
    def width(self) -> int:
        """D."""
        return self.number("embedding_length")

    @property
    def heads(self) -> int:
        """The number of queries' heads."""
        return self.number("attention.head_count")

    @property
    def layers(self) -> int:
        """L."""
        return self.number("block_count")


def from_gguf(
    metadata: Settings,
    *,
    vocab: int,
    eos_ids: tuple[int, ...],
    bos_id: int | None,
    tied: bool,
    rope_factors: np.ndarray | None,
) -> DecoderConfig:
    """The decoder that GGUF metadata describes.

    `rope_factors` is the file's `rope_freqs.weight`, Llama 3's frequency divisors. Raises
    `WeightsError` for an unknown architecture, a missing key or a trait that the decoder lacks.
    """
    architecture = metadata.get("general.architecture")
    kinds = [kind for kind, family in FAMILIES.items() if family.gguf == architecture]
    if not kinds:
        known = sorted(family.gguf for family in FAMILIES.values())
        raise WeightsError(
            f"general.architecture {architecture!r} is not a known architecture: "
            f"choose one of {known}"
        )
    keys = GgufKeys(metadata, str(architecture))
    _refuse_gguf_scaling(keys)
    head_width = keys.number("attention.key_length", keys.width // keys.heads)
    base = keys.number("rope.freq_base", 10_000.0)
    config: dict[str, Any] = {
        "model_type": kinds[0],
        "vocab_size": vocab,
        "hidden_size": keys.width,
        "num_hidden_layers": keys.layers,
        "num_attention_heads": keys.heads,
        "num_key_value_heads": keys.number("attention.head_count_kv", keys.heads),
        "head_dim": head_width,
        "intermediate_size": keys.number("feed_forward_length"),
        # Stored as float32: the shortest decimal that rounds to it is what was meant.
        "rms_norm_eps": float(str(np.float32(keys.number("attention.layer_norm_rms_epsilon")))),
        "rope_theta": base,
        "max_position_embeddings": keys.number("context_length"),
        "tie_word_embeddings": tied,
        "eos_token_id": list(eos_ids),
        "bos_token_id": bos_id,
    }
    if rope_factors is not None:
        config["rope_scaling"] = _llama3_scaling(rope_factors, base, head_width)
    family = FAMILIES[kinds[0]]
    own = family.own.from_gguf(keys) if family.own else {}
    return from_hf({**config, **family.fixed, **own})


def _refuse_gguf_scaling(keys: GgufKeys) -> None:
    """Raise for a rope scaling. Without a type, llama.cpp takes a factor as a linear one."""
    name = f"{keys.architecture}.rope.scaling.type"
    kind = keys.metadata.get(name)
    if kind not in (None, "none", ""):
        raise WeightsError(f"{name} {kind!r} is not supported")
    if kind is None:
        for key in ("rope.scaling.factor", "rope.scale_linear"):
            factor = keys.metadata.get(f"{keys.architecture}.{key}", 1.0)
            if factor not in (0, 1):
                raise WeightsError(f"{keys.architecture}.{key}={factor!r} is not supported")


def to_gguf(config: DecoderConfig) -> dict[str, Any]:
    """The GGUF metadata that `from_gguf` makes `config` of, and llama.cpp reads."""
    family = FAMILIES[config.family]
    keys: dict[str, Any] = {
        "vocab_size": config.vocab,
        "block_count": config.layers,
        "context_length": config.max_positions,
        "embedding_length": config.width,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        "rope.dimension_count": config.head_width,
        "rope.freq_base": float(config.rope_base),
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
    }
    keys |= family.own.to_gguf(config) if family.own else {}
    return {f"{family.gguf}.{key}": value for key, value in keys.items()}


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """A config.json for `config`, with the keys that transformers 4 and 5 and vLLM read."""
    family = FAMILIES[config.family]
    settings: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "hidden_activation" if config.gelu else "hidden_act": (
            "gelu_pytorch_tanh" if config.gelu else "silu"
        ),
    }
    if config.rope_scaling is not None:
        settings["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_positions,
        }
    own = family.own.to_hf(config) if family.own else {}
    return {**settings, **family.fixed, **own}


def rope_factors(scaling: RopeScaling, base: float, head_width: int) -> np.ndarray:
    """Llama 3's frequency divisors [H/2] as GGUF stores them: what `scaling` comes to."""
    half = head_width // 2
    wavelength = 2 * np.pi * base ** (np.arange(half) / half)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((scaling.original_positions / wavelength - low) / (high - low), 0.0, 1.0)
    return (1.0 / (blend + (1.0 - blend) / scaling.factor)).astype(np.float32)


def _decoder(config: Settings, family: str, **traits: Any) -> DecoderConfig:
    """What every family shares."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    activation = config.get("hidden_act") or config.get("hidden_activation")
    expected = "gelu_pytorch_tanh" if traits.get("gelu") else "silu"
    if activation != expected:
        raise WeightsError(f"activation {activation!r} is not supported for {family}: {expected!r}")
    rope = _rope(config, "full_attention")
    eos = config["eos_token_id"]
    return DecoderConfig(
        family=family,
        vocab=config["vocab_size"],
        width=width,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config["num_key_value_heads"] or heads,
        head_width=config.get("head_dim") or width // heads,
        mlp_width=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
        rope_base=float(rope["rope_theta"]),
        rope_scaling=_scaling(rope),
        tied=config["tie_word_embeddings"],
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        bos_id=config["bos_token_id"],
        max_positions=config["max_position_embeddings"],
        **traits,
    )


def _rope(config: Settings, layer_type: str) -> Settings:
    """The rope settings of one kind of layer: families with one kind have no inner mapping."""
    parameters = config["rope_parameters"]
    return parameters.get(layer_type, parameters)


def _scaling(rope: Settings) -> RopeScaling | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise WeightsError(f"rope_type {kind!r} is not supported: choose default or llama3")
    for key in (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ):
        check(f"rope_scaling.{key}", rope.get(key), POSITIVE)
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_positions=rope["original_max_position_embeddings"],
    )


def _llama3_scaling(factors: np.ndarray, base: float, head_width: int) -> dict[str, Any]:
    """The rope scaling whose divisors are `factors`: Llama 3.x fixes all of it but the factor."""
    rope = {
        "rope_type": "llama3",
        "factor": float(np.max(factors)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaling = _scaling(rope)
    assert scaling is not None
    own = rope_factors(scaling, base, head_width)
    if own.shape != factors.shape or not np.allclose(own, factors, rtol=1e-3):
        raise WeightsError("rope_freqs.weight is not Llama 3's rope scaling, which alone is known")
    return rope


def _pattern(layer_types: list[str]) -> int:
    """n where every n-th layer is global; 0 where all are local."""
    if "full_attention" not in layer_types:
        return 0
    pattern = layer_types.index("full_attention") + 1
    for i, kind in enumerate(layer_types):
        if (kind == "full_attention") != ((i + 1) % pattern == 0):
            raise WeightsError(
                f"layer_types[{i}]={kind!r} breaks the rule: every {pattern}th global"
            )
    return pattern
