"""A model on the held-out prompts of a run."""

import re
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf

from pujax.evaluation.metrics import Evaluation, evaluate
from pujax.files import weights
from pujax.files.chat import Chat
from pujax.models.decoder import LanguageModel
from pujax.run.data import collate, make_dataset
from pujax.run.settings import DataConfig, EvalConfig
from pujax.teacher.prompts import load_prompts
from pujax.teacher.store import read_anchors


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
