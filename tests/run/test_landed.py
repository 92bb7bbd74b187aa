"""A whole run directory as the version at commit 05ca909 wrote it, before the rooms of today.

`landed.tar.gz` holds a toy student, eight sums and their answers, and that version's

    python -m pujax.train run.dir=run run.name=landed model.path=student data.prompts=train.jsonl
        data.heldout=heldout.jsonl data.anchors=anchors.jsonl data.max_prompt_tokens=20
        data.max_response_tokens=6 sft.steps=2 sft.batch=4 sft.lr=1e-2 align.steps=4 align.prompts=2
        align.lr=1e-2 eval.prompts=4 eval.batch=4 checkpoint.every=2

with one of its checkpoints, after two of the four steps of the alignment.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pujax.evaluation import page
from pujax.evaluation.results import load
from pujax.inference.finished import export
from pujax.inference.heldout import evaluate_other

COMMAND = [
    "run.dir=run",
    "run.name=landed",
    "model.path=student",
    "data.prompts=train.jsonl",
    "data.heldout=heldout.jsonl",
    "data.anchors=anchors.jsonl",
    "data.max_prompt_tokens=20",
    "data.max_response_tokens=6",
    "sft.steps=2",
    "sft.batch=4",
    "sft.lr=1e-2",
    "align.steps=4",
    "align.prompts=2",
    "align.lr=1e-2",
    "eval.prompts=4",
    "eval.batch=4",
    "checkpoint.every=2",
]


@pytest.fixture
def landed(tmp_path, monkeypatch) -> Path:
    with tarfile.open(Path(__file__).with_name("landed.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def metrics(directory: Path) -> list[dict[str, float]]:
    """The numbers of the alignment's steps, without what a clock made."""
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in row.items() if not key.startswith(("stage", "time/"))}
        for row in rows
        if row["stage"] == "align"
    ]


@pytest.mark.slow
def test_the_same_command_goes_on_with_it_and_takes_the_same_steps(landed, tmp_path):
    before, answers = metrics(landed), load(landed / "eval-aligned.jsonl").rows
    for name in ("done", "eval-aligned.jsonl", "export"):
        path = landed / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    went = subprocess.run(
        [sys.executable, "-m", "pujax.train", *COMMAND],
        # On one device; see quick.py.
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert went.returncode == 0, went.stderr
    assert "resuming after align step 2" in went.stdout
    assert len(before) == 4
    for row, was in zip(metrics(landed), before, strict=True):  # more is logged by now
        assert {key: row[key] for key in was} == pytest.approx(was, rel=1e-4, abs=1e-6)
    now = load(landed / "eval-aligned.jsonl").rows
    assert [row.response for row in now] == [row.response for row in answers]


def test_the_commands_take_it_too(landed, monkeypatch, capsys):
    """As they are typed, through their settings."""

    def told(command: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"pujax {command}", *words])
        importlib.import_module(f"pujax.{command}").main()
        return capsys.readouterr().out

    assert told("report", "run=run") == "run/report.html\n"
    assert told("export", "run=run", "out=out", "compare=2") == "out\n"
    header = told("evaluate", "run=run", "model=out", "name=again")
    assert "again" in header
    now, then = (load(landed / f"eval-{name}.jsonl").rows for name in ("again", "aligned"))
    assert [row.response for row in now] == [row.response for row in then]


def test_it_can_be_evaluated_reported_and_exported(landed):
    page.write(landed)
    assert "the answer is" in (landed / "report.html").read_text()
    export(out=Path("out"), run=landed)
    weights = Path("out/model.safetensors").read_bytes()
    assert weights == (landed / "export" / "model.safetensors").read_bytes()
    found = evaluate_other(landed, "out", "again")
    kept = load(landed / "eval-aligned.jsonl").rows
    assert [row.response for row in found.rows] == [row.response for row in kept]
