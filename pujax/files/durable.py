"""Files that a crash leaves whole: written at once, and lines whose torn tail is left out."""

import errno
import fcntl
import json
import os
import re
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

    Who writes the same file at this moment is waited for: each time it is written whole. Nothing is
    left at that name when the block fails. Raises `DiskError` as `write_whole` does, also for an
    OSError in the block.
    """
    beside = path.with_name(f".{path.name}.new")
    with on_disk(path), _held(beside):
        placed = False
        try:
            yield beside
            flush(beside)
            beside.replace(path)
            placed = True
        finally:
            if not placed:  # or else another process may have that name by now
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


def sweep_files(directory: Path, head: str) -> tuple[Path, Path]:
    """Where a sweep's table, which begins with `head`, and its picture go: sweep.md, sweep.png.

    Raises `DiskError` where another file is there.
    """
    text, picture = directory / "sweep.md", directory / "sweep.png"
    refuse_other(text, head.encode())
    refuse_other(picture, b"pujax", *([b"Matplotlib"] if text.exists() else []))  # of before
    return text, picture


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """A file at `path` that no other process has until the block ends; no link is followed."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _refuse_theirs(path, os.fstat(descriptor))
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever had it gave it another name
    try:
        yield
    finally:
        os.close(descriptor)


def _refuse_theirs(path: Path, found: os.stat_result) -> None:
    """Raise FileExistsError for what no write of ours left: a pipe, or a file of two names.

    To write to the one would wait for its reader, and to the other change a file elsewhere.
    """
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


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
