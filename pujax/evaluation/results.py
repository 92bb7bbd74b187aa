"""What a model did on the held-out prompts: rows of values, on the disk and in memory."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pujax.errors import EvaluationError
from pujax.evaluation.metrics import METRICS, Shown
from pujax.files.durable import read_jsonl, write_whole

KNOWN: dict[str, Shown] = {name: metric.shown for name, metric in METRICS.items()}

LARGEST = 1e300  # beyond it sums and pictures overflow

TEXTS = ("id", "prompt", "anchor", "response")
OPTIONAL = ("kind", "answer")


@dataclass(frozen=True)
class Row:
    """One held-out prompt answered, with the value of each metric; None where it has none."""

    id: str
    kind: str | None
    prompt: str
    answer: str | None
    anchor: str
    response: str
    values: Mapping[str, float | None]
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """What one model (base, sft, aligned) did on every held-out prompt.

    `shown` says how the metrics are shown that the rows have, in the order of the tables. `of` is
    the digest of the parameters and of what else decides the answers, where a run has made it.
    """

    model: str
    rows: tuple[Row, ...]
    shown: Mapping[str, Shown] = field(default_factory=lambda: KNOWN)
    of: str | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            raise EvaluationError(
                f"evaluation of {self.model}: no held-out prompts (eval.prompts): allow some, and "
                "evaluate again"
            )

    def values(self, metric: str) -> list[float]:
        """A metric's value on each prompt that has one."""
        values = [row.values.get(metric) for row in self.rows]
        return [value for value in values if value is not None]

    def means(self) -> dict[str, float]:
        """Means by metric name (`eval/...`), without metrics that no prompt has."""
        values = {metric: self.values(metric) for metric in self.shown}
        return {f"eval/{metric}": float(np.mean(v)) for metric, v in values.items() if v}

    def by_kind(self) -> dict[str, "Evaluation"]:
        """The evaluation split by the prompts' kinds, in alphabetical order."""
        kinds = sorted({row.kind for row in self.rows if row.kind is not None})
        return {
            kind: replace(self, rows=tuple(row for row in self.rows if row.kind == kind))
            for kind in kinds
        }


def is_number(value: Any) -> bool:
    """Whether a file's value is a number of a size that can be worked with.

    NaN is none, nor is true or an integer of hundreds of digits.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= LARGEST


def is_value(value: Any) -> bool:
    """Whether a file's value is one of a metric: such a number, any float, or null."""
    return value is None or isinstance(value, float) or is_number(value)


def save(evaluation: Evaluation, directory: Path) -> Path:
    """Write `eval-<model>.jsonl` and return its path: one row a line, each with its CRC-32.

    First lines say how metrics are shown that not every reader knows, how many rows there are, and
    `of` what these are.
    """
    path = directory / f"eval-{evaluation.model}.jsonl"
    lines = []
    if dict(evaluation.shown) != KNOWN:
        lines.append({"metrics": {name: vars(shown) for name, shown in evaluation.shown.items()}})
    told = {"rows": len(evaluation.rows)}
    lines.append(told if evaluation.of is None else {"of": evaluation.of} | told)
    for row in evaluation.rows:
        line = vars(row) | {"values": dict(row.values)}
        if not row.samples:
            del line["samples"]
        lines.append(line)
    sealed = [line | {"crc32": _crc32(line)} for line in lines]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in sealed)
    write_whole(path, text.encode(errors="backslashreplace"))
    return path


def load(path: Path) -> Evaluation:
    """Read what `save` wrote, now or when the values stood in the row beside its texts.

    Raises `EvaluationError` naming file and line for anything else, as for a line that is not what
    was written, and for fewer or more rows. Lines of a pujax that wrote none have no CRC-32, but
    then none in the file has; nor did an earlier one say how many rows there are, or `of` what.
    """
    rows, shown, of, count, lines = [], dict(KNOWN), None, None, read_jsonl(path)
    sealed = any("crc32" in line for line in lines)
    for number, line in enumerate(lines, 1):
        try:
            if sealed and line.pop("crc32", None) != _crc32(line):
                raise ValueError("it is not what was written")
            if "metrics" in line and "id" not in line:
                shown = {name: Shown(**told) for name, told in line["metrics"].items()}
            elif line and line.keys() <= {"of", "rows"}:
                of, count = line.get("of", of), line.get("rows", count)
            else:
                rows.append(_row(line))
        except (TypeError, ValueError, AttributeError) as error:
            raise EvaluationError(
                f"{path}:{number}: not a row of an evaluation: {error}: delete the file, and "
                "evaluate again"
            ) from error
    if not rows:
        raise EvaluationError(f"{path}: no rows in it: delete it, and evaluate again")
    if count not in (None, len(rows)):
        raise EvaluationError(
            f"{path}: {len(rows)} rows in it, and there were {count}: delete it, and evaluate again"
        )
    for name in dict.fromkeys(name for row in rows for name in row.values):
        shown.setdefault(name, Shown(name))
    return Evaluation(path.stem.removeprefix("eval-"), tuple(rows), shown, of)


def _crc32(line: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(line, sort_keys=True).encode())


def _row(line: Mapping[str, Any]) -> Row:
    """A row of a file; ValueError or TypeError says what is wrong with it."""
    fields = {**dict.fromkeys(OPTIONAL), **line}
    samples = fields.pop("samples", ())
    values = fields.pop("values", None)
    texts = {name: fields.pop(name, None) for name in (*TEXTS, *OPTIONAL)}
    for name, value in texts.items():
        if not (isinstance(value, str) or (value is None and name in OPTIONAL)):
            raise ValueError(f"{name} is {value!r}")
    values = fields if values is None else values
    for name, value in values.items():
        if not is_value(value):
            raise ValueError(f"{name} is {value!r:.80}")
    if not all(isinstance(sample, str) for sample in samples):
        raise ValueError(f"samples are {samples!r}")
    return Row(**texts, values=values, samples=tuple(samples))


OWN = ("base", "sft", "aligned")
"""What a run calls the models that it evaluates itself, in their order."""


def load_all(directory: Path) -> list[Evaluation]:
    """The evaluations that a directory has, a run's own first, in the order it makes them."""
    order = {model: place for place, model in enumerate(OWN)}
    found = [load(path) for path in sorted(directory.glob("eval-*.jsonl"))]
    return sorted(found, key=lambda evaluation: order.get(evaluation.model, len(order)))


def of_run(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The evaluations of base, sft and aligned alone; all, where there are none of these."""
    own = [evaluation for evaluation in evaluations if evaluation.model in OWN]
    return own or list(evaluations)


def shown_by(evaluations: Iterable[Evaluation]) -> dict[str, Shown]:
    """How the metrics of several evaluations are shown, the first to name one decides."""
    shown: dict[str, Shown] = {}
    for evaluation in evaluations:
        for name, told in evaluation.shown.items():
            shown.setdefault(name, told)
    return shown
