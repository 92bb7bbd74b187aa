"""A line a minute where work is silent and no bar moves, so that nobody takes it for stuck."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def waited(
    what: str, say: Callable[[str], None] | None, *, every: float = 60.0
) -> Iterator[Callable[[], None]]:
    """Say that `what` goes on, and for how long, after each `every` seconds of silence.

    Yields what is to be called when something else was said. Without `say`, as where a terminal has
    a bar that moves, nothing is done.
    """
    if say is None:
        yield lambda: None
        return
    begun = heard = time.monotonic()
    ended = threading.Event()

    def noted() -> None:
        nonlocal heard
        heard = time.monotonic()

    def watch() -> None:
        while not ended.wait(max(0.0, heard + every - time.monotonic())):
            if time.monotonic() - heard >= every:
                say(f"{what}: still at it, {duration(time.monotonic() - begun)} by now")
                noted()

    watching = threading.Thread(target=watch, name=what, daemon=True)
    watching.start()
    try:
        yield noted
    finally:
        ended.set()
        watching.join()


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
