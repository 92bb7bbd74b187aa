"""The store of anchors, as it is read: each answer once, and kept.

The anchor store is a JSONL file that only grows, one answer a line. Beside `anchors.jsonl` stand
`anchors.failed.jsonl` (answers that were refused, filtered or empty: kept for the record, never
used as anchors) and `anchors.jsonl.lock`, which `pujax.teacher.writer` needs.
"""

import codecs
import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pujax.errors import StoreError
from pujax.records import Anchor, Prompt, messages_key
from pujax.teacher.settings import TeacherConfig
from pujax.text import blank, well_formed

FORMAT = 1

TAIL = 256  # bytes at the end of what is known of a file, to see whether they are still there

COLLECT = "collect them with `python -m pujax.collect`"
"""What to do about answers that a store lacks."""

TABLES = (".csv", ".tsv", ".parquet", ".json", ".txt")
"""What prompts may be in and a store is not."""

OPENED = re.compile("<think(?:ing)?>", re.IGNORECASE)
CLOSED = re.compile("</think(?:ing)?>", re.IGNORECASE)
"""Around a thought. One expression of both and the space between takes quadratic time."""

# --- records --------------------------------------------------------------------------------------


def failures_path(store: Path) -> Path:
    """Where the answers of `store` that can't be anchors are kept. Raises `StoreError`."""
    if not store.name:
        raise StoreError(f"{store}: is a folder: name a file in it with `store`")
    if store.suffix.lower() in TABLES:
        raise StoreError(
            f"{store}: a {store.suffix} is not a store: name the .jsonl file that answers are kept "
            "in; prompts are named by data.prompts"
        )
    return store.with_name(f"{store.stem}.failed{store.suffix}")


def require_store(store: Path, remedy: str = COLLECT) -> None:
    """Raise `StoreError` where there is no store, with what to do about it."""
    failures_path(store)  # refuses what is none by its name
    if not store.is_file():
        folder = "" if store.parent.is_dir() else f", and no folder {store.parent}"
        raise StoreError(f"{store}: no such store{folder}: {remedy}")


def read_failures(
    store: Path, torn: Callable[[Path, bytes], None] = lambda path, tail: None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of the answers that can't be anchors; none when there is no such file."""
    file = failures_path(store)
    return read_records(file, failed=True, torn=torn) if file.exists() else iter(())


def read_records(
    path: Path,
    failed: bool | None = None,
    torn: Callable[[Path, bytes], None] = lambda path, tail: None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each whole record, with the byte after it; `torn` is told of a tail that is left out.

    The last one may lack its newline, as when the store is next written it is ended with one.
    Raises `StoreError` for a record of another format, a line that isn't one, and an answer among
    the failures (`failed`) or the other way round (False).
    """
    end = 0
    try:
        check_plain(path)
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                end += len(raw)
                if raw.isspace():  # as an editor leaves one
                    continue
                if not raw.endswith(b"\n") and not _is_record(raw):
                    torn(path, raw)
                    return
                yield end, parse(raw, f"{path}:{number}", failed)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}: check `store`") from error


def _is_record(raw: bytes) -> bool:
    with contextlib.suppress(StoreError):
        parse(raw, "")
        return True
    return False


def check_torn(raw: bytes, file: Path) -> None:
    """Raise `StoreError` unless a file's last line, which lacks its end, is the start of a record.

    A crash may leave zeros behind it. What else ends without a newline is somebody's file, or was
    saved with other ends of lines.
    """
    begun = raw.rstrip(b"\0")
    head = re.sub(rb"[ \t]", b"", begun[:40])
    ours = any(start[: len(head)] == head[: len(start)] for start in (b'{"format":1,', b'{"key":"'))
    try:
        json.loads(begun)
        ours = False
    except (UnicodeDecodeError, RecursionError):  # cut inside of a character
        pass
    except ValueError as error:
        ours = ours and not str(error).startswith("Extra data")
    if begun and (not ours or re.search(rb"[\x00-\x08\x0a-\x1f]", begun)):
        raise StoreError(
            f"{file}: its last line is neither a record nor the start of one: take it out, end "
            "each line with a newline, or choose another `store`"
        )


def check_plain(path: Path) -> None:
    """Raise `StoreError` for a folder, a pipe or a device: some of them are read without end."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise StoreError(
                f"{path}: is a folder, a pipe or a device: move it away, or name a plain file with "
                "`store`"
            )


def parse(raw: bytes, place: str, failed: bool | None = None) -> dict[str, Any]:
    """The record of a line that stands at `place`, among failures or answers if `failed` is told.

    Raises `StoreError`.
    """
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:4]:
        raise StoreError(f"{place}: UTF-16, and not the UTF-8 of a store: save it as UTF-8")
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{place}: not a record ({error}): take this line out") from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise StoreError(
            f"{place}: store format {found!r:.40}, this pujax has format {FORMAT}: "
            "collect into another file, or use the pujax that wrote it"
        )
    lacking = FIELDS.keys() - record.keys()
    if lacking:
        raise StoreError(f"{place}: a record without {sorted(lacking)}: take this line out")
    for name, holds in (*FIELDS.items(), *LATER.items()):
        if name in record and not holds(record[name]):
            raise StoreError(
                f"{place}: a record with {name} {record[name]!r:.80}: mend or take out this line"
            )
    if failed is not None and ("reason" in record) != failed:
        what = "an answer among failures" if failed else "a failure among answers"
        raise StoreError(
            f"{place}: {what}, so of another store: rename that file, or take out this line"
        )
    return record


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -1e300 < value < 1e300
        and math.isfinite(value)
    )


def _counts(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_number, value.values())))


def _turns(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict) and _text(turn.get("role")) and _text(turn.get("content"))
            for turn in value
        )
    )


FIELDS: dict[str, Callable[[Any], bool]] = {
    "key": lambda value: _text(value) and re.fullmatch("[0-9a-f]{64}", value) is not None,
    "id": _text,
    "messages": _turns,
    "response": _text,
    "finish_reason": _text_or_null,
    "model": _text_or_null,
    "usage": _counts,
    "cost": lambda value: value is None or _number(value),
    "created": _text,
}
"""What every record has, and what each field may hold."""

LATER: dict[str, Callable[[Any], bool]] = {
    "seconds": lambda value: value is None or (_number(value) and value >= 0),
    "reason": _text,
}
"""What not every record has.

Those of an earlier pujax lack how long the request took, and answers why they can't be anchors.
"""


# --- what a store holds ---------------------------------------------------------------------------


@dataclass(slots=True)
class Mark:
    """How far a file has been read or written: the bytes before `end` are `tail`."""

    end: int = 0
    line: int = 0
    inode: tuple[int, int] | None = None
    tail: bytes = b""

    def passed(self, raw: bytes) -> None:
        """Move on beyond `raw`."""
        self.end += len(raw)
        self.line += 1
        self.tail = raw[-TAIL:]

    def stands(self, descriptor: int) -> bool:
        """Whether what was passed is still there."""
        start = self.end - len(self.tail)
        # Below zero when another program cut the file just as its size was taken.
        return start >= 0 and os.pread(descriptor, len(self.tail), start) == self.tail


class Contents:
    """What a store and its failures hold, read once and then from where the reading ended.

    `answered` and `failed` have the first half of each key; `take` is called with each record and
    whether it is a failure. `otherwise` has the questions that were answered under other settings
    than `asked` (of a teacher), by the first half of their `messages_key`, with the names of those
    settings: of several answers the ones that differ in the fewest. Reading makes no file.
    """

    def __init__(
        self,
        path: Path,
        take: Callable[[dict[str, Any], bool], None] = lambda record, failed: None,
        *,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.answered: set[bytes] = set()
        self.failed: set[bytes] = set()
        self.otherwise: dict[bytes, frozenset[str]] = {}
        self.take = take
        self._asked = asked
        self._marks = {path: Mark(), failures_path(path): Mark()}
        self.refresh()

    def refresh(self) -> bool:
        """Take in what was written since the last time; False when a file is not the same any more.

        Raises `StoreError`.
        """
        same = True
        try:
            for file, mark in self._marks.items():
                same = self._read(file, mark) and same
            return same
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}: check `store`") from error

    def _read(self, file: Path, mark: Mark) -> bool:
        try:
            found = os.stat(file)
        except (FileNotFoundError, NotADirectoryError):
            return mark.inode is None
        inode = (found.st_dev, found.st_ino)
        if inode == mark.inode and found.st_size == mark.end:
            return True
        if mark.inode not in (None, inode) or found.st_size < mark.end:
            return False
        check_plain(file)
        failed = file != self.path
        known = self.failed if failed else self.answered
        with file.open("rb") as lines:
            if not mark.stands(lines.fileno()):
                return False
            mark.inode = inode
            lines.seek(mark.end)
            for raw in lines:
                if not raw.endswith(b"\n"):
                    break
                if raw.isspace():
                    mark.passed(raw)
                    continue
                record = parse(raw, f"{file}:{mark.line + 1}", failed)
                mark.passed(raw)
                known.add(digest(record["key"]))
                self.take(record, failed)
                if not failed:
                    self._compare(record)
        return True

    def _compare(self, record: dict[str, Any]) -> None:
        """Keep in which settings an answer differs, where it does."""
        asked, sampling = self._asked, record.get("sampling")
        if asked is None or not isinstance(sampling, dict):
            return
        before = {**sampling, "model": record["model"]}
        now = {**asked["sampling"], "model": asked["model"]}
        if before == now:
            return
        names = before.keys() | now.keys()
        differing = frozenset(name for name in names if before.get(name) != now.get(name))
        question = digest(messages_key(record["messages"]))
        known = self.otherwise.get(question)
        if known is None or len(differing) < len(known):
            self.otherwise[question] = differing


def digest(key: str) -> bytes:
    """The first half of a key: enough to tell the keys of any store apart."""
    return bytes.fromhex(key[:32])


# --- anchors --------------------------------------------------------------------------------------


class Anchors:
    """The anchors of `prompts` (None: of every prompt) by `messages_key`, as records are taken.

    A teacher that is asked has the answers under its own settings. A replay has those to the same
    messages, of `teacher.model` alone where that is given; of several the newest counts, and two
    models' are an error. `failed` has the prompts that got no usable answer.
    """

    def __init__(
        self, store: Path, teacher: TeacherConfig, prompts: Iterable[Prompt] | None = None
    ) -> None:
        self.found: dict[str, Anchor] = {}
        self.failed: set[str] = set()
        self._store = store
        self._teacher = teacher
        asked = teacher.asked if teacher.asks else None
        self._wanted: set[str] | None = None
        if prompts is not None:
            self._wanted = {messages_key(prompt.messages, asked) for prompt in prompts}

    def take(self, record: dict[str, Any], failed: bool) -> None:
        """Keep `record` if it is one of them. Raises `StoreError` for a second model's answer."""
        teacher, wanted = self._teacher, self._wanted
        if teacher.asks and wanted is not None and record["key"] not in wanted:
            return
        name = messages_key(record["messages"])
        if not teacher.asks and wanted is not None and name not in wanted:
            return
        if teacher.model is not None and record["model"] != teacher.model:
            return
        if failed:
            self.failed.add(name)
            return
        before = self.found.get(name)
        if before is not None and before.model != record["model"]:
            raise StoreError(
                f"{self._store}: {before.model!r} and {record['model']!r} both answered the same "
                "prompt: choose one with teacher.model"
            )
        anchor = anchor_of(record, teacher.thoughts)
        if anchor is None:
            self.failed.add(name)
        else:
            self.found[name] = anchor


def read_anchors(path: str | Path, model: str | None = None) -> dict[str, Anchor]:
    """The anchors of a store by `messages_key`, for replay; of `model`'s alone when it is given.

    Where one model answered the same messages under several settings the newest answer counts.
    Raises `StoreError` when there is no store, or when two models answered the same messages.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"{path}: no such store: collect it with `python -m pujax.collect`")
    anchors = Anchors(path, TeacherConfig(model=model))
    for _, record in read_records(path, failed=False):
        anchors.take(record, False)
    return anchors.found


def anchor_of(record: dict[str, Any], thoughts: str = "strip") -> Anchor | None:
    """A store's record as training uses it; None when nothing is left beside a thought."""
    text = said(record["response"], thoughts)
    if text is None:
        return None
    tokens = (record["usage"] or {}).get("completion_tokens")
    anchor = Anchor(
        well_formed(text),
        record["finish_reason"],
        record["model"],
        seconds=record.get("seconds"),
        tokens=tokens,
        cost=record.get("cost"),
    )
    if anchor.told:
        return anchor
    sampling = record.get("sampling")
    limits = sampling if isinstance(sampling, dict) else {}
    limit = limits.get("max_tokens") or limits.get("max_completion_tokens")
    within = limit is None or (tokens is not None and _number(limit) and tokens < limit)
    return replace(anchor, within_limit=within)


def said(response: str, thoughts: str) -> str | None:
    """The answer without the thought that leads it; None when it is all thought.

    `thoughts` is strip, keep (it is part of the answer) or fail (an answer with one is none). A
    thought may lack its opening tag, where the template has written that.
    """
    if thoughts == "keep" or "think" not in response.casefold():
        return response
    led = response.lstrip()
    opened = OPENED.match(led)
    start = opened.end() if opened else 0
    closed = CLOSED.search(led, start)
    if closed is None or "<think" in led[start : closed.start()].casefold():
        return None if opened else response
    answer = led[closed.end() :].lstrip()
    return (None if blank(answer) else answer) if thoughts == "strip" else None
