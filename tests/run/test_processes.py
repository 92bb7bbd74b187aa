"""Runs of several processes on one machine, by collectives over its loopback."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from quick import XLA_FLAGS
from rich.console import Console
from safetensors.numpy import load_file
from split_step import begun, laid, steps

from pujax.config.compose import conf_dir, from_hydra, register
from pujax.config.settings import DistributedConfig, TrainConfig
from pujax.errors import ConfigError, ProcessError
from pujax.models.sharding import make_mesh
from pujax.run import processes
from pujax.run.checkpoint import Checkpoints, Place
from pujax.run.directory import run_directory
from pujax.run.fit import fit
from pujax.run.student import placed

register("train_schema", TrainConfig)
ROOT = Path(__file__).parents[2]
SMALL = [
    "+experiment=smoke",
    *("model.shape.layers=1", "model.shape.width=16", "model.shape.mlp_width=16"),
    *("data.max_response_tokens=4", "sampling.candidates=2"),
    *("sft.steps=1", "sft.batch=4", "align.steps=2", "align.prompts=4", "eval.batch=4"),
    *("checkpoint.every=1", "checkpoint.keep=9"),
]


def start(*words, port, index, count):
    """One of `count` processes with two devices each."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {XLA_FLAGS}",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
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


def started(*words, count=2):
    """Processes that do the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(*words, port=port, index=index, count=count) for index in range(count)]


def ended(*words, count=2):
    """What each of the processes returned, said and complained of."""
    made = started(*words, count=count)
    said = [process.communicate(timeout=600) for process in made]
    return [(process.returncode, *each) for process, each in zip(made, said, strict=True)]


def lines(path):
    """The lines of a run's file, without what a clock made."""
    rows = map(json.loads, path.read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


QUICK = """
from pujax.run import processes
from pujax.train import main
processes.HEARTBEAT = 8  # else the dead are missed 40 seconds later, in the middle of a wait
main()
"""


def assert_same_run(place, other):
    """That a run came to what another did: samples and answers, and numbers to float32's digits."""
    assert lines(place / "samples.jsonl") == lines(other / "samples.jsonl")
    ours, theirs = (lines(each / "metrics.jsonl") for each in (place, other))
    for row in (*ours, *theirs):  # whether padding is left out, and can be, is the mesh's to choose
        assert row.pop("samples/packed", 0.0) in (0.0, 1.0)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for one, another in zip(ours, theirs, strict=True):
        names = [key for key, value in one.items() if isinstance(value, str)]
        assert [one.pop(key) for key in names] == [another.pop(key) for key in names]
        assert one == pytest.approx(another, rel=1e-5, abs=1e-5)
    for name in ("base", "sft", "aligned"):
        answers = [
            [row.get("response") for row in lines(each / f"eval-{name}.jsonl")]
            for each in (place, other)
        ]
        assert answers[0] == answers[1]
    ours, theirs = (load_file(each / "export" / "model.safetensors") for each in (place, other))
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], atol=1e-5)
    assert {path.name for path in place.iterdir()} == {path.name for path in other.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_several_processes_go_on_with_what_one_began_as_one_would(count, tmp_path):
    """They split every parameter, one of them is killed, and the same command goes on from it."""
    files = []
    for name, size in (("train", 12), ("heldout", 4)):
        rows = (ROOT / "experiments" / "quickstart" / f"{name}.jsonl").read_text().splitlines()
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(rows[:size]))
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

    words = [*SMALL, *files, f"run.dir={shared}", "mesh=fsdp"]
    *others, last = started("-c", QUICK, *words, count=count)
    while not (shared / "checkpoints" / "2").exists() and others[0].poll() is None:
        time.sleep(0.005)
    last.kill()
    killed = time.monotonic()
    said = [process.communicate(timeout=600) for process in others]
    last.communicate()
    assert all(process.returncode not in (None, 0) for process in others), said
    assert time.monotonic() - killed < 60
    assert [line for line in said[0][0].splitlines() if "resuming after" in line] == [
        "resuming after sft step 1"
    ]
    for _, err in said:
        assert len(err.splitlines()) == 1, said
        assert f"process {count - 1} of this run has ended" in err
        assert "start the same command again, in all of them" in err
    assert not (shared / "done").exists()

    first, *others = ended("-m", "pujax.train", *words, count=count)
    assert {status for status, _, _ in (first, *others)} == {0}, (first, *others)
    assert "resuming after align step" in first[1]
    for _, out, err in others:
        # Gloo says who is connected, in threads that write into each other's lines.
        spoken = [line for line in out.splitlines() if line and "Gloo" not in line]
        assert [line for line in spoken if "peer ranks" not in line] == []
        assert err == ""
    assert_same_run(shared, alone)
    assert len(lines(shared / "samples.jsonl")) == 2 * 4


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_line(tmp_path):
    """Before that they take a step with every matrix split over both, and one goes on from that."""
    first, second = ended(str(ROOT / "tests" / "split_step.py"), str(tmp_path))
    assert first[0] == -signal.SIGKILL
    assert second[0] != 0
    made = [output.splitlines()[0] for _, output, _ in (first, second)]
    assert made[0] == made[1]  # both know the first one's number
    assert len(second[2].splitlines()) == 1
    assert second[2].startswith("process 0 of this run has ended")
    assert "start the same command again, in all of them" in second[2]
    one = make_mesh(1, 1, 1)
    expected, (line, next_line) = steps(one, laid(one, begun()), range(2))
    with closing(Checkpoints(tmp_path, keep=1, model={})) as checkpoints:
        found = checkpoints.newest(placed(begun(), one))
    assert found is not None
    place, state = found
    assert place == Place("align", 1)
    state, (resumed,) = steps(one, state, range(1, 2))
    with np.load(tmp_path / "step.npz") as shared:
        for ours, theirs in ((shared, line), (resumed, next_line)):
            np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
            np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (state.params, expected.params)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


FOUND = """E1126 23:21:38.231973 11663 coordination_service.cc:1549] Use error polling to send \
the following error to all tasks: UNAVAILABLE: The following tasks are unhealthy (stopped sending \
heartbeats):
3
The tasks have crashed. Check the task logs for an earlier error.
E1126 23:21:38.232498 11674 coordination_service_agent.cc:289] Polled an error.
"""
ENDING = """F1126 23:21:38.232638 11674 client.h:80] Terminating process because the JAX \
distributed service detected fatal errors. absl::Status: UNAVAILABLE: The following tasks are \
unhealthy (stopped sending heartbeats):
3
The tasks have crashed. Check the task logs for an earlier error.

RPC: /xla.coordination.CoordinationService/PollForError
*** Check failure stack trace: ***
    @     0x7f5f3ba40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
LED = """F1126 23:21:38.232638 11674 client.h:80] Terminating process because the JAX distributed \
service detected fatal errors. absl::Status: UNAVAILABLE: the leader task may have died
*** Check failure stack trace: ***
"""


@pytest.mark.parametrize("cut", [None, 300, len(FOUND) - 9, len(FOUND) + 240])
def test_what_jax_says_of_the_dead_comes_out_as_one_line_wherever_it_is_cut(cut):
    line = processes.GONE.format(who="process 3") + "\n"
    joined = f"{processes._JOINED}\n"
    for said, shown in (
        (f"a warning\n{FOUND}{ENDING}", "a warning\nALONE\n"),
        (f"a warning\n{joined}{FOUND}{ENDING}", f"a warning\n{line}"),
        (f"half{joined}{FOUND}{line}{ENDING}", f"half\n{line}"),
        (f"{joined}{line}{FOUND}{ENDING}", line),
        (f"{FOUND}{line}", line),
        (f"{line[:-1]}{FOUND}\n{ENDING}", line),
        (f"{line[:-1]}{FOUND}\n", line),
        (f"{FOUND}pujax.train: no\nwhy", "pujax.train: no\nwhy"),
        (f"{joined}{LED}", processes.GONE.format(who="process 0") + "\n"),
    ):
        words = [sys.executable, "-IS", "-c", processes._FILTER]
        words += [processes.GONE, "ALONE", processes._JOINED]
        reads = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert reads.stdin is not None
        for piece in (said[:cut], said[len(said) if cut is None else cut :]):
            reads.stdin.write(piece)
            reads.stdin.flush()
            time.sleep(0.05)
        assert reads.communicate()[1] == shown


class Service:
    """What is told by jax's coordination service, kept in a dictionary."""

    def __init__(self):
        self.kept = {}

    def key_value_set_bytes(self, key, value):
        self.kept[key] = value

    def blocking_key_value_get_bytes(self, key, timeout):
        return self.kept[key]

    def key_value_set(self, key, value):
        self.kept[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.kept.items() if key.startswith(folder)]

    def key_value_delete(self, key):
        del self.kept[key]

    def wait_at_barrier(self, key, timeout):
        pass


def test_processes_that_were_told_otherwise_all_end_and_a_path_of_ones_own_does_not_matter(
    monkeypatch,
):
    service = Service()
    first = {"seed": 1, "loss.beta": 0.1, "run.dir": "here", "data.heldout": "h.jsonl"}

    def settings(index, turns, **changed):
        group = processes._Group(service, index, 2, turns)
        monkeypatch.setattr(processes, "_group", group)
        processes.require_same(first | changed)

    def firsts(turn):  # the first has told them already
        processes._tell(service, f"pujax/told/{turn}", processes.pickle.dumps((True, told)))

    told = {"seed": "1", "loss.beta": "0.1"}
    firsts(1)
    processes._tell(service, "pujax/told/3", processes.pickle.dumps((True, None)))
    settings(1, 0, **{"run.dir": "there", "data.heldout": "elsewhere.jsonl"})
    assert not service.key_value_dir_get("pujax/differs/")
    processes._tell(service, "pujax/told/3", processes.pickle.dumps((False, None)))
    with pytest.raises(ProcessError, match="process 1 ends with the first"):
        settings(1, 0, seed=2)
    with pytest.raises(ConfigError, match="seed is 2 in process 1 and 1 in the first: start the"):
        settings(0, 0)


def test_what_waits_for_the_others_is_ended_by_a_signal():
    with processes._ended_by_signals():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL


@pytest.mark.parametrize("size", [0, 1, 4, 5, 12, 13])
def test_what_is_told_goes_in_pieces_and_comes_whole(monkeypatch, size):
    monkeypatch.setattr(processes, "PIECE", 4)
    service, data = Service(), bytes(range(size))
    processes._tell(service, "key", data)
    assert processes._heard(service, "key") == data
    assert max(len(piece) for piece in service.kept.values()) <= 4 + 4


SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0"}
EXPLICIT = {"coordinator_address": "one:99", "num_processes": 2, "process_id": 1}
DEACTIVATED = EXPLICIT | {"cluster_detection_method": "deactivate"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
ON_ONE_MACHINE = DEACTIVATED | {"coordinator_address": "127.0.0.1:63782", "local_device_ids": 1}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.mark.parametrize(
    ("settings", "environment", "given"),
    [
        ((), {}, None),
        ((), SLURM | {"SLURM_NTASKS": "1"}, None),
        ((), {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # a batch script, without srun
        ((), SLURM | {"SLURM_NTASKS": "2"}, {}),
        ((False,), SLURM | {"SLURM_NTASKS": "2"}, None),
        ((), {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1"}, {}),
        ((), OPEN_MPI | {"PMIX_NAMESPACE": "123456789"}, ON_ONE_MACHINE),
        ((True, "one:99"), OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, DEACTIVATED),
        ((True, "one:99", 2), POD, DEACTIVATED),
        ((True, "one:99", 2, 1), {}, EXPLICIT),
        ((False, "one:99", 2, 1), {}, DEACTIVATED),
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
    ("settings", "environment", "said"),
    [
        ((True, None, 2, 1), {}, "process 1 of 2 has to know where the first one is"),
        ((), {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "process 0 of 2 has to know"),
        ((), {"JAX_PROCESS_ID": "1"}, "process 1 of None has to know"),
        ((True, "one:99", 2), {"JAX_PROCESS_ID": "7"}, r"process=7: must lie in \[0, 2\)"),
        ((), {"JAX_NUM_PROCESSES": "0"}, "distributed.processes=0: must be positive"),
    ],
)
def test_several_processes_without_an_address_are_not_taken_for_one(settings, environment, said):
    with pytest.raises(ConfigError, match=said):
        processes.given(DistributedConfig(*settings), environment)


def test_open_mpi_5_on_several_machines_has_to_be_told_an_address():
    far = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(ConfigError, match=r"distributed\.coordinator=None: .* HOST:PORT"):
        processes.given(DistributedConfig(), far)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((True, "one"), "distributed.coordinator='one': write HOST:PORT"),
        ((True, "one:99999"), "distributed.coordinator='one:99999': write HOST:PORT"),
        ((True, "http://one:80"), "distributed.coordinator='http://one:80': write HOST:PORT"),
        ((True, "one:99", 0), "distributed.processes=0: must be positive"),
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
