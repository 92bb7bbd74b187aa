"""How far a collection is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pujax.teacher.asking import Tally
from pujax.teacher.plan import Plan

REPORT_EVERY = 30.0  # seconds between progress lines where there is no terminal


@contextmanager
def progress() -> Iterator[Callable[[Plan, Tally], None]]:
    """Within the block: a function that shows a plan and how far it is, on standard error."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        bar = bars.add_task("asking", total=None)
        last = time.monotonic()

        def show(plan: Plan, tally: Tally) -> None:
            nonlocal last
            failed = sum(tally.failed.values())
            done = tally.answered + failed
            note = "".join(
                f", {count} {name}"
                for name, count in (("failed", failed), ("retried", tally.retried))
                if count
            )
            if console.is_terminal:
                bars.update(bar, total=plan.to_ask, completed=done, description=f"asking{note}")
            elif time.monotonic() - last > REPORT_EVERY:
                last = time.monotonic()
                print(f"asking: {done} of {plan.to_ask}{note}", file=sys.stderr, flush=True)

        yield show
