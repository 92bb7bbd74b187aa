"""What has been evaluated: of a run, of several side by side, and with which settings."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pujax.config.functions import described, fits
from pujax.config.settings import DataConfig, EvalConfig, TrainConfig
from pujax.errors import EvaluationError
from pujax.evaluation.results import Evaluation, load_all, of_run
from pujax.evaluation.statistics import same_prompts
from pujax.evaluation.tables import Arm
from pujax.files.settings import kept_settings
from pujax.teacher.settings import CollectConfig, TeacherConfig


def evaluations_of(directory: Path, last: Sequence[str] = ()) -> list[Evaluation]:
    """What a run's directory has of evaluations, those of models in `last` last and in that order.

    Raises `EvaluationError` when that is nothing.
    """
    found = load_all(directory)
    found.sort(key=lambda each: last.index(each.model) if each.model in last else -1)
    if not found:
        raise EvaluationError(f"{directory} has no eval-*.jsonl: is it a run's directory?")
    return found


def final(directory: Path) -> Evaluation:
    """The evaluation of what a run ended with. Raises `EvaluationError` where it has none."""
    return of_run(evaluations_of(directory))[-1]


def arms(
    directories: Sequence[Path], names: Sequence[str], folders: Sequence[Path] | None = None
) -> tuple[list[Arm], bool]:
    """Several runs as the columns of one table, and whether they are arms, not stages of one.

    Runs of one name, or without names those whose settings differ in the seed alone, are an arm.
    Several arms stand side by side with the model that each ended with; of a single one each stage
    is a column. `folders` have each run's evaluations, where its own directory is not meant. Raises
    `EvaluationError`, as for runs that were asked different prompts, and `ConfigError` for settings
    that can't be read.
    """
    kept = dict(zip(directories, folders or directories, strict=True))
    first = final(kept[directories[0]])
    for run in directories[1:]:
        same_prompts(first, final(kept[run]), of=(directories[0], run))
    grouped = by_arm(directories, names)
    if len(grouped) > 1:
        columns = [
            Arm(name, tuple(final(kept[run]) for run in runs)) for name, runs in grouped.items()
        ]
        return columns, True
    stages: dict[str, dict[str, Evaluation]] = {}
    for directory in directories:
        for found in evaluations_of(kept[directory]):
            stages.setdefault(found.model, {})[str(directory)] = found
    return [
        Arm(model, tuple(runs.values()), of=tuple(runs)) for model, runs in stages.items()
    ], False


def by_arm(directories: Sequence[Path], names: Sequence[str] = ()) -> dict[str, list[Path]]:
    """Runs by what their arm is called: those of one name, or of settings alike but for the seed.

    Raises `ConfigError` for settings that can't be read.
    """
    grouped: dict[str, list[Path]] = {}
    for place, directory in enumerate(directories):
        key = names[place] if names else _all_but_the_seed(directory)
        grouped.setdefault(key, []).append(directory)
    firsts = [runs[0] for runs in grouped.values()]
    if names or len(firsts) == 1:
        return grouped if names else {firsts[0].name: list(directories)}
    called = titles(firsts)
    if len(set(called)) < len(called):
        called = list(map(str, firsts))
    return dict(zip(called, grouped.values(), strict=True))


def titles(directories: Sequence[Path]) -> list[str]:
    """What to call runs: their folders' names, or where those are times what sets them apart.

    That is their `run.name`, where each has one of its own, else the settings that differ.
    """
    if not all(re.match(r"\d{4}-?\d\d-?\d\d", directory.name) for directory in directories):
        return [str(directory.name) for directory in directories]
    settings = [dict(_leaves(kept_settings(directory))) for directory in directories]
    called = [str(each.get("run.name") or "") for each in settings]
    if all(called) and len(set(called)) == len(called):
        return called
    keys = [
        key
        for key in dict.fromkeys(key for each in settings for key in each)
        if key.partition(".")[0] not in ("run", "resume")
        and len({str(each.get(key)) for each in settings}) > 1
    ]
    named = [" ".join(f"{k}={each.get(k)}" for k in keys[:2]) for each in settings]
    return named if len(set(named)) == len(named) else [path.name for path in directories]


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value; a function goes by its group's key and its own name."""
    for key, value in node.items():
        if key == "_target_":
            yield prefix.rstrip("."), str(value).rpartition(".")[2]
        elif isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _all_but_the_seed(directory: Path) -> str:
    settings = kept_settings(directory)
    kept = {key: value for key, value in settings.items() if key not in ("seed", "run", "resume")}
    return json.dumps(kept, sort_keys=True, default=str)


def run_config(directory: Path, trusted: Sequence[str] = ()) -> TrainConfig:
    """The settings of a run as far as its held-out prompts go, whichever version stored them.

    Trusted is what the caller trusts, and not what a run's directory, which may be another's, says
    of itself. Raises `EvaluationError`, and `ConfigError` for settings that can't be read or a
    value that is out of its range.
    """
    stored = kept_settings(directory)
    try:
        return TrainConfig(
            trusted=list(trusted),
            data=from_stored(DataConfig, stored["data"]),
            teacher=from_stored(TeacherConfig, stored.get("teacher", {})),
            collect=from_stored(CollectConfig, stored.get("collect", {})),
            eval=from_stored(EvalConfig, stored["eval"]),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{directory}/config.yaml: not a run's settings ({error}): put the file right"
        ) from error


def from_stored(schema: Any, told: Mapping[str, Any]) -> Any:
    """An instance of `schema` from the keys that it knows of; the rest has its defaults.

    Raises TypeError for a value that the schema can't have.
    """
    kinds, made = get_type_hints(schema), {}
    for field in fields(schema):
        if field.name in told:
            kind, value = kinds[field.name], told[field.name]
            if is_dataclass(kind):
                value = from_stored(kind, value)
            elif not fits(value, kind):
                raise TypeError(f"{field.name} is {value!r:.80}, not {described(kind)}")
            made[field.name] = value
    return schema(**made)
