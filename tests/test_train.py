import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from campaign import CACHE, SMALL, environment
from safetensors.numpy import load_file

from pujax.config.functions import build_metrics
from pujax.evaluation.results import load
from pujax.inference.evaluated import run_config
from pujax.inference.heldout import evaluate_subject, reference_for

ROOT = Path(__file__).parents[1]


def command(*overrides):
    return [sys.executable, "-m", "pujax.train", *SMALL, *overrides]


def train(*overrides):
    return subprocess.Popen(
        command(*overrides),
        cwd=ROOT,
        env=environment(CACHE),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines(directory):
    """The run's metrics, without what a clock made."""
    rows = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(row).items() if not key.startswith("time/")}
        for row in rows
    ]


@pytest.mark.slow
def test_a_run_leaves_its_settings_metrics_samples_plot_report_and_model(whole):
    directory, output = whole
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "eval-base.jsonl",
        "eval-aligned.jsonl",
        "curves.png",
        "report.html",
        "table.md",
        "suite-costs.json",
        "export/model.safetensors",
        "export/tokenizer.json",
    ):
        assert (directory / name).stat().st_size > 0, name
    assert list((directory / "tensorboard").rglob("events*"))
    rows = lines(directory)
    assert [(row["stage"], row["step"]) for row in rows if row["stage"] != "eval"] == [
        *(("sft", step) for step in (1, 2, 3)),
        *(("align", step) for step in (1, 2, 3, 4)),
    ]
    assert [(row["model"], row["step"]) for row in rows if row["stage"] == "eval"] == [
        ("base", 0),
        *(("sft", step) for step in (1, 2, 3)),
        *(("aligned", step) for step in (1, 2, 3, 4)),
    ]
    steps = [json.loads(row) for row in (directory / "metrics.jsonl").read_text().splitlines()]
    assert all(row["time/cpu_s"] > 0 for row in steps if row["stage"] != "eval")
    samples = (directory / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 4 * 2  # steps x prompts
    assert "aligned" in output
    assert f"\nrun: {directory}\n" in output
    beaten = ": SFT for as long as alignment took, about "
    assert f"\nnot in the table{beaten}" in output
    assert f"<p>Not in the table{beaten}" in (directory / "report.html").read_text()


@pytest.mark.slow
def test_the_reference_that_a_suite_takes_answers_as_the_runs_sft_model_did(whole, monkeypatch):
    monkeypatch.chdir(ROOT)
    directory, _ = whole
    config = run_config(directory)
    metrics = build_metrics(config.eval)
    found = evaluate_subject(reference_for(directory, config), config, metrics, "sft")
    for one, other in zip(found.rows, load(directory / "eval-sft.jsonl").rows, strict=True):
        assert one.response == other.response
        logps = [row.values["anchor_logp"] for row in (one, other)]
        assert logps[0] == pytest.approx(logps[1], abs=1e-4)


def finish_after(process, directory, stage, step, number):
    """Send a signal once the run has logged that step."""
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        path = directory / "metrics.jsonl"
        if path.exists() and any(
            (row["stage"], row["step"]) == (stage, step)
            for row in map(json.loads, path.read_text().splitlines())
        ):
            process.send_signal(number)
            break
        time.sleep(0.02)
    output, _ = process.communicate()
    return output


@pytest.mark.long  # tests/campaign.py kills runs too, at moments that chance chooses
@pytest.mark.parametrize(("stage", "step"), [("sft", 3), ("align", 3)])
def test_a_killed_run_resumes_and_ends_bit_for_bit_as_if_it_had_not_been(
    whole, tmp_path, stage, step
):
    directory = tmp_path / "run"
    finish_after(train(f"run.dir={directory}"), directory, stage, step, signal.SIGKILL)
    process = train(f"run.dir={directory}")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "resuming after" in output
    assert lines(directory) == lines(whole[0])
    ours = load_file(directory / "export" / "model.safetensors")
    theirs = load_file(whole[0] / "export" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly_and_the_same_command_goes_on(whole, tmp_path):
    root = tmp_path / "runs"
    process = train(f"run.root={root}")
    until = time.monotonic() + 300
    while time.monotonic() < until and not list(root.glob("smoke/*/metrics.jsonl")):
        time.sleep(0.05)
    directory = next(iter(root.glob("smoke/*")))
    output = finish_after(process, directory, "align", 1, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "the same command goes on from there" in output
    process = train(f"run.root={root}")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert [path.name for path in root.glob("smoke/*")] == [directory.name]
    assert lines(directory) == lines(whole[0])


@pytest.mark.slow
def test_a_prompt_that_is_too_long_stops_the_command_with_one_line(tmp_path):
    process = train(f"run.dir={tmp_path}/run", "data.max_prompt_tokens=40")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert "data.max_prompt_tokens is 40: raise it" in output
    assert "Traceback" not in output
