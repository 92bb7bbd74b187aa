"""A run's state on disk, by Orbax: whole or not there at all, and refused where it doesn't fit.

    RUN/checkpoints/<n>/   the newest few training states with their stage and step
    RUN/damaged/<n>/       what was one of them until its bytes changed
    RUN/reference/         what alignment started from: parameters, or an adapter, after SFT
    RUN/best/<stage>-<s>/  the parameters after s steps of a stage that one may hand on as its best
    RUN/reference.json     the checksums of what lies beside it; a checkpoint holds its own

n counts the steps of both stages. Orbax writes beside the final name and renames, so a crash or a
full disk in the middle of a save leaves the checkpoints before it as they were.

Of several processes the first alone reads and writes: states are gathered on its host, one array
after the other, and handed out from there. So a run goes on with any number of processes, and only
the first of them needs its directory; its host has to hold a state, 12 bytes a trained parameter.
Orbax could write from all, each its own parts. But a checksum is of a whole array, so that any mesh
can hold what it read against it; and with one writer a rename makes a checkpoint whole, whichever
process dies meanwhile and whatever disks the others see.
"""

import errno
import json
import logging
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from pujax.errors import CheckpointError
from pujax.files.durable import on_disk, write_whole
from pujax.models.sharding import fetched
from pujax.run.processes import from_first, several, to_first, told
from pujax.types import Params, TrainState

_ONE_AT_A_TIME = threading.RLock()
"""Held while Orbax reads or writes: in two threads at once it can fail, or never end."""


@dataclass(frozen=True)
class Place:
    """How far a run has come: `step` steps of `stage` are done."""

    stage: str
    step: int


class _Damaged(CheckpointError):
    """A checkpoint whose bytes are not what was saved."""


class _Foreign(CheckpointError):
    """What another run saved."""


class _Quiet(logging.Filter):
    """Keeps what Orbax logs of its threads off the screen: what failed is raised, and said once."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is none of Orbax's tracebacks."""
        return record.exc_info is None and "raised an exception" not in record.getMessage()


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_Quiet())


class Checkpoints:
    """The checkpoints of the run in `directory`; keeps the newest `keep`.

    `model` describes the student. It is stored beside every state, and a stored one that differs
    is refused before anything is read; so is a state with another `mark`, which somebody took from
    another run, where both have one.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        model: Mapping[str, Any],
        mark: str | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._say = say
        self._directory = directory.resolve()
        self._model = json.loads(json.dumps(model))
        self._mark = {} if mark is None else {"mark": mark}
        self._keep = keep
        self._opened: ocp.CheckpointManager | None = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's, when it is first asked for: who reads a reference needs none, and no folder."""
        if self._opened is None:
            folder = self._directory / "checkpoints"
            with _ONE_AT_A_TIME, on_disk(folder):
                if os.path.lexists(folder):
                    _refuse_closed(folder)
                if several():
                    folder.mkdir(exist_ok=True)  # Orbax would have all of them wait for it
                self._opened = ocp.CheckpointManager(
                    folder,
                    options=ocp.CheckpointManagerOptions(
                        max_to_keep=self._keep,
                        enable_async_checkpointing=False,
                        cleanup_tmp_directories=True,
                        **_by_first(create=False),
                    ),
                )
        return self._opened

    def newest(self, like: TrainState) -> tuple[Place, TrainState] | None:
        """Where the newest whole checkpoint stands and its state; None without a checkpoint.

        The state is laid out and typed as `like` is (whose values are not read). One that is
        damaged is said, moved aside, and the one before it taken. Raises `CheckpointError` for one
        of another model, for one that can't be read at the moment, and when all are damaged.
        """
        states: list[TrainState] = []

        def read() -> Place | None:
            found = self._newest(like)
            if found is None:
                return None
            states.append(found[1])
            return found[0]

        place = told(read)
        return None if place is None else (place, from_first(states[0] if states else None, like))

    def _newest(self, like: TrainState) -> tuple[Place, TrainState] | None:
        while (number := self._manager.latest_step()) is not None:
            try:
                return self._read(number, like)
            except _Damaged as error:
                before = [step for step in self._manager.all_steps() if step < number]
                if not before:
                    raise CheckpointError(
                        f"{error}, and there is no other: remove that folder to begin again from "
                        "the start, or begin another run (resume=never, or another run.dir)"
                    ) from error
                aside = self._move_aside(number)
                self._say(
                    f"{error}; going on from the one before it, {max(before)}; what is left of it "
                    f"is in {aside}"
                )
        return None

    def _move_aside(self, number: int) -> Path:
        """Where checkpoint `number` lies now, which counts no more."""
        aside = self._directory / "damaged" / str(number)
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        try:
            aside.parent.mkdir(exist_ok=True)
            (self._directory / "checkpoints" / str(number)).rename(aside)
        except OSError as error:
            raise CheckpointError(
                f"{self._directory}/checkpoints/{number} is damaged and can't be moved to {aside} "
                f"({error.strerror}): move it there and start the same command again"
            ) from error
        self._manager.reload()
        return aside

    def save(self, number: int, place: Place, state: TrainState) -> None:
        """Save `state` as checkpoint `number`, unless it is there already.

        Raises `CheckpointError` when it can't be written; the checkpoints before it stay.
        """
        if number in self.numbers():
            return
        whole = to_first(state)
        told(lambda: self._save(number, place, whole))

    def _save(self, number: int, place: Place, state: TrainState) -> None:
        meta = {"stage": place.stage, "step": place.step, "model": self._model} | self._mark
        meta["checksums"] = checksums(state) | _sealed(place)
        meta["checksum"] = _of_meta(meta)
        self._room_for(state)
        items = {"state": ocp.args.StandardSave(_fields(state)), "meta": ocp.args.JsonSave(meta)}
        try:
            with _ONE_AT_A_TIME:
                self._manager.save(number, args=ocp.args.Composite(**items))
        except Exception as error:
            kept = self._manager.latest_step()
            for leftover in (self._directory / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
            reason = _first_line(error)
            raise CheckpointError(
                f"checkpoint {number} could not be written to {self._directory}/checkpoints "
                f"({reason}); the last good one is {kept}: {_cure(reason)} and start the same "
                "command again"
            ) from error

    def numbers(self) -> list[int]:
        """The numbers of the checkpoints that are kept."""
        return told(lambda: sorted(self._manager.all_steps()))

    def save_reference(self, params: Params) -> None:
        """Keep what alignment starts from; once a run. Raises `CheckpointError` if it can't."""
        self._save_params(self._directory / "reference", params)

    def restore_reference(self, params: Params) -> Params:
        """What alignment started from, laid out as `params` is.

        Raises `CheckpointError` when it is missing or damaged. Where its checksums are missing, as
        those of a pujax before there were any, that is said.
        """
        path = self._directory / "reference"
        return self._restore_params(path, params, "alignment starts from it")

    def save_best(self, stage: str, step: int, params: Params) -> None:
        """Keep parameters that may be the stage's best, once. Raises `CheckpointError`."""
        self._save_params(self._directory / "best" / f"{stage}-{step}", params)

    def restore_best(self, stage: str, step: int, params: Params) -> Params:
        """What `save_best` kept, laid out as `params` is. Raises `CheckpointError`."""
        path = self._directory / "best" / f"{stage}-{step}"
        return self._restore_params(path, params, f"{stage} was best there")

    def keep_best(self, stage: str, steps: Iterable[int]) -> None:
        """Remove what `save_best` kept of `stage`, but for these steps."""
        kept = {f"{stage}-{step}" for step in steps}
        folder = self._directory / "best"

        def remove() -> None:
            with on_disk(folder):
                for path in folder.glob(f"{stage}-*"):
                    if path.name.removesuffix(".json") in kept:
                        continue
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink()

        told(remove)

    def _save_params(self, path: Path, params: Params) -> None:
        def there() -> bool:
            with on_disk(path):
                return path.is_dir()

        if told(there):
            return
        whole = to_first(params)
        told(lambda: self._write_params(path, whole))

    def _write_params(self, path: Path, params: Params) -> None:
        with on_disk(path):
            path.parent.mkdir(exist_ok=True)
        self._room_for(params)
        content = json.dumps(checksums(params) | self._mark).encode()
        try:
            write_whole(path.with_suffix(".json"), content)  # first: what is there has checksums
            with _ONE_AT_A_TIME, ocp.StandardCheckpointer(**_by_first()) as saver:
                saver.save(path, params)
        except Exception as error:
            reason = _first_line(error)
            raise CheckpointError(
                f"{path} could not be written ({reason}): {_cure(reason)} and start the same "
                "command again"
            ) from error

    def _restore_params(self, path: Path, params: Params, why: str) -> Params:
        read: list[Params] = []
        told(lambda: read.append(self._read_params(path, params, why)))
        return from_first(read[0] if read else None, params)

    def _read_params(self, path: Path, params: Params, why: str) -> Params:
        kept = path.with_suffix(".json")
        try:
            with _ONE_AT_A_TIME, ocp.StandardCheckpointer(**_by_first()) as saver:
                restored = saver.restore(path, _abstract(params))
            if kept.exists():
                saved = json.loads(kept.read_bytes())
                _verify(checksums(restored), saved, str(path))
                self._refuse_foreign(path, saved)
            else:
                self._say(f"{kept} is not there: what was read of {path} is not held against it")
        except _Foreign:
            raise
        except Exception as error:
            if reason := _hindrance(error, path):
                raise _passing(path, reason) from error
            raise CheckpointError(
                f"{path} can't be read ({_first_line(error)}), and {why}: put back a copy, or "
                "begin another run with resume=never and without run.dir"
            ) from error
        return restored

    def close(self) -> None:
        """Release what Orbax holds."""
        if self._opened is not None:
            with _ONE_AT_A_TIME:
                self._opened.close()

    def _read(self, number: int, like: TrainState) -> tuple[Place, TrainState]:
        """A checkpoint, held against its checksums where it has any."""
        folder = f"{self._directory}/checkpoints/{number}"

        def restored(**items: Any) -> Any:
            try:
                with _ONE_AT_A_TIME:
                    return self._manager.restore(number, args=ocp.args.Composite(**items))
            except Exception as error:
                if reason := _hindrance(error, Path(folder)):
                    raise _passing(folder, reason) from error
                raise _Damaged(f"{folder} can't be read ({_first_line(error)})") from error

        meta = restored(meta=ocp.args.JsonRestore())["meta"]
        if not isinstance(meta, dict) or meta.keys() not in _METAS:
            raise _Damaged(f"{folder} can't be read (its meta has other keys than were saved)")
        if "checksum" in meta and meta["checksum"] != _of_meta(meta):
            raise _Damaged(f"{folder} is damaged: its meta (place, model) is not what was saved")
        try:
            place, model = Place(meta["stage"], meta["step"]), dict(meta["model"])
        except (TypeError, ValueError) as error:
            raise _Damaged(f"{folder} can't be read (in its meta: {error})") from error
        self._refuse_foreign(folder, meta)
        if differing := _differences(model, self._model):
            raise CheckpointError(
                f"{folder} is of another model ({differing}): begin another run (resume=never, or "
                "another run.dir)"
            )
        fields = restored(state=ocp.args.StandardRestore(_abstract(_fields(like))))["state"]
        state = TrainState(**fields)
        if meta.get("checksums"):  # a pujax before them left none
            _verify(checksums(state) | _sealed(place), meta["checksums"], folder)
        return place, state

    def _refuse_foreign(self, place: Path | str, saved: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` for what was saved with another mark."""
        ours, theirs = self._mark.get("mark"), saved.get("mark")
        if None not in (ours, theirs) and ours != theirs:
            raise _Foreign(
                f"{place} was saved by another run: move it away, and put back this one's where "
                "there was one"
            )

    def _room_for(self, tree: Any) -> None:
        """Refuse to begin a save that the disk can't hold."""
        need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self._directory).free
        if free < need:
            raise CheckpointError(
                f"{self._directory}: a checkpoint takes {need / 2**20:.0f} MiB and "
                f"{free / 2**20:.0f} MiB are free; the last good one is "
                f"{self._manager.latest_step()}: make room and start the same command again"
            )


def _fields(state: TrainState) -> dict[str, Any]:
    """A state as it lies on disk: without a head it is what it was before there were any."""
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return {name: value for name, value in fields.items() if value is not None}


def _abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree, without its values.

    Of several processes the first reads arrays of the host alone, which here take no memory.
    """
    if several():
        return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _by_first(**settings: Any) -> dict[str, Any]:
    """What has Orbax leave other processes alone, and `settings` beside it; nothing without any."""
    if not several():
        return {}
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="pujax"
    )
    return {"multiprocessing_options": alone} | settings


def checksums(tree: Any) -> dict[str, int]:
    """A CRC-32 of each leaf's type, shape and bytes, by the leaf's path; about 1 GB a second.

    Of arrays that lie in several processes too, where each of them has to ask.
    """

    def checksum(leaf: Any) -> int:
        value = np.ascontiguousarray(leaf)
        start = zlib.crc32(f"{value.dtype} {np.shape(leaf)}".encode())
        return zlib.crc32(value.reshape(-1).view(np.uint8).data, start)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if several():  # one after the other: they are gathered in the same order everywhere
        return {jax.tree_util.keystr(path): checksum(fetched(leaf)) for path, leaf in leaves}
    with ThreadPoolExecutor(2) as pool:  # crc32 lets go of the interpreter
        made = pool.map(lambda leaf: checksum(leaf[1]), leaves)
        return {
            jax.tree_util.keystr(path): value for (path, _), value in zip(leaves, made, strict=True)
        }


_FIRST = {"stage", "step", "model"}
_SEALED = _FIRST | {"checksums", "checksum"}
_METAS = (_FIRST, _FIRST | {"checksums"}, _SEALED, _SEALED | {"mark"})
"""The keys of a meta at first, since there are checksums, without a mark, and now: where one is
missing because a bit of its name has changed, that must not pass for a meta of before."""


def _of_meta(meta: Mapping[str, Any]) -> int:
    """A CRC-32 of all that a meta holds but this."""
    rest = {key: value for key, value in meta.items() if key != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _sealed(place: Place) -> dict[str, int]:
    return {"place": zlib.crc32(f"{place.stage} {place.step}".encode())}


def _verify(now: Mapping[str, int], saved: Mapping[str, int], place: str) -> None:
    """Raise `_Damaged` where a leaf's checksum is not what it was when it was saved."""
    wrong = [name for name in now if now[name] != saved.get(name)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        raise _Damaged(f"{place} is damaged: {wrong[0]}{more} differ from what was saved")


_LOST = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.ENAMETOOLONG)
"""What the system says of a file that is gone, or of a name or a size that was read wrong."""

_PASSING = (
    *(errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)
"""What it says of a file that may be whole; TensorStore's errors have its words alone."""


def _hindrance(error: BaseException | None, folder: Path) -> str:
    """What of the machine kept `folder` from being read; nothing where its bytes are at fault."""
    while error is not None:
        if isinstance(error, OSError) and error.errno not in (None, *_LOST):
            return os.strerror(error.errno)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return "out of memory"
        for said in map(os.strerror, _PASSING):
            if said in str(error):
                return said
        error = error.__cause__ or error.__context__
    return _unreadable(folder)


def _passing(folder: Path | str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} can't be read at the moment ({reason}): see to that and start the same command "
        "again; it is left as it is"
    )


def _refuse_closed(folder: Path) -> None:
    """Raise `CheckpointError` for what Orbax takes for an empty folder, and can't write to."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no folder, and a run's checkpoints go there: move it away, or choose "
            "another run.dir"
        )
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{folder}: can't be read and written: mend its permissions and start the same command "
            "again"
        )


def _unreadable(folder: Path) -> str:
    """Why some file below `folder` can't be read; nothing where each can."""

    def fail(error: OSError) -> None:
        raise error

    try:
        for where, _, names in os.walk(folder, onerror=fail):
            for name in names:
                with open(os.path.join(where, name), "rb") as file:
                    while file.read(2**24):
                        pass
    except OSError as error:
        return "" if error.errno in _LOST else os.strerror(error.errno or 0)
    return ""


def _first_line(error: Exception) -> str:
    """What the system said where it was the system, else the first line."""
    said = re.search(r"No space left on device|Read-only file system|Permission denied", str(error))
    return said[0] if said else (str(error).strip() or type(error).__name__).splitlines()[0]


def _cure(reason: str) -> str:
    if reason in ("Permission denied", "Read-only file system"):
        return "mend its permissions"
    return "make room"


def _differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The settings in which two descriptions differ, on one line."""
    parts = [
        f"{name} {stored[name]!r} there, {given.get(name)!r} here"
        for name in sorted(stored)  # what is younger than the checkpoint says nothing about it
        if stored[name] != given.get(name)
    ]
    return "; ".join(parts)
