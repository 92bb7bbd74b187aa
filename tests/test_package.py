"""What an install has, and where its experiments find their data."""

import os
import subprocess
import sys
import tarfile
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
    prompts = config.data.prompts
    prompts = prompts if isinstance(prompts, list) else [prompts]
    for path in (*prompts, config.data.heldout, config.data.anchors):
        assert Path(str(path)).is_file()


def test_a_clones_own_data_comes_first_and_by_its_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "experiments/quickstart/train.jsonl"
    assert shipped("quickstart/train.jsonl") == str(ROOT / name)
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("")
    assert shipped("quickstart/train.jsonl") == name
    assert shipped("quickstart/none.jsonl") == "experiments/quickstart/none.jsonl"


def ran(words, **how):
    """What a command says on standard output and error, and its status."""
    done = subprocess.run(words, capture_output=True, text=True, **how)
    return done.returncode, done.stdout + done.stderr


def test_the_sdist_makes_a_wheel_that_runs_from_any_folder(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling, which builds it, is not installed")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path / "dist"), "-t"]
    assert ran([*build, "sdist"], cwd=ROOT)[0] == 0
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    for name in ("tests/conftest.py", "Makefile", "requirements.lock", "docs/data.md"):
        assert (source / name).is_file(), name
    status, said = ran([*build, "wheel"], cwd=source)
    assert status == 0, said
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile"]
    status, said = ran([*install, "--quiet", "--target", str(site), str(wheel)])
    assert status == 0, said

    def pujax(*words):
        environment = os.environ | {"PYTHONPATH": str(site)}
        return ran([sys.executable, site / "bin" / "pujax", *words], cwd=tmp_path, env=environment)

    assert pujax("evaluate", "--help")[0] == 0
    status, said = pujax("train", "experiment=quickstart", "--cfg", "job", "--resolve")
    assert status == 0, said
    shipped_there = f"{site}/pujax/experiments/quickstart"
    assert f"- {shipped_there}/train.jsonl\n  - {shipped_there}/train_more.jsonl\n" in said
    # All of the settings are read and the data is found: what stops it comes after that.
    assert pujax("train", "experiment=smoke", "model.path=./none") == (
        1,
        "pujax.train: ./none: no such file or directory: name a model's directory, a GGUF file or "
        "a hub id\n",
    )


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
