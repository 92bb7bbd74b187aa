"""What the devices of a compiled step tell each other: how often, and how many bytes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16}  # of other types the name says how wide they are: f32, s8, u32
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_MADE = re.compile(r"(?:ROOT )?%?([\w.-]+) = ((?:\(.*?\)|\S+)) ([\w-]+)\(([^)]*)\)")
_BODY = re.compile(r"\bbody=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"\b(?:to_apply|calls)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:\w+_computations?)=\{?((?:%?[\w.-]+(?:, )?)+)")
_OPENS = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")


@dataclass(frozen=True)
class Traffic:
    """How often a device takes part in collectives in one step, and the bytes that it takes in."""

    count: int = 0
    bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.count + other.count, self.bytes + other.bytes)


Table = dict[str, Traffic]


def traffic(program: str, *, trips: int = 1) -> Table:
    """The collectives of a compiled program, which is `compiled.as_text()`, by kind.

    A loop counts as often as the compiler knows that it runs, or else `trips` times; of a choice
    the branch that moves most counts. Bytes are the size of what is gathered, scattered or
    exchanged, and twice that of a sum: of n devices in a ring each takes in (n - 1)/n of it.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in map(str.strip, program.splitlines()):
        if opens := _OPENS.match(line):
            name = opens[2]
            bodies[name] = []
            entry = name if opens[1] else entry
        elif name:
            bodies[name].append(line)
    known: dict[str, Table] = {}

    def of(name: str) -> Table:
        if name not in known:
            known[name], arrays = {}, {}
            for line in bodies.get(name, ()):
                known[name] = _sum(known[name], at(line, arrays))
        return known[name]

    def at(line: str, arrays: dict[str, str]) -> Table:
        made = _MADE.match(line)
        if made is None:
            return {}
        name, result, operation, operands = made.groups()
        arrays[name] = result
        if operation in KINDS:
            given = sum(_size(arrays.get(each.strip("% "), "")) for each in operands.split(","))
            whole = max(given, _size(result))  # what is scattered is larger before, else after
            return {operation: Traffic(1, whole * (2 if operation == "all-reduce" else 1))}
        if operation == "while":
            said, body = _TRIPS.search(line), _BODY.search(line)
            assert body is not None, line
            times = int(said[1]) if said else trips
            return {
                kind: Traffic(each.count * times, each.bytes * times)
                for kind, each in of(body[1]).items()
            }
        if operation == "conditional":
            names = [one for some in _BRANCHES.findall(line) for one in some.split(",")]
            return max((of(one.strip("% ")) for one in names), key=total)
        called = _CALLED.search(line)
        return of(called[1]) if called else {}

    return of(entry)


def total(table: Mapping[str, Traffic]) -> int:
    """The bytes of all kinds."""
    return sum(each.bytes for each in table.values())


def _sum(one: Table, other: Table) -> Table:
    none = Traffic()
    kinds = [kind for kind in KINDS if kind in one or kind in other]
    return {kind: one.get(kind, none) + other.get(kind, none) for kind in kinds}


def _size(shapes: str) -> int:
    """The bytes of all arrays in a type as XLA writes it."""
    size = 0
    for kind, dimensions in _ARRAY.findall(shapes):
        bits = _BITS.get(kind) or int(re.sub(r"\D*(\d+).*", r"\1", kind))
        size += prod(map(int, filter(None, dimensions.split(",")))) * bits // 8
    return size
