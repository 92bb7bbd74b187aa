"""What a suite is given to ask about, and what it answers."""

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pujax.errors import DiskError, EvaluationError
from pujax.files.durable import on_disk, read_jsonl, refuse_other, write_whole
from pujax.records import Example, Prompt, canonical

if TYPE_CHECKING:  # jax with them, which comparing answers does not need
    from pujax.models.decoder import LanguageModel
    from pujax.types import Batch, Frames, Params

SEAL = "crc32"
"""The key of a shared record's checksum in its file."""

Judge = Callable[[Sequence[Prompt]], Mapping[str, str]]
"""Questions to what was said to each, by its id; what got no usable answer is left out."""


@dataclass(frozen=True)
class Subject:
    """A model, and the held-out prompts that a suite asks it about, `batch` at once."""

    model: "LanguageModel"
    params: "Params"
    examples: Sequence[Example]
    batch: int
    collate: Callable[[Sequence[Example]], "Batch"]
    decode: Callable[[Sequence[int]], str]
    frames: "Frames"


@dataclass(frozen=True)
class SuiteAnswer:
    """What a suite found: a table's header and rows, a note, and the raw records behind it."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    records: tuple[dict[str, Any], ...]


def keep_answer(answer: SuiteAnswer, name: str, folder: Path) -> None:
    """Write what the suite `name` found to `suite-<name>.json`, its raw records left out.

    It takes the place of what the suite found there before. Raises `DiskError`, also where
    something else has that name.
    """
    path = refuse_other_answer(name, folder)
    told = {"header": answer.header, "rows": answer.rows, "note": answer.note}
    text = json.dumps(told, ensure_ascii=False, indent=1) + "\n"
    write_whole(path, text.encode(errors="backslashreplace"))


def refuse_other_answer(name: str, folder: Path) -> Path:
    """Where the suite `name` keeps what it found; `DiskError` where something else is there."""
    path = folder / f"suite-{name}.json"
    refuse_other(path, b'{\n "header": ')
    return path


def kept_answers(folder: Path) -> dict[str, SuiteAnswer]:
    """What suites found in `folder`, by their names, without raw records.

    Raises `EvaluationError` for a file that has something else in it.
    """
    found = {}
    for path in sorted(folder.glob("suite-*.json")):
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            header, *rows = (tuple(map(str, row)) for row in (told["header"], *told["rows"]))
            note = str(told["note"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise EvaluationError(
                f"{path}: not what a suite found ({error}): delete it, and ask the suite again"
            ) from error
        if not header or any(len(row) != len(header) for row in rows):
            raise EvaluationError(
                f"{path}: its rows are not as long as its header: delete it, and ask the suite "
                "again"
            )
        found[path.stem.removeprefix("suite-")] = SuiteAnswer(header, tuple(rows), note, ())
    return found


class Records:
    """What a suite finds of each prompt, by its id, kept as it comes: a restart goes on after it.

    The file's first line says what was asked. Without a path they are kept in memory alone. Raises
    `EvaluationError` for a file of another question, and `DiskError`.
    """

    def __init__(self, path: Path | None = None, asked: Mapping[str, Any] | None = None) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self._path = path
        self._asked = json.loads(json.dumps({"asked": asked or {}}))
        if path is None or not path.exists():
            return
        first, *lines = read_jsonl(path) or [self._asked]
        if first != self._asked or not all(isinstance(line.get("id"), str) for line in lines):
            raise EvaluationError(f"{path}: is of another question: move it away")
        self.found = {line["id"]: line for line in lines}
        if not path.read_bytes().endswith(b"\n"):
            self.write(lines)  # without its torn end, that more may follow

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep more of them; they are on the disk when this returns."""
        before = list(self.found.values())
        self.found |= {record["id"]: record for record in records}
        if self._path is None:
            return
        if not self._path.exists():
            self.write(before)
        with on_disk(self._path), self._path.open("ab") as file:
            file.write(_lines(records))
            file.flush()
            os.fsync(file.fileno())

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the file anew, with these alone."""
        if self._path is not None:
            write_whole(self._path, _lines([self._asked, *records]))


class SharedRecords:
    """Records that other models have too: as `Records`, with a checksum in each line of the file.

    Without `kept`, and where no more can be written, they are in memory alone. Raises
    `EvaluationError` for a record that is not as it was kept.
    """

    def __init__(self, kept: Records | None = None) -> None:
        kept = Records() if kept is None else kept
        self._kept = kept
        self.found: dict[str, dict[str, Any]] = {}
        for name, line in kept.found.items():
            record = {key: value for key, value in line.items() if key != SEAL}
            if line.get(SEAL) != zlib.crc32(canonical(record)):
                raise EvaluationError(f"{name}: is not the record that was kept")
            self.found[name] = record

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep more of them, on the disk where that may be written."""
        self.found |= {record["id"]: record for record in records}
        with suppress(DiskError):
            self._kept.add([{**each, SEAL: zlib.crc32(canonical(each))} for each in records])


def _lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    return "".join(lines).encode(errors="backslashreplace")
