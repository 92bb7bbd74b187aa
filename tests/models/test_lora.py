from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import tiny

from pujax.errors import ConfigError
from pujax.models import lora
from pujax.models.decoder import LanguageModel

TOKENS = np.arange(4, 16)[None]


def _logits(config, params):
    return jax.jit(LanguageModel(config).forward)(params, TOKENS)


def _trained(adapter):
    """An adapter whose B has moved from zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape), adapter)


def test_a_fresh_adapter_leaves_the_logits_as_they_are_bit_for_bit():
    config, base = tiny("qwen2")
    adapter = lora.init_adapter(jax.random.key(0), base, rank=4)
    with_adapter = lora.with_adapter(base, adapter)
    np.testing.assert_array_equal(_logits(config, with_adapter), _logits(config, base))


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_merged_is_unmerged(name):
    config, base = tiny(name)
    config = replace(config, lora_scale=2.0)
    adapter = _trained(lora.init_adapter(jax.random.key(0), base, rank=4))
    unmerged = _logits(config, lora.with_adapter(base, adapter))
    assert np.abs(unmerged - _logits(config, base)).max() > 0.1
    merged = _logits(config, lora.merge(base, adapter, config.lora_scale))
    assert np.abs(merged - unmerged).max() < 1e-5 * np.abs(unmerged).max()


def test_a_merged_kernel_is_the_base_and_scale_a_b():
    base = {"layers": {"q": jnp.ones((1, 2, 2))}}
    adapter = {
        "layers": {"q_lora_a": jnp.array([[[1.0], [2.0]]]), "q_lora_b": jnp.array([[[3.0, 4.0]]])}
    }
    merged = lora.merge(base, adapter, 0.5)
    np.testing.assert_allclose(merged["layers"]["q"][0], [[2.5, 3.0], [4.0, 5.0]])


def test_a_merged_kernel_keeps_the_bases_dtype():
    _, base = tiny("qwen2")
    adapter = lora.init_adapter(jax.random.key(0), base, rank=4)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), base)
    assert lora.merge(half, adapter, 1.0)["layers"]["q"].dtype == jnp.bfloat16


def test_targets_choose_kernels_by_their_whole_name():
    _, base = tiny("qwen2")
    adapter = lora.init_adapter(jax.random.key(0), base, rank=3, targets="q|up")
    shapes = {name: leaf.shape for name, leaf in adapter["layers"].items()}
    assert shapes == {
        "q_lora_a": (4, 32, 3),
        "q_lora_b": (4, 3, 32),
        "up_lora_a": (4, 32, 3),
        "up_lora_b": (4, 3, 48),
    }


@pytest.mark.parametrize("targets", ["q_proj", "g"])
def test_targets_that_match_nothing_are_an_error(targets):
    _, base = tiny("qwen2")
    with pytest.raises(
        ConfigError, match=rf"model\.lora\.targets='{targets}' matches none of .*gate"
    ):
        lora.init_adapter(jax.random.key(0), base, rank=2, targets=targets)


def test_splitting_undoes_adding():
    _, base = tiny("qwen2")
    adapter = lora.init_adapter(jax.random.key(0), base, rank=2)
    again_base, again_adapter = lora.split(lora.with_adapter(base, adapter))
    assert again_base == base
    assert again_adapter == adapter


def test_an_adapter_that_changes_nothing_is_left_out():
    _, base = tiny("qwen2")
    whole = lora.with_adapter(base, lora.init_adapter(jax.random.key(0), base, rank=2))
    assert lora.without_idle(whole) == base
    assert lora.without_idle(base) == base
    whole["layers"]["down_lora_b"] = whole["layers"]["down_lora_b"].at[-1, -1, -1].set(1e-30)
    assert lora.without_idle(whole) is whole
