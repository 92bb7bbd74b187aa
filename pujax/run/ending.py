"""How a run ends: what it left where, how much of the disk that takes, and what to do with it."""

import os
import shutil
from pathlib import Path

CHECKPOINTS = "checkpoints"
"""The states to go on from, which a run that is done goes on from no more."""


def ending(directory: Path, *, clean: bool) -> str:
    """What to say of a run that is done; its checkpoints go where they are to be `clean`ed up.

    What alignment started from, reference/, stays: suites ask it.
    """
    states = directory / CHECKPOINTS
    if clean:
        shutil.rmtree(states, ignore_errors=True)
    whole, spare = size_of(directory), size_of(states)
    disk = f"disk: {amount(whole)}"
    if spare:
        disk += (
            f", {amount(spare)} of it {states}, which is needed no more: remove it, or set "
            "checkpoint.clean=true"
        )
    return "\n".join(
        [
            f"run: {directory}",
            f"report: {directory / 'report.html'}",
            f"model: {directory / 'export'}",
            disk,
            f"next: pujax chat run={directory}, or serve, export, evaluate",
        ]
    )


def size_of(directory: Path) -> int:
    """The bytes of all files below a directory; links count as links."""
    return sum(
        os.lstat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(directory)
        for name in names
    )


def amount(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
