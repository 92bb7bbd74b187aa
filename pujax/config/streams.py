"""The standard streams of a command, any of which whoever started it may have closed."""

import os
import sys
from io import TextIOWrapper


def hold(name: str) -> None:
    """See that all three are open, or end with one line where the output of `name` is closed.

    What is opened first takes the number of a closed one, so that a library's warnings would go
    into a store or a checkpoint. Raises SystemExit.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")
    if sys.stdout is None:
        sys.exit(f"{name}: standard output is closed: write >/dev/null where nobody is to read it")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")


def escape() -> None:
    """Have what a terminal's encoding lacks written as an escape; before the first print."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
