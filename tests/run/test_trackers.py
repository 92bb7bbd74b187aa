"""Trackers: what each is told, and that a run needs none of them."""

import sys
import time
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest

from pujax import train
from pujax.config.settings import LogConfig, RunConfig, SftConfig, TrainConfig
from pujax.errors import ConfigError
from pujax.run.logs import RunLog
from pujax.run.trackers import OPENERS, telling
from pujax.teacher.settings import TeacherConfig


class Fake:
    """All three packages at once: notes what it is called with."""

    def __init__(self, broken=False):
        self.told, self.settings, self.broken = [], {}, broken

    def init(self, **how):
        self.settings = how
        return SimpleNamespace(log=self.log, finish=lambda: self.told.append("end"))

    def log(self, metrics, step):
        if self.broken:
            raise RuntimeError("no\nnetwork")
        self.told.append((step, metrics))

    def set_tracking_uri(self, uri):
        self.uri = uri

    def set_experiment(self, name):
        pass

    def search_runs(self, **_):
        return []

    def start_run(self, **how):
        self.how = how

    def log_params(self, params):
        self.settings = {"config": params}

    def log_metrics(self, metrics, step):
        self.log(metrics, step)

    def end_run(self):
        self.told.append("end")


def config(*names):
    return TrainConfig(
        run=RunConfig(name="mine"),
        sft=SftConfig(steps=3),
        log=LogConfig(to=list(names)),
        teacher=TeacherConfig(model="rented"),
    )


def test_an_earlier_state_that_is_handed_on_is_told_of_after_the_last_step(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with telling(config("wandb"), tmp_path, print) as tell:
        tell("sft", 3, {"loss": 1})
        tell("eval-sft", 0, {"eval/exact": 0.5})
        tell("align", 1, {"loss": 1})
    assert [step for step, _ in fake.told[:-1]] == [3, 3, 4]


@pytest.mark.parametrize("name", OPENERS)
def test_a_tracker_is_told_what_the_run_writes_by_steps_of_the_whole(name, tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, name, fake)
    directory = tmp_path / "runs" / "mine" / "now"
    with telling(config(name), directory, print) as tell, RunLog(directory, tell=tell) as log:
        log.evaluation("base", 0, {"eval/exact": 0.25})
        log.step("sft", 1, {"loss": 2.0}, seconds=2.0, tokens=10)
        log.evaluation("sft", 3, {"eval/exact": 0.5})
        log.step("align", 2, {"loss": 1.0}, seconds=1.0, tokens=10)
        log.evaluation("aligned", 4, {"eval/exact": 1.0})
    pace = {"sft/time/step_s": 2.0, "sft/time/tokens_per_s": 5.0}
    assert fake.told[:3] == [
        (0, {"eval/exact": 0.25}),
        (1, {"sft/loss": 2.0} | pace),
        (3, {"eval/exact": 0.5}),
    ]
    assert fake.told[3][0] == 5
    assert fake.told[3][1]["align/loss"] == 1.0
    assert fake.told[4:] == [(7, {"eval/exact": 1.0}), "end"]
    assert "rented" not in str(fake.settings)
    assert "seed" in fake.settings["config"]


def test_nothing_leaves_the_machine_unless_the_environment_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fake = Fake()
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, fake)
    with telling(config("wandb"), tmp_path / "runs" / "mine" / "now", print):
        assert fake.settings["mode"] == "offline"
    with telling(config("mlflow"), tmp_path / "runs" / "mine" / "now", print):
        assert fake.uri == f"sqlite:///{tmp_path}/runs/mine/mlflow.db"


def test_a_tracker_that_fails_is_told_no_more_and_the_others_are(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", Fake(broken=True))
    monkeypatch.setitem(sys.modules, "wandb", good := Fake())
    said = []
    with telling(config("trackio", "wandb"), tmp_path, said.append) as tell:
        tell("sft", 1, {"loss": 1.0})
        tell("sft", 2, {"loss": 1.0})
    assert [step for step, _ in good.told[:-1]] == [1, 2]
    assert said == [f"trackio: no network: it is told no more, {tmp_path}/metrics.jsonl has it all"]


def test_one_that_is_not_installed_is_refused_before_there_is_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    wanted = replace(config("mlflow"), run=RunConfig(name="x", root=str(tmp_path / "runs")))
    with pytest.raises(ConfigError, match=r"not installed: pip install 'pujax\[mlflow\]'"):
        train.run(wanted)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match=r"log.to='tensorboard': choose trackio, wandb or mlflow"):
        LogConfig(to=["tensorboard"])


def trackio_kept(directory):
    logs = import_module("trackio.sqlite_storage").SQLiteStorage.get_logs("mine", "now")
    return [(log["step"], log["sft/loss"]) for log in logs]


def wandb_kept(directory):
    proto = import_module("wandb.proto.wandb_internal_pb2")
    for _ in range(100):  # it writes on in a process of its own
        kept = []
        for file in sorted(directory.glob("wandb/offline-run-*/run-*.wandb")):
            written, at = file.read_bytes(), 7  # LevelDB's log: a head, then records with theirs
            while at + 7 <= len(written):
                size = int.from_bytes(written[at + 4 : at + 6], "little")
                record = proto.Record()
                record.ParseFromString(written[at + 7 : at + 7 + size])
                at += 7 + size
                said = {(i.key or i.nested_key[0]): i.value_json for i in record.history.item}
                if "sft/loss" in said:
                    kept.append((int(said["_step"]), float(said["sft/loss"])))
        if len(kept) == 3:
            break
        time.sleep(0.1)
    return kept


def mlflow_kept(directory):
    client = import_module("mlflow").MlflowClient(f"sqlite:///{directory.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mine")
    (run,) = client.search_runs([experiment.experiment_id])
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "sft/loss")]


KEPT = {"trackio": trackio_kept, "wandb": wandb_kept, "mlflow": mlflow_kept}


@pytest.mark.filterwarnings("default")  # these packages have their own
@pytest.mark.parametrize("name", OPENERS)
def test_the_tracker_itself_keeps_on_this_machine_what_it_is_told(name, tmp_path, monkeypatch):
    for key in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read as it is imported
    pytest.importorskip(name, reason=f"{name}, an extra, is not installed")
    directory, said = tmp_path / "runs" / "mine" / "now", []
    directory.mkdir(parents=True)
    with telling(config(name), directory, said.append) as tell:
        tell("sft", 1, {"loss": 2.0})
        tell("sft", 2, {"loss": 1.0})
    time.sleep(1.1)  # wandb names its folders by the second
    with telling(config(name), directory, said.append) as tell:  # the run goes on
        tell("sft", 3, {"loss": 0.5})
    assert said == []
    assert KEPT[name](directory) == [(1, 2.0), (2, 1.0), (3, 0.5)]
