"""Held-out prompts asked otherwise than in a run's own table: which, how, and where that is kept.

A folder of its own, in the run's directory or elsewhere, has `eval-<model>.jsonl` as a run has, and
beside each `asked-<model>.json`, which says of what and how it was made.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from pujax.config.functions import build_metrics
from pujax.config.settings import DataConfig, EvalConfig, TrainConfig
from pujax.config.tool_settings import HeldoutConfig, MeasureConfig, over
from pujax.errors import ConfigError, EvaluationError, PujaxError
from pujax.evaluation.metrics import PAIRS, Metric
from pujax.evaluation.results import Evaluation, load, save
from pujax.files.chat import Chat
from pujax.files.durable import on_disk, refuse_unwritable, write_whole
from pujax.files.locate import at_home, locate
from pujax.inference.evaluated import run_config
from pujax.inference.finished import model_path
from pujax.inference.heldout import evaluate_subject, subject_for
from pujax.records import Example, Prompt, canonical, messages_key
from pujax.run.data import load_heldout
from pujax.teacher.preferences import load_preferences
from pujax.teacher.prompts import load_prompts
from pujax.teacher.settings import TeacherConfig
from pujax.text import counted

FINAL = "aligned"
"""What the model is called that a run ended with."""

PROMPTS = "data.heldout or data.anchors"
"""By what the digest of the prompts is called in files that tell how an evaluation was made."""


@dataclass(frozen=True)
class Split:
    """Held-out prompts, how they are laid out and measured, and the folder that keeps the answers.

    The settings are as far as held-out prompts go; `trusted` of them is the caller's. `learnt` is
    what the run was trained on.
    """

    config: TrainConfig
    metrics: Mapping[str, Metric]
    folder: Path
    learnt: DataConfig


def split_of(
    directory: Path | None,
    data: HeldoutConfig,
    measured: MeasureConfig,
    *,
    teacher: str | None = None,
    out: str | None = None,
    trusted: Sequence[str] = (),
) -> Split:
    """The prompts of `data` where it has any, laid out and measured as by the run in `directory`.

    Rows of rated responses are preferences, as long as `data` has no anchors: also of a run whose
    own prompts a store answers. `teacher` is whose anchors. Raises `ConfigError`, and
    `EvaluationError` for a run whose settings can't be read.
    """
    own = TrainConfig(eval=EvalConfig(), trusted=list(trusted))
    if directory is not None:
        own = run_config(directory, trusted)
    before = DataConfig(anchors=None) if directory is None else own.data
    rated = before.anchors is not None and data.anchors is None and _rated(data.heldout)
    if rated:  # its prompts with them, which no settings may have without anchors
        before = replace(before, anchors=None, prompts=MISSING)
    of_data = over(before, data)
    of_eval = over(own.eval, measured)
    nodes = {**own.eval.metrics, **measured.metrics}
    metrics = {
        **build_metrics(own.eval, own.trusted),
        **(PAIRS if rated or (directory is None and of_data.anchors is None) else {}),
        **build_metrics(replace(own.eval, metrics=nodes), own.trusted),
    }
    if data.heldout is not None:
        of_eval = replace(of_eval, prompts=measured.prompts)
    whose = own.teacher
    if data.anchors is not None or teacher is not None:
        whose = TeacherConfig(model=teacher or own.teacher.model)
    config = replace(
        own,
        data=of_data,
        eval=replace(of_eval, metrics=nodes),
        teacher=whose,
    )
    if of_data.heldout in (None, MISSING):
        raise ConfigError(f"{directory}/config.yaml: no data.heldout: set data.heldout=FILE")
    folder = Path("evaluations") if directory is None else directory
    name = _stem(of_data.heldout)
    folder = folder / (name if directory is None else f"heldout-{name}")
    if out is not None:
        folder = at_home(out)
    if (folder / "config.yaml").exists():
        raise ConfigError(f"out={out!r}: is a run's directory, which has a table of its own")
    return Split(config, metrics, folder, own.data)


def _rated(source: Any) -> bool:
    """Whether rows have responses that someone rated; False for what can't be read at all."""
    try:
        return source is not None and any(load_preferences(source, bad=lambda error: None))
    except PujaxError:
        return False


def _stem(source: Any) -> str:
    """A name for a file, several, or a dataset, of letters that any file's name may have."""
    if isinstance(source, Mapping):
        source = f"{source.get('dataset')}-{source.get('split', 'train')}"
        return re.sub(r"[^\w.-]+", "-", source.rpartition("/")[2])
    files = [source] if isinstance(source, str) else list(source)
    return re.sub(r"[^\w.-]+", "-", "-".join(Path(str(file)).stem for file in files))


def evaluated(
    split: Split, path: str, name: str, *, say: Callable[[str], None] = print
) -> Evaluation:
    """The model at `path`, called `name`, on the prompts of `split`; from the disk where it is.

    `path` may be a finished run's directory. Raises what reading settings, prompts, anchors and
    weights raises, `EvaluationError` where the folder has other prompts, settings or models, and
    `DiskError` where nothing can be written into it.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise EvaluationError(f"name={name!r}: it can't name a file: choose another")
    path = model_path(path)
    kept = split.folder / f"eval-{name}.jsonl"
    if not kept.exists():
        refuse_unwritable(split.folder)
    chat = Chat.load(path)
    dataset = load_heldout(split.config, chat, say)
    examples = dataset.examples[: split.config.eval.prompts]
    asked = asked_of(split.config, examples) | {
        "eval.metrics": [list(split.metrics), split.config.eval.metrics]
    }
    asked["model"] = model_digest(path)
    _refuse_other(split.folder, name, asked)
    if warning := warning_of_training([e.prompt for e in examples], split.learnt):
        say(warning)
    if kept.exists():
        say(f"{kept}: has been evaluated")
        before = load(kept)
        if [row.id for row in before.rows] != [example.prompt.id for example in examples]:
            raise EvaluationError(f"{kept}: its rows are not of these prompts: delete it")
        return before
    subject = subject_for(split.config, path, chat, dataset)
    found = evaluate_subject(subject, split.config, split.metrics, name)
    _refuse_other(split.folder, name, asked)  # another process may have been at it meanwhile
    with on_disk(split.folder):
        split.folder.mkdir(parents=True, exist_ok=True)
    # First: an evaluation without it would be nobody's.
    write_whole(_beside(kept), (json.dumps(asked, indent=2) + "\n").encode())
    say(str(save(found, split.folder)))
    return found


def warning_of_training(prompts: Sequence[Prompt], data: DataConfig) -> str | None:
    """How many of the prompts a run of these settings was trained on; None where there are none."""
    own = None if data.prompts == MISSING else data.prompts  # asked without a run
    trained = set[str]()
    try:
        if own is not None:
            found = load_prompts(own, lambda line: None)
            trained |= {messages_key(each.messages) for each in found}
        if data.preferences is not None:
            rated = load_preferences(data.preferences, bad=lambda error: None)
            trained |= {messages_key(each.prompt.messages) for each in rated}
    except PujaxError as error:
        return f"warning: whether the run was trained on these prompts is not known ({error})"
    shared = sum(messages_key(prompt.messages) in trained for prompt in prompts)
    if not shared:
        return None
    named = " and ".join(str(s) for s in (own, data.preferences) if s is not None)
    return (
        f"warning: {shared} of {counted(len(prompts), 'prompt')} are among those that the run was "
        f"trained on ({named}): what a table says of these was learnt, and is no held-out result"
    )


def _beside(kept: Path) -> Path:
    """The file that says of what, and how, the evaluation `kept` was made."""
    return kept.with_name(f"asked-{kept.stem.removeprefix('eval-')}.json")


def asked_of(config: TrainConfig, examples: Sequence[Example]) -> dict[str, Any]:
    """What two evaluations must share to stand in one table, by the settings' names."""
    data, measured = config.data, config.eval
    rows = [
        [e.prompt.id, list(e.prompt.messages), e.prompt.answer, e.prompt.kind, e.anchor]
        + [[given.text, given.score] for given in e.given]
        for e in examples
    ]
    return {
        PROMPTS: hashlib.sha256(canonical(rows)).hexdigest(),
        "data.system": data.system,
        "data.max_prompt_tokens": data.max_prompt_tokens,
        "data.max_response_tokens": data.max_response_tokens,
        "data.on_too_long": data.on_too_long,
        "eval.samples": measured.samples,
        "eval.temperature": measured.temperature,
    }


def _refuse_other(folder: Path, name: str, asked: Mapping[str, Any]) -> None:
    """Raise `EvaluationError` where `folder` has evaluations that this one can't stand beside."""
    for kept in sorted(folder.glob("eval-*.jsonl")):
        try:
            before = json.loads(_beside(kept).read_text(encoding="utf-8"))
            differing = [key for key in asked if before.get(key) != asked[key]]
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise EvaluationError(
                f"{kept}: nothing tells of what it was made: choose another folder with out=FOLDER"
            ) from error
        if kept.stem != f"eval-{name}":
            differing = [key for key in differing if key != "model"]
        if differing:
            which = [
                "data.heldout, data.anchors, data.dimensions or eval.prompts"
                if key == PROMPTS
                else key
                for key in differing
            ]
            raise EvaluationError(
                f"{kept} was made with other {', '.join(which)}: choose another folder with "
                "out=FOLDER" + (" or another name=" if differing == ["model"] else "")
            )


def model_digest(path: str) -> str:
    """The sha256 of a model's files: weights, settings, tokenizer and template."""
    local = locate(path)
    files = [local]
    if local.is_dir():
        files = sorted(
            file for form in ("safetensors", "json", "jinja") for file in local.glob(f"*.{form}")
        )
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            whole.update(hashlib.file_digest(content, "sha256").digest())
    return whole.hexdigest()
