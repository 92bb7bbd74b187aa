"""The directory of a run: found or made, locked for the life of the process, its settings in it."""

import fcntl
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pujax.config.settings import TrainConfig, default_of
from pujax.errors import ConfigError, InUse, PujaxError
from pujax.evaluation.metrics import PAIRS
from pujax.files.durable import on_disk, write_whole
from pujax.files.settings import (
    DONE,
    SETTINGS,
    SWEPT,
    UNTOUCHED,
    flat,
    keep_settings,
    kept_settings,
    named_now,
    of_asking,
    refuse_secrets,
    within,
)
from pujax.text import counted, printable

LOCK, OUTPUT = ".lock", "output.log"

_WRITTEN = re.compile(
    r"(metrics|samples)\.jsonl|inputs\.json|eval-(?!base\.).*\.jsonl"
    r"|nonfinite-.*\.npz|done|table\.md|curves\.png|report\.html|tensorboard|checkpoints"
    r"|damaged|best|reference(\.json)?|export"
)
"""What a run writes into its directory, after its settings.

But for eval-base.jsonl, which may be put there: what a run begins with may have been evaluated;
and for output.log, which begins before the run does.
"""

MEASURING = frozenset(("eval.every", "eval.batch"))
"""Settings that measure: like the `UNTOUCHED` ones they may differ when a run goes on, unless
`checkpoint.best` chooses by what they find.

Of the teacher its model alone counts: whether it gave the same anchors is held against the digests
of `pujax.run.inputs`.
"""

NOTHING: Mapping[str, str] = MappingProxyType({})


@contextmanager
def run_directory(config: TrainConfig, apart: Mapping[str, str] = NOTHING) -> Iterator[Path]:
    """The directory of the run to do or to go on with, with `config` in it, locked meanwhile.

    It says which other unfinished runs of these settings there are, and which of them are in use.
    A new one is named by the time and by what sets a job of a sweep `apart`, which it keeps too,
    and goes away again where the block fails before anything but settings is in it.

    `resume=auto` goes on with `run.dir` where that is given, else with the newest run of this name
    that has the same settings, isn't done and isn't in use; `resume=PATH` goes on with that run;
    `resume=never` begins one. Raises `ConfigError` when the run to go on with has other settings,
    is done, in use, or isn't there, for a `run.dir` with files that no run wrote where this one
    would write, or with runs in it, for a place with * ? or [ in its path, and for a secret among
    the settings. A job of a sweep that somebody does at this moment is in use, and not begun again.
    Raises `DiskError` for a place where no folder can be made.
    """
    settings, theirs = named_now(asdict(config)), False
    remedy = elsewhere(config)
    refuse_secrets(settings)
    place = Path(config.run.dir or Path(config.run.root) / config.run.name)
    _refuse_pattern(place if config.resume in ("auto", "never") else Path(config.resume))
    with on_disk(place):
        made = [folder for folder in (place, *place.parents) if not folder.exists()]
    if config.resume not in ("auto", "never"):
        directory = Path(config.resume)
        if not (directory / SETTINGS).is_file():
            raise ConfigError(
                f"resume={config.resume!r}: no run there (no {SETTINGS})"
                f"{_runs_in(directory) or ': choose auto, never or the directory of a run'}"
            )
        lock = _lock(directory, remedy)
    elif config.run.dir is not None:
        directory = Path(config.run.dir)
        theirs = directory.is_dir()
        with on_disk(directory):
            directory.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(directory)
        lock = _lock(directory, remedy)
    else:
        parent = Path(config.run.root) / config.run.name
        found = _unfinished(parent, settings, apart, remedy) if config.resume == "auto" else None
        label = "_".join(f"{k}={v}" for k, v in apart.items())
        directory, lock = found or _fresh(parent, label, remedy)
    with lock:
        if (directory / SETTINGS).is_file():
            _may_go_on(directory, settings, config.resume, remedy)
        begun = (directory / SETTINGS).is_file()
        before = {OUTPUT} & {path.name for path in directory.iterdir()}  # who began us writes it
        keep_settings(directory, settings)
        if apart:
            write_whole(directory / SWEPT, json.dumps(apart).encode())
        try:
            yield directory
        except BaseException:
            first = {SETTINGS, LOCK, SWEPT, OUTPUT}
            if not begun and {path.name for path in directory.iterdir()} <= first:
                with suppress(OSError):  # something may have come into it just now
                    for name in first - before:
                        (directory / name).unlink(missing_ok=True)
                    if not theirs:
                        directory.rmdir()
                    for folder in made:  # as far as nothing else is in them
                        if folder != directory:
                            folder.rmdir()
            raise


def elsewhere(config: TrainConfig) -> str:
    """What to set for a run of its own, beside the one that can't be gone on with."""
    placed = config.run.dir is not None and config.resume in ("auto", "never")
    return "choose another run.dir" if placed else "set resume=never for a new run"


def _runs_in(directory: Path) -> str:
    """Which of a folder's own runs to go on with; nothing where it is no folder of runs."""
    runs = [stored.parent for stored in sorted(directory.glob(f"*/{SETTINGS}"))]
    left = [path for path in runs if not (path / DONE).exists()]
    if not runs:
        return ""
    if not left:
        return f": {counted(len(runs), 'run')} in it, none of them unfinished"
    return f": {counted(len(left), 'unfinished run')} in it: give resume={left[-1]}"


def finished(config: TrainConfig, apart: Mapping[str, str]) -> Path | None:
    """The newest run that has done this job of a sweep already; None where there is none."""
    settings, parent = named_now(asdict(config)), Path(config.run.root) / config.run.name
    found = sorted(parent.glob(f"*/{DONE}"), reverse=True)
    if config.run.dir is not None:
        found = [Path(config.run.dir) / DONE]
    for directory in (path.parent for path in found if path.exists()):
        with suppress(PujaxError):  # not readable: not of this job
            if not _differing(kept_settings(directory), settings, apart):
                return directory
    return None


def traces(directory: Path) -> list[str]:
    """The names in a directory that a run would write after its settings, sorted."""
    return sorted(path.name for path in directory.iterdir() if _WRITTEN.fullmatch(path.name))


def _refuse_pattern(place: Path) -> None:
    """Raise `ConfigError` for a place that is read as a pattern: Orbax (0.12) looks for files so.

    What it wrote there it would not find again.
    """
    if glob.has_magic(str(place.absolute())):
        raise ConfigError(
            f"run.dir={place}: {place.absolute()} has one of * ? [ in it, where checkpoints can be "
            "written and not read: choose another place"
        )


def _refuse_foreign(directory: Path) -> None:
    """Raise `ConfigError` where files without a run's settings lie where a run would write.

    And for a folder of runs: `run=FOLDER` would mean the new one from then on, and no longer its
    newest.
    """
    lock, found = directory / LOCK, traces(directory)
    if (directory / SETTINGS).exists():
        return  # which are held against those of the run to do
    if inner := sorted(directory.glob(f"*/{SETTINGS}")):
        raise ConfigError(
            f"run.dir={directory}: is a folder of runs, {inner[-1].parent.name} one of them, which "
            "nobody would find below a run: choose a folder in it, or of its own"
        )
    if os.path.lexists(lock) and not _is_ours(lock):
        found.append(LOCK)
    if found:
        raise ConfigError(
            f"run.dir={directory}: has {found[0]} in it, where a run would write, but no "
            f"{SETTINGS} of a run: move it away, or choose another run.dir"
        )


def _is_ours(lock: Path) -> bool:
    """Whether a lock file is one that `_lock` made."""
    regular = lock.is_file() and not lock.is_symlink()
    return regular and re.fullmatch(rb"\d{0,20}", lock.read_bytes()[:40]) is not None


def _may_go_on(directory: Path, settings: Mapping[str, Any], resume: str, remedy: str) -> None:
    """Refuse to go on with a run that is done or of other settings, or to begin over one."""
    if resume == "never":
        raise ConfigError(
            f"{directory} holds a run and resume=never begins one: move it away, or choose another "
            "run.dir"
        )
    differing = _differing(kept_settings(directory), settings)
    if differing:
        raise ConfigError(
            f"{directory} was begun with other settings ({'; '.join(differing)}): set them back, "
            f"or {remedy}"
        )
    if (directory / DONE).exists():
        raise ConfigError(f"{directory} is done: {remedy}")


class _Lock:
    """An open lock file and its folder; closed, as any end of the process does, the run is free."""

    def __init__(self, descriptor: int, folder: int) -> None:
        self._descriptor, self._folder = descriptor, folder

    def __enter__(self) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)  # for the message alone

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        os.close(self._folder)


def _lock(directory: Path, remedy: str) -> _Lock:
    """The run in `directory`, for this process. Raises `InUse` while another one has it.

    The folder is locked with the file in it, which somebody may delete.
    """
    path = directory / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    folder = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _flock_folder(folder)
    except OSError as error:
        os.close(descriptor)
        os.close(folder)
        if not isinstance(error, BlockingIOError):  # a file system without locks
            raise ConfigError(f"{path}: can't lock a file here ({error.strerror})") from error
        raise InUse(f"{_in_use(directory)}: wait for it, or {remedy}") from error
    if os.fstat(descriptor).st_nlink == 0:  # its last owner took it back just now
        os.close(descriptor)
        os.close(folder)
        directory.mkdir(parents=True, exist_ok=True)
        return _lock(directory, remedy)
    return _Lock(descriptor, folder)


def _in_use(directory: Path) -> str:
    """That another process does this run, and which."""
    pid = ""
    with suppress(OSError):  # deleted just now
        pid = (directory / LOCK).read_bytes()[:20].decode(errors="replace")
    return f"{directory} is in use by {f'process {pid}' if pid else 'another process'}"


def _flock_folder(folder: int) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # NFS locks files alone
        return


def _unfinished(
    parent: Path, settings: Mapping[str, Any], apart: Mapping[str, str], remedy: str
) -> tuple[Path, _Lock] | None:
    """The newest run under `parent` with these settings that isn't done or in use, locked.

    Of the others that aren't done it prints where they are: nothing goes on with these by itself.
    Where there is none, it prints in what the newest that isn't done has other settings.
    """
    found, used, left = None, list[Path](), list[Path]()
    others: list[tuple[Path, list[str]]] = []
    for stored in sorted(parent.glob(f"*/{SETTINGS}"), reverse=True):
        directory = stored.parent
        try:
            if (directory / DONE).exists():
                continue
            if differing := _differing(kept_settings(directory), settings, apart):
                others.append((directory, differing))
                continue
            if found is not None:
                left.append(directory)
                continue
            lock = _lock(directory, remedy)
        except InUse:
            if apart:
                raise
            used.append(directory)
            continue
        except PujaxError:  # not readable: not a run to go on with
            continue
        if (directory / DONE).exists():
            lock.__exit__()  # it came to its end just now
        else:
            found = directory, lock
    for directory in used:
        begins = f"a new run begins beside it (resume={directory} once that one has stopped)"
        gone_on = found and f"{found[0]} is gone on with beside it"
        print(f"{_in_use(directory)}: {gone_on or begins}", flush=True)
    if not (found or used or apart):
        _tell_of_other(others, remedy)
    for directory in left:
        print(
            f"another unfinished run of these settings: {directory} (resume={directory} goes on "
            "with it)",
            flush=True,
        )
    return found


def _tell_of_other(others: Sequence[tuple[Path, list[str]]], remedy: str) -> None:
    """Print the first of these runs that nobody is at, and in which settings it differs."""
    for directory, differing in others:
        with suppress(PujaxError):
            _lock(directory, remedy).__exit__()
            few = "; ".join(printable(one, 80) for one in differing[:3])
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            print(
                f"a new run begins: of other settings is the unfinished one in {directory} "
                f"({few}{more}), which goes on where these are set back",
                flush=True,
            )
            return


def _fresh(parent: Path, label: str, remedy: str) -> tuple[Path, _Lock]:
    """A new directory named by time and label, locked; no other process gets the same."""
    with on_disk(parent):
        parent.mkdir(parents=True, exist_ok=True)
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    if label:
        plain = re.sub(r"[^\w.=+-]+", "-", label)
        name += "_" + plain.encode()[:150].decode(errors="ignore")  # of 255 that a name may have
    for number in range(1, 10_000):
        directory = parent / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            directory.mkdir(parents=True)  # another process may take the parent back meanwhile
            return directory, _lock(directory, remedy)
    raise ConfigError(f"{parent}: ten thousand runs of one second: choose another run.root")


def _differing(
    stored: Mapping[str, Any], given: Mapping[str, Any], apart: Mapping[str, str] = NOTHING
) -> list[str]:
    """The settings, by dotted key, in which two runs' numbers could differ, and those swept.

    A setting that `stored` lacks is younger than that run, which had what is the default now. So
    is a metric of pairs, which came later; where `stored` has no metrics at all, so is any.
    """
    before, now = flat(stored), flat(given)
    had = {key.split(".")[2] for key in before if key.startswith("eval.metrics.")}
    younger = [
        f"eval.metrics.{name}"
        for name in given["eval"]["metrics"].keys() - had
        if not had or name in PAIRS
    ]
    now = {key: value for key, value in now.items() if not within(key, younger)}
    choosing = now.get("checkpoint.best") is not None
    keys = sorted(
        key
        for key in before.keys() | now.keys()
        if within(key, apart)
        or (
            not within(key, UNTOUCHED) and (choosing or key not in MEASURING) and not of_asking(key)
        )
    )
    pairs = [(key, before.get(key, default_of(key)), now.get(key)) for key in keys]
    return [f"{key} was {was!r}, is {is_!r}" for key, was, is_ in pairs if was != is_]
