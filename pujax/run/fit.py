"""The two stages of a run: SFT on the anchors, then alignment; evaluated, logged, resumable."""

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console

from pujax.errors import DataError, NonFiniteError, StopRequested
from pujax.evaluation import findings, page, tables
from pujax.evaluation.answering import Draws, evaluate
from pujax.evaluation.results import Evaluation, load, save
from pujax.files.chat import Chat
from pujax.files.export import export_hf
from pujax.method import losses
from pujax.method.needs import needs_of
from pujax.method.optimizer import make_optimizer
from pujax.method.step import Recipe, assemble, make_sft_step, make_train_step
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.models.packing import TokenBudget
from pujax.models.sharding import make_mesh, put_batch, tree_shardings
from pujax.records import Example, messages_key
from pujax.run.checkpoint import Checkpoints, Place
from pujax.run.compose import build, build_loss, with_protocol
from pujax.run.data import Dataset, batch_at, collate, make_dataset
from pujax.run.heldout import build_metrics
from pujax.run.logs import RunLog, SampleGroup, progress
from pujax.run.settings import TrainConfig
from pujax.run.student import load_student, new_state
from pujax.teacher.anchors import anchors_for
from pujax.teacher.prompts import load_prompts
from pujax.types import Batch, Group, LossFn, Params, TrainState


@dataclass(frozen=True)
class Stage:
    """One of the two stages: its length, its batch, the run's steps before it, and its step.

    `advance` does one step on a batch and returns the new state, its metrics, and the group it
    learnt from where there is one.
    """

    name: str
    steps: int
    prompts: int
    before: int
    salt: int
    advance: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any], Group | None]]


def fit(config: TrainConfig, directory: Path, *, console: Console | None = None) -> None:
    """Do the run in `directory`, or go on with it from its newest checkpoint.

    Raises `ConfigError`, `DataError`, `CheckpointError` or `NonFiniteError`; `StopRequested` after
    SIGTERM or Ctrl-C, with the state saved.
    """
    console = console or Console()
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    chat = Chat.load(config.model.path)
    train_data, heldout = load_data(config, chat, console)
    student = load_student(config.model, chat, mesh, config.seed)
    model, base = student.model, student.base
    recipe, loss_fn = build_recipe(config, chat, train_data)
    metrics = build_metrics(config.eval)
    # Packing mixes prompts, which a mesh keeps on devices of their own.
    alone = mesh.size == 1

    def budgeted(data: Dataset, prompts: int, responses: int) -> LanguageModel:
        return model.clone(budget=budget_for(data, prompts, responses) if alone else None)

    checkpoints = Checkpoints(
        directory, keep=config.checkpoint.keep, model=dataclasses.asdict(model.config)
    )
    place = None if config.resume == "never" else checkpoints.latest()
    started = place or Place("sft", 0)
    resume = None if config.resume == "never" else (started.stage, started.step)
    if place:
        console.print(f"resuming after {place.stage} step {place.step}")
    root = jax.random.key(config.seed)

    def evaluated(name: str, step: int, trainable: Params, *, keep: bool = True) -> Evaluation:
        """The held-out evaluation of a model, from the disk if this run has made it before."""
        path = directory / f"eval-{name}.jsonl"
        if keep and path.exists():
            result = load(path)
        else:
            result = evaluate(
                budgeted(heldout, config.eval.batch, 1),
                assemble(base, trainable),
                heldout.examples[: config.eval.prompts],
                name=name,
                batch=config.eval.batch,
                collate=lambda examples: put_batch(
                    mesh, collate(examples, heldout), config.eval.batch
                ),
                decode=chat.decode,
                metrics=metrics,
                draws=Draws(config.eval.samples, config.eval.temperature),
            )
            if keep:
                save(result, directory)
        log.evaluation(name, step, result.means())
        return result

    with RunLog(directory, resume=resume) as log, stop_signals() as stopping:
        loop = Loop(config, directory, mesh, train_data, chat, checkpoints, log, console, stopping)
        results = [evaluated("base", 0, student.trainable)]

        optimizer = optimizer_for(config, config.sft.lr, config.sft.steps)
        state = new_state(student.trainable, optimizer, mesh)
        sft_step = make_sft_step(
            budgeted(train_data, config.sft.batch, 1),
            losses.sft,
            optimizer,
            tree_shardings(mesh, state),
        )

        def sft(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any], None]:
            return *sft_step(state, base, batch), None

        stage = Stage("sft", config.sft.steps, config.sft.batch, 0, 0, sft)
        if started.stage == "sft":
            state = loop.run(stage, state, place)
            reference = state.params
            checkpoints.save_reference(reference)
        else:
            reference = checkpoints.restore_reference(state.params)
        del state
        if config.sft.steps:
            results.append(evaluated("sft", config.sft.steps, reference))

        updates = config.align.steps * config.align.inner_epochs
        optimizer = optimizer_for(config, config.align.lr, updates)
        state = new_state(jax.tree.map(jnp.copy, reference), optimizer, mesh)
        train_step = make_train_step(
            budgeted(train_data, config.align.prompts, config.sampling.candidates + 1),
            recipe,
            loss_fn,
            optimizer,
            tree_shardings(mesh, state),
            microbatch=config.align.microbatch,
        )

        def align(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any], Group]:
            state, group, metrics = train_step(state, reference, base, batch, root)
            return state, metrics, group

        def halfway(state: TrainState, step: int) -> None:
            if config.eval.every and step % config.eval.every == 0 and step < config.align.steps:
                evaluated("aligned", step, state.params, keep=False)

        stage = Stage("align", config.align.steps, config.align.prompts, config.sft.steps, 1, align)
        state = loop.run(stage, state, place if started.stage == "align" else None, halfway)
        results.append(evaluated("aligned", config.align.steps, state.params))

    finish(directory, config, model.config, assemble(base, state.params), chat, results, console)
    checkpoints.close()


@dataclass(frozen=True)
class Loop:
    """What both stages' loops share."""

    config: TrainConfig
    directory: Path
    mesh: Mesh
    data: Dataset
    chat: Chat
    checkpoints: Checkpoints
    log: RunLog
    console: Console
    stopping: Callable[[], int]

    def run(
        self,
        stage: Stage,
        state: TrainState,
        place: Place | None,
        after: Callable[[TrainState, int], None] = lambda state, step: None,
    ) -> TrainState:
        """All steps of `stage` that are left, logged and checkpointed."""
        done = 0
        if place is not None:
            state, done = self.checkpoints.restore(state), place.step
        if done >= stage.steps:
            return state
        seed = (self.config.seed, stage.salt)
        with progress(stage.name, done=done, steps=stage.steps, console=self.console) as show:
            for step in range(done + 1, stage.steps + 1):
                examples, batch = batch_at(self.data, stage.prompts, seed, step - 1)
                begun = time.monotonic()
                placed = put_batch(self.mesh, batch, stage.prompts)
                state, metrics, group = stage.advance(state, placed)
                metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
                tokens = int(batch.prompts.lengths.sum())
                if group is None:
                    tokens += int(batch.anchors.lengths.sum())
                else:
                    group = jax.device_get(group)
                    tokens += int(group.mask.sum())
                seconds = time.monotonic() - begun
                show(self.log.step(stage.name, step, metrics, seconds=seconds, tokens=tokens))
                if group is not None:
                    self.log.samples(stage.name, step, sample_groups(examples, group, self.chat))
                if metrics["skipped"]:
                    self._not_finite(stage, step, batch, int(metrics["skipped"]))
                stopping = self.stopping()
                last = step == stage.steps
                if last or stopping or step % self.config.checkpoint.every == 0:
                    self.checkpoints.save(stage.before + step, Place(stage.name, step), state)
                if stopping:
                    raise StopRequested(
                        f"stopped after {stage.name} step {step}; the state is in "
                        f"{self.directory}: the same command goes on from there",
                        stopping,
                    )
                after(state, step)
        return state

    def _not_finite(self, stage: Stage, step: int, batch: Batch, count: int) -> None:
        """Save the batch of a skipped update; give up after too many in a row."""
        path = self.directory / f"nonfinite-{stage.name}-{step}.npz"
        named = jax.tree_util.tree_leaves_with_path(batch)
        np.savez(
            path, **{jax.tree_util.keystr(at, simple=True, separator="."): x for at, x in named}
        )
        self.console.print(f"{stage.name} step {step}: loss or gradient not finite, update skipped")
        if count >= self.config.optim.max_skipped:
            raise NonFiniteError(
                f"{count} updates in a row were not finite, the last at {stage.name} step {step}; "
                f"its batch is in {path}: lower {stage.name}.lr, or look at that batch"
            )


def load_data(config: TrainConfig, chat: Chat, console: Console) -> tuple[Dataset, Dataset]:
    """Training and held-out examples of the same static shape.

    A configured teacher is asked for the anchors that the store lacks, before anything else.
    Raises `DataError`, and what `anchors_for` raises.
    """
    parts = [list(load_prompts(source)) for source in (config.data.prompts, config.data.heldout)]
    anchors = anchors_for(
        [*parts[0], *parts[1]],
        with_protocol(config.teacher),
        Path(config.data.anchors),
        config.collect,
        say=partial(console.print, markup=False, highlight=False),
    )
    # The teacher refused the others, and that has been said.
    train_data, heldout = (
        make_dataset(
            [prompt for prompt in part if messages_key(prompt.messages) in anchors],
            anchors,
            chat,
            config.data,
        )
        for part in parts
    )
    shared = {e.prompt_ids for e in train_data.examples} & {e.prompt_ids for e in heldout.examples}
    if shared:
        raise DataError(
            f"{len(shared)} prompts are in both {config.data.prompts} and {config.data.heldout}: "
            "take them out of one, or the evaluation means nothing"
        )
    for name, data in (("training", train_data), ("held-out", heldout)):
        notes = [
            f"{count} {what}"
            for count, what in (
                (data.dropped, "dropped as too long"),
                (data.truncated, "truncated"),
                (data.anchors_cut, f"anchors cut at {data.response_size} tokens"),
            )
            if count
        ]
        console.print(f"{len(data.examples)} {name} prompts" + "".join(f", {n}" for n in notes))
    return train_data, heldout


def build_recipe(config: TrainConfig, chat: Chat, data: Dataset) -> tuple[Recipe, LossFn]:
    """The functions that the settings name, tried on shapes so that a wrong value fails now.

    Raises `ConfigError`.
    """
    labels = build(config.labels, "labels")
    loss_fn, said = build_loss(config.loss)
    recipe = Recipe(
        sampling=config.sampling,
        response_size=data.response_size,
        scorer=build(config.scorer.score, "scorer.score"),
        by_policy=config.scorer.by == "policy",
        labels=labels,
        frames=chat.frames,
        needs=needs_of(loss_fn, labels, config.sampling.candidates, **said),
        inner_epochs=config.align.inner_epochs,
    )
    return recipe, loss_fn


def budget_for(data: Dataset, prompts: int, responses: int) -> TokenBudget | None:
    """A budget for the real tokens of most batches, a third above the mean.

    Candidates are taken to be as long as their anchors. None where padding is too little to matter.
    """

    def most(lengths: list[int], each: int, size: int) -> int:
        whole = prompts * each * size
        return min(whole, -(-round(1.33 * sum(lengths) / len(lengths) * prompts * each) // 32) * 32)

    P, T = data.prompt_size, data.response_size
    budget = TokenBudget(
        prompts=most([len(e.prompt_ids) for e in data.examples], 1, P),
        responses=most([len(e.anchor_ids) for e in data.examples], responses, T),
    )
    whole = prompts * P + prompts * responses * T
    return budget if budget.prompts + budget.responses < 0.8 * whole else None


def optimizer_for(config: TrainConfig, lr: float, updates: int) -> optax.GradientTransformation:
    """The optimizer of a stage of `updates` updates."""
    optim = config.optim
    return make_optimizer(
        lr,
        updates,
        b1=optim.b1,
        b2=optim.b2,
        weight_decay=optim.weight_decay,
        clip_norm=optim.clip_norm,
        warmup=optim.warmup,
        schedule=optim.schedule,
    )


def sample_groups(examples: Sequence[Example], group: Group, chat: Chat) -> list[SampleGroup]:
    """A step's groups as a person reads them."""

    def text(b: int, g: int) -> str:
        return chat.decode(group.tokens[b, g][group.mask[b, g]].tolist())

    return [
        SampleGroup(
            id=example.prompt.id,
            prompt=example.prompt.messages[-1]["content"],
            anchor=example.anchor,
            candidates=[text(b, g) for g in range(1, group.tokens.shape[1])],
            scores=group.scores[b].tolist(),
            labels=group.labels[b].tolist(),
        )
        for b, example in enumerate(examples)
    ]


def finish(
    directory: Path,
    config: TrainConfig,
    settings: DecoderConfig,
    params: Params,
    chat: Chat,
    results: Sequence[Evaluation],
    console: Console,
) -> None:
    """Export the aligned model, draw the report, print the table, and mark the run as done."""
    card = {"student": config.model.path} | dataclasses.asdict(config)
    export_hf(settings, params, chat, directory / "export", card)
    (directory / "table.md").write_text(tables.markdown(results) + "\n", encoding="utf-8")
    page.write(directory)
    console.print(tables.table(results))
    for line in findings.told(results):
        console.print(line, markup=False, highlight=False)
    console.print(f"run: {directory}\nplot: {directory / 'curves.png'}")
    (directory / "done").touch()


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """SIGTERM and Ctrl-C become a wish that the step loop grants; a second Ctrl-C is at once."""
    wished = 0

    def wish(number: int, frame: object) -> None:
        nonlocal wished
        if wished and number == signal.SIGINT:
            raise KeyboardInterrupt
        wished = number

    before = {number: signal.signal(number, wish) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: wished
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
