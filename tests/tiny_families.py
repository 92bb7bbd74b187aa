"""Every family at toy size, as config.json has it, with the traits that tell them apart on."""

from typing import Any

import numpy as np

from pujax.models import families
from pujax.models.decoder import DecoderConfig, param_shapes

_SHARED = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}

TINY: dict[str, dict[str, Any]] = {
    "llama": _SHARED
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "tie_word_embeddings": False,
    },
    "qwen2": _SHARED
    | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "qwen3": _SHARED
    | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 24,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "gemma3": _SHARED
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 100.0,
        "sliding_window": 5,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 20,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}


def tiny(name: str, **changes: Any) -> tuple[DecoderConfig, Any]:
    """A random model of a family: its settings, and float32 parameters that all matter."""
    config = families.from_hf(TINY[name] | changes)
    rng = np.random.default_rng(0)

    def filled(tree: Any) -> Any:
        return {
            key: filled(shape)
            if isinstance(shape, dict)
            else rng.normal(1.0 if "norm" in key else 0.0, 0.3, shape).astype(np.float32)
            for key, shape in tree.items()
        }

    return config, filled(param_shapes(config))
