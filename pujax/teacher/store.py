"""The store of anchors: each answer once, and kept.

The anchor store is a JSONL file that only grows, one answer a line. Beside `anchors.jsonl` stand
`anchors.failed.jsonl` (answers that were refused, filtered or empty: kept for the record, never
used as anchors) and `anchors.jsonl.lock`. The lock file's bytes are what processes lock (POSIX
record locks, which the kernel drops when a process dies): byte 0 to append, and byte 1 + a number
from the key while that key is being asked, so two processes never ask for the same answer.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pujax.errors import StoreError
from pujax.records import Anchor, Messages, canonical, messages_key
from pujax.teacher.prompts import Digests
from pujax.teacher.settings import TeacherConfig

FORMAT = 1

FIELDS = {"key", "id", "messages", "response", "finish_reason", "model", "usage", "cost", "created"}

BALLAST = 1 << 20  # bytes set aside on the disk for the answers in flight when it is full


def anchor_key(teacher: TeacherConfig, messages: Messages) -> str:
    """The sha256 of the teacher's model, its sampling parameters and the messages."""
    asked = {
        "model": teacher.model,
        "sampling": sampling_of(teacher),
        "messages": [{"role": turn["role"], "content": turn["content"]} for turn in messages],
    }
    return hashlib.sha256(canonical(asked)).hexdigest()


def sampling_of(teacher: TeacherConfig) -> dict[str, Any]:
    """The settings that change what the teacher says."""
    return {
        "system": teacher.system,
        "temperature": None if teacher.temperature is None else float(teacher.temperature),
        "max_tokens": teacher.max_tokens,
        **dict(teacher.extra_body),
    }


# --- the store ------------------------------------------------------------------------------------


def failures_path(store: Path) -> Path:
    """Where the answers of `store` that can't be anchors are kept."""
    return store.with_name(f"{store.stem}.failed{store.suffix}")


def read_failures(store: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of the answers that can't be anchors; none when there is no such file."""
    file = failures_path(store)
    return read_records(file) if file.exists() else iter(())


def read_records(path: Path, start: int = 0, line: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each whole record from byte `start` on, with the byte after it; a torn tail is left out.

    Raises `StoreError` for a record of another format or a line that isn't one.
    """
    try:
        with path.open("rb") as lines:
            lines.seek(start)
            for number, raw in enumerate(lines, line):
                if not raw.endswith(b"\n"):
                    return
                start += len(raw)
                yield start, _record(raw, path, number if line else None)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}: check `store`") from error


def _record(raw: bytes, path: Path, number: int | None) -> dict[str, Any]:
    place = f"{path}:{number}" if number else str(path)
    try:
        record = json.loads(raw)
        found = record["format"] if isinstance(record, dict) else None
    except KeyError:
        found = None
    except ValueError as error:
        raise StoreError(f"{place}: not a record ({error}): take this line out") from error
    if found != FORMAT:
        raise StoreError(
            f"{place}: store format {found}, this pujax has format {FORMAT}: "
            "collect into another file, or use the pujax that wrote it"
        )
    lacking = FIELDS - record.keys()
    if lacking or not re.fullmatch("[0-9a-f]{64}", record["key"]):
        what = f"without {sorted(lacking)}" if lacking else f"with key {record['key']!r}"
        raise StoreError(f"{place}: a record {what}: take this line out")
    return record


class AnchorStore:
    """The anchors in `path`, open for collecting by this process and others at the same time.

    `answered` and `failed` hold the first half of each key. Opening mends a torn tail and tells of
    it in `repairs`. One process opens a store once: its record locks are the process's own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.repairs: list[str] = []
        self.full = False
        self._read = dict.fromkeys((path, failures_path(path)), 0)
        self._files: dict[Path, int] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _open(path.with_name(path.name + ".lock"))
            self._ballast, name = tempfile.mkstemp(dir=path.parent)
            os.unlink(name)  # so the space comes back when the process ends, however it ends
            with contextlib.suppress(OSError):  # a disk that is full already
                os.write(self._ballast, bytes(BALLAST))
            with self._locked():
                self._files[path] = _open(path)
                for file in self._read:
                    if file.exists():
                        self._mend(file)
            _sync_folder(path.parent)
        except OSError as error:
            raise StoreError(
                f"{path}: can't open the store for writing: {error.strerror}: choose another "
                "`store`, or mend the permissions"
            ) from error
        self.answered = Digests()
        self.failed = Digests()
        self._known = {path: self.answered, failures_path(path): self.failed}
        try:
            self.refresh()
        except StoreError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the files and of every claim."""
        for known in self._known.values():
            known.close()
        for descriptor in (*self._files.values(), self._lock, self._ballast):
            os.close(descriptor)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, 0)

    def _mend(self, file: Path) -> None:
        """End the file with a whole line: under the lock nobody is in the middle of writing one."""
        descriptor = self._descriptor(file)
        size = os.fstat(descriptor).st_size
        tail, start = b"", size
        while start and b"\n" not in tail:
            start = max(0, start - 65536)
            tail = os.pread(descriptor, size - start, start)
        torn = tail[tail.rfind(b"\n") + 1 :]
        if not torn:
            return
        with contextlib.suppress(StoreError):
            _record(torn, file, None)
            os.write(descriptor, b"\n")
            os.fsync(descriptor)
            self.repairs.append(f"{file}: ended the last record, which lacked its newline")
            return
        os.ftruncate(descriptor, size - len(torn))
        os.fsync(descriptor)
        self.repairs.append(f"{file}: cut off a torn last line of {len(torn)} bytes, to ask again")

    def _descriptor(self, file: Path) -> int:
        """The open file; most stores never have failures, so theirs is made when one comes."""
        if file not in self._files:
            self._files[file] = _open(file)
            _sync_folder(file.parent)
        return self._files[file]

    def refresh(self) -> None:
        """Take in what this process and others have written since the last time."""
        for file, known in self._known.items():
            start = self._read[file]
            if file.exists() and file.stat().st_size > start:
                for end, record in read_records(file, start, 1 if start == 0 else 0):
                    known.put(digest(record["key"]))
                    self._read[file] = end

    def claim(self, key: str) -> bool:
        """Whether this process may ask for `key`: False while another one is asking."""
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _claim_byte(key))
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise StoreError(f"{self.path}: no file locks here: {error.strerror}") from error
        return True

    def release(self, key: str) -> None:
        """Give up the claim on `key`."""
        fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, _claim_byte(key))

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Put the records on the disk: a `reason` sends one to the failures. Returns after fsync.

        When the disk is full the space set aside for this moment is used, and `full` becomes true.
        Raises `StoreError` when even that does not help; whole lines stay, nothing torn does.
        """
        file = self.path
        try:
            with self._locked():
                for file in self._known:
                    failures = file != self.path
                    lines = [
                        _line(record) for record in records if ("reason" in record) == failures
                    ]
                    if lines:
                        descriptor = self._descriptor(file)
                        self._write(descriptor, b"".join(lines))
                        os.fsync(descriptor)
        except OSError as error:
            raise StoreError(
                f"{file}: can't write: {error.strerror}: make room, run the same command again"
            ) from error

    def _write(self, descriptor: int, data: bytes) -> None:
        start = os.fstat(descriptor).st_size
        written, freed = 0, False
        try:
            while written < len(data):
                try:
                    written += os.write(descriptor, data[written:])
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or freed:
                        raise
                    freed = True
                    os.ftruncate(self._ballast, 0)
            self.full = self.full or freed
        finally:
            if written < len(data):
                os.ftruncate(descriptor, start + data[:written].rfind(b"\n") + 1)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def _sync_folder(path: Path) -> None:
    """Make the names of new files durable too."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def digest(key: str) -> bytes:
    """The first half of a key: enough to tell the keys of any store apart."""
    return bytes.fromhex(key[:32])


def _claim_byte(key: str) -> int:
    return 1 + int(key[:15], 16)


def _line(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate: legal in JSON, not in UTF-8
        return json.dumps(record).encode() + b"\n"


def read_anchors(path: Path, model: str | None = None) -> dict[str, Anchor]:
    """The anchors of a store by `messages_key`, for replay; of `model`'s alone when it is given.

    Where one model answered the same messages under several settings the newest answer counts.
    Raises `StoreError` when there is no store, or when two models answered the same messages.
    """
    if not path.is_file():
        raise StoreError(f"{path}: no such store: collect it with `python -m pujax.collect`")
    anchors: dict[str, Anchor] = {}
    for _, record in read_records(path):
        if model is not None and record["model"] != model:
            continue
        key = messages_key(record["messages"])
        if key in anchors and anchors[key].model != record["model"]:
            raise StoreError(
                f"{path}: {anchors[key].model!r} and {record['model']!r} both answered the same "
                "prompt: choose one with teacher.model"
            )
        anchors[key] = anchor_of(record)
    return anchors


def anchor_of(record: dict[str, Any]) -> Anchor:
    """A store's record as training uses it."""
    return Anchor(record["response"], record["finish_reason"], record["model"])
