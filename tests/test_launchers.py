"""Sweeps whose jobs a launcher of Hydra's starts; they skip where its extra is not installed."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import pytest
from campaign import CACHE, environment

ROOT = Path(__file__).parents[1]
SMALL = (
    "+experiment=smoke",
    *("model.shape.layers=1", "model.shape.width=16", "model.shape.mlp_width=16"),
    *("data.max_response_tokens=4", "sampling.candidates=2", "eval.prompts=4", "eval.batch=4"),
    *("sft.steps=1", "align.steps=8", "align.prompts=4", "checkpoint.every=1"),
)
SWEPT = ("loss=grpo,dpo", "seed=0,1")
LAUNCHERS = {
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit": ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=20"),
}


def command(root, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "pujax.train", "-m", *SMALL, *SWEPT, f"run.root={root}", *words],
        cwd=ROOT,
        env=environment(CACHE),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_all(process, root):
    """As a machine that goes down: the sweep, and the jobs that a launcher made processes of."""
    os.killpg(process.pid, signal.SIGKILL)
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes()
        except OSError:  # it ended just now
            continue
        if str(root).encode() in words and int(place.parent.name) != os.getpid():
            os.kill(int(place.parent.name), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds a launcher's processes in /proc")
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_killed_sweep_does_what_is_left_and_ends_in_one_table(name, tmp_path):
    if not list(distributions(name=f"hydra-{name}-launcher")):
        pytest.skip(f"the extra {name} is not installed")
    root = tmp_path / "runs"
    process = command(root, *LAUNCHERS[name])
    while process.poll() is None and not list(root.glob("smoke/*/done")):
        time.sleep(0.02)
    kill_all(process, tmp_path)
    process.communicate()
    done = {path.parent: path.stat().st_mtime_ns for path in root.glob("smoke/*/done")}
    assert 1 <= len(done) < 4

    process = command(root, *LAUNCHERS[name])
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    runs = {path.parent for path in root.glob("smoke/*/done")}
    assert len(runs) == len(list(root.glob("smoke/*"))) == 4
    for directory, when in done.items():
        assert (directory / "done").stat().st_mtime_ns == when
        assert "resuming" not in (directory / "output.log").read_text()
    words = [sys.executable, "-m", "pujax.report", f"sweep={root}"]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "unfinished" not in told.stdout
    table = (root / "sweep.md").read_text()
    assert re.findall(r"^\| (loss=\w+) \| (\d) \|", table, re.M) == [
        ("loss=grpo", "2"),
        ("loss=dpo", "2"),
    ]
