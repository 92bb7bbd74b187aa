"""A sweep (`-m`): what sets each of its jobs apart, where Hydra keeps its files, what failed.

Jobs run one after the other in this process, or where a launcher starts them in processes of their
own, several at once.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory, mkdtemp

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from pujax.errors import ConfigError
from pujax.files.locate import at_home
from pujax.text import counted

_FAILED = "failed-"  # and a job's number: what sets it apart, in the sweep's folder
_BEGUN = "begun-"  # and a job's number, in the sweep's folder
_DONE = "done-"  # and a job's number: the directory of its run
_SUBMITIT = ".submitit"  # where submitit keeps what its jobs print, in the sweep's folder

LAUNCHERS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"}
"""Hydra's launchers that an extra of pujax brings, by name."""


def sweeping() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def beside_others() -> bool:
    """Whether this is a job of a sweep that may run beside others of it, in another process."""
    return sweeping() and not HydraConfig.get().launcher["_target_"].endswith(".BasicLauncher")


def overrides_apart() -> dict[str, str]:
    """What sets this job of a sweep apart, by key, in the order typed; nothing outside of one."""
    if not sweeping():
        return {}
    parse = OverridesParser.create().parse_overrides
    given = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    several = {each.key_or_group for each in parse(given) if each.is_sweep_override()}
    job = parse(HydraConfig.get().overrides.task)
    return {e.key_or_group: str(e.value()) for e in job if e.key_or_group in several}


def title(apart: Mapping[str, str]) -> str:
    """What a job of a sweep is called where it is told of: `seed=0 loss=dpo`."""
    return " ".join(f"{key}={value}" for key, value in apart.items()) or "the job"


def note_begun() -> None:
    """Have the sweep know, in whichever process it is, that this job was begun; else nothing."""
    if sweeping():
        config = HydraConfig.get()
        Path(config.sweep.dir, f"{_BEGUN}{config.job.num}").touch()


def hold_begun(folder: Path, words: Sequence[str]) -> None:
    """Raise `ConfigError` where the sweep of these `words` had not one job."""
    if not any(folder.glob(f"{_BEGUN}*")):
        told = " ".join(word for word in words if "(" in word)
        raise ConfigError(f"{told}: goes through no value at all, so nothing was done: give one")


def note_failure(name: str) -> None:
    """Have the sweep know, in whichever process it is, that this job of that name failed."""
    config = HydraConfig.get()
    Path(config.sweep.dir, f"{_FAILED}{config.job.num}").write_text(name, encoding="utf-8")


def failures(folder: Path) -> list[str]:
    """The names of the jobs that failed, in their order."""
    found = sorted(folder.glob(f"{_FAILED}*"), key=lambda path: int(path.name[len(_FAILED) :]))
    return [path.read_text(encoding="utf-8") for path in found]


def note_done(directory: Path) -> None:
    """Have the sweep know, in whichever process it is, that this job's run is done, and where."""
    config = HydraConfig.get()
    note = Path(config.sweep.dir, f"{_DONE}{config.job.num}")
    note.write_bytes(os.fsencode(directory.absolute()))


def comparing(folder: Path) -> str | None:
    """The command that puts the finished runs of the sweep side by side; None where none is."""
    runs = [os.fsdecode(note.read_bytes()) for note in folder.glob(f"{_DONE}*")]
    if not runs:
        return None
    shared = Path(os.path.commonpath([Path(run).parent for run in runs]))
    near = shared.relative_to(Path.cwd()) if shared.is_relative_to(Path.cwd()) else shared
    return f"pujax report {quote(f'sweep={near}')}"


def hold_failures(folder: Path) -> None:
    """Raise `ConfigError` that names the jobs which failed, where any did."""
    failed = failures(folder)
    if failed:
        count = counted(len(failed), "job of the sweep", "jobs of the sweep")
        kept = folder / _SUBMITIT
        why = f"what they said is in {kept}; " if kept.exists() else ""
        raise ConfigError(
            f"{count} failed ({', '.join(failed)}): {why}mend it, and give the same command again"
        )


@contextmanager
def sweep_folder(typed: Sequence[str]) -> Iterator[Path]:
    """A folder for what Hydra and its launcher write of a sweep, which may hold a secret.

    It goes away with the sweep. But where submitit starts the jobs it is one that other machines
    see, in `run.root`, for nobody else to read, and stays unless all of them came to a good end:
    the jobs' output is in it, and they may outlive this process.
    """
    if not any(word.startswith("hydra/launcher=submitit") for word in typed):
        with TemporaryDirectory() as aside:
            yield Path(aside)
        return
    roots = [word.partition("=")[2] for word in typed if word.startswith("run.root=")]
    parent = at_home((roots or ["runs"])[-1]).absolute() / ".sweeps"
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=time.strftime("%Y-%m-%d_%H-%M-%S-"), dir=parent))
    print(f"what the jobs say is in {folder / _SUBMITIT}", flush=True)
    yield folder
    if not failures(folder):
        shutil.rmtree(folder, ignore_errors=True)
