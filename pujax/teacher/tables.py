"""Rows of prompts from tables: CSV, Parquet, Hugging Face datasets."""

import csv
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import IO, Any

from pujax.errors import PromptError
from pujax.teacher.settings import MAPPED, dataset_of
from pujax.text import encoding_of, not_utf8

COLUMNS = ("prompt", "messages", "instruction", "conversations", "chosen")
"""A table has one of them, or what is asked would be its header."""

LONGEST = 2**31 - 1  # characters of a cell; Python's own limit is less than a long document has

Rows = Iterator[tuple[str, Mapping[str, Any]]]


def csv_rows(path: Path) -> Rows:
    """The rows of a .csv or .tsv file with their places; empty cells are left out.

    Raises `PromptError`.
    """
    read = _tabbed if path.suffix.lower() == ".tsv" else _separated
    line = 0
    csv.field_size_limit(LONGEST)
    try:
        with opened(path, newline="") as file:
            rows = read(file)
            line, names = next(rows, (1, []))
            _check_columns(names, f"{path}:{line}")
            for line, cells in rows:
                place = f"{path}:{line}"
                if len(cells) != len(names):
                    raise PromptError(
                        f"{place}: not as many cells as the header has: quote cells with separators"
                    )
                filled = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
                for name in ("messages", "conversations", "responses", "ratings"):
                    if name in filled:
                        filled[name] = _json(filled[name], name, place)
                yield place, filled
    except UnicodeDecodeError as error:
        raise PromptError(_undecoded(path, error)) from error
    except csv.Error as error:
        raise PromptError(f"{path}:{line + 1}: not a table ({error}): mend it") from error


def _separated(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file, no empty ones, with the number of each one's last line.

    Where a decimal has a comma, spreadsheets separate cells by semicolons: by those, where a header
    has one of `COLUMNS` by them alone. Some say it first, in a line `sep=;`.
    """
    lines = iter(file)
    header = next(lines, "")
    if said := re.fullmatch(r"sep=(.)\r?\n?", header):
        rows = csv.reader(lines, delimiter=said[1], strict=True)
        return ((rows.line_num + 1, cells) for cells in rows if cells)
    by = {mark: next(csv.reader([header], delimiter=mark), []) for mark in ",;"}
    semicolons = (
        not set(COLUMNS) & set(by[","]) and len(by[";"]) > 1 and set(COLUMNS) & set(by[";"])
    )
    rows = csv.reader(chain([header], lines), delimiter=";" if semicolons else ",", strict=True)
    return ((rows.line_num, cells) for cells in rows if cells)


def _tabbed(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The same of a TSV file, whoever wrote it: a spreadsheet quotes cells, others never do.

    A row in which a cell begins with a quote is read as quoted where that is well formed and makes
    as many cells as the header has, else a quote is a character like others. Raises `csv.Error`
    for lines that are one row by the one reading and several by the other.
    """
    lines, at, width = list(file), 0, 0
    while at < len(lines):
        first, cells = at, lines[at].rstrip("\r\n").split("\t")
        at += 1
        if any(cell.startswith('"') for cell in cells):
            rest = (lines[line] for line in range(first, len(lines)))
            rows = csv.reader(rest, delimiter="\t", strict=True)
            try:
                quoted = next(rows)
            except csv.Error:
                quoted = []
            if quoted and len(quoted) == (width or len(quoted)):
                if rows.line_num > 1 and len(cells) == width > 1:
                    raise csv.Error(
                        "a quoted cell of several lines, or a quote in the text? a .csv tells them"
                    )
                at, cells = first + rows.line_num, quoted
        if cells == [""]:
            continue
        width = width or len(cells)
        yield at, cells


@contextmanager
def opened(path: Path, *, newline: str) -> Iterator[IO[str]]:
    """A file of text in UTF-8, or in UTF-16 or UTF-32 where it begins with the mark of these."""
    with path.open("rb") as file:
        encoding = encoding_of(file.peek(4)[:4])
        with TextIOWrapper(file, encoding, newline=newline) as text:
            yield text


def _undecoded(path: Path, error: UnicodeDecodeError) -> str:
    """Where a file is not of its encoding: what reads it by blocks says no line."""
    if error.encoding in ("utf-8", "utf-8-sig") and path.is_file():
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    return f"{path}:{number}: {not_utf8(line, error, path)}"
    return f"{path}: not {error.encoding} ({error.reason}): save it as UTF-8"


def parquet_rows(path: Path) -> Rows:
    """The rows of a .parquet file with their places. Raises `PromptError`."""
    try:
        import pyarrow
        from pyarrow import parquet  # comes with `datasets`
    except ImportError as error:
        raise PromptError(f"{path}: reading Parquet needs pyarrow ({error}): install it") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, str(path))
            for batch in file.iter_batches():
                for row in _values(batch, path, number):
                    yield f"{path}[{number}]", row
                    number += 1
    except PromptError:
        raise
    except (pyarrow.ArrowException, ValueError) as error:
        raise PromptError(f"{path}: not Parquet ({error}): write it again") from error


def _values(batch: Any, path: Path, first: int) -> list[dict[str, Any]]:
    """The rows of a batch, of which row `first` is the first, as Python has them.

    Raises `PromptError` for a cell that Python can't hold, such as a date after the year 9999.
    """
    try:
        rows = batch.to_pylist()
        for row in rows:  # pandas makes numbers with a fraction of whole ones where one is missing
            answer = row.get("answer")
            if isinstance(answer, float) and answer.is_integer():
                row["answer"] = int(answer)
        return rows
    except Exception:  # of a dozen types
        for name, cells in zip(batch.schema.names, batch.columns, strict=True):
            for number, cell in enumerate(cells, first):
                try:
                    cell.as_py()
                except Exception as error:
                    raise PromptError(
                        f"{path}[{number}]: {name!r} can't be read ({_first_line(error)}): leave "
                        "this column out, or write it as text"
                    ) from error
        raise


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def dataset_rows(mapping: Mapping[str, Any]) -> Rows:
    """The rows of a dataset, `columns` and `template` applied, with their places.

    Raises `ConfigError` for a wrong key and `PromptError` for what can't be loaded.
    """
    settings = dataset_of(mapping)
    import datasets  # takes a second and 100 MB: only who reads a dataset pays

    try:
        rows: Any = datasets.load_dataset(
            settings.dataset,
            settings.name,
            split=settings.split,
            data_files=settings.data_files,
        )
    except Exception as error:  # the library raises a dozen types, those of its readers among them
        raise PromptError(
            f"dataset {settings.dataset!r}: {_first_line(error)}: check its name, split and "
            "data_files, and for one of the hub the network"
        ) from error
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
        place = f"{settings.dataset}[{index}]"
        try:
            row = rows[index]
        except Exception as error:  # as of `load_dataset`: a date after the year 9999 is read here
            raise PromptError(f"{place}: can't be read ({_first_line(error)}): mend it") from error
        mapped = {name: row.get(settings.columns.get(name, name)) for name in MAPPED}
        if settings.template is not None:
            mapped["prompt"], mapped["messages"] = _fill(settings.template, row, place), None
        yield place, {**row, **mapped}


def _fill(template: str, row: Mapping[str, Any], place: str) -> str:
    """`template` with each {column} as it stands in `row`: nothing else is allowed in braces."""
    filled = []
    try:
        for text, column, form, conversion in string.Formatter().parse(template):
            filled.append(text)
            if column is None:
                continue
            if column not in row or form or conversion:
                raise PromptError(
                    f"{place}: template names {column!r}: the columns are {list(row)}, each as "
                    "{column} alone"
                )
            if row[column] is None:
                raise PromptError(f"{place}: template names {column!r}, which is null here")
            filled.append(str(row[column]))
    except ValueError as error:
        if isinstance(error, PromptError):
            raise
        raise PromptError(
            f"data.prompts.template={template!r}: {error}: write {{{{ and }}}} for braces"
        ) from error
    return "".join(filled)


def _check_columns(names: list[str], place: str) -> None:
    spaced = [name for name in names if name != name.strip() and name.strip() in MAPPED + COLUMNS]
    if spaced:
        raise PromptError(
            f"{place}: the column {spaced[0]!r} has spaces around its name: take them out, as "
            "after every other separator"
        )
    twice = sorted({name for name in names if names.count(name) > 1 and name in MAPPED + COLUMNS})
    if twice:
        raise PromptError(f"{place}: two columns are called {twice[0]!r}: rename one of them")
    if not set(COLUMNS) & set(names):
        raise PromptError(
            f"{place}: the columns are {names}: name one `prompt` (and others `answer`, `kind`, "
            "`id`)"
        )


def _json(cell: str, name: str, place: str) -> Any:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{place}: `{name}` is not JSON ({error}): mend it") from error
