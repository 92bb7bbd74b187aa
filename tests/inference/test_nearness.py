"""An export's greedy answers are counted against those that its run kept."""

import json
from dataclasses import replace

import pytest

from pujax.errors import DataError
from pujax.evaluation.results import Evaluation, Row, save
from pujax.export import ExportConfig
from pujax.inference import nearness as module
from pujax.inference.nearness import nearness


@pytest.fixture
def run(tmp_path):
    """A finished run that kept three answers; nothing of its model is read."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    settings = {"data": {"heldout": "h", "anchors": "a"}, "eval": {"prompts": 3, "samples": 4}}
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
