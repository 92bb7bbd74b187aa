"""`python -m pujax.train`: the command that composes the settings and does the run."""

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from pujax.errors import ConfigError
from pujax.run.compilation import keep_compiled, release_compiler_memory
from pujax.run.compose import conf_dir, from_hydra, register
from pujax.run.settings import TrainConfig

register("train_schema", TrainConfig)

# Settings that may differ when a run goes on: they don't touch its numbers.
UNTOUCHED = ("run", "resume", "checkpoint", "eval", "mesh", "teacher", "collect")


@hydra.main(config_path=conf_dir(), config_name="train", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Train as told; exit status 0 when the run is done, or was asked to stop and saved itself."""
    try:
        config = from_hydra(TrainConfig, composed)
        directory = run_directory(config, _plain(composed))
    except ConfigError as error:
        sys.exit(f"pujax.train: {error}")
    keep_compiled()
    release_compiler_memory()
    from pujax.errors import (
        ChatError,
        CheckpointError,
        DataError,
        NonFiniteError,
        PromptError,
        StopRequested,
        StoreError,
        TeacherError,
        WeightsError,
    )
    from pujax.run.fit import fit

    try:
        fit(config, directory)
    except StopRequested as stop:
        print(f"pujax.train: {stop}", file=sys.stderr)
    except (
        ChatError,
        CheckpointError,
        ConfigError,
        DataError,
        FileExistsError,
        NonFiniteError,
        PromptError,
        StoreError,
        TeacherError,
        WeightsError,
    ) as error:
        sys.exit(f"pujax.train: {error}")


def run_directory(config: TrainConfig, settings: dict[str, Any]) -> Path:
    """The directory of the run to do or to go on with, made, with the settings in it.

    `resume=auto` goes on with `run.dir` where that is given, else with the newest run of this name
    that has the same settings and isn't done; `resume=PATH` goes on with that run. Raises
    `ConfigError` when the run to go on with has other settings, is done, or isn't there.
    """
    if config.resume not in ("auto", "never"):
        directory = Path(config.resume)
        if not (directory / "config.yaml").is_file():
            raise ConfigError(f"resume={config.resume!r}: no run there (no config.yaml)")
    elif config.run.dir is not None:
        directory = Path(config.run.dir)
    else:
        parent = Path(config.run.root) / config.run.name
        directory = None
        if config.resume == "auto":
            directory = _unfinished(parent, settings)
        directory = directory or _fresh(parent)
    stored = directory / "config.yaml"
    if stored.is_file() and config.resume != "never":
        differing = _differing(OmegaConf.to_container(OmegaConf.load(stored)), settings)
        if differing:
            raise ConfigError(
                f"{directory} was begun with other settings ({'; '.join(differing)}): set them "
                "back, or choose resume=never and another run.dir"
            )
        if (directory / "done").exists():
            raise ConfigError(f"{directory} is done: choose another run.dir, or resume=never")
    directory.mkdir(parents=True, exist_ok=True)
    if not stored.is_file():
        OmegaConf.save(OmegaConf.create(settings), stored)
    return directory


def _plain(composed: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _unfinished(parent: Path, settings: dict[str, Any]) -> Path | None:
    """The newest run under `parent` with these settings that has begun and isn't done."""
    for stored in sorted(parent.glob("*/config.yaml"), reverse=True):
        same = not _differing(OmegaConf.to_container(OmegaConf.load(stored)), settings)
        if same and not (stored.parent / "done").exists():
            return stored.parent
    return None


def _fresh(parent: Path) -> Path:
    """A directory named by the time, that no other run has."""
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    candidates = [parent / name, *(parent / f"{name}-{n}" for n in range(2, 100))]
    return next(path for path in candidates if not path.exists())


def _differing(stored: Any, given: dict[str, Any]) -> list[str]:
    """The settings, by dotted key, in which two runs' numbers could differ."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(value, dict) and value:
            items: dict[str, Any] = {}
            for key, part in value.items():
                items |= flat(part, f"{prefix}.{key}" if prefix else str(key))
            return items
        return {prefix: value}

    before, now = flat(stored), flat(given)
    return [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(set(before) | set(now))
        if before.get(key) != now.get(key) and key.split(".")[0] not in UNTOUCHED
    ]


if __name__ == "__main__":
    main()
