"""What TensorBoard reads of a directory, and what it shows of that."""

import struct
from collections import Counter
from pathlib import Path
from typing import Any

from tensorboardX.proto import event_pb2

PROTOS = vars(event_pb2)  # made at run time: a type checker knows none of them


def events(directory: Path) -> list[Any]:
    """Record by record, a protobuf between its CRCs; one that a kill tore is left out."""
    found = []
    for path in sorted(directory.iterdir()):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            if at + 16 + size > len(data):
                break
            found.append(PROTOS["Event"].FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def shown(directory: Path) -> Counter[tuple[str, int, float]]:
    """Each tag's value at each step and how often it is there, but for what a clock made."""
    found: list[tuple[str, int, float]] = []
    for event in events(directory):
        if event.session_log.status == PROTOS["SessionLog"].START:  # hides what was before
            found = [point for point in found if point[1] < event.step]
        found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return Counter(point for point in found if not point[0].startswith("time/"))
