"""An export's greedy answers are counted against those that its run kept."""

import json
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest

from pujax.errors import DataError
from pujax.evaluation.results import Evaluation, Row, save
from pujax.export import ExportConfig
from pujax.inference import nearness as module
from pujax.inference.nearness import nearness
from pujax.records import Prompt


@pytest.fixture
def run(tmp_path):
    """A finished run that kept three answers; nothing of its model is read."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    settings = {
        "data": {"heldout": "h", "anchors": "a", "system": "Be brief."},
        "eval": {"prompts": 3, "samples": 4},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    rows = [Row(i, None, "?", None, "!", f"answer {i}", {}) for i in ("a", "b", "c")]
    save(Evaluation("aligned", tuple(rows)), tmp_path)
    return tmp_path


def answered(monkeypatch, change):
    """Lets the export answer as the run did but for `change`; what it was asked comes back."""
    asked = []

    def evaluate(subject, config, metrics, name):
        asked.append((subject, config.eval.prompts, config.eval.samples, dict(metrics)))
        rows = [Row(i, None, "?", None, "!", f"answer {i}", {}) for i in ("a", "b", "c")]
        rows = rows[: config.eval.prompts]
        return Evaluation(name, tuple(replace(r, **change.get(r.id, {})) for r in rows))

    monkeypatch.setattr(module, "subject_of", lambda config, path: path)
    monkeypatch.setattr(module, "evaluate_subject", evaluate)
    return asked


def test_equal_answers_are_counted_among_the_first_prompts(run, tmp_path, monkeypatch):
    asked = answered(monkeypatch, {"b": {"response": "another"}})
    said = "2 of 3 greedy answers to held-out prompts are the run's own"
    assert nearness(run, tmp_path / "out", 32) == said
    assert nearness(run, tmp_path / "out", 1).startswith("1 of 1 greedy answers")
    assert asked == [(str(tmp_path / "out"), count, 0, {}) for count in (3, 1)]


def test_fewer_than_half_of_a_gguf_file_name_a_remedy(run, tmp_path, monkeypatch):
    answered(monkeypatch, {"a": {"response": "another"}, "b": {"response": "one more"}})
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    said = nearness(run, tmp_path / "out.gguf", 32)
    assert said.startswith("1 of 3 greedy answers")
    assert "try kind=Q8_0 or F16" in said
    assert "try kind=" not in nearness(run, tmp_path / "out", 32)


@pytest.fixture
def llama(monkeypatch):
    """Stands in for llama.cpp's server and its held-out prompts; what it was asked comes back."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            question = body["messages"][-1]["content"]
            content = json.dumps({"choices": [{"message": {"content": f"answer {question}"}}]})
            self.send_response(500 if question == "broken" else 200)
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()

    @contextmanager
    def served_at(path, *, context):
        asked.append((path, context))
        yield f"http://127.0.0.1:{server.server_port}/v1"

    def heldout(config, chat):
        asked.append((chat, config.data.on_too_long))
        asks = {"a": "a", "b": "another", "c": "broken"}
        examples = [
            SimpleNamespace(prompt=Prompt(i, ({"role": "user", "content": q},)))
            for i, q in asks.items()
        ]
        return SimpleNamespace(examples=examples, prompt_size=16, response_size=5)

    monkeypatch.setattr(module, "served_at", served_at)
    monkeypatch.setattr(module, "load_heldout", heldout)
    monkeypatch.setattr(module.Chat, "load", lambda path: path)
    yield asked
    server.shutdown()
    server.server_close()


def test_a_gguf_file_answers_by_llama_cpp_where_that_is_installed(
    run, tmp_path, monkeypatch, llama
):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    out = tmp_path / "model.gguf"
    told = "1 of 2 greedy answers to held-out prompts are the run's own, by llama.cpp"
    assert nearness(run, out, 2) == told
    loaded, served, (path, body), _ = llama
    assert loaded == (str(run / "export"), "drop")  # a prompt that was cut would be another there
    assert served == (out, 21)
    assert path == "/v1/chat/completions"
    assert body == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}],
        "max_tokens": 5,
        "temperature": 0,
        "reasoning_format": "none",
    }
    said = nearness(run, out, 3)
    assert said.startswith(f"not compared with the run ({out}: llama.cpp did not answer: ")
    assert "500" in said


def test_a_gguf_file_answers_by_our_decoder_where_llama_cpp_is_not(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    asked = answered(monkeypatch, {})
    told = "3 of 3 greedy answers to held-out prompts are the run's own"
    assert nearness(run, tmp_path / "m.gguf", 3) == told
    assert len(asked) == 1


def test_what_can_not_be_compared_says_why_and_the_export_stays(run, tmp_path, monkeypatch):
    def missing(*_):
        raise DataError("h: no such file")

    monkeypatch.setattr(module, "subject_of", missing)
    assert nearness(run, tmp_path, 2) == "not compared with the run (h: no such file)"
    (run / "eval-aligned.jsonl").unlink()
    assert "has kept no held-out answers" in nearness(run, tmp_path, 2)


def test_fewer_than_no_prompts_are_refused():
    with pytest.raises(ValueError, match="compare=-1"):
        ExportConfig(model="m", out="o", compare=-1)
