"""The two stages of a run: SFT on the anchors, then alignment; evaluated, logged, resumable."""

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from pujax.errors import NonFiniteError, StopRequested, require
from pujax.evaluation import findings, page, results, tables
from pujax.evaluation.answering import Draws, evaluate
from pujax.evaluation.metrics import Metric
from pujax.evaluation.results import Evaluation
from pujax.files.chat import Chat
from pujax.files.durable import write_whole
from pujax.files.export import export_hf
from pujax.method import losses
from pujax.method.needs import needs_of
from pujax.method.optimizer import make_optimizer
from pujax.method.step import Recipe, assemble, make_sft_step, make_train_step
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.models.packing import TokenBudget
from pujax.models.sharding import make_mesh, put_batch, tree_shardings
from pujax.records import Example
from pujax.run.checkpoint import Checkpoints, Place
from pujax.run.compose import build, build_loss
from pujax.run.data import Dataset, batch_at, collate, load_data
from pujax.run.ending import ending
from pujax.run.heldout import build_metrics
from pujax.run.inputs import hold_inputs
from pujax.run.logs import RunLog, SampleGroup, progress
from pujax.run.provenance import provenance
from pujax.run.settings import TrainConfig
from pujax.run.student import like_state, load_student, new_state
from pujax.run.trackers import telling
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
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    chat = Chat.load(config.model.path)
    # What is wrong in these shows before anything is read, and before a teacher is paid.
    recipe, loss_fn = build_recipe(config, chat)
    metrics = build_metrics(config.eval, config.trusted)
    train_data, heldout = load_data(config, chat, say)
    check_batches(config, train_data)
    student = load_student(config.model, chat, mesh, config.seed)
    check_positions(student.model.config, train_data)
    hold_inputs(
        directory,
        config,
        chat,
        {"data.prompts": train_data, "data.heldout": heldout},
        (student.base, student.trainable),
        begun=(directory / "metrics.jsonl").exists(),
        say=say,
    )
    checkpoints = Checkpoints(
        directory,
        keep=config.checkpoint.keep,
        model=dataclasses.asdict(student.model.config),
        say=say,
    )
    with stop_signals() as stopping:
        like = like_state(student.trainable, optimizer_for(config, 0.0, 1), mesh)
        place, state = checkpoints.newest(like) or (Place("sft", 0), None)
        if state is not None:
            say(f"resuming after {place.stage} step {place.step}")
        resume = None if config.resume == "never" else (place.stage, place.step)
        with (
            telling(config, directory, say) as tell,
            RunLog(directory, resume=resume, tell=tell) as log,
        ):
            run = Run(
                config,
                directory,
                mesh,
                student.model,
                student.base,
                train_data,
                heldout,
                metrics,
                chat,
                checkpoints,
                log,
                console,
                say,
                stopping,
            )
            made = [run.evaluated("base", 0, student.trainable)]
            if place.stage == "sft":
                reference = supervised(run, student.trainable, state, place.step)
                checkpoints.save_reference(reference)
                state = None
            else:
                reference = checkpoints.restore_reference(like.params)
            del student  # what SFT began with is needed no more
            if config.sft.steps:
                made.append(run.evaluated("sft", config.sft.steps, reference))
            done = place.step if place.stage == "align" else 0
            params = aligned(run, recipe, loss_fn, reference, state, done)
            made.append(run.evaluated("aligned", config.align.steps, params))
        finish(run, params, made)
    checkpoints.close()
    say(ending(directory, clean=config.checkpoint.clean))


def supervised(run: "Run", trainable: Params, state: TrainState | None, done: int) -> Params:
    """The parameters after SFT on the anchors; a `state` given has `done` steps behind it."""
    config = run.config
    optimizer = optimizer_for(config, config.sft.lr, config.sft.steps)
    if state is None:
        state = new_state(trainable, optimizer, run.mesh)
    step = make_sft_step(
        run.budgeted(run.data, config.sft.batch, 1),
        losses.sft,
        optimizer,
        tree_shardings(run.mesh, state),
    )

    def advance(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any], None]:
        return *step(state, run.base, batch), None

    stage = Stage("sft", config.sft.steps, config.sft.batch, 0, 0, advance)
    return run.through(stage, state, done).params


def aligned(
    run: "Run",
    recipe: Recipe,
    loss_fn: LossFn,
    reference: Params,
    state: TrainState | None,
    done: int,
) -> Params:
    """The parameters after alignment from `reference`; `state` and `done` as for `supervised`."""
    config, align = run.config, run.config.align
    optimizer = optimizer_for(config, align.lr, align.steps * align.inner_epochs)
    if state is None:
        state = new_state(jax.tree.map(jnp.copy, reference), optimizer, run.mesh)
    step = make_train_step(
        run.budgeted(run.data, align.prompts, config.sampling.candidates + 1),
        recipe,
        loss_fn,
        optimizer,
        tree_shardings(run.mesh, state),
        microbatch=align.microbatch,
    )
    root = jax.random.key(config.seed)

    def advance(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any], Group]:
        state, group, metrics = step(state, reference, run.base, batch, root)
        return state, metrics, group

    def halfway(state: TrainState, step: int) -> None:
        every = config.eval.every
        if every and step % every == 0 and step < align.steps and not run.log.has("aligned", step):
            run.evaluated("aligned", step, state.params, keep=False)

    stage = Stage("align", align.steps, align.prompts, config.sft.steps, 1, advance)
    return run.through(stage, state, done, halfway).params


@dataclass(frozen=True)
class Run:
    """What is there throughout a run, and what both of its stages do."""

    config: TrainConfig
    directory: Path
    mesh: Mesh
    model: LanguageModel
    base: Params | None
    data: Dataset
    heldout: Dataset
    metrics: Mapping[str, Metric]
    chat: Chat
    checkpoints: Checkpoints
    log: RunLog
    console: Console
    say: Callable[[str], None]
    stopping: Callable[[], int]

    def budgeted(self, data: Dataset, prompts: int, responses: int) -> LanguageModel:
        """The model with a budget of real tokens for batches of that size."""
        # Packing mixes prompts, which a mesh keeps on devices of their own.
        alone = self.mesh.size == 1
        return self.model.clone(budget=budget_for(data, prompts, responses) if alone else None)

    def pause(self, where: str) -> None:
        """Raise `StopRequested` if a signal asked for it: called where all is saved."""
        if number := self.stopping():
            raise StopRequested(
                f"stopped {where}; the state is in {self.directory}: the same command goes on "
                "from there",
                number,
            )

    def evaluated(
        self, name: str, step: int, trainable: Params, *, keep: bool = True
    ) -> Evaluation:
        """The held-out evaluation of a model, from the disk if this run has made it before."""
        examples = self.heldout.examples[: self.config.eval.prompts]
        result = self._kept(name, examples) if keep else None
        if result is None:
            settings, batch = self.config.eval, self.config.eval.batch

            def collated(some: Sequence[Example]) -> Batch:
                self.pause(f"while evaluating {name}")
                return put_batch(self.mesh, collate(some, self.heldout), batch)

            result = evaluate(
                self.budgeted(self.heldout, batch, 1),
                assemble(self.base, trainable),
                examples,
                name=name,
                batch=batch,
                collate=collated,
                decode=self.chat.decode,
                metrics=self.metrics,
                draws=Draws(settings.samples, settings.temperature),
            )
            if keep:
                results.save(result, self.directory)
        self.log.evaluation(name, step, result.means())
        self.pause(f"after evaluating {name}")
        return result

    def _kept(self, name: str, examples: Sequence[Example]) -> Evaluation | None:
        """The evaluation on disk, where it is whole and of these examples."""
        path = self.directory / f"eval-{name}.jsonl"
        if not path.exists():
            return None
        try:
            result = results.load(path)
        except ValueError as error:
            self.say(f"{error}: evaluating {name} again")
            return None
        kept = [(row.id, row.kind, row.answer, row.anchor) for row in result.rows]
        if kept != [(e.prompt.id, e.prompt.kind, e.prompt.answer, e.anchor) for e in examples]:
            self.say(f"{path} is not of these held-out prompts: evaluating {name} again")
            return None
        return result

    def through(
        self,
        stage: Stage,
        state: TrainState,
        done: int,
        after: Callable[[TrainState, int], None] = lambda state, step: None,
    ) -> TrainState:
        """The state after all steps of `stage`, of which `done` are done; logged and saved.

        `after` is called behind each step, and once behind the last that was done before: what it
        did then may be lost. Raises `NonFiniteError` for a stage that ends on a skipped update.
        """
        if done:
            after(state, done)
        seed = (self.config.seed, stage.salt)
        steps = range(done + 1, stage.steps + 1)
        with progress(stage.name, done=done, steps=stage.steps, console=self.console) as show:
            for step in steps:
                examples, batch = batch_at(self.data, stage.prompts, seed, step - 1)
                begun, worked = time.monotonic(), time.process_time()
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
                # Of all threads: how long a step took on a machine that does other work too.
                metrics["time/cpu_s"] = time.process_time() - worked
                show(self.log.step(stage.name, step, metrics, seconds=seconds, tokens=tokens))
                if group is not None:
                    self.log.samples(stage.name, step, sample_groups(examples, group, self.chat))
                if metrics["skipped"]:
                    self._not_finite(stage, step, batch, int(metrics["skipped"]), state)
                wished = self.stopping()
                if step == stage.steps or wished or step % self.config.checkpoint.every == 0:
                    self.log.flush()  # a line that is lost is never written again
                    self.checkpoints.save(stage.before + step, Place(stage.name, step), state)
                    self.pause(f"after {stage.name} step {step}")
                after(state, step)
        if skipped := int(state.skipped):
            raise NonFiniteError(
                f"{stage.name} ended on {skipped} updates that were not finite and so skipped: "
                f"begin another run with a lower {stage.name}.lr"
            )
        return state

    def _not_finite(
        self, stage: Stage, step: int, batch: Batch, count: int, state: TrainState
    ) -> None:
        """Save the batch of a skipped update; give up after too many in a row."""
        path = self.directory / f"nonfinite-{stage.name}-{step}.npz"
        named = jax.tree_util.tree_leaves_with_path(batch)
        np.savez(
            path, **{jax.tree_util.keystr(at, simple=True, separator="."): x for at, x in named}
        )
        self.say(f"{stage.name} step {step}: loss or gradient not finite, update skipped")
        if count < self.config.optim.max_skipped:
            return
        remedy = f"lower {stage.name}.lr, or look at that batch"
        for at, leaf in jax.tree_util.tree_leaves_with_path(assemble(self.base, state.params)):
            if not bool(jnp.isfinite(leaf).all()):  # a skipped update leaves them as they were
                remedy = f"the parameters it began with are not finite ({jax.tree_util.keystr(at)})"
                break
        raise NonFiniteError(
            f"{count} updates in a row were not finite, the last at {stage.name} step {step}; "
            f"its batch is in {path}: {remedy}"
        )


def check_batches(config: TrainConfig, data: Dataset) -> None:
    """Refuse a batch that the data can't fill, before anything is computed."""
    for key, steps, size in (
        ("sft.batch", config.sft.steps, config.sft.batch),
        ("align.prompts", config.align.steps, config.align.prompts),
    ):
        require(
            not steps or size <= len(data.examples),
            key,
            size,
            f"there are {len(data.examples)} training prompts: lower it",
        )


def check_positions(model: DecoderConfig, data: Dataset) -> None:
    """Refuse prompts and responses that the model has no positions for."""
    longest = max(data.prompt_size, data.reference_size) + data.response_size
    require(
        longest <= model.max_positions,
        "data.max_prompt_tokens",
        data.prompt_size,
        f"with data.max_response_tokens={data.response_size} and the reference prompt's frame that "
        f"makes {longest} tokens, and the model has {model.max_positions} positions: lower them",
    )


def build_recipe(config: TrainConfig, chat: Chat) -> tuple[Recipe, LossFn]:
    """The functions that the settings name, tried on shapes so that a wrong value fails now.

    Raises `ConfigError`.
    """
    trusted = config.trusted
    labels = build(config.labels, "labels", trusted)
    loss_fn, said = build_loss(config.loss, trusted)
    recipe = Recipe(
        sampling=config.sampling,
        response_size=config.data.max_response_tokens,
        scorer=build(config.scorer.score, "scorer.score", trusted),
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


def finish(run: Run, params: Params, made: Sequence[Evaluation]) -> None:
    """Export the aligned model, draw the report, print the table, and mark the run as done."""
    directory, config = run.directory, dataclasses.asdict(run.config)
    for key in ("teacher", "collect"):  # no business of whoever gets the model
        del config[key]
    card = {"student": run.config.model.path} | config
    card |= provenance(run.config.model.path, run.config, tables.markdown(made))
    whole = assemble(run.base, params)
    export_hf(run.model.config, whole, run.chat, directory / "export", card)
    run.pause("after the export")
    write_whole(directory / "table.md", (tables.markdown(made) + "\n").encode())
    page.write(directory)
    run.console.print(tables.table(made))
    for line in findings.told(made):
        run.say(line)
    run.pause("before it was marked as done")
    write_whole(directory / "done", b"")


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
