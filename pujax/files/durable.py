"""Files that a crash leaves whole: written at once, and lines whose torn tail is left out."""

import errno
import fcntl
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pujax.errors import DiskError, RecordError

Line = dict[str, Any]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP)
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP)  # what a file system says that can't flush a folder


def read_jsonl(path: Path) -> list[Line]:
    """The objects of a JSONL file. A torn last line, one without its newline, is left out.

    Raises `RecordError` naming file and line for any other line that isn't a JSON object.
    """
    return [line for line, _ in whole_lines(path)]


def whole_lines(path: Path) -> Iterator[tuple[Line, bytes]]:
    """Each whole line of a JSONL file, as an object and as it stands; errors as in `read_jsonl`."""
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, raw in enumerate(lines, 1):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{path}:{number}: not JSON ({error}): remove this line") from error
        if not isinstance(line, dict):
            raise RecordError(f"{path}:{number}: not a JSON object: remove this line")
        yield line, raw


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` at once: after a crash it holds the old bytes or the new.

    Raises `DiskError` when it can't be written; what was at `path` is still there then.
    """
    with written_whole(path) as beside:
        beside.write_bytes(content)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file to, which takes its place when the block ends.

    It is a new one, so that nothing of the user's has it. Who writes the same file at this moment
    is waited for: each time it is written whole. Nothing is left at that name when the block fails,
    and what a kill left is gone once the file is written again. Raises `DiskError` as `write_whole`
    does, also for an OSError in the block.
    """
    with on_disk(path), _held(path) as (beside, descriptor):
        placed = False
        try:
            yield beside
            with _still_locked(beside, descriptor):
                flush(beside)
                beside.replace(path)
            placed = True
        finally:
            if not placed:
                beside.unlink(missing_ok=True)
        flush(path.parent)


def refuse_unwritable(folder: Path) -> None:
    """Raise `DiskError` where no file can be made in `folder`, which need not be there yet.

    For who writes once the work is done: what can't be kept is not begun.
    """
    there = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), folder)
    with on_disk(folder), tempfile.TemporaryFile(dir=there):
        pass


def refuse_other(path: Path, *marks: bytes) -> None:
    """Raise `DiskError` where something is at `path` whose beginning has none of our `marks`.

    For a file under a plain name in a folder of the user's own, who may have one of that name.
    """
    begun = b""
    with on_disk(path):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                begun = file.read(300)
        if os.path.lexists(path) and not any(mark in begun for mark in marks):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


@contextmanager
def _held(path: Path) -> Iterator[tuple[Path, int]]:
    """A new file beside `path`, of a name that nobody has, and what locks it to the block's end."""
    _clear(path)
    while True:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(beside, descriptor):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # before it was locked another process took it for a leftover
    try:
        yield beside, descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _still_locked(beside: Path, descriptor: int) -> Iterator[None]:
    """Lock what is at the name now: safetensors puts a file of its own there."""
    if _is_at(beside, descriptor):
        yield
        return
    other = os.open(beside, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(other, fcntl.LOCK_EX)
        yield
    finally:
        os.close(other)


def _clear(path: Path) -> None:
    """Wait for who writes `path` now, and remove what those who were killed have left of it.

    What has such a name but is no plain file, or can't be locked, stays as it is.
    """
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.new")
    names: list[str] = []
    with suppress(PermissionError):  # a folder may be written and not listed
        names = os.listdir(path.parent)
    for beside in [path.with_name(name) for name in names if ours.fullmatch(name)]:
        with suppress(OSError):
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(beside, flags)
            try:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    if _is_at(beside, descriptor):
                        beside.unlink()
            finally:
                os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


def flush(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if path.is_file() or error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Say what an OSError within the block means for `path`, in one line, as `DiskError`."""
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        number, reason = _errno(error), str(error)
        if number is None and not isinstance(error, OSError):
            raise
        if number is not None:
            reason = os.strerror(number)
        raise DiskError(f"{path} can't be written ({reason}): {_remedy(number)}") from error


def _errno(error: Exception) -> int | None:
    """The operating system's number of an error; libraries in Rust have it in their words."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _remedy(number: int | None) -> str:
    if number in _FULL:
        return "make room on its disk and start the same command again"
    if number in _FORBIDDEN:
        return "choose a place that you may write to"
    if number == errno.ENOENT:
        return "make the folder that it is to lie in"
    if number in _IN_THE_WAY:
        return "move away what is in its way, or choose another name"
    return "see to its disk, or choose another place"
