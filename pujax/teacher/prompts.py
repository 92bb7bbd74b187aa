"""Prompts from JSONL, text files and Hugging Face datasets, one at a time."""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pujax.errors import ConfigError, PromptError
from pujax.records import Prompt, canonical, messages_key
from pujax.teacher.settings import DatasetConfig

ROLES = ("system", "user", "assistant")


class Digests:
    """Digests with what is known of each: beyond two megabytes they are on the disk.

    So memory does not grow with the number of prompts.
    """

    def __init__(self) -> None:
        self._table = sqlite3.connect("", isolation_level=None)  # a file that goes when closed
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-2048"):
            self._table.execute(f"PRAGMA {pragma}").close()
        self._table.execute("CREATE TABLE known (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")

    def put(self, key: bytes, value: bytes = b"") -> bytes | None:
        """The value that `key` has already; when it has none it gets `value`, and None returns."""
        new = self._table.execute("INSERT OR IGNORE INTO known VALUES (?, ?)", (key, value))
        return None if new.rowcount else self._get(key)

    def __contains__(self, key: bytes) -> bool:
        return self._get(key) is not None

    def _get(self, key: bytes) -> bytes | None:
        row = self._table.execute("SELECT value FROM known WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def close(self) -> None:
        """Let go of the file."""
        self._table.close()


def load_prompts(source: str | Sequence[str] | Mapping[str, Any]) -> Iterator[Prompt]:
    """The prompts of a file, of several files, or of a dataset (a mapping: `DatasetConfig`).

    A `.jsonl` file has `prompt` or `messages` a line, and maybe `id`, `answer` and `kind`; any
    other file is text, one prompt a line. Without an id a prompt gets one made from its content. A
    prompt that comes again under the same id is dropped.

    Raises `PromptError` naming the place for an unreadable, empty or torn file, a field that is
    missing or of the wrong type, and an id that comes again with other content.
    """
    with contextlib.closing(Digests()) as seen:
        for place, prompt in _rows(source):
            name = hashlib.sha256(prompt.id.encode(errors="surrogatepass")).digest()[:16]
            content = [prompt.messages, prompt.answer, prompt.kind]
            digest = hashlib.sha256(canonical(content)).digest()[:16]
            before = seen.put(name, digest)
            if before is None:
                yield prompt
            elif before != digest:
                raise PromptError(
                    f"{place}: id {prompt.id!r} came before with other content: give each its own"
                )


def _rows(source: str | Sequence[str] | Mapping[str, Any]) -> Iterator[tuple[str, Prompt]]:
    if isinstance(source, Mapping):
        yield from _dataset(source)
        return
    paths = [source] if isinstance(source, str | Path) else list(source)
    if not paths:
        raise PromptError("data.prompts is an empty list: name at least one file")
    for path in paths:
        yield from _file(Path(path))


def _file(path: Path) -> Iterator[tuple[str, Prompt]]:
    jsonl = path.suffix == ".jsonl"
    if path.suffix == ".json":
        raise PromptError(f"{path}: write one JSON object a line and name the file .jsonl")
    empty = True
    try:
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                place = f"{path}:{number}"
                line = _decode(raw, place, first=number == 1)
                if not line.strip():
                    continue
                empty = False
                row = _object(line, place, raw) if jsonl else {"prompt": line.strip()}
                yield place, _prompt(row, place)
    except OSError as error:
        raise PromptError(f"{path}: {error.strerror}: check data.prompts") from error
    if empty:
        raise PromptError(f"{path}: no prompts in it: write one a line")


def _decode(raw: bytes, place: str, *, first: bool) -> str:
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{place}: not UTF-8 (byte {error.start}): save it as UTF-8") from error


def _object(line: str, place: str, raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        torn = not raw.endswith(b"\n")
        why = "the file is cut off here: write it again" if torn else "mend this line"
        raise PromptError(f"{place}: not JSON ({error}): {why}") from error
    if not isinstance(row, dict):
        raise PromptError(f'{place}: {type(row).__name__}, need an object: {{"prompt": ...}}')
    return row


def _dataset(mapping: Mapping[str, Any]) -> Iterator[tuple[str, Prompt]]:
    try:
        settings = DatasetConfig(**mapping)
    except TypeError as error:
        known = list(DatasetConfig.__dataclass_fields__)
        raise ConfigError(f"data.prompts: {error}: its keys are {known}") from error
    import datasets  # takes a second and 100 MB: only who reads a dataset pays

    try:
        rows: Any = datasets.load_dataset(
            settings.dataset,
            settings.name,
            split=settings.split,
            data_files=settings.data_files,
        )
    except Exception as error:  # the library raises a dozen types, those of its readers among them
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PromptError(f"dataset {settings.dataset!r}: {first}") from error
    start, _, stop = (settings.slice or ":").partition(":")
    picked = range(len(rows))[int(start) if start else None : int(stop) if stop else None]
    if not picked:
        raise PromptError(
            f"dataset {settings.dataset!r}: no rows in {settings.split}[{settings.slice or ':'}]"
        )
    for name in settings.columns.values():
        if name not in rows.column_names:
            raise PromptError(
                f"dataset {settings.dataset!r}: no column {name!r}: it has {rows.column_names}"
            )
    for index in picked:
        row, place = rows[index], f"{settings.dataset}[{index}]"
        fields = ("id", "prompt", "messages", "answer", "kind")
        ours = {name: row.get(settings.columns.get(name, name)) for name in fields}
        if settings.template is not None:
            try:
                ours["prompt"], ours["messages"] = settings.template.format(**row), None
            except (KeyError, IndexError) as error:
                raise PromptError(
                    f"{place}: template names {error}: the columns are {rows.column_names}"
                ) from error
        if isinstance(ours["id"], int):
            ours["id"] = str(ours["id"])
        yield place, _prompt(ours, place)


def _prompt(row: Mapping[str, Any], place: str) -> Prompt:
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        found = "both" if prompt is not None else f"neither (it has {sorted(row)})"
        raise PromptError(f"{place}: needs `prompt` or `messages`, found {found}")
    if messages is None:
        messages = [{"role": "user", "content": _text(prompt, "prompt", place)}]
    turns = _turns(messages, place)
    texts = {name: _optional(row.get(name), name, place) for name in ("id", "answer", "kind")}
    return Prompt(
        id=texts["id"] or messages_key(turns)[:16],
        messages=turns,
        answer=texts["answer"],
        kind=texts["kind"],
    )


def _turns(messages: Any, place: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise PromptError(f"{place}: `messages` must be a list of turns that isn't empty")
    turns = []
    for index, turn in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise PromptError(f"{place}: {name} needs a `role` of {', '.join(ROLES)}")
        content = _text(turn.get("content"), f"{name}.content", place)
        turns.append({"role": turn["role"], "content": content})
    if turns[-1]["role"] != "user":
        raise PromptError(f"{place}: the last turn must be the user's, for the teacher to answer")
    return tuple(turns)


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise PromptError(f"{place}: `{name}` must be a text that isn't empty, found {value!r:.60}")
    return value


def _optional(value: Any, name: str, place: str) -> str | None:
    return None if value is None else _text(value, name, place)
