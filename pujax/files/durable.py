"""Files that a crash leaves whole: written at once, and lines whose torn tail is left out."""

import errno
import fcntl
import json
import os
import re
import secrets
import stat
import tempfile
import zlib
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
    """A new file beside `path` to write to, which takes its place when the block ends.

    Its name is nobody else's (see `begun_for`), and the block writes to the file that is there. Who
    writes `path` at this moment is waited for: each time it is written whole. Nothing is left
    beside it when the block fails, and what a kill leaves goes when `path` is next written. Raises
    `DiskError` as `write_whole` does, also for an OSError in the block.
    """
    with on_disk(path), _held_beside(path) as beside:
        placed = False
        try:
            yield beside
            flush(beside)
            beside.replace(path)
            placed = True
        finally:
            if not placed:
                beside.unlink(missing_ok=True)
        flush(path.parent)


def name_beside(path: Path) -> Path:
    """A name beside `path` that nothing has yet: .NAME.DIGITS.new."""
    drawn = secrets.token_hex(4)
    return path.with_name(f".{path.name}.{drawn}{_seal(path.name, drawn)}.new")


def begun_for(name: str) -> str | None:
    """The name that a file which `written_whole` began was to get; None for any other file.

    Of the sixteen digits in such a name half are drawn by chance, and half are a checksum of those
    and of NAME: of other names that look like one, one in four thousand million passes for it.
    """
    found = re.fullmatch(r"\.(.+)\.([0-9a-f]{8})([0-9a-f]{8})\.new", name, re.DOTALL)
    return found[1] if found and found[3] == _seal(found[1], found[2]) else None


def _seal(name: str, drawn: str) -> str:
    return f"{zlib.crc32(os.fsencode(f'{name} {drawn}')):08x}"


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
def _held_beside(path: Path) -> Iterator[Path]:
    """A new file beside `path`, locked until the block ends."""
    _clear_beside(path)
    while True:
        beside = name_beside(path)
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(beside, descriptor):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # before it was locked another process took it for what a kill left
    try:
        yield beside
    finally:
        os.close(descriptor)


def _clear_beside(path: Path) -> None:
    """Wait for who writes `path` at this moment, and remove what a kill left of writing it.

    What can't be locked stays: somebody may be writing to it.
    """
    names: list[str] = []
    with suppress(OSError):  # a folder may be written and not listed
        names = [name for name in os.listdir(path.parent) if begun_for(name) == path.name]
    for beside in map(path.with_name, names):
        with suppress(OSError):
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(beside, flags)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if stat.S_ISREG(os.fstat(descriptor).st_mode) and _is_at(beside, descriptor):
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
    """The operating system's number of an error; libraries in Rust and C have it in their words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if re.search(r"\d+ requested and \d+ written", str(error)):  # numpy's, of fewer than it gave
        return errno.ENOSPC
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _remedy(number: int | None) -> str:
    if number in _FULL:
        return "make room on its disk and start the same command again"
    if number in _FORBIDDEN:
        return "choose a place that you may write to"
    if number == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if number == errno.ENOENT:
        return "make the folder that it is to lie in"
    if number in _IN_THE_WAY:
        return "move away what is in its way, or choose another name"
    return "see to its disk, or choose another place"
