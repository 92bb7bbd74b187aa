from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pujax.method.sampling import greedy
from pujax.models.decoder import LanguageModel
from pujax.models.logps import response_logps
from pujax.models.lora import with_adapter
from pujax.models.sharding import make_mesh, tree_shardings
from pujax.models.soft_prompt import init_soft_prompt, led, with_rows
from pujax.types import right_padded

TEXT = (7, 11, 13)  # what the virtual tokens are copies of
PROMPTS = [(20, 21, 22), (30, 31)]


def test_virtual_tokens_stand_before_a_prompt_but_behind_its_bos(model):
    assert led((20, 21), 2, model.config) == (96, 97, 20, 21)
    with_bos = replace(model.config, bos_id=1)
    assert led((1, 20), 2, with_bos) == (1, 96, 97, 20)
    assert led((20, 1), 1, with_bos) == (96, 20, 1)
    assert led((), 1, with_bos) == (96,)


def test_copies_of_a_texts_tokens_say_what_the_text_says(model, params):
    """In reading given responses as in sampling, and where a family scales its embeddings."""
    scaled = LanguageModel(replace(model.config, embed_scale=3.0))
    tokens = jnp.array(np.random.default_rng(0).integers(6, 96, (2, 2, 4)), jnp.int32)
    mask = jnp.ones(tokens.shape, bool)
    soft = with_adapter(params, init_soft_prompt(params, TEXT))
    written = right_padded([(*TEXT, *prompt) for prompt in PROMPTS], 8)
    virtual = right_padded([led(prompt, 3, model.config) for prompt in PROMPTS], 8)
    assert virtual.ids.tolist() != written.ids.tolist()
    read = jax.jit(response_logps, static_argnums=0)
    for one in (model, scaled):
        ours = read(one, soft, virtual, tokens, mask)
        np.testing.assert_array_equal(ours, read(one, params, written, tokens, mask))

    @jax.jit
    def answered(params, prompts):
        return greedy(model, params, model.prefill(params, prompts), size=5)

    made, same = answered(soft, virtual), answered(params, written)
    np.testing.assert_array_equal(made.tokens, same.tokens)


def test_a_gradient_reaches_each_virtual_token(model, params):
    virtual = right_padded([led(prompt, 3, model.config) for prompt in PROMPTS], 8)
    tokens = jnp.full((2, 1, 3), 9, jnp.int32)

    def loss(soft):
        whole = with_adapter(params, soft)
        return response_logps(model, whole, virtual, tokens, jnp.ones(tokens.shape, bool)).sum()

    gradient = jax.jit(jax.grad(loss))(init_soft_prompt(params, TEXT))["soft_prompt"]
    assert gradient.shape == (3, model.config.width)
    assert (jnp.abs(gradient).max(axis=1) > 1e-6).all()


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_it_lies_whole_on_every_device(params, sizes):
    placed = tree_shardings(make_mesh(*sizes), init_soft_prompt(params, TEXT))
    assert placed["soft_prompt"].is_fully_replicated


@pytest.mark.parametrize("ids", [(96, 97), (100, 99)], ids=["behind", "with a gap"])
def test_virtual_tokens_as_rows_say_the_same_and_are_never_the_likeliest(model, params, ids):
    """The other logits are what they were, and a virtual token's is the mean of those."""
    config = model.config
    vectors = 50 * np.random.default_rng(0).normal(size=(2, config.width)).astype(np.float32)
    soft = with_adapter(params, {"soft_prompt": jnp.asarray(vectors)})
    grown, tables = with_rows(config, params, vectors, ids)
    assert (grown.vocab, grown.tied) == (max(ids) + 1, False)
    rows = LanguageModel(grown)
    prefill = jax.jit(LanguageModel.prefill, static_argnums=0)
    virtual = prefill(model, soft, right_padded([led(PROMPTS[0], 2, config)], 8))
    written = prefill(rows, tables, right_padded([(*ids, *PROMPTS[0])], 8))
    np.testing.assert_array_equal(virtual.last, written.last)
    logits, plain = rows.unembed(tables, written.last)[0], model.unembed(params, virtual.last)[0]
    np.testing.assert_array_equal(logits[:96], plain)
    np.testing.assert_allclose(logits[96:], jnp.full(grown.vocab - 96, plain.mean()), atol=1e-5)
