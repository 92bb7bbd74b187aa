import numpy as np
import pytest
from tiny_families import TINY

from pujax.errors import WeightsError
from pujax.models import families


def test_rope_factors_are_those_that_llama_cpp_converts(tmp_path):
    scaling = families.from_hf(TINY["llama"]).rope_scaling
    assert scaling is not None
    factors = families.rope_factors(scaling, 500.0, 16)
    # Wavelengths 2 pi 500^(i/8): below 32/4 they stay, above 32/1 they slow by 4.
    assert factors[0] == 1.0
    assert factors[-1] == 4.0
    wavelength = 2 * np.pi * 500 ** (1 / 8)
    smooth = (32 / wavelength - 1) / 3
    assert factors[1] == pytest.approx(1 / ((1 - smooth) / 4 + smooth))


@pytest.mark.parametrize(
    ("name", "trait"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"hidden_act": "relu"}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("gemma3", {"final_logit_softcapping": 30.0}),
        ("gemma3", {"layer_types": ["full_attention", *["sliding_attention"] * 3]}),
    ],
)
def test_a_trait_that_the_decoder_lacks_is_refused(name, trait):
    with pytest.raises(WeightsError, match=r"not supported|breaks the rule"):
        families.from_hf(TINY[name] | trait)
