"""A line a minute where work is silent and no bar moves, so that nobody takes it for stuck."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

_OUTER: ContextVar[list[str] | None] = ContextVar("outer", default=None)
"""What is waited for around this, by the waits within it that are not over."""


@contextmanager
def waited(
    what: str, say: Callable[[str], None] | None, *, every: float = 60.0
) -> Iterator[Callable[[], None]]:
    """Say that `what` goes on, and for how long, after each `every` seconds of silence.

    Yields what is to be called when something else was said. Without `say`, as where a terminal has
    a bar that moves, nothing is done. Of one wait within another the inner one speaks.
    """
    if say is None:
        yield lambda: None
        return
    begun = heard = time.monotonic()
    ended = threading.Event()
    outer, within = _OUTER.get(), list[str]()

    def noted() -> None:
        nonlocal heard
        heard = time.monotonic()

    def watch() -> None:
        while not ended.wait(max(0.0, heard + every - time.monotonic())):
            if within:
                noted()
            elif time.monotonic() - heard >= every:
                say(f"{what}: still at it, {duration(time.monotonic() - begun)} by now")
                noted()

    watching = threading.Thread(target=watch, name=what, daemon=True)
    watching.start()
    if outer is not None:
        outer.append(what)
    _OUTER.set(within)
    try:
        yield noted
    finally:
        _OUTER.set(outer)  # no token: a generator that a failure left may be closed elsewhere
        if outer is not None:
            outer.remove(what)
        ended.set()
        watching.join()


def through(
    starts: range, what: str, count: int, say: Callable[[str], None] | None = None
) -> Iterator[int]:
    """`starts`, where parts of `count` things begin, while a bar or `say` tells how far that is.

    Without `say` a terminal gets the bar, and standard error a line a minute where output goes into
    a file.
    """
    if say is None and sys.stdout.isatty():
        from rich.progress import track

        yield from track(starts, description=what, transient=True)
        return
    tell, at = say or partial(print, file=sys.stderr, flush=True), 0

    def told(line: str) -> None:
        tell(f"{line}, {at} of {count}")

    with waited(what, told):
        for at in starts:
            yield at


def duration(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def about(seconds: float) -> str:
    """A time in words no finer than it is known."""
    if seconds < 90:
        return "about a minute"
    minutes = seconds / 60
    return f"about {minutes:.0f} min" if minutes < 120 else f"about {minutes / 60:.1f} hours"
