"""A model on the held-out prompts of a run."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf

from pujax.errors import ConfigError
from pujax.evaluation.answering import evaluate
from pujax.evaluation.metrics import METRICS, Metric, Shown
from pujax.evaluation.results import Evaluation
from pujax.files import weights
from pujax.files.chat import Chat
from pujax.models.decoder import LanguageModel
from pujax.run.compose import build
from pujax.run.data import collate, make_dataset
from pujax.run.settings import DataConfig, EvalConfig
from pujax.teacher.prompts import load_prompts
from pujax.teacher.store import read_anchors


def build_metrics(config: EvalConfig) -> Mapping[str, Metric]:
    """The metrics that the settings name, or those that a run has when they name none.

    Raises `ConfigError`.
    """
    metrics = {}
    for name, node in config.metrics.items():
        key = f"eval.metrics.{name}"
        try:
            function, shown = node["function"], {k: v for k, v in node.items() if k != "function"}
            metrics[name] = Metric(build(function, f"{key}.function"), Shown(**shown))
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{key}={node!r}: {error}: it needs a function and a title, and may have digits "
                "and better, as in conf/eval/"
            ) from error
    return metrics or METRICS


def evaluate_other(directory: Path, path: str, name: str) -> Evaluation:
    """The model at `path` on the held-out prompts of the run in `directory`, in float32.

    Raises what reading settings, prompts, anchors and weights raises, and ValueError for a `name`
    that the run has.
    """
    if not re.fullmatch(r"[\w.-]+", name) or (directory / f"eval-{name}.jsonl").exists():
        raise ValueError(
            f"--name {name!r}: the run has it, or it can't name a file: choose another"
        )
    settings = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
    assert isinstance(settings, dict)
    data, held = DataConfig(**settings["data"]), EvalConfig(**settings["eval"])
    chat = Chat.load(path)
    anchors = read_anchors(Path(data.anchors))
    dataset = make_dataset(load_prompts(data.heldout), anchors, chat, data)
    config, params = weights.load(path)
    return evaluate(
        LanguageModel(replace(config, eos_ids=chat.eos_ids)),
        params,
        dataset.examples[: held.prompts],
        name=name,
        batch=held.batch,
        collate=lambda examples: collate(examples, dataset),
        decode=chat.decode,
    )
