"""How a run ends: what it left where, how much of the disk that takes, and what to do with it."""

import os
import shutil
from pathlib import Path
from shlex import quote

STATES = ("checkpoints", "damaged")
"""Its folders of checkpoints, sound and damaged: a run that is done needs neither."""


def ending(directory: Path, *, clean: bool, success: bool = True) -> str:
    """What to say of a run that is done; its checkpoints go where they are to be `clean`ed up.

    What alignment started from, reference/, stays: suites ask it. A model that is no `success` is
    to be looked at before it is used.
    """
    states = [directory / name for name in STATES]
    if clean:
        for folder in states:
            shutil.rmtree(folder, ignore_errors=True)
    whole, spare = size_of(directory), {folder: size_of(folder) for folder in states}
    disk = f"disk: {amount(whole)}"
    for folder, size in spare.items():
        if size:
            disk += (
                f", {amount(size)} of it {folder}, which is needed no more: remove it, or set "
                "checkpoint.clean=true"
            )
    chat = f"pujax chat {quote(f'run={directory}')}"
    then = f"{chat}, or serve, export, evaluate"
    if not success:
        then = f"{chat}, or the report, to see why: not yet serve or export"
    return "\n".join(
        [
            f"run: {directory}",
            f"report: {directory / 'report.html'}",
            f"model: {directory / 'export'}",
            disk,
            f"next: {then}",
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
