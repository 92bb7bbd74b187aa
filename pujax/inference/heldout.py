"""A model on the held-out prompts of a run."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pujax.config.functions import build_metrics
from pujax.config.model_settings import ModelConfig
from pujax.config.settings import TrainConfig
from pujax.errors import EvaluationError
from pujax.evaluation.answering import Draws, evaluate
from pujax.evaluation.metrics import Metric, missing
from pujax.evaluation.results import Evaluation, Row, load_all
from pujax.evaluation.statistics import differing_prompts
from pujax.evaluation.subjects import Subject
from pujax.evaluation.text import shown
from pujax.files import weights
from pujax.files.chat import Chat
from pujax.files.durable import refuse_unwritable
from pujax.files.settings import kept_settings
from pujax.inference.evaluated import from_stored, run_config
from pujax.inference.finished import model_path, refuse_name
from pujax.method.step import assemble
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.models.sharding import make_mesh
from pujax.run.batches import collate
from pujax.run.data import Dataset, load_heldout
from pujax.run.inputs import other_given
from pujax.run.student import load_student
from pujax.types import Params


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
    own = directory / "export"
    if config.data.anchors is not None or not (own / "config.json").is_file():
        return
    if other_given(directory, load_heldout(config, Chat.load(own))):
        raise EvaluationError(
            f"data.heldout={config.data.heldout} has other rated responses now than {directory} "
            "was measured on: put back what was there, or ask these in a table of their own: "
            "data.heldout=FILE"
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
    samples, examples = config.eval.samples, subject.examples
    if line := missing(metrics, found.shown, samples=samples, examples=examples):
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
        told = from_stored(ModelConfig, stored["model"])
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
