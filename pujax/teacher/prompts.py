"""Prompts from JSONL, text files, tables and Hugging Face datasets, one at a time."""

import difflib
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from pujax.errors import PromptError
from pujax.records import Prompt, canonical, messages_key
from pujax.teacher import tables
from pujax.text import blank, encoding_of, not_utf8, printable, surrogate_at

ROLES = ("system", "user", "assistant")

KEYS = ("prompt", "messages", "answer", "kind", "id")

SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""Who speaks in a row of `conversations`; system is system."""

Rows = Iterator[tuple[str, Mapping[str, Any]]]


def warn(text: str) -> None:
    """Print to standard error."""
    print(text, file=sys.stderr)


def load_prompts(
    source: str | Sequence[str] | Mapping[str, Any], say: Callable[[str], None] = warn
) -> Iterator[Prompt]:
    """The prompts of a file, of several files, or of a dataset (a mapping: `DatasetConfig`).

    A `.jsonl` file has `prompt` or `messages` a line, and maybe `id`, `answer` and `kind`; a
    `.json` file is a list of such objects, and a table (`.csv`, `.tsv`, `.parquet`) has columns of
    these names. Rows of `instruction`, `input`, `output` and `history` (Alpaca) or `conversations`
    (ShareGPT) are read as well. A row's `system` is its system message. A `.txt` file has one
    prompt a line. Without an id a prompt gets one made from its content. A prompt that comes again
    under the same id is dropped. `say` is told of a key that looks like a misspelt one.

    Raises `PromptError` naming the place for an unreadable, empty or torn file, a field that is
    missing or of the wrong type, and an id that comes again with other content.
    """
    seen: dict[bytes, bytes] = {}
    doubtful: set[str] = set()
    for place, row in rows(source):
        for key in row.keys() - doubtful:
            doubtful.add(key)
            near = difflib.get_close_matches(str(key).lower(), KEYS, 1, 0.75)
            if key not in KEYS and near and near[0] not in row:
                say(f"{place}: {printable(str(key))!r} is not read: did you mean {near[0]!r}?")
        prompt = prompt_of(row, place)
        name = hashlib.sha256(prompt.id.encode()).digest()[:16]
        content = [prompt.messages, prompt.answer, prompt.kind]
        digest = hashlib.sha256(canonical(content)).digest()[:16]
        before = seen.get(name)
        if before is None:
            seen[name] = digest
            yield prompt
        elif before != digest and row.get("id") is None:
            raise PromptError(
                f"{place}: the same prompt came before with another answer or kind, or one of the "
                "two without: keep one of them"
            )
        elif before != digest:
            raise PromptError(
                f"{place}: id {prompt.id!r} came before with other content: give each its own"
            )


def refuse_pipes(source: str | Sequence[str] | Mapping[str, Any]) -> None:
    """Raise `PromptError` for a file that gives what it has but once."""
    for path in [] if isinstance(source, Mapping) else _paths(source):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise PromptError(
                f"{path}: a pipe or a device can be read once only: write its prompts to a file"
            )


def refuse_missing(source: str | Sequence[str] | Mapping[str, Any], key: str) -> None:
    """Raise `PromptError` for a file of setting `key` that is not there, or that nothing reads.

    And for a list of no file. None is opened, and a dataset is not looked for.
    """
    if source == []:
        raise PromptError(f"{key}=[]: an empty list: name at least one file")
    for path in [] if isinstance(source, Mapping) else _paths(source):
        _reader(path)
        if not path.exists() or path.is_dir():
            raise _unread(path, "a folder" if path.exists() else "No such file or directory", key)


def refuse_bad_prompts(source: str | Sequence[str] | Mapping[str, Any]) -> None:
    """Raise `PromptError` for what `load_prompts` can't use of files.

    For who is about to load jax and a model, and tells of doubts then. A dataset isn't read for
    that, nor is a pipe, which gives what it has but once.
    """
    if are_files(source):
        for _ in load_prompts(source, say=lambda _: None):
            pass


def are_files(source: str | Sequence[str] | Mapping[str, Any]) -> bool:
    """Whether it is files alone, which can be read twice: no dataset and no pipe."""
    return not isinstance(source, Mapping) and all(path.is_file() for path in _paths(source))


def _unread(path: Path, reason: object, key: str = "data.prompts or data.heldout") -> PromptError:
    several = "; several files are a list, [A,B]" if "," in str(path) else ""
    return PromptError(f"{path}: {reason}: check {key}{several}")


def _paths(source: str | Sequence[str]) -> list[Path]:
    return [Path(path) for path in ([source] if isinstance(source, str | Path) else source)]


def rows(source: str | Sequence[str] | Mapping[str, Any]) -> Rows:
    """The rows of a file, of several files, or of a dataset, as they are, with their places.

    Raises `PromptError` for what can't be read.
    """
    if isinstance(source, Mapping):
        yield from tables.dataset_rows(source)
        return
    paths = _paths(source)
    if not paths:
        raise PromptError("data.prompts is an empty list: name at least one file")
    for path in paths:
        yield from _file(path)


def _file(path: Path) -> Rows:
    read, empty = _reader(path), True
    try:
        for place, row in read(path):
            empty = False
            yield place, row
    except OSError as error:
        raise _unread(path, error.strerror or error) from error
    if empty:
        raise PromptError(f"{path}: no prompts in it: write one a line")


def _reader(path: Path) -> Callable[[Path], Rows]:
    """What reads a file of such a name. Raises `PromptError` where nothing does."""
    kind = path.suffix.lower()
    readers: dict[str, Callable[[Path], Rows]] = {
        **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines"), _jsonl),
        **dict.fromkeys((".txt", ""), _text_lines),
        **dict.fromkeys((".csv", ".tsv"), tables.csv_rows),
        ".json": _json_list,
        ".parquet": tables.parquet_rows,
    }
    if kind not in readers:
        raise PromptError(
            f"{path}: can't tell how to read {kind}: name the file .txt for one prompt a line, or "
            ".jsonl, .json, .csv, .tsv or .parquet"
        )
    return readers[kind]


def _text_lines(path: Path) -> Rows:
    for place, line, _ in _lines(path):
        for part in line.split("\r"):  # an old Mac's ends of lines too
            if not blank(part):
                yield place, {"prompt": part.strip()}


def _jsonl(path: Path) -> Rows:
    for place, line, raw in _lines(path):
        if line.strip():
            yield place, _object(line, place, raw)


def _json_list(path: Path) -> Rows:
    """The rows of a file that is one list of objects, as Alpaca's and ShareGPT's are given away."""
    text = "".join(line for _, line, _ in _lines(path))
    if not text.strip():
        return
    try:
        rows = json.loads(text, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise PromptError(
            f"{path}: not one JSON list ({error}): mend it, or name a file with one object a line "
            ".jsonl"
        ) from error
    if not isinstance(rows, list):
        raise PromptError(
            f"{path}: {type(rows).__name__}, need a list of objects: make it one, or name a file "
            "with one object a line .jsonl"
        )
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise PromptError(f"{path}[{i}]: {type(row).__name__}, need an object")
        yield f"{path}[{i}]", row


def _lines(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """The lines of a file with their places, and as UTF-8 in bytes, whatever they were in."""
    number = 0
    with path.open("rb") as file:
        if (encoding := encoding_of(file.peek(4)[:4])) != "utf-8-sig":
            with TextIOWrapper(file, encoding, newline="\n") as text:
                try:
                    for number, line in enumerate(text, 1):
                        yield f"{path}:{number}", line, line.encode()
                except UnicodeDecodeError as error:
                    why = f"not {encoding} ({error.reason}): save it as UTF-8"
                    raise PromptError(f"{path}:{number + 1}: {why}") from error
            return
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise PromptError(f"{path}:{number}: {not_utf8(raw, error, path)}") from error
            yield f"{path}:{number}", line, raw


def _object(line: str, place: str, raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits too
        torn = not raw.endswith(b"\n")
        why = "the file is cut off here: write it again" if torn else "mend this line"
        if b"\r" in raw.strip():
            why = "its lines end in a carriage return alone: end them in a line feed"
        raise PromptError(f"{place}: not JSON ({error}): {why}") from error
    if not isinstance(row, dict):
        raise PromptError(f'{place}: {type(row).__name__}, need an object: {{"prompt": ...}}')
    return row


def _once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of which no key is there twice: of such ones all but the last would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"two values are called {printable(twice, 40)!r}")
    return made


# --- a row to a prompt ----------------------------------------------------------------------------


def prompt_of(row: Mapping[str, Any], place: str) -> Prompt:
    """The prompt of a row in any of the forms that `load_prompts` reads. Raises `PromptError`."""
    if row.get("prompt") is None and row.get("messages") is None:
        row = _alpaca(_sharegpt(row, place), place)
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        found = "both" if prompt is not None else f"neither (it has {sorted(map(str, row))})"
        raise PromptError(f"{place}: needs `prompt` or `messages`, found {found}")
    if messages is None:
        messages = [{"role": "user", "content": checked_text(prompt, "prompt", place)}]
    turns = _with_own_system(_turns(messages, place), row, place)
    texts = {name: _optional(row.get(name), name, place) for name in ("id", "answer", "kind")}
    return Prompt(
        id=texts["id"] or messages_key(turns)[:16],
        messages=turns,
        answer=texts["answer"],
        kind=texts["kind"],
        rest={str(key): value for key, value in row.items() if key not in KEYS},
    )


def _with_own_system(
    turns: tuple[dict[str, str], ...], row: Mapping[str, Any], place: str
) -> tuple[dict[str, str], ...]:
    """The turns, led by the row's `system` if there is one. Raises `PromptError` for another."""
    system = _optional(row.get("system"), "system", place)
    if system is None:
        return turns
    if turns[0]["role"] != "system":
        return ({"role": "system", "content": system}, *turns)
    if turns[0]["content"].strip() != system.strip():
        raise PromptError(
            f"{place}: `system` is another system message than the first turn: take one out"
        )
    return turns


def _alpaca(row: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """A row of Alpaca's as one of ours; any other as it is."""
    if row.get("instruction") is None:
        return row
    if row.get("messages") is not None:
        raise PromptError(f"{place}: needs `conversations` or `instruction`, found both")
    answer = row.get("answer") if row.get("output") is None else row["output"]
    return {**row, "messages": alpaca_turns(row, place), "answer": answer}


def alpaca_turns(row: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """The conversation of a row of Alpaca's. Raises `PromptError`."""
    prompt = checked_text(row["instruction"], "instruction", place)
    more = _optional(row.get("input"), "input", place)
    history, turns = row.get("history") or [], list[dict[str, Any]]()
    pairs = history if isinstance(history, list) else [None]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise PromptError(
                f"{place}: `history` must be a list of [question, answer], found {history!r:.60}"
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": checked_text(text, "history", place)})
    return [*turns, {"role": "user", "content": f"{prompt}\n\n{more}" if more else prompt}]


def _sharegpt(row: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """A row of ShareGPT's as one of ours, an assistant's last turn as the answer; others as is."""
    conversations = row.get("conversations")
    if conversations is None:
        return row
    turns = sharegpt_turns(conversations, place)
    answer = row.get("answer")
    if turns and turns[-1]["role"] == "assistant":
        last = turns.pop()["content"]
        answer = last if answer is None else answer
    if not turns:
        raise PromptError(f"{place}: `conversations` has no turn of the user's to answer")
    return {**row, "messages": turns, "answer": answer}


def sharegpt_turns(
    conversations: Any, place: str, name: str = "conversations"
) -> list[dict[str, Any]]:
    """Turns of ShareGPT's or ours as ours, their contents unchecked. Raises `PromptError`."""
    if not isinstance(conversations, list) or not all(isinstance(t, dict) for t in conversations):
        raise PromptError(f"{place}: `{name}` must be a list of turns")
    turns = []
    for index, turn in enumerate(conversations):
        key, who = speaker(turn)
        role = SHAREGPT.get(who, who) if isinstance(who, str) else who
        if role not in ROLES:
            raise PromptError(
                f"{place}: `{name}[{index}].{key}` is {who!r:.60}: write human, gpt or system, or "
                "take the turn out"
            )
        said = turn.get("content") if turn.get("value") is None else turn["value"]
        turns.append({"role": role, "content": said})
    return turns


def speaker(turn: Mapping[str, Any]) -> tuple[str, Any]:
    """Under which key a turn says who speaks, and who: null, as Parquet fills up, says nothing."""
    key = "role" if turn.get("from") is None and turn.get("role") is not None else "from"
    return key, turn.get(key)


def _turns(messages: Any, place: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise PromptError(f"{place}: `messages` must be a list of turns that isn't empty")
    turns = []
    for index, turn in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            found = repr(turn.get("role") if isinstance(turn, dict) else turn)
            roles = ", ".join(ROLES)
            raise PromptError(f"{place}: {name} needs a `role` of {roles}, found {found:.60}")
        content = checked_text(turn.get("content"), f"{name}.content", place)
        turns.append({"role": turn["role"], "content": content})
    if turns[-1]["role"] != "user":
        raise PromptError(f"{place}: the last turn must be the user's, for the teacher to answer")
    return tuple(turns)


def checked_text(value: Any, name: str, place: str) -> str:
    """`value`, a text that isn't empty and that UTF-8 can hold. Raises `PromptError`."""
    if not isinstance(value, str) or blank(value):
        raise PromptError(f"{place}: `{name}` must be a text that isn't empty, found {value!r:.60}")
    if "\0" in value:
        raise PromptError(
            f"{place}: `{name}` has a NUL character, which is no text: take it out (or is the file "
            "UTF-16? convert it: iconv -f UTF-16LE -t UTF-8)"
        )
    at = surrogate_at(value)
    if at is not None:
        raise PromptError(
            f"{place}: `{name}` has half a character, {value[at]!r}, at position {at}: UTF-8 can't "
            "hold it; write the whole one or take it out"
        )
    return value


def _optional(value: Any, name: str, place: str) -> str | None:
    """A text, or a number as one; None when there is nothing."""
    if value is None or (isinstance(value, str) and blank(value)):
        return None
    if isinstance(value, float | Decimal) and math.isfinite(value):
        return str(value) if isinstance(value, float) else f"{value:f}"
    whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if whole else checked_text(value, name, place)
