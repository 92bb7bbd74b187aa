"""Model families as settings of the one decoder, and the names of their tensors in files.

A family is one settings function (a Hugging Face config to a `DecoderConfig`) and one name map
(our parameter to its Hugging Face and its GGUF name). GGUF metadata is first put into the words of
a Hugging Face config, so that both kinds of file go through the same settings function.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pujax.errors import WeightsError
from pujax.models.decoder import DecoderConfig, RopeScaling

Settings = Mapping[str, Any]  # a config.json, every key of its family present


@dataclass(frozen=True)
class Name:
    """One parameter's name in files; `{}` stands for the layer. Kernels lie there as [out, in]."""

    hf: str
    gguf: str


@dataclass(frozen=True)
class Family:
    """What tells one family from another, outside of the decoder.

    `norm_offset` is what its Hugging Face norm weights lack: our tree (and GGUF) holds 1 + w where
    it is 1. `permuted` says that its GGUF files hold the rows of q and k in interleaved order.
    """

    settings: Callable[[Settings], DecoderConfig]
    names: Mapping[str, Name]
    architecture: str
    gguf: str
    norm_offset: float = 0.0
    permuted: bool = False


def llama(config: Settings) -> DecoderConfig:
    """Llama 2, Llama 3.x (with its rope scaling) and SmolLM2."""
    _refuse(config, attention_bias=False, mlp_bias=False)
    return _decoder(config, "llama")


def qwen2(config: Settings) -> DecoderConfig:
    """Qwen 2.5: biases on the queries, keys and values."""
    _refuse(config, use_sliding_window=False)
    return _decoder(config, "qwen2", qkv_bias=True)


def qwen3(config: Settings) -> DecoderConfig:
    """Qwen 3 (dense): normed queries and keys, a head width of its own."""
    _refuse(config, use_sliding_window=False, attention_bias=False)
    return _decoder(config, "qwen3", qk_norm=True)


def gemma3(config: Settings) -> DecoderConfig:
    """Gemma 3, text alone: local and global layers, four norms a layer, scaled embeddings."""
    _refuse(
        config,
        attention_bias=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        use_bidirectional_attention=False,
    )
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


_PATTERN = "sliding_window_pattern"

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
    "llama": Family(llama, _PLAIN, "LlamaForCausalLM", "llama", permuted=True),
    "qwen2": Family(qwen2, _PLAIN | _BIASES, "Qwen2ForCausalLM", "qwen2"),
    "qwen3": Family(qwen3, _PLAIN | _QK_NORMS, "Qwen3ForCausalLM", "qwen3"),
    "gemma3_text": Family(
        gemma3, _PLAIN | _QK_NORMS | _FOUR_NORMS, "Gemma3ForCausalLM", "gemma3", norm_offset=1.0
    ),
}


def from_hf(config: Settings) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises `WeightsError` for an unknown architecture or a trait that the decoder lacks.
    """
    from transformers import AutoConfig

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise WeightsError(
            f"model_type {kind!r} is not a known architecture: choose one of {sorted(FAMILIES)}"
        )
    # transformers knows each family's defaults and both generations of rope keys.
    whole = AutoConfig.for_model(**config).to_dict()
    return FAMILIES[kind].settings(whole)


def from_gguf(
    metadata: Settings, *, tied: bool, rope_factors: np.ndarray | None, eos_ids: tuple[int, ...]
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

    def get(key: str) -> Any:
        if f"{architecture}.{key}" not in metadata:
            raise WeightsError(f"GGUF key {architecture}.{key!s} is missing: fetch the file again")
        return metadata[f"{architecture}.{key}"]

    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in ("none", ""):
        raise WeightsError(f"{architecture}.rope.scaling.type {scaling!r} is not supported")
    heads, width, layers = get("attention.head_count"), get("embedding_length"), get("block_count")
    head_width = metadata.get(f"{architecture}.attention.key_length", width // heads)
    base = metadata.get(f"{architecture}.rope.freq_base", 10_000.0)
    config: dict[str, Any] = {
        "model_type": kinds[0],
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": head_width,
        "intermediate_size": get("feed_forward_length"),
        # Stored as float32: the shortest decimal that rounds to it is what was meant.
        "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
        "rope_theta": base,
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": tied,
        "eos_token_id": list(eos_ids),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
    }
    if rope_factors is not None:
        config["rope_scaling"] = _llama3_scaling(rope_factors, base, head_width)
    if architecture == "gemma3":
        # llama.cpp fixes what the file leaves out; 62 layers are the 27B model.
        config |= {
            "query_pre_attn_scalar": width // heads if layers == 62 else head_width,
            "sliding_window": get("attention.sliding_window"),
            "sliding_window_pattern": metadata.get(f"{architecture}.attention.{_PATTERN}", 6),
            "rope_local_base_freq": metadata.get(f"{architecture}.rope.freq_base_swa", 10_000.0),
        }
    return from_hf(config)


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
    if config.window:
        assert config.query_scale is not None
        settings |= {
            "query_pre_attn_scalar": round(config.query_scale**-2),
            "sliding_window": config.window,
            "layer_types": [
                "sliding_attention" if local else "full_attention" for local in config.local_layers
            ],
            "rope_local_base_freq": config.rope_local_base,
        }
        if config.pattern:
            settings["sliding_window_pattern"] = config.pattern
    return settings


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
    if not np.allclose(rope_factors(scaling, base, head_width), factors, rtol=1e-3):
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


def _refuse(config: Settings, **allowed: Any) -> None:
    """Raise for a trait that the decoder lacks, rather than compute something else."""
    for key, value in allowed.items():
        if config.get(key) != value:
            raise WeightsError(f"{key}={config[key]!r} is not supported: only {value!r} is")
