"""What is written when the work is done has its place before the work is begun."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest

import pujax.run.measure
from pujax import benchmark, evaluate
from pujax.config.tool_settings import BenchmarkConfig, HeldoutConfig, WorkConfig
from pujax.errors import DiskError
from pujax.evaluation import page
from pujax.files import weights
from pujax.files.chat import Chat
from pujax.files.durable import refuse_unwritable
from pujax.inference import heldout, suites
from pujax.inference.finished import export
from pujax.teacher.settings import TeacherConfig

WINRATE = {"_target_": "pujax.evaluation.judging.winrate", "_partial_": True}


def begun(*_, **__):
    raise AssertionError("the work was begun")


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The directory of a finished run, of which reading anything that takes time is work."""
    directory = tmp_path / "run"
    (directory / "export").mkdir(parents=True)
    (directory / "export" / "config.json").write_text("{}")
    (directory / "metrics.jsonl").write_text("")
    for file in ("test.jsonl", "b.jsonl"):
        (tmp_path / file).write_text("")
    prompts = {"prompts": "a.jsonl", "anchors": "b.jsonl", "heldout": "test.jsonl"}
    (directory / "config.yaml").write_text(json.dumps({"data": prompts, "eval": {"batch": 1}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Chat, "load", begun)
    monkeypatch.setattr(weights, "load", begun)
    monkeypatch.setattr(page, "steps", begun)
    monkeypatch.setattr(pujax.run.measure, "Benchmark", begun)
    return directory


def on_a_split(run, place):
    data, run = HeldoutConfig(heldout="test.jsonl"), str(run)
    evaluate.run(evaluate.EvaluateConfig(run=run, data=data, out=str(place)))


def with_a_judge(run, place):
    teacher = TeacherConfig(base_url="http://127.0.0.1:1/v1", model="judge")
    asked = {"run": str(run), "suite": WINRATE, "store": str(place / "verdicts.jsonl")}
    evaluate.run(evaluate.EvaluateConfig(**asked, teacher=teacher))


COMMANDS = {
    "evaluate": lambda run, place: heldout.evaluate_other(place, str(run), "mine"),
    "evaluate, a split": on_a_split,
    "evaluate, a suite": lambda run, place: suites.answered(
        WINRATE, place, {"answers": begun, "judge": begun}
    ),
    "evaluate, its judge": with_a_judge,
    "export, hf": lambda run, place: export(out=place, run=run),
    "export, gguf": lambda run, place: export(out=place / "a.gguf", run=run, format="gguf"),
    "report": lambda run, place: page.write(place),
    "benchmark": lambda run, place: benchmark.run(
        BenchmarkConfig(benchmark=WorkConfig(sweep=True, out=str(place)))
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_could_not_keep_what_it_finds_does_not_begin(name, finished, monkeypatch):
    def read_only(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    inside = name in ("evaluate", "report")  # which write into the run itself
    place = finished if inside else finished.parent / "new" / "folder"
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(DiskError, match=r"can't be written \(Read-only file system\): ") as caught:
        COMMANDS[name](finished, place)
    assert str(caught.value).startswith(f"{place} ")
    assert not (finished.parent / "new").exists()


def test_a_place_is_tried_and_nothing_is_left_there(tmp_path):
    refuse_unwritable(tmp_path / "not" / "yet" / "there")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"file/a can't be written \(Not a directory\): move away"):
        refuse_unwritable(tmp_path / "file" / "a")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root passes over permission bits")
def test_a_folder_without_the_right_to_write_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(DiskError, match=r"Permission denied\): choose a place that you may write"):
        refuse_unwritable(tmp_path / "a")
    tmp_path.chmod(0o755)


def test_a_relative_place_is_tried_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse_unwritable(Path("new/folder"))
    assert not list(tmp_path.iterdir())
