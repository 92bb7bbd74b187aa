"""`pujax train`: SFT on the anchors, then alignment, resumable; see conf/train.yaml."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pujax.errors import ConfigError
from pujax.run.commands import command
from pujax.run.compilation import keep_compiled, release_compiler_memory
from pujax.run.settings import TrainConfig

# Settings that may differ when a run goes on: they don't touch its numbers.
UNTOUCHED = ("run", "resume", "checkpoint", "eval", "mesh", "teacher", "collect")


def run(config: TrainConfig) -> None:
    """Train as told, in a directory of the run's own or in the one to go on with."""
    directory = run_directory(config, asdict(config))
    keep_compiled()
    release_compiler_memory()
    from pujax.run.fit import fit

    fit(config, directory)


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


main = command("train", TrainConfig, run)

if __name__ == "__main__":
    main()
