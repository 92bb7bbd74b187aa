"""What an install has, and where its experiments find their data."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from pujax.config.compose import conf_dir, from_hydra, register, shipped
from pujax.config.settings import TrainConfig

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path.stem for path in Path(conf_dir(), "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_finds_its_data_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register("train_schema", TrainConfig)
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = from_hydra(TrainConfig, compose("train", overrides=[f"+experiment={name}"]))
    for path in (config.data.prompts, config.data.heldout, config.data.anchors):
        assert Path(str(path)).is_file()


def test_a_clones_own_data_comes_first_and_by_its_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "experiments/quickstart/train.jsonl"
    assert shipped("quickstart/train.jsonl") == str(ROOT / name)
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("")
    assert shipped("quickstart/train.jsonl") == name
    assert shipped("quickstart/none.jsonl") == "experiments/quickstart/none.jsonl"


@pytest.mark.long  # it builds, with what the registry has for that
def test_a_wheel_runs_its_experiments_from_any_folder(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-m", "pujax.train", "+experiment=smoke", "sft.steps=1", "align.steps=1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (settings,) = tmp_path.glob("runs/smoke/*/config.yaml")
    assert f"prompts: {tmp_path}/site/pujax/experiments/quickstart/" in settings.read_text()
