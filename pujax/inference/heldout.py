"""A model on the held-out prompts of a run."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pujax.config.functions import build_metrics
from pujax.config.model_settings import ModelConfig
from pujax.config.settings import DataConfig, EvalConfig, TrainConfig
from pujax.errors import EvaluationError
from pujax.evaluation.answering import Draws, evaluate
from pujax.evaluation.metrics import Metric, missing
from pujax.evaluation.results import Evaluation, Row, load_all, of_run
from pujax.evaluation.statistics import differing_prompts, same_prompts
from pujax.evaluation.subjects import Subject
from pujax.evaluation.tables import Arm
from pujax.evaluation.text import shown
from pujax.files import weights
from pujax.files.chat import Chat
from pujax.files.durable import refuse_unwritable
from pujax.files.settings import kept_settings
from pujax.inference.finished import model_path, refuse_name
from pujax.method.step import assemble
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.models.sharding import make_mesh
from pujax.run.batches import collate
from pujax.run.data import Dataset, load_heldout
from pujax.run.student import load_student
from pujax.teacher.settings import CollectConfig, TeacherConfig
from pujax.types import Params


def evaluations_of(directory: Path) -> list[Evaluation]:
    """What a run's directory has of evaluations. Raises `EvaluationError` when that is nothing."""
    found = load_all(directory)
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
    stages: dict[str, list[Evaluation]] = {}
    for directory in directories:
        for found in evaluations_of(kept[directory]):
            stages.setdefault(found.model, []).append(found)
    return [Arm(model, tuple(runs)) for model, runs in stages.items()], False


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
    """What to call runs: their folders' names, or where those are times what sets them apart."""
    if not all(re.match(r"\d{4}-?\d\d-?\d\d", directory.name) for directory in directories):
        return [str(directory.name) for directory in directories]
    settings = [dict(_leaves(kept_settings(directory))) for directory in directories]
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
            data=_record(DataConfig, stored["data"]),
            teacher=_record(TeacherConfig, stored.get("teacher", {})),
            collect=_record(CollectConfig, stored.get("collect", {})),
            eval=_record(EvalConfig, stored["eval"]),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{directory}/config.yaml: not a run's settings ({error}): put the file right"
        ) from error


def _record(schema: Any, told: Mapping[str, Any]) -> Any:
    """An instance of `schema` from the keys that it knows of; the rest has its defaults."""
    return schema(
        **{
            field.name: _record(field.type, told[field.name])
            if is_dataclass(field.type)
            else told[field.name]
            for field in fields(schema)
            if field.name in told
        }
    )


def evaluate_other(
    directory: Path, path: str, name: str, *, trusted: Sequence[str] = ()
) -> Evaluation:
    """The model at `path` on the held-out prompts of the run in `directory`, in float32.

    `path` may be a finished run's directory too. Raises what reading settings, prompts, anchors and
    weights raises, `DiskError` for a run that nothing can be written into, and `EvaluationError`
    for a `name` that the run has or keeps for its own models: going on, it would take another's
    evaluation for its own. So it does, before anything is answered, where the prompts are no longer
    those that the run's own models were asked: nothing could be compared with such rows.
    """
    refuse_name(directory, path, name)
    refuse_unwritable(directory)
    config = run_config(directory, trusted)
    metrics = build_metrics(config.eval, config.trusted)
    subject = subject_of(config, path, print)
    _refuse_other_prompts(directory, config, subject)
    found = evaluate_subject(subject, config, metrics, name)
    refuse_name(directory, path, name)  # another process may have taken it meanwhile
    return found


def _refuse_other_prompts(directory: Path, config: TrainConfig, subject: Subject) -> None:
    """Raise `EvaluationError` where a run's rows are of other prompts than `subject` would get."""
    for kept in load_all(directory)[:1]:
        now = [
            Row(e.prompt.id, e.prompt.kind, shown(e.prompt), e.prompt.answer, e.anchor, "", {})
            for e in subject.examples
        ]
        if differing := differing_prompts(kept.rows, now):
            raise EvaluationError(
                f"{directory}/eval-{kept.model}.jsonl is of other prompts or anchors than "
                f"data.heldout={config.data.heldout} has now ({differing}): put back what was "
                "there, or ask these in a table of their own: data.heldout=FILE"
            )


def evaluate_subject(
    subject: Subject, config: TrainConfig, metrics: Mapping[str, Metric], name: str
) -> Evaluation:
    """What a model, called `name`, does on its prompts, with as many samples as `config` says."""
    found = evaluate(
        subject.model,
        subject.params,
        subject.examples,
        name=name,
        batch=subject.batch,
        collate=subject.collate,
        decode=subject.decode,
        metrics=metrics,
        draws=Draws(config.eval.samples, config.eval.temperature),
        say=None if sys.stdout.isatty() else partial(print, file=sys.stderr, flush=True),
    )
    if line := missing(metrics, found.shown, samples=config.eval.samples):
        print(line, file=sys.stderr, flush=True)
    return found


def subject_of(
    config: TrainConfig, path: str, say: Callable[[str], None] = lambda line: None
) -> Subject:
    """The model at `path` with the held-out prompts that `config` names.

    `path` may be a finished run's directory too; `say` is told how many prompts are left out.
    Raises what reading prompts, anchors and weights raises.
    """
    path = model_path(path)
    chat = Chat.load(path)
    return subject_for(config, path, chat, load_heldout(config, chat, say))


def subject_for(config: TrainConfig, path: str, chat: Chat, dataset: Dataset) -> Subject:
    """The model at `path` with prompts that have been read. Raises what reading weights raises."""
    settings, params = weights.load(path)
    return _subject(replace(settings, eos_ids=chat.eos_ids), params, config, chat, dataset)


def _subject(
    settings: DecoderConfig, params: Params, config: TrainConfig, chat: Chat, dataset: Dataset
) -> Subject:
    return Subject(
        model=LanguageModel(settings),
        params=params,
        examples=dataset.examples[: config.eval.prompts],
        batch=config.eval.batch,
        collate=lambda examples: collate(examples, dataset),
        decode=chat.decode,
        frames=chat.frames,
    )


def reference_for(directory: Path, config: TrainConfig) -> Subject:
    """What the alignment of the run in `directory` started from, with the prompts of `config`.

    Raises `CheckpointError` where the run has kept none, and what reading prompts, anchors and
    weights raises.
    """
    from pujax.run.checkpoint import Checkpoints  # with Orbax, which takes a second

    stored = kept_settings(directory)
    try:
        told = _record(ModelConfig, stored["model"])
    except (AttributeError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{directory}/config.yaml: not a run's settings ({error}): put the file right"
        ) from error
    chat = Chat.load(told.path)
    dataset = load_heldout(config, chat)
    student = load_student(told, chat, make_mesh(), int(stored.get("seed", 0)))
    checkpoints = Checkpoints(directory, keep=1, model={})
    trainable = checkpoints.restore_reference(student.trainable)
    checkpoints.close()
    params = assemble(student.base, trainable)
    return _subject(student.model.config, params, config, chat, dataset)
