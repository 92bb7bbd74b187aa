"""HTML of a page of its own: the document around it, and tables that a phone can read too."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from pujax.evaluation import tables
from pujax.evaluation.metrics import Shown
from pujax.evaluation.statistics import Difference

WIDE = 9  # columns from which on a table is laid out as on a narrow screen, whatever the screen

Cell = tuple[str, str]
"""A cell's style and its HTML."""


GENERATOR = '<meta name="generator" content="pujax">'
"""By which a page is known for one of ours."""


def document(name: str, sections: Iterable[str]) -> str:
    """A whole page, `name` its title in plain text; needs nothing from anywhere else.

    It follows the reader's colour scheme.
    """
    body = "\n".join(section for section in sections if section)
    style, script = (
        files("pujax.evaluation").joinpath(f"page.{kind}").read_text(encoding="utf-8")
        for kind in ("css", "js")
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def table(header: Sequence[str], rows: Iterable[tuple[str, Iterable[Cell]]]) -> str:
    """A table of named rows; `header` has a title for the names too, and is plain text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(_row(title, header[1:], cells) for title, cells in rows)
    wide = " wide" if len(header) >= WIDE else ""
    return (
        f'<div class="table{wide}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def plain(text: str) -> Cell:
    """A cell of plain text; a course of several numbers may break between them."""
    return "course" if "→" in text else "", escape(text)


def compared(shown: Shown, cell: str | Difference) -> Cell:
    """A cell of a table of evaluations, a clear gain or loss in its colour."""
    if isinstance(cell, str):
        return plain(cell)
    mean, _, limits = tables.interval(shown, cell).partition(" ")
    return tables.verdict(shown, cell), f"{mean} <small>{limits}</small>"


def _row(title: str, header: Sequence[str], cells: Iterable[Cell]) -> str:
    """A table's row; each cell has its column's name for narrow pages."""
    marked = "".join(
        f'<td class="{style}" data-column="{escape(column)}">{cell}</td>'
        for column, (style, cell) in zip(header, cells, strict=True)
    )
    return f"<tr><th>{escape(title)}</th>{marked}</tr>"
