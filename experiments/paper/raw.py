"""Results as they are kept: a JSON file a run and split, of which tables and figures are made."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pujax import __version__
from pujax.errors import EvaluationError
from pujax.evaluation import results
from pujax.evaluation.results import is_value
from pujax.files.durable import read_jsonl, write_whole
from pujax.records import messages_key
from pujax.teacher.prompts import load_prompts
from pujax.teacher.store import read_failures, read_records

Raw = dict[str, Any]

Key = tuple[str, int, str]
"""A run's name, its seed, and the split that it was read on."""

SHAPE: Mapping[str, Any] = {
    **dict.fromkeys(("name", "split", "arm", "title", "group", "metric", "against"), str),
    **{"seed": int, "place": int, "origin": str | None, "chosen": Mapping, "prompts": Mapping},
}
"""What every result has, by type."""

OF_ANSWERS: Mapping[str, Any] = {
    **dict.fromkeys(("settings", "steps", "seconds", "teacher", "machine", "shown"), Mapping),
    **{"course": list, "id": list, "kind": list, "answer": list, "response": list},
    "values": Mapping,
}
"""What one of a model's answers has too."""

OF_SUITE: Mapping[str, Any] = {"header": list, "rows": list, "note": str}
"""And one of a suite in their place."""

OF_JUDGE: Mapping[str, Any] = {
    **dict.fromkeys(("arm", "title", "judge", "note"), str),
    **{"seed": int, "prompts": int, "against": Mapping, "rows": list, "records": list},
}

GROUPS = ("default", "main", "fresh", "others", "anchors", "ablations", "methods", "course")
PACE = "pace"  # the group of arms that only measure: run where another needs them, in no table
COURSE = "course"  # and of arms that are asked on the way too, for the curves: in no table either

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def file_name(key: Key) -> str:
    """The name of a result's file."""
    name, seed, split = key
    return f"{name}-seed{seed}-{split}.json"


def read_all(folder: Path) -> dict[Key, Raw]:
    """Every result in `folder`/raw, in the order of the files' names. Raises `EvaluationError`."""
    found = {}
    for path in sorted((folder / "raw").glob("*.json")):
        try:
            # The first results were made when these were not kept yet.
            young = {"metric": "sampled_exact", "against": "sft_continued"}
            told = json.loads(path.read_text(encoding="utf-8"))
            result = told | {key: value for key, value in young.items() if key not in told}
            key = result["name"], result["seed"], result["split"]
            if path.name != file_name(key):
                raise ValueError(f"by what it says it is {file_name(key)}")
            _check(result)
            found[key] = result
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise EvaluationError(f"{path}: not a result ({error!r}): restore it") from error
    return found


def _check(result: Raw) -> None:
    """Raise ValueError unless a result has the shape of one."""
    _check_types(result, SHAPE | (OF_SUITE if "header" in result else OF_ANSWERS))
    if result["group"] not in (*GROUPS, PACE):
        raise ValueError(f"its group {result['group']!r} is none of {', '.join(GROUPS)}")
    columns = [] if "header" in result else ["kind", "answer", "response"]
    values = {key: result[key] for key in columns} | {**result.get("values", {})}
    for key, column in values.items():
        if not isinstance(column, list) or len(column) != len(result["id"]):
            raise ValueError(f"its {key} has not as many entries as there are prompts")
    for key, column in result.get("values", {}).items():
        wrong = [value for value in column if not is_value(value)]
        if wrong:
            raise ValueError(f"its {key} has {wrong[0]!r:.60}, no number")


def _check_types(told: Raw, shape: Mapping[str, Any]) -> None:
    """Raise ValueError naming a key whose value isn't of the type that `shape` has for it."""
    for key, wanted in shape.items():
        value = told.get(key)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"its {key} is {value!r:.60}")


def read_judged(path: Path) -> Raw:
    """What a judge found, as `experiments.paper.judge` keeps it in a file.

    Raises `EvaluationError` for one that has something else.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        _check_types(told, OF_JUDGE)
        _check_types(told["against"], {"title": str, "seed": int})
        if not all(isinstance(name, str) for name, _ in told["rows"]):
            raise ValueError("its rows have no names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EvaluationError(
            f"{path}: not a judge's result ({error!r}): restore it, or delete it and ask again"
        ) from error
    return told


def arm_of(result: Raw) -> str:
    """The arm that a result is of; of one of the curve the same arm with all prompts."""
    arm = result["arm"]
    return arm.rpartition("-")[0] if result["group"] == "anchors" else arm


def write(folder: Path, result: Raw) -> Path:
    """Write a result to `folder`/raw, one entry a line, and return its path."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
    path = folder / "raw" / file_name((result["name"], result["seed"], result["split"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    return path


def put_in_order(folder: Path, arms: Sequence[str]) -> None:
    """Give each result in `folder`/raw its arm's place among `arms`, in which tables have them.

    Arms are added between others, and what was kept before would stand elsewhere.
    """
    for result in read_all(folder).values():
        place = arms.index(result["arm"]) if result["arm"] in arms else result["place"]
        if place != result["place"]:
            write(folder, result | {"place": place})


def chosen(result: Raw) -> str:
    """The settings that were tried for it, for a person."""
    return ", ".join(f"{key} {value}" for key, value in result["chosen"].items())


def mean(result: Raw, metric: str) -> float:
    """A metric's mean over the prompts that have it. Raises `EvaluationError` when none has."""
    values = [value for value in result["values"].get(metric, []) if value is not None]
    if not values:
        raise EvaluationError(f"{result['name']}: no prompt has the metric {metric}")
    return fmean(values)


def step_seconds(lines: Iterable[Mapping[str, Any]], stage: str, key: str) -> float | None:
    """The mean of a stage's steps, without those that compiled.

    They are the first, and in a run that was cut off and resumed what is over three times the
    median.
    """
    steps = [line for line in lines if line["stage"] == stage and line["step"] > 1]
    values = [line[key] for line in steps if line.get(key) is not None]
    if not values:
        return None
    limit = 3 * median(values)
    return fmean(value for value in values if value <= limit)


def course(lines: Iterable[Mapping[str, Any]]) -> list[Raw]:
    """The evaluations of a run in order: stage, step, seconds of training before it, KL, means.

    The KL is the mean over the last ten steps.
    """
    spent, kls, found = {"wall": 0.0, "processor": 0.0}, [], []
    for line in lines:
        if line["stage"] == "eval":
            means = {k: v for k, v in line.items() if k.startswith("eval/")}
            told = {"model": line["model"], "step": line["step"], "seconds": _rounded(spent)}
            recent = [kl for kl in kls[-10:] if kl is not None]
            found.append(told | {"kl": _round(fmean(recent)) if recent else None} | means)
            continue
        spent["wall"] += line["time/step_s"]
        spent["processor"] += line.get("time/cpu_s") or 0.0
        kls.append(line.get("kl/ref"))
    return found


def teacher(prompts: Path, store: Path) -> Raw:
    """What the training prompts' anchors took of the teacher: queries, and tokens in and out."""
    wanted = {messages_key(prompt.messages) for prompt in load_prompts(str(prompts))}
    used = {}
    for _, record in read_records(store):
        name = messages_key(record["messages"])
        if name in wanted:
            used[name] = record["usage"] or {}
    total = {"queries": len(used)}
    for key in ("prompt_tokens", "completion_tokens"):
        total[key] = sum(int(usage.get(key, 0)) for usage in used.values())
    return total


def answered(prompts: Sequence[Path], store: Path) -> list[bool]:
    """Of each prompt in these files, whether the store has an answer to it, or a refusal."""
    records = [*(read_records(store) if store.exists() else ()), *read_failures(store)]
    known = {messages_key(record["messages"]) for _, record in records}
    asked = load_prompts([str(path) for path in prompts])
    return [messages_key(prompt.messages) in known for prompt in asked]


def result(
    *,
    key: Key,
    about: Mapping[str, Any],
    settings: Mapping[str, Any],
    directory: Path,
    answers: Path,
    prompts: Path,
    store: Path,
    evaluation_s: float | None,
) -> Raw:
    """A run's result on a split, from what its `directory` and the evaluation `answers` hold."""
    evaluation = results.load(answers)
    lines = read_jsonl(directory / "metrics.jsonl")
    steps = {stage: sum(line["stage"] == stage for line in lines) for stage in ("sft", "align")}
    keys = {"wall": "time/step_s", "processor": "time/cpu_s"}
    paces = {
        stage: {kind: _round(step_seconds(lines, stage, key)) for kind, key in keys.items()}
        for stage in steps
    }
    rows = evaluation.rows
    shown = {name: told for name, told in evaluation.shown.items() if evaluation.values(name)}
    return {
        "name": key[0],
        "seed": key[1],
        "split": key[2],
        **about,
        "settings": dict(settings),
        "prompts": {
            "training": sum(1 for _ in load_prompts(str(prompts))),
            "evaluated": len(rows),
            "with an answer": sum(row.answer is not None for row in rows),
        },
        "steps": steps,
        "step_s": paces,
        "seconds": {
            stage: {kind: _round((paces[stage][kind] or 0.0) * count) for kind in keys}
            for stage, count in steps.items()
        },
        "evaluation_s": _round(evaluation_s),
        "teacher": teacher(prompts, store),
        "machine": machine(),
        "versions": {
            "pujax": __version__,  # which need not be installed
            **{name: version(name) for name in PACKAGES},
        },
        "course": course(lines) if key[2] == "validation" else [],
        "shown": {name: vars(told) for name, told in shown.items()},
        "id": [row.id for row in rows],
        "kind": [row.kind for row in rows],
        "answer": [row.answer for row in rows],
        "response": [row.response for row in rows],
        "values": {name: [_round(row.values.get(name)) for row in rows] for name in shown},
    }


def machine() -> Raw:
    """The processor, its cores, and the language's version."""
    named = Path("/proc/cpuinfo")
    lines = named.read_text().splitlines() if named.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def commit(root: Path) -> str | None:
    """The commit that is checked out, and whether the code differs from it; None without git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "pujax", "conf")
        return git("rev-parse", "--short=12", "HEAD") + (" and changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _rounded(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _round(value) for name, value in numbers.items()}


def _round(value: float | None) -> float | None:
    """Six significant digits."""
    return None if value is None else float(f"{value:.6g}")
