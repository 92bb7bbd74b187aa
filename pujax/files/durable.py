"""Files that a crash leaves whole: written at once, and lines whose torn tail is left out."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read_jsonl(path: Path) -> list[Line]:
    """The objects of a JSONL file. A torn last line, one without its newline, is left out.

    Raises ValueError naming file and line for any other line that isn't a JSON object.
    """
    return [line for line, _ in whole_lines(path)]


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` at once: after a crash it holds the old bytes or the new."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def whole_lines(path: Path) -> Iterator[tuple[Line, bytes]]:
    """Each whole line of a JSONL file, as an object and as it stands; errors as in `read_jsonl`."""
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, raw in enumerate(lines, 1):
        try:
            line = json.loads(raw)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}): remove this line") from error
        if not isinstance(line, dict):
            raise ValueError(f"{path}:{number}: not a JSON object: remove this line")
        yield line, raw
