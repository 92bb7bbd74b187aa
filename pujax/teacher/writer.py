"""The store of anchors, as it is written: by several processes at once, and losing nothing.

The lock file's bytes are what processes lock (POSIX record locks, which the kernel drops when a
process dies): byte 0 to append, and byte 1 + a number from the key while that key is being asked,
so two processes never ask for the same answer.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pujax.errors import StoreError
from pujax.teacher.store import (
    TAIL,
    Contents,
    Mark,
    check_plain,
    check_torn,
    digest,
    failures_path,
    parse,
)
from pujax.text import counted

FULL = (errno.ENOSPC, errno.EDQUOT)

BALLAST = 1 << 20  # bytes set aside on the disk for the answers in flight when it is full


class AnchorStore:
    """The anchors in `path`, open for collecting by this process and others at the same time.

    Opening mends a torn tail; `repairs` tells of it, and of what was put back after another program
    had replaced the file, as an editor's save does. One process opens a store once: its record
    locks are the process's own. Processes that reach it by a symlink share the lock file of what
    that leads to; the failures and what could not be stored go by the name given.
    """

    def __init__(self, path: Path, contents: Contents | None = None) -> None:
        _refuse_names_kept(path)
        self.path = path
        self.contents = contents or Contents(path)
        self.repairs: list[str] = []
        self.full = False
        self._lock_path = Path(f"{os.path.realpath(path)}.lock")
        self._files: dict[Path, int] = {}
        self._marks: dict[Path, Mark] = {}
        self._claims: set[str] = set()
        self._threads = threading.Lock()  # answers are written by a thread of their own
        self._replaced = False
        self._kept: dict[Path, set[bytes]] = {}  # what is beside the store, or in the temp folder
        self._journal_kept = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _open(self._lock_path)
            self._ballast = _unnamed(path.parent)
            self._journal = _unnamed(path.parent)  # this process's lines, should the file lose them
            with contextlib.suppress(OSError):  # a disk that is full already
                os.write(self._ballast, bytes(BALLAST))
            with self._locked():
                self._descriptor(path)
                for file in (path, failures_path(path)):
                    if file.exists():
                        self._mend(file)
            _sync_folder(path.parent)
        except OSError as error:
            raise StoreError(
                f"{path}: can't open the store for writing: {error.strerror}: choose another "
                "`store`, or mend the permissions"
            ) from error
        try:
            self.refresh()
        except StoreError:
            self._let_go()
            raise

    def close(self) -> None:
        """Let go of the files and of every claim, once this process's answers are all in place.

        Raises `StoreError` when they can't be put there, once for a store.
        """
        try:
            with self._locked():
                if self._is_replaced():
                    self._put_back()
        except (OSError, StoreError) as error:
            if not self._journal_kept:  # or else it has been told
                raise self._rescued(error, ()) from error
        finally:
            self._let_go()
        for kept, lines in self._kept.items():
            answers = counted(len(lines), "answer")
            self.repairs.append(
                f"{kept}: has {answers} of this run, which the store could not take"
            )

    def _let_go(self) -> None:
        for descriptor in (*self._files.values(), self._lock, self._ballast, self._journal):
            os.close(descriptor)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        while True:
            self._keep_lock()
            fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, 0)
            if _is_at(self._lock, self._lock_path):
                break
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, 0)

    def _keep_lock(self) -> None:
        """Where the lock file was deleted or replaced, claim in the new one what is claimed."""
        with self._threads:
            if _is_at(self._lock, self._lock_path):
                return
            old, self._lock = self._lock, _open(self._lock_path)
            os.close(old)
            for key in self._claims:
                with contextlib.suppress(OSError):
                    _claim(self._lock, key)

    def _mend(self, file: Path) -> None:
        """End the file with a whole line: under the lock nobody is in the middle of writing one."""
        descriptor = self._descriptor(file)
        size = os.fstat(descriptor).st_size
        if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
            return
        tail, start = b"", size
        while start and b"\n" not in tail:
            start = max(0, start - 65536)
            tail = os.pread(descriptor, size - start, start)
        torn = tail[tail.rfind(b"\n") + 1 :]
        with contextlib.suppress(StoreError):
            parse(torn, str(file))
            os.write(descriptor, b"\n")
            os.fsync(descriptor)
            self.repairs.append(f"{file}: ended the last record, which lacked its newline")
            return
        check_torn(torn, file)
        os.ftruncate(descriptor, size - len(torn))
        os.fsync(descriptor)
        self.repairs.append(f"{file}: cut off a torn last line of {len(torn)} bytes, to ask again")

    def _descriptor(self, file: Path) -> int:
        """The open file; most stores never have failures, so theirs is made when one comes."""
        if file not in self._files:
            descriptor = _open(file)
            if os.fstat(descriptor).st_nlink > 1:
                os.close(descriptor)
                raise StoreError(  # who collects by that name has another lock file
                    f"{file}: has another name too, as a hard link: remove one of them, or put a "
                    "copy in its place"
                )
            self._files[file] = descriptor
            _sync_folder(file.parent)
        return self._files[file]

    def take_up(self) -> None:
        """Put in what earlier runs kept beside the store, and add .taken to those files' names.

        Each answer once. A file with a line that is no record stays; `repairs` tells of each.
        """
        try:
            with self._locked():
                for file in (self.path, failures_path(self.path)):
                    for kept in kept_beside(file):
                        self.refresh()  # the one before may have had the same answers
                        self._take_up(kept, file)
            self.refresh()
        except OSError as error:
            raise StoreError(
                f"{self.path}: can't write: {error.strerror}: {_remedy(error)}"
            ) from error

    def _take_up(self, kept: Path, file: Path) -> None:
        failed = file != self.path
        known = self.contents.failed if failed else self.contents.answered
        with kept.open("rb") as lines:
            # A run that keeps more in it now does so before this, or in a file of its own.
            fcntl.flock(lines, fcntl.LOCK_EX)
            if not _is_at(lines.fileno(), kept):
                return
            new: dict[bytes, bytes] = {}
            try:
                for number, raw in enumerate(lines, 1):
                    if not raw.isspace():
                        key = digest(parse(raw, f"{kept}:{number}", failed)["key"])
                        if key not in known:
                            new[key] = raw if raw.endswith(b"\n") else raw + b"\n"
            except StoreError as error:
                self.repairs.append(f"{error}; until then the answers in it wait")
                return
            if new:
                self._add(file, b"".join(new.values()))
            _put_aside(kept)  # it may hold another answer to a known key, or be somebody's copy
        _sync_folder(kept.parent)
        self.repairs.append(
            f"{kept}: {counted(len(new), 'answer')} in it that the store lacked, put into {file}"
        )

    def refresh(self) -> None:
        """Take in what this process and others have written since the last time."""
        with self._threads:
            self._replaced = not self.contents.refresh() or self._replaced

    def claim(self, key: str) -> bool:
        """Whether this process may ask for `key`: False while another one is asking."""
        try:
            self._keep_lock()
        except OSError as error:
            raise StoreError(f"{self._lock_path}: {error.strerror}: {_remedy(error)}") from error
        try:
            _claim(self._lock, key)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise StoreError(f"{self.path}: no file locks here: {error.strerror}") from error
        self._claims.add(key)
        return True

    def release(self, key: str) -> None:
        """Give up the claim on `key`."""
        self._claims.discard(key)
        fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, _claim_byte(key))

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Put the records on the disk: a `reason` sends one to the failures. Returns after fsync.

        When the disk is full the space set aside for this moment is used, and `full` becomes true.
        Raises `StoreError` when even that does not help or the store is gone; whole lines stay,
        nothing torn does, and what the store can't take is kept elsewhere.
        """
        try:
            with self._locked():
                self._append(records)
        except (OSError, StoreError) as error:
            raise self._rescued(error, records) from error

    def append_lacking(
        self,
        records: Sequence[dict[str, Any]],
        lacking: Callable[[Sequence[dict[str, Any]]], Sequence[dict[str, Any]]],
    ) -> tuple[int, list[dict[str, Any]]]:
        """Put in, as `append` does, those of `records` that are `lacking` once the store is read.

        Under the lock, so that nobody puts in the same meanwhile. Returns how many were put in, and
        those whose keys other processes ask for now: they are not put in. Raises `StoreError` as
        `append` does, but keeps nothing elsewhere: it is for what lies in another file anyway.
        """
        taken: list[str] = []
        try:
            with self._locked():
                self.refresh()
                if self._is_replaced():
                    self._put_back()
                chosen = lacking(records)
                taken = [record["key"] for record in chosen if self.claim(record["key"])]
                free = set(taken)
                ours = [record for record in chosen if record["key"] in free]
                self._append(ours)
            return len(ours), [record for record in chosen if record["key"] not in free]
        except OSError as error:
            raise self._unwritten(error) from error
        finally:
            for key in taken:
                self.release(key)

    def _append(self, records: Sequence[dict[str, Any]]) -> None:
        if self._is_replaced():
            self._put_back()
        for file in (self.path, failures_path(self.path)):
            failures = file != self.path
            lines = [_line(record) for record in records if ("reason" in record) == failures]
            if lines:
                self._add(file, b"".join(lines))
        if self._is_replaced():
            self._put_back()

    def _add(self, file: Path, data: bytes) -> None:
        self._mend(file)  # another program may have left half a line since
        descriptor = self._descriptor(file)
        self._write(descriptor, data)
        os.fsync(descriptor)
        with contextlib.suppress(OSError):  # a full disk has had what matters more
            os.write(self._journal, b"\n" + data)
        found = os.fstat(descriptor)
        inode = (found.st_dev, found.st_ino)
        self._marks[file] = Mark(found.st_size, inode=inode, tail=data[-TAIL:])

    def _write(self, descriptor: int, data: bytes) -> None:
        start = os.fstat(descriptor).st_size
        written, freed = 0, False
        try:
            while written < len(data):
                try:
                    written += os.write(descriptor, data[written:])
                except OSError as error:
                    if error.errno not in FULL or freed:
                        raise
                    freed = True
                    os.ftruncate(self._ballast, 0)
            self.full = self.full or freed
        finally:
            if written < len(data):
                os.ftruncate(descriptor, start + data[:written].rfind(b"\n") + 1)

    def _is_replaced(self) -> bool:
        """Whether another program has put something else in place of a file or into it."""
        return self._replaced or not all(
            _is_at(descriptor, file) and self._marks.get(file, Mark()).stands(descriptor)
            for file, descriptor in self._files.items()
        )

    def _put_back(self) -> None:
        """Take up the files that are there now and add what they lack of this process's answers."""
        self._replaced = True  # until all of this is done
        _wait_until_still(self.path)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._marks.clear()
        self._descriptor(self.path)
        for file in (self.path, failures_path(self.path)):
            if file.exists():
                self._mend(file)
        ours = self._written()
        contents = Contents(self.path, self.contents.take)
        lost = 0
        for raw, key, failed in ours:
            if key not in (contents.failed if failed else contents.answered):
                file = failures_path(self.path) if failed else self.path
                self._write(self._descriptor(file), raw)
                lost += 1
        for descriptor in self._files.values():
            os.fsync(descriptor)
        contents.refresh()
        with self._threads:
            self.contents, self._replaced = contents, False
        self.repairs.append(
            f"{self.path}: another program replaced it while collecting; "
            f"{counted(lost, 'answer')} of this run, lost with that, put back"
        )

    def _unwritten(self, error: OSError) -> StoreError:
        return StoreError(f"{self.path}: can't write: {error.strerror}: {_remedy(error)}")

    def _rescued(
        self, error: OSError | StoreError, records: Sequence[dict[str, Any]]
    ) -> StoreError:
        """The error to raise, once `records` and all that may be lost with the store are safe."""
        if isinstance(error, StoreError):
            said = f"{error}; another program wrote this while collecting"
        else:
            said = str(self._unwritten(error))
        lines = {_line(record): "reason" in record for record in records}
        if not self._journal_kept and not (isinstance(error, OSError) and error.errno in FULL):
            lines = {raw: failed for raw, _, failed in self._written()} | lines
            self._journal_kept = True
        files = []
        for store, failed in ((self.path, False), (failures_path(self.path), True)):
            data = [raw for raw, is_failure in lines.items() if is_failure == failed]
            if data:
                files.append(self._keep(store, data))
        if not files:
            return StoreError(said)
        if None in files:
            return StoreError(f"{said}; the last answers could not be kept anywhere")
        where = " and ".join(map(str, files))
        home = self.path.parent
        remedy = "the next collection puts them into the store"
        if any(file is not None and file.parent != home for file in files):
            remedy = f"move that beside the store, and {remedy}"
        return StoreError(f"{said}; answers of this run are in {where}: {remedy}")

    def _keep(self, store: Path, lines: list[bytes]) -> Path | None:
        """The file, beside the store or else in the temp folder, that now has the lines too."""
        stem, suffix = f"{store.stem}.kept", store.suffix
        for folder in (store.parent, Path(tempfile.gettempdir())):
            for number in range(1, 1000):
                file = folder / (f"{stem}{suffix}" if number == 1 else f"{stem}{number}{suffix}")
                try:
                    with file.open("ab" if file in self._kept else "xb") as out:
                        fcntl.flock(out, fcntl.LOCK_EX)
                        if not _is_at(out.fileno(), file):  # taken up just now
                            continue
                        try:
                            out.write(b"".join(lines))
                            out.flush()
                            os.fsync(out.fileno())
                        except OSError:
                            if file not in self._kept:  # or a full disk leaves an empty one
                                file.unlink()
                            raise
                except FileExistsError:  # of another run
                    continue
                except OSError:
                    break
                self._kept.setdefault(file, set()).update(lines)
                return file
        return None

    def _written(self) -> list[tuple[bytes, bytes, bool]]:
        """Each line that this process wrote, with its digest and whether it is a failure."""
        with open(os.dup(self._journal), "rb") as lines:
            lines.seek(0)
            found = []
            for raw in lines:
                with contextlib.suppress(StoreError):  # a line that found no room in the journal
                    record = parse(raw, "")
                    found.append((raw, digest(record["key"]), "reason" in record))
        os.lseek(self._journal, 0, os.SEEK_END)
        return found


def kept_beside(store: Path) -> list[Path]:
    """The files with answers that a run could not put into `store`, or into its failures.

    What has a lock file is a store of its own, by a pujax that took such a name for one; a pipe,
    which may be read without end, and a folder are nothing of ours.
    """
    name = re.compile(rf"{re.escape(store.stem)}\.kept\d*{re.escape(store.suffix)}")
    with contextlib.suppress(OSError):
        found = [path for path in store.parent.iterdir() if name.fullmatch(path.name)]
        return sorted(
            path
            for path in found
            if path.is_file() and not path.with_name(f"{path.name}.lock").exists()
        )
    return []


def _put_aside(kept: Path) -> None:
    """Take a file out of those that wait, under a name that nothing has."""
    numbers = itertools.chain([""], itertools.count(2))
    free = (kept.with_name(f"{kept.name}.taken{number}") for number in numbers)
    kept.rename(next(path for path in free if not os.path.lexists(path)))


def _refuse_names_kept(store: Path) -> None:
    """Raise `StoreError` where another store's failures or kept answers would have this name."""
    for name in (store.name, os.path.basename(os.path.realpath(store))):
        if re.search(r"\.(failed|kept\d*)(\.[^.]*)?$", name):
            raise StoreError(
                f"{store}: pujax names so what it keeps beside a store: name the store otherwise"
            )


def take_up(store: Path, contents: Contents, say: Callable[[str], None]) -> None:
    """Put into `store` what runs before kept beside it, as `AnchorStore.take_up` does, and say so.

    Where it can't be written that is said, and all stays as it is.
    """
    waiting = [*kept_beside(store), *kept_beside(failures_path(store))]
    if not waiting:
        return
    try:
        book = AnchorStore(store, contents)
        try:
            book.take_up()
        finally:
            book.close()
    except StoreError as error:
        say(f"{waiting[0]} has answers that {store} lacks: {error}")
        return
    for repair in book.repairs:
        say(repair)


def _open(path: Path) -> int:
    check_plain(path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def _remedy(error: OSError) -> str:
    """What to do about it."""
    if error.errno in FULL:
        return "make room, run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "mend the permissions, run the same command again"
    return "see that the folder is there and the store a plain file, run the same command again"


def _unnamed(folder: Path) -> int:
    """A file without a name: its space comes back when the process ends, however it ends."""
    descriptor, name = tempfile.mkstemp(dir=folder)
    os.unlink(name)
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _wait_until_still(path: Path) -> None:
    """Wait, a few seconds at most, until nobody writes the file: not every save is at once."""
    before = -1
    for _ in range(20):
        size = path.stat().st_size if path.exists() else 0
        if size == before:
            return
        before = size
        time.sleep(0.2)


def _sync_folder(path: Path) -> None:
    """Make the names of new files durable too."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _claim(lock: int, key: str) -> None:
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _claim_byte(key))


def _claim_byte(key: str) -> int:
    return 1 + int(key[:15], 16)


def _line(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate: legal in JSON, not in UTF-8
        return json.dumps(record).encode() + b"\n"
