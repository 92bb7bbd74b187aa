"""What a run says of prompts without an anchor, before jax is imported where files tell."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pujax.config.compose import shipped
from pujax.config.settings import DataConfig, TrainConfig
from pujax.errors import require
from pujax.records import Prompt, messages_key
from pujax.teacher.anchors import anchors_for
from pujax.teacher.prompts import are_files, load_prompts
from pujax.teacher.settings import CollectConfig, TeacherConfig
from pujax.teacher.store import COLLECT

HAD_ALL = (
    "had them all when it began: put back the prompts or the answers that it had, or begin another "
    "run"
)


def to_collect(config: DataConfig, *, begun: bool) -> str:
    """What to do about answers that a store lacks; an experiment's own is for its own prompts."""
    if begun:
        return f"the run {HAD_ALL}"
    if config.preferences is not None and _of_experiment(config.anchors):
        return "to learn from the preferences alone, set data.prompts=null data.anchors=null"
    if not (_of_experiment(config.anchors) and not _of_experiment(config.prompts)):
        return COLLECT
    return (
        f"data.anchors={config.anchors} is the experiment's: set data.anchors=YOUR STORE, which "
        "`python -m pujax.collect` makes"
    )


def refuse_unanswered(config: TrainConfig, *, begun: bool) -> None:
    """Refuse prompts of files to which the store has no answer, where nobody is asked for it.

    And a batch of more prompts than have one. Whether a prompt is left out as too long its tokens
    tell, and a dataset is read once: of those `load_data` finds it. Raises `StoreError` and
    `ConfigError`.
    """
    data = config.data
    sources = [source for source in (data.prompts, data.heldout) if source is not None]
    if data.anchors is None or config.teacher.asks or data.on_too_long != "error":
        return
    answered = answered_in(sources, data.anchors, config.teacher, to_collect(data, begun=begun))
    if answered and answered[0] and data.prompts is not None and data.preferences is None:
        refuse_batches(config, sft=answered[0], align=answered[0])


def refuse_batches(config: TrainConfig, *, sft: int, align: int) -> None:
    """Refuse a batch of more prompts than there are for its stage. Raises `ConfigError`."""
    for key, steps, size, prompts in (
        ("sft.batch", config.sft.steps, config.sft.batch, sft),
        ("align.prompts", config.align.steps, config.align.prompts, align),
    ):
        remedy = f"there are {prompts} training prompts: lower it"
        if not prompts:
            remedy = "no training prompt has an answer with a token in it: look at data.anchors"
        require(not steps or size <= prompts, key, size, remedy)


def answered_in(
    sources: Sequence[Any], store: str, teacher: TeacherConfig, remedy: str
) -> list[int] | None:
    """How many prompts of each source have an answer of `teacher`; None unless all are files.

    Raises `StoreError` with the `remedy` for prompts that nobody has asked of.
    """
    if not all(map(are_files, sources)):
        return None
    parts = [list(load_prompts(source, say=_nothing)) for source in sources]

    def place(prompt: Prompt) -> str:
        return f" in {next(s for s, p in zip(sources, parts, strict=True) if _has(p, prompt))}"

    anchors = anchors_for(
        [prompt for part in parts for prompt in part],
        teacher,
        Path(store),
        CollectConfig(),  # of who asks
        say=_nothing,
        remedy=remedy,
        place=place,
    )
    return [sum(messages_key(prompt.messages) in anchors for prompt in part) for part in parts]


def _has(part: list[Prompt], prompt: Prompt) -> bool:
    return any(each is prompt for each in part)


def _nothing(line: str) -> None:
    """Told what `load_data` will say."""


def _of_experiment(source: Any) -> bool:
    """Whether it is one of the files that come with pujax, or some of them."""
    if isinstance(source, list | tuple):
        return bool(source) and all(map(_of_experiment, source))
    return isinstance(source, str) and source == shipped("/".join(Path(source).parts[-2:]))
