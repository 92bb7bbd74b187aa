"""The two stages of a run: SFT on the anchors, then alignment; evaluated, logged, resumable."""

import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from rich.console import Console

from pujax.config.functions import build, build_loss, build_metrics, with_protocol
from pujax.config.settings import TrainConfig
from pujax.errors import forget_closed_terminal, require, stops
from pujax.evaluation import costs, findings, page, tables
from pujax.evaluation.results import Evaluation
from pujax.evaluation.signal import failing
from pujax.evaluation.subjects import keep_answer
from pujax.evaluation.waiting import waited
from pujax.files.chat import Chat
from pujax.files.durable import write_whole
from pujax.files.export import export_hf, refuse_foreign_directory
from pujax.method import losses
from pujax.method.discriminator import new_head
from pujax.method.needs import needs_of
from pujax.method.optimizer import make_optimizer
from pujax.method.scoring import rewards_of
from pujax.method.step import (
    Recipe,
    TrainStep,
    assemble,
    make_sampler,
    make_sft_step,
    make_train_step,
)
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.models.sharding import make_mesh, padding_of, tree_shardings, ways
from pujax.records import STAGES, Example
from pujax.run import beginning
from pujax.run.agreement import check_given, check_settings
from pujax.run.checkpoint import Checkpoints, Place, checksums
from pujax.run.control import make_control
from pujax.run.data import Dataset, load_data
from pujax.run.directory import traces
from pujax.run.ending import ending
from pujax.run.forecast import forecast
from pujax.run.inputs import hold_inputs
from pujax.run.logs import RunLog
from pujax.run.plan import fitting
from pujax.run.processes import first, several, to_first, told, wish
from pujax.run.provenance import provenance
from pujax.run.reference import with_reference
from pujax.run.rewarding import Rewards, try_rewards
from pujax.run.selection import criterion_of
from pujax.run.stages import Fitting, Run, Stage
from pujax.run.student import check_memory, like_state, load_student, new_state, shape_of
from pujax.run.symptoms import Symptoms
from pujax.run.trackers import telling
from pujax.run.trial import try_recipe
from pujax.run.unanswered import refuse_batches
from pujax.teacher.endpoint import on_device
from pujax.text import counted
from pujax.types import Batch, Group, Head, LossFn, Params, TrainState

EXPORT = "export"  # in a run's directory


def fit(
    config: TrainConfig,
    directory: Path,
    *,
    console: Console | None = None,
    fitting: Fitting = fitting,
    signals: Callable[[], AbstractContextManager[Callable[[], int]]] | None = None,
) -> None:
    """Do the run in `directory`, or go on with it from its newest checkpoint.

    `fitting` makes of each stage's jitted functions what is called, and `signals` tells who asks to
    stop, by default a signal to this process: for a caller that does several runs at once.

    Raises `ConfigError`, `DataError`, `CheckpointError` or `NonFiniteError`; `StopRequested` after
    SIGTERM, Ctrl-C or a closed terminal, with the state saved.
    """
    console = console or Console(quiet=not first())
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    mesh = make_mesh(**vars(config.mesh))
    chat = Chat.load(config.model.path)
    check_teacher(config)
    # What is wrong in these shows before anything is read, and before a teacher is paid.
    recipe, loss_fn = build_recipe(config, chat)
    metrics = build_metrics(config.eval, config.trusted)
    criterion = criterion_of(config, metrics)
    shape, begun = shape_of(config.model, chat), told(lambda: _begun(directory))

    def check(data: Dataset) -> None:
        check_batches(config, data)
        check_given(config, recipe, loss_fn, data)
        check_positions(shape, data)

    check_memory(config.model, shape, mesh)
    for line in beginning.place(config, directory, shape, mesh):
        say(line)
    train_data, heldout = told(lambda: load_data(config, chat, say, check, begun=begun))
    check(train_data)  # anchors may be refused, or not trusted
    if config.align.steps:
        asked = [example for example in train_data.examples if not example.given]
        with waited("trying the reward", say):
            remarks = told(lambda: try_rewards(recipe.scorer, asked))
        for line in remarks:
            say(line)
    for line in filling(config, mesh):
        say(line)
    with waited("reading the student", say):
        student = load_student(config.model, chat, mesh, config.seed)
        sums = checksums((student.base, student.trainable))
    mark = told(
        lambda: hold_inputs(
            directory,
            config,
            chat,
            {**train_data.parts, "data.heldout": heldout},
            sums,
            begun=begun,
            rows=bool(rewards_of(recipe.scorer)),
            say=say,
        )
    )
    for line in told(lambda: beginning.work(config, student, recipe, train_data, heldout)):
        say(line)
    checkpoints = Checkpoints(
        directory,
        keep=config.checkpoint.keep,
        model=dataclasses.asdict(student.model.config),
        mark=mark,
        say=say,
    )
    with closing(checkpoints), (signals or stop_signals)() as stopping:
        head = new_head(recipe.scorer, shape.width)
        like = like_state(student.trainable, optimizer_for(config, 0.0, 1), mesh, head)
        with waited("reading the newest checkpoint", say):
            place, state = checkpoints.newest(like) or (Place("sft", 0), None)
        if state is not None:
            say(f"resuming after {place.stage} step {place.step}")
        resume = None if config.resume == "never" else (place.stage, place.step)
        with (
            telling(config, directory, say) as tell,
            RunLog(directory, resume=resume, tell=tell) as log,
        ):
            asked = heldout.examples[: config.eval.prompts]
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
                criterion,
                symptoms=Symptoms(config.align.steps),
                fitting=fitting,
                forecast=forecast(config, student.model, recipe, train_data, asked),
            )
            if log.lost:
                say(log.lost)
            for line in log.earlier:  # what was said of them is not said again
                run.symptoms.of(line)
            made, handed_on = [run.evaluated("base", 0, student.trainable)], dict[str, int]()
            if place.stage == "sft":
                reference, step = supervised(run, student.trainable, state, place.step, head)
                with waited("keeping what alignment starts from", say):
                    checkpoints.save_reference(reference)
                state = None
            else:
                with waited("reading what alignment starts from", say):
                    reference = checkpoints.restore_reference(like.params)
                step = run.chosen("sft", ("base", 0), config.sft.steps)
            del student  # what SFT began with is needed no more
            before = ("base", 0)
            if config.sft.steps:
                made.append(run.evaluated("sft", step, reference, same=None if step else made[0]))
                before, handed_on = ("sft", step), {"sft": step}
            done = place.step if place.stage == "align" else 0
            params, step = aligned(run, recipe, loss_fn, reference, before, state, done)
            # A stage of no steps leaves what it began with, which has been evaluated; so does one
            # whose best state is that.
            made.append(run.evaluated("aligned", step, params, same=None if step else made[-1]))
        with waited("writing the model and the report", say):
            finish(run, params, made, handed_on | {"align": step})
    success = not findings.verdict_on(made).sentence.startswith("Not a success")
    told(lambda: say(ending(directory, clean=config.checkpoint.clean, success=success)))


def _begun(directory: Path) -> bool:
    """Whether a run has left something there. Raises `ConfigError` for an export of others."""
    refuse_foreign_directory(directory / EXPORT)
    return bool(traces(directory))


def supervised(
    run: Run, trainable: Params, state: TrainState | None, done: int, head: Head | None
) -> tuple[Params, int]:
    """The parameters after SFT on the anchors, and of which step they are.

    A `state` given has `done` steps behind it. A new `head` is carried along untrained, so that the
    states of both stages are alike.
    """
    config = run.config
    optimizer = optimizer_for(config, config.sft.lr, config.sft.steps)
    if state is None:
        state = new_state(trainable, optimizer, run.mesh, head)
    data = run.data.with_anchors
    model, shardings = run.budgeted(data, config.sft.batch, 1), tree_shardings(run.mesh, state)
    step = run.fitting("sft", make_sft_step(model, losses.sft, optimizer, shardings), run.mesh)

    def advance(
        state: TrainState, batch: Batch, examples: Sequence[Example]
    ) -> tuple[TrainState, dict[str, Any], None]:
        return *step(state, run.base, dataclasses.replace(batch, given=None)), None

    stage = Stage(
        "sft", "sft", ("base", 0), config.sft.steps, config.sft.batch, data, before=0,
        salt=0, advance=advance,
    )  # fmt: skip
    return run.through(stage, state, done)


def aligned(
    run: Run,
    recipe: Recipe,
    loss_fn: LossFn,
    reference: Params,
    begun: tuple[str, int],
    state: TrainState | None,
    done: int,
) -> tuple[Params, int]:
    """The parameters after alignment from `reference`, and of which step they are.

    `begun` says which evaluation is the reference's; `state` and `done` as for `supervised`.
    """
    config, align = run.config, run.config.align
    optimizer = optimizer_for(config, align.lr, align.steps * align.inner_epochs)
    if state is None:
        head = new_head(recipe.scorer, run.model.config.width)
        state = new_state(jax.tree.map(jnp.copy, reference), optimizer, run.mesh, head)
    shardings = tree_shardings(run.mesh, state)
    data, cache = run.data, config.data.reference_cache
    if recipe.needs.reference and cache is not None:
        data = with_reference(
            data,
            run.model,
            assemble(run.base, reference),
            folder=Path(cache),
            mesh=run.mesh,
            size=align.prompts,
            steps=align.steps,
            say=run.say,
            pause=lambda: run.pause("while reading with the reference"),
        )

    def model_for(part: Dataset) -> LanguageModel:
        candidates = part.candidates or config.sampling.candidates
        return run.budgeted(part, align.prompts, candidates + 1)

    def step_on(part: Dataset) -> TrainStep:
        model, size = model_for(part), align.microbatch
        step = make_train_step(model, recipe, loss_fn, optimizer, shardings, microbatch=size)
        return run.fitting("align", step, run.mesh)

    steps = {part.candidates > 0: step_on(part) for part in data.parts.values()}
    root = jax.random.key(config.seed)
    control = make_control(
        recipe,
        run.model,
        lambda trainable: assemble(run.base, trainable if recipe.by_policy else reference),
        data,
        mesh=run.mesh,
        decode=run.chat.decode,
        seed=config.seed,
    )
    rewards = Rewards(recipe.scorer)
    sample = run.fitting("align", make_sampler(model_for(data), recipe), run.mesh)

    def advance(
        state: TrainState, batch: Batch, examples: Sequence[Example]
    ) -> tuple[TrainState, dict[str, Any], Group]:
        noted, step = {}, steps[batch.given is not None]
        if rewards and batch.given is None:
            made = sample(state, run.base, batch, root)
            batch, noted = run.rewarded(rewards, batch, made, examples)
        state, group, metrics = step(state, reference, run.base, batch, root)
        return state, metrics | noted, group

    stage = Stage(
        "align", "aligned", begun, align.steps, align.prompts, data,
        before=config.sft.steps, salt=1, advance=advance, control=control,
    )  # fmt: skip
    with rewards:
        return run.through(stage, state, done)


def check_teacher(config: TrainConfig) -> None:
    """Refuse a teacher on this run's own devices where several processes hold them."""
    require(
        not several() or not on_device(with_protocol(config.teacher, config.trusted)),
        "teacher",
        "local",
        "it can't answer in one of several processes: `pujax collect` first, then teacher=replay",
    )


def check_batches(config: TrainConfig, data: Dataset) -> None:
    """Refuse a batch that the data can't fill, before anything is computed."""
    sft, align = (
        min(len(each.examples) for each in part.parts.values())
        for part in (data.with_anchors, data)
    )
    refuse_batches(config, sft=sft, align=align)


def filling(config: TrainConfig, mesh: Mesh) -> list[str]:
    """Where a step computes copies to fill the mesh, and which sizes would need none."""
    sft, align, parts = config.sft, config.align, ways(mesh)
    sizes = {
        "sft.batch": sft.batch if sft.steps else 0,
        "align.prompts": align.prompts if align.steps else 0,
        "align.microbatch": (align.microbatch or 0) if align.steps else 0,
        "eval.batch": config.eval.batch,
    }
    return [
        f"{key}={size}: {counted(padding, 'row')} of padding more to fill {parts} devices; "
        f"{size + padding} would need none"
        for key, size in sizes.items()
        if (padding := padding_of(mesh, size))
    ]


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
    scorer = build(config.scorer.score, "scorer.score", trusted)
    Rewards(scorer)  # starts nothing yet, and refuses what it can't run
    loss_fn, said = build_loss(config.loss, trusted)
    candidates = config.sampling.candidates
    try_recipe(scorer, labels, loss_fn, frames=chat.frames, candidates=candidates)
    recipe = Recipe(
        sampling=config.sampling,
        response_size=config.data.max_response_tokens,
        scorer=scorer,
        by_policy=config.scorer.by == "policy",
        labels=labels,
        frames=chat.frames,
        needs=needs_of(loss_fn, labels, candidates, **said),
        inner_epochs=config.align.inner_epochs,
    )
    check_settings(config, recipe, loss_fn)
    return recipe, loss_fn


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


def finish(
    run: Run, params: Params, made: Sequence[Evaluation], handed_on: Mapping[str, int]
) -> None:
    """Export the aligned model, draw the report, print the table, and mark the run as done.

    `handed_on` has the step, by stage, whose state went on from there.
    """
    directory, config = run.directory, dataclasses.asdict(run.config)
    for key in ("teacher", "collect", "distributed"):  # no business of whoever gets the model
        del config[key]
    card = {"student": run.config.model.path} | config
    notes = [part.gate_note for part in run.data.parts.values() if part.gate_note]
    chosen_by = run.config.checkpoint.best
    if chosen_by is not None:
        whole_steps = {stage: getattr(run.config, stage).steps for stage in handed_on}
        notes += [findings.chosen(handed_on, whole_steps), findings.selected(chosen_by)]
    note = "".join(f"\n\n{one[0].upper()}{one[1:]}." for one in notes)
    results = tables.markdown(made) + note
    card |= provenance(run.config.model.path, run.config, results)
    whole = to_first(assemble(run.base, params))
    told(lambda: export_hf(run.model.config, whole, run.chat, directory / EXPORT, card))
    run.pause("after the export")

    def report() -> None:
        write_whole(directory / "table.md", f"{results}\n".encode())
        known = costs.measured_anyway(made[-1], run.heldout.examples, whole)
        keep_answer(known, "costs", directory)
        page.write(directory)

    told(report)
    run.console.print(tables.table(made))
    for line in findings.remarks(made, run.symptoms.control, chosen_by):
        run.say(line)
    if failed := failing(run.symptoms.failed):
        run.say(f"warning: {failed}")

    def outlook() -> None:
        if longer := findings.sft_for_as_long(page.steps(directory / "metrics.jsonl")):
            run.say(longer)

    told(outlook)  # the first process alone has the file
    run.pause("before it was marked as done")
    told(lambda: write_whole(directory / "done", b""))
    for stage in STAGES:  # reference/ and export/ have what was chosen
        run.checkpoints.keep_best(stage, ())


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """What asks to stop becomes a wish that the step loop grants; a second Ctrl-C is at once."""
    wished = 0

    def take(number: int, frame: object) -> None:
        nonlocal wished
        if wished and number == signal.SIGINT:
            raise KeyboardInterrupt
        wished = number
        if number == signal.SIGHUP:
            forget_closed_terminal()

    before = {number: signal.signal(number, take) for number in stops()}
    try:
        yield wish(lambda: wished)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
