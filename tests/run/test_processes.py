"""Runs of several processes on one machine, by collectives over its loopback."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console
from safetensors.numpy import load_file

from pujax.config.compose import conf_dir, from_hydra, register
from pujax.config.settings import DistributedConfig, TrainConfig
from pujax.errors import ConfigError
from pujax.run import processes
from pujax.run.directory import run_directory
from pujax.run.fit import fit

register("train_schema", TrainConfig)
ROOT = Path(__file__).parents[2]
SMALL = [
    "+experiment=smoke",
    *("model.shape.layers=1", "model.shape.width=16", "model.shape.mlp_width=16"),
    *("data.max_response_tokens=4", "sampling.candidates=2"),
    *("sft.steps=1", "sft.batch=4", "align.steps=2", "align.prompts=4", "eval.batch=4"),
    *("checkpoint.every=1", "checkpoint.keep=9"),
]


def start(*words, port, index):
    """One of two processes with two devices each."""
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
    }
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def both(*words):
    """Two processes that do the same, and what each of them returned, said and complained of."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = [start(*words, port=port, index=index) for index in (0, 1)]
    said = [process.communicate(timeout=600) for process in made]
    return [(process.returncode, *each) for process, each in zip(made, said, strict=True)]


def lines(path):
    """The lines of a run's file, without what a clock made."""
    rows = map(json.loads, path.read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began_as_one_would(tmp_path):
    files = []
    for name, count in (("train", 12), ("heldout", 4)):
        rows = (ROOT / "experiments" / "quickstart" / f"{name}.jsonl").read_text().splitlines()
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(rows[:count]))
        files.append(f"data.{'prompts' if name == 'train' else name}={path}")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        composed = compose("train", overrides=[*SMALL, *files, f"run.dir={alone}", "mesh=single"])
    config = from_hydra(TrainConfig, composed)
    with run_directory(config) as directory:
        fit(config, directory, console=Console(quiet=True))
    # As after a SIGKILL in the first step of alignment, on one device.
    shutil.copytree(alone, shared)
    for name in ("done", "export", "checkpoints/3", "checkpoints/2", "eval-aligned.jsonl"):
        path = shared / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    first, second = both("-m", "pujax.train", *SMALL, *files, f"run.dir={shared}")
    assert first[0] == second[0] == 0, (first, second)
    assert "resuming after sft step 1" in first[1]
    # Gloo says who is connected, in threads that write into each other's lines.
    spoken = [line for line in second[1].splitlines() if line and "Gloo" not in line]
    assert [line for line in spoken if "peer ranks" not in line] == []
    assert second[2] == ""
    assert lines(shared / "samples.jsonl") == lines(alone / "samples.jsonl")
    assert len(lines(shared / "samples.jsonl")) == 2 * 4
    ours, theirs = (lines(place / "metrics.jsonl") for place in (shared, alone))
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        names = [key for key, value in one.items() if isinstance(value, str)]
        assert [one.pop(key) for key in names] == [other.pop(key) for key in names]
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    for name in ("base", "sft", "aligned"):
        answers = [
            [row.get("response") for row in lines(place / f"eval-{name}.jsonl")]
            for place in (shared, alone)
        ]
        assert answers[0] == answers[1]
    ours, theirs = (load_file(place / "export" / "model.safetensors") for place in (shared, alone))
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], atol=1e-5)
    assert {path.name for path in shared.iterdir()} == {path.name for path in alone.iterdir()}


DYING = """
import os, signal, sys
from pujax.config.settings import DistributedConfig
from pujax.errors import ProcessError
from pujax.run.processes import first, told, together
try:
    with together(DistributedConfig()):
        made = told(os.getpid)
        print("the first is", made, flush=True)
        if first():
            os.kill(made, signal.SIGKILL)
        told(os.getpid)
except ProcessError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_line():
    first, second = both("-c", DYING)
    assert first[0] == -signal.SIGKILL
    assert second[0] != 0
    assert first[1] == second[1]  # both know the first one's number
    assert len(second[2].splitlines()) == 1
    assert "start the same command again, in all of them" in second[2]


SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0"}
EXPLICIT = {"coordinator_address": "one:99", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(
    ("settings", "environment", "given"),
    [
        ((), {}, None),
        ((), SLURM | {"SLURM_NTASKS": "1"}, None),
        ((), {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # a batch script, without srun
        ((), SLURM | {"SLURM_NTASKS": "2"}, {}),
        ((False,), SLURM | {"SLURM_NTASKS": "2"}, None),
        ((), {"OMPI_COMM_WORLD_SIZE": "4"}, {}),
        ((True, "one:99", 2, 1), {}, EXPLICIT),
        ((False, "one:99", 2, 1), {}, EXPLICIT | {"cluster_detection_method": "deactivate"}),
        (
            (True, None, None, 0),
            {"JAX_COORDINATOR_ADDRESS": "one:99", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            EXPLICIT | {"process_id": 0},
        ),
    ],
)
def test_there_are_others_where_a_launcher_or_the_settings_say_so(settings, environment, given):
    assert processes.given(DistributedConfig(*settings), environment) == given


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((True, "one"), "distributed.coordinator='one': write HOST:PORT"),
        ((False, "one:99"), "set distributed.processes and distributed.process too"),
        (
            (True, "one:99", 2, 2),
            r"distributed.process=2: must lie in \[0, distributed.processes=2",
        ),
    ],
)
def test_a_record_that_is_not_whole_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        DistributedConfig(*settings)
