"""The first words of a run: what it is about to do, where, in what time, on how much disk."""

from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pujax.config.settings import TrainConfig
from pujax.evaluation.waiting import about, duration
from pujax.method.labels import takes_members
from pujax.method.step import Recipe
from pujax.models.decoder import DecoderConfig
from pujax.models.parameters import param_shapes
from pujax.run.data import Dataset
from pujax.run.ending import amount
from pujax.run.forecast import forecast
from pujax.run.judged import judged, kept
from pujax.run.provenance import teachers_in
from pujax.run.student import Student, fast_bfloat16
from pujax.text import counted


def place(config: TrainConfig, directory: Path, shape: DecoderConfig, mesh: Mesh) -> list[str]:
    """Where the run is kept, what it trains and on what: known before anything large is read."""
    path = config.model.path
    student = f"random weights, the tokenizer of {path}" if config.model.shape.layers else path
    sizes = jax.tree.leaves(param_shapes(shape), is_leaf=lambda node: isinstance(node, tuple))
    parameters = sum(prod(size) for size in sizes)
    trained = f"LoRA of rank {config.model.lora.rank}" if config.model.lora.rank else "all trained"
    device = mesh.devices.flat[0]
    devices = f"{mesh.size} × {device.device_kind}"
    split = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    narrow = mesh.size == 1 and device.platform == "cpu" and config.model.dtype == "auto"
    faster = "; model.dtype=bfloat16 takes less time here" if narrow and fast_bfloat16() else ""
    return [
        f"run: {directory}",
        f"student: {student}, {shape.layers} layers, {parameters / 1e6:.1f} M parameters, "
        f"{trained}",
        f"device: {devices}{f', mesh: {split}' if split else ''}{faster}",
    ]


def work(
    config: TrainConfig, student: Student, recipe: Recipe, data: Dataset, heldout: Dataset
) -> list[str]:
    """What the run learns from, its steps, and about how long and how large it will be."""
    asked = heldout.examples[: config.eval.prompts]
    sft, align = config.sft, config.align
    loss = str(config.loss.get("_target_", "")).rpartition(".")[2]
    answered = [(each.prompt, each.anchor) for each in data.with_anchors.examples]
    told = judged(answered)
    if config.data.anchors is not None and Path(config.data.anchors).is_file():
        told |= kept(Path(config.data.anchors), [prompt for prompt, _ in answered], config.teacher)
    lines = [
        f"anchors: {_whose(config)}; prompts to {data.prompt_size} tokens, responses to "
        f"{data.response_size}",
        *(f"{_whence(data)}: {name} {words}" for name, words in told.items()),
        *_ratings(config, recipe, data),
        *_stage("sft", sft.steps, sft.batch, data.with_anchors),
        *_too_often(sft.steps, sft.batch, len(data.with_anchors.examples)),
        *_stage("align", align.steps, align.prompts, data, config.sampling.candidates, loss),
        f"evaluation: {counted(len(asked), 'held-out prompt')}, of the base and after each stage",
    ]
    seconds = forecast(config, student.model, recipe, data, asked).seconds(
        jnp.dtype(student.model.dtype).name
    )
    time = _span(seconds) if seconds else "said after the first steps"
    return [*lines, f"time: {time}; disk: about {amount(expected_bytes(config, student))}"]


def expected_bytes(config: TrainConfig, student: Student) -> int:
    """What a run takes of the disk at its end, checkpoints included."""
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(student.trainable))
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(student.base or student.trainable))
    states = 0 if config.checkpoint.clean else config.checkpoint.keep
    return whole + trained + 3 * trained * states  # export, reference, a state with two moments


def told_by_pace(stage: str, more: float, rest: float) -> str:
    """How long a run will still take: `more` seconds for a stage, and `rest` after it."""
    return f"time: {about(more + rest)} left, {duration(more)} of it {stage}, by the first steps"


def _span(seconds: float) -> str:
    """A rough time, in words no finer than it is known."""
    if seconds < 90:
        return "about a minute or two, compiling included"
    return (
        f"{about(seconds)} as fast as the machine is now, and a minute or two to compile (a rough "
        "guess)"
    )


def _steps(steps: int, batch: int, prompts: int) -> str:
    if not steps:
        return "none"
    through = f", {steps * batch / prompts:.2g} times through {prompts}" if prompts else ""
    return f"{counted(steps, 'step')} of {counted(batch, 'prompt')}{through}"


def _stage(
    name: str, steps: int, prompts: int, data: Dataset, sampled: int = 0, by: str = ""
) -> list[str]:
    """What a stage takes of each part of the data, and of candidates where any are `sampled`."""
    if not steps:
        return [f"{name}: none"]
    others, lines = data.of_other(steps), []
    for (key, part), count in zip(data.parts.items(), (steps - others, others), strict=False):
        if not count:
            continue
        whose = "" if data.other is None else f" of {key}"
        given = ", given with their scores" if part.candidates else ""
        many = part.candidates or sampled
        each = f", {counted(many, 'candidate')} each{given}, {by}" if sampled else ""
        lines.append(f"{name}: {_steps(count, prompts, len(part.examples))}{whose}{each}")
    return lines


def _whence(data: Dataset) -> str:
    """What the anchors are that SFT learns from."""
    return "the teacher's answers" if "data.prompts" in data.parts else "the best responses"


def _ratings(config: TrainConfig, recipe: Recipe, data: Dataset) -> list[str]:
    """By which dimensions given candidates are rated, in the order of `labels.weights`, and how."""
    names = max((part.dimensions for part in data.parts.values()), key=len)
    if len(names) < 2:
        return []
    weights, by = config.data.dimensions.values(), "data.dimensions"
    if takes_members(recipe.labels):
        weights, by = getattr(recipe.labels, "keywords", {}).get("weights"), "labels.weights"
    elif recipe.needs.members:
        return [f"ratings: {', '.join(names)}, one by one"]
    if not weights:
        return [f"ratings: {', '.join(names)}, alike"]
    told = (f"{name} {weight:g}" for name, weight in zip(names, weights, strict=True))
    return [f"ratings: {', '.join(told)}, by {by}"]


MANY, SOME = 10, 4  # passes of SFT over the prompts from which on it is said, and advised instead


def _too_often(steps: int, batch: int, prompts: int) -> list[str]:
    """A warning where SFT goes through so few prompts so often that it learns them by heart."""
    if not prompts or steps * batch <= MANY * prompts:
        return []
    return [
        f"warning: {steps * batch / prompts:.0f} passes of SFT learn "
        f"{counted(prompts, 'prompt')} by heart: sft.steps={max(1, round(SOME * prompts / batch))} "
        f"makes about {SOME}; docs/how-many.md says which settings fit how many prompts"
    ]


def _whose(config: TrainConfig) -> str:
    store = config.data.anchors
    if store is None:
        return f"the best responses of {config.data.heldout}"
    names = teachers_in(Path(store))
    return f"{', '.join(names) or 'nobody is named'}, in {store}"
