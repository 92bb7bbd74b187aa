"""The first words of a run: what it is about to do, where, in what time, on how much disk."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pujax.config.settings import TrainConfig
from pujax.config.tool_settings import WorkConfig
from pujax.evaluation.waiting import duration
from pujax.method.step import Recipe
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.models.parameters import param_shapes
from pujax.records import Example
from pujax.run.data import Dataset
from pujax.run.ending import amount
from pujax.run.judged import judged, kept
from pujax.run.measure import flops, matmul_rate
from pujax.run.provenance import teachers_in
from pujax.run.student import Student
from pujax.text import counted

PACED = 6  # steps whose ends tell a pace: the first one compiles

SHARE = 0.5
"""Of a matrix product's speed, what a whole run gets out of a CPU: a benchmark's steps, which have
no padding, got 0.4 to 0.75."""


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
    return [
        f"run: {directory}",
        f"student: {student}, {shape.layers} layers, {parameters / 1e6:.1f} M parameters, "
        f"{trained}",
        f"device: {devices}{f', mesh: {split}' if split else ''}",
    ]


def work(
    config: TrainConfig, student: Student, recipe: Recipe, data: Dataset, heldout: Dataset
) -> list[str]:
    """What the run learns from, its steps, and about how long and how large it will be."""
    asked = heldout.examples[: config.eval.prompts]
    sft, align = config.sft, config.align
    candidates = data.candidates or config.sampling.candidates
    loss = str(config.loss.get("_target_", "")).rpartition(".")[2]
    trained = len(data.examples)
    given = ", given with their scores" if data.candidates else ""
    answered = [(each.prompt, each.anchor) for each in data.with_anchors.examples]
    told = judged(answered)
    if config.data.anchors is not None and Path(config.data.anchors).is_file():
        told |= kept(Path(config.data.anchors), [prompt for prompt, _ in answered], config.teacher)
    lines = [
        f"anchors: {_whose(config)}; prompts to {data.prompt_size} tokens, responses to "
        f"{data.response_size}",
        *(f"the teacher's answers: {name} {words}" for name, words in told.items()),
        f"sft: {_steps(sft.steps, sft.batch, len(data.with_anchors.examples))}",
        f"align: {_steps(align.steps, align.prompts, trained)}"
        + (f", {candidates} candidates each{given}, {loss}" if align.steps else ""),
        f"evaluation: {counted(len(asked), 'held-out prompt')}, of the base and after each stage",
    ]
    seconds = expected_seconds(config, student.model, recipe, data, asked)
    time = "about " + _span(seconds) if seconds else "said after the first steps"
    return [*lines, f"time: {time}; disk: about {amount(expected_bytes(config, student))}"]


def expected_bytes(config: TrainConfig, student: Student) -> int:
    """What a run takes of the disk at its end, checkpoints included."""
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(student.trainable))
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(student.base or student.trainable))
    states = 0 if config.checkpoint.clean else config.checkpoint.keep
    return whole + trained + 3 * trained * states  # export, reference, a state with two moments


def expected_seconds(
    config: TrainConfig,
    model: LanguageModel,
    recipe: Recipe,
    data: Dataset,
    asked: Sequence[Example],
) -> float | None:
    """How long the two stages and three evaluations take, by their arithmetic, without compiling.

    Ours, and rough: real lengths of prompts and anchors, candidates as long as anchors, at `SHARE`
    of what a matrix product gets here. None but on a CPU, where arithmetic is what takes the time.
    """
    if jax.default_backend() != "cpu":
        return None
    sft, align = config.sft, config.align
    plain = replace(recipe, needs=replace(recipe.needs, anchor=False, reference=False))

    def of(
        examples: Sequence[Example], prompts: int, candidates: int, recipe: Recipe, given: bool
    ) -> tuple[float, float]:
        shape = WorkConfig(
            prompts=prompts,
            candidates=candidates,
            prompt_tokens=_mean([len(e.prompt_ids) for e in examples], 1),
            response_tokens=_mean([len(e.anchor_ids) for e in examples], 2),
            offline=given,
        )
        return flops(model.config, shape, recipe)

    count = data.candidates or config.sampling.candidates
    trained, rest = of(data.examples, align.prompts, count, recipe, bool(data.candidates))
    supervised, _ = of(data.with_anchors.examples, sft.batch, 1, plain, True)
    evaluated, _ = of(asked, len(asked), 1, plain, True)  # the anchors' pass, and two for answers
    times = 1 + bool(sft.steps) + bool(align.steps)
    work = align.steps * (align.inner_epochs * trained + rest) + sft.steps * supervised
    return (work + times * evaluated) / (SHARE * _rate(jnp.dtype(model.dtype).name))


def told_by_pace(stage: str, ends: Sequence[float], left: int, evaluation: float | None) -> str:
    """How long a stage's last `left` steps will take, by when its first ones ended, in seconds.

    `evaluation` is what one has taken, where there was any. For where `expected_seconds` says
    nothing.
    """
    pace = (ends[-1] - ends[0]) / (len(ends) - 1)
    line = f"time: {stage} takes about {duration(pace * left)} more, by its first steps"
    return line if evaluation is None else f"{line}; an evaluation took {duration(evaluation)}"


@cache
def _rate(dtype: str) -> float:
    return matmul_rate(dtype, repeats=5, size=1024)


def _mean(lengths: Sequence[int], least: int) -> int:
    return max(least, round(sum(lengths) / max(1, len(lengths))))


def _span(seconds: float) -> str:
    """A rough time, in words no finer than it is known."""
    if seconds < 90:
        return "a minute or two, compiling included"
    return f"{seconds / 60:.0f} min and a minute or two to compile (a rough guess)"


def _steps(steps: int, batch: int, prompts: int) -> str:
    if not steps:
        return "none"
    through = f", {steps * batch / prompts:.2g} times through {prompts}" if prompts else ""
    return f"{counted(steps, 'step')} of {counted(batch, 'prompt')}{through}"


def _whose(config: TrainConfig) -> str:
    store = config.data.anchors
    if store is None:
        return f"the best responses of {config.data.heldout}"
    names = teachers_in(Path(store))
    return f"{', '.join(names) or 'nobody is named'}, in {store}"
