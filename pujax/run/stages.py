"""One stage of a run: its steps, logged and saved, and which of its states is handed on."""

import hashlib
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from pujax.config.settings import TrainConfig
from pujax.errors import DivergedError, NonFiniteError, StopRequested, require
from pujax.evaluation import results
from pujax.evaluation.answering import Draws, evaluate
from pujax.evaluation.metrics import Metric, missing
from pujax.evaluation.results import Evaluation
from pujax.evaluation.statistics import FEW
from pujax.files.chat import Chat
from pujax.files.durable import write_whole
from pujax.method.step import assemble
from pujax.models.decoder import LanguageModel
from pujax.models.lora import without_idle
from pujax.models.packing import TokenBudget
from pujax.models.sharding import fetched, put_batch, ways
from pujax.records import STAGES, Example, canonical
from pujax.run.batches import batch_at, collate
from pujax.run.beginning import told_by_pace
from pujax.run.checkpoint import Checkpoints, Place, checksums
from pujax.run.control import LOOKED, Controlled
from pujax.run.data import Dataset
from pujax.run.forecast import PACED, Forecast
from pujax.run.logs import RunLog, SampleGroup, progress
from pujax.run.plan import fitting
from pujax.run.processes import told
from pujax.run.rewarding import Rewards
from pujax.run.selection import Criterion
from pujax.run.symptoms import Symptoms, group_notes
from pujax.text import counted
from pujax.types import Batch, Completions, Group, Params, TrainState

DRAWN = 500  # batches by whose lengths a budget of tokens is chosen

Fitting = Callable[[str, Callable[..., Any], Mesh], Callable[..., Any]]
"""What makes of a stage's jitted function what the stage calls."""


@dataclass(frozen=True)
class Stage:
    """One of the two stages: its length, its batch, its data, the steps before it, and its step.

    `model` is what its evaluations call the model, and `begun` the model and step of the evaluation
    of what it begins with. `advance` does one step on a batch of these examples and returns the new
    state, its metrics, and the group it learnt from where there is one. `control` says of a state's
    groups what its score is worth beside its control.
    """

    name: str
    model: str
    begun: tuple[str, int]
    steps: int
    prompts: int
    data: Dataset
    before: int
    salt: int
    advance: Callable[
        [TrainState, Batch, Sequence[Example]], tuple[TrainState, dict[str, Any], Group | None]
    ]
    control: Controlled | None = None


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
    criterion: Criterion | None = None
    symptoms: Symptoms = field(default_factory=Symptoms)
    took: dict[str, float] = field(default_factory=dict)  # seconds of evaluations, by model
    # What was measured of the state that a stage would hand on, and its step, by model.
    leading: dict[str, tuple[int, Evaluation]] = field(default_factory=dict)
    forecast: Forecast | None = None
    fitting: Fitting = fitting

    def budgeted(self, data: Dataset, prompts: int, responses: int) -> LanguageModel:
        """The model with a budget of real tokens for batches of that size."""
        return self.model.clone(budget=budget_for(data, prompts, responses, ways(self.mesh)))

    def rewarded(
        self, rewards: Rewards, batch: Batch, made: Completions, examples: Sequence[Example]
    ) -> tuple[Batch, dict[str, float]]:
        """The batch with these completions and their rewards given, and what to log of them."""
        tokens, mask = fetched((made.tokens, made.mask))
        texts = [
            [self.chat.decode(ids[real].tolist()) for ids, real in zip(*group, strict=True)]
            for group in zip(tokens[: len(examples)], mask[: len(examples)], strict=True)
        ]
        found = told(lambda: rewards.of(examples, texts))
        for line in found.failures:
            self.say(line)
        placed = put_batch(self.mesh, found.scores, len(examples))
        return replace(batch, given=made, rewards=placed), dict(found.metrics)

    def pause(self, where: str) -> None:
        """Raise `StopRequested` if a signal asked for it: called where all is saved."""
        if number := self.stopping():
            raise StopRequested(
                f"stopped {where}; the state is in {self.directory}: the same command goes on "
                "from there",
                number,
            )

    def evaluated(
        self,
        name: str,
        step: int,
        trainable: Params,
        *,
        keep: bool = True,
        same: Evaluation | None = None,
    ) -> Evaluation:
        """The held-out evaluation of a model, from the disk if this run has made it before.

        `same` is one of the same parameters under another name.
        """
        examples = self.heldout.examples[: self.config.eval.prompts]
        of = self._digest(trainable, examples) if keep else None
        result = told(lambda: self._kept(name, examples, of)) if keep else None
        at, measured = self.leading.get(name, (None, None))
        same = same or (measured if at == step else None)
        if result is None and keep and same is not None:
            result = self._saved(replace(same, model=name, of=of))
        if result is None:
            settings, batch = self.config.eval, self.config.eval.batch

            def collated(some: Sequence[Example]) -> Batch:
                self.pause(f"while evaluating {name}")
                return put_batch(self.mesh, collate(some, self.heldout), batch)

            begun = time.monotonic()
            found = evaluate(
                self.budgeted(self.heldout, batch, 1 + self.heldout.candidates),
                assemble(self.base, trainable),
                examples,
                name=name,
                batch=batch,
                collate=collated,
                decode=self.chat.decode,
                metrics=self.metrics,
                draws=Draws(settings.samples, settings.temperature),
                say=None if self.console.is_terminal else self.say,
            )
            self.took[name] = time.monotonic() - begun
            left_out = missing(
                self.metrics, found.shown, samples=settings.samples, examples=examples
            )
            if name == "base" and left_out:
                self.say(left_out)
            # A metric of one's own may find something else in each process.
            result = self._saved(replace(found, of=of)) if keep else told(lambda: found)
        if line := self.log.evaluation(name, step, result.means()):
            self._warn(line)
        self.pause(f"after evaluating {name}")
        return result

    def _saved(self, result: Evaluation) -> Evaluation:
        """The evaluation, in the run's directory too."""

        def save() -> Evaluation:
            results.save(result, self.directory)
            return result

        return told(save)

    def _digest(self, trainable: Params, examples: Sequence[Example]) -> str:
        """Of all that decides what a model answers to these examples, and what is measured."""
        settings = self.config.eval
        drawn = (settings.samples, settings.temperature if settings.samples else None)
        asked = [
            [e.prompt_ids, e.anchor_ids, *([r.ids, r.score] for r in e.given)] for e in examples
        ]
        params = checksums(without_idle(assemble(self.base, trainable)))
        whole = [params, asked, self.heldout.response_size, drawn, settings.metrics]
        return hashlib.sha256(canonical(whole)).hexdigest()

    def _kept(self, name: str, examples: Sequence[Example], of: str | None) -> Evaluation | None:
        """The evaluation on disk, where it is whole, and of this model and these examples."""
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
        if result.of not in (of, None):  # a pujax before said nothing
            self.say(f"{path} is of another model, or asked otherwise: evaluating {name} again")
            return None
        return result

    def through(self, stage: Stage, state: TrainState, done: int) -> tuple[Params, int]:
        """The parameters that `stage` hands on, and the step that they are of; all is logged.

        `state` has `done` steps behind it. The last state's are handed on, or with a criterion the
        best of those that were measured. Raises `NonFiniteError` for a stage that ends on a skipped
        update, and `DivergedError` for one that goes astray.
        """
        self.checkpoints.keep_best(stage.name, range(done + 1))  # a killed process may have more
        if self.criterion and not done:
            self._values(stage.model, stage.begun, self.criterion)  # fails now, not at the end
            self.checkpoints.save_best(stage.name, 0, state.params)
        seed, course = (self.config.seed, stage.salt), self.symptoms.course(stage.name)
        steps = range(done + 1, stage.steps + 1)
        last, ends = done, list[float]()
        ended = bool(done) and self._measured(stage, state, done)  # which may have been lost
        if done < stage.steps and not self.console.is_terminal:
            self.say(f"{stage.name}: compiling, with the first step")
        rest = None if self.forecast is None else partial(self._after, self.forecast, stage)
        with progress(
            stage.name, done=done, steps=stage.steps, console=self.console, rest=rest
        ) as show:
            for step in steps:
                if ended:
                    break
                last = step
                examples, batch = batch_at(stage.data, stage.prompts, seed, step - 1)
                begun, worked = time.monotonic(), time.process_time()
                placed = put_batch(self.mesh, batch, stage.prompts)
                state, metrics, group = stage.advance(state, placed, examples)
                metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
                tokens = int(batch.prompts.lengths.sum())
                if group is None:
                    tokens += int(batch.anchors.lengths.sum())
                else:
                    group = fetched(group)
                    tokens += int(group.mask.sum())
                    metrics |= group_notes(group)
                seconds = time.monotonic() - begun
                # Of all threads: how long a step took on a machine that does other work too.
                worked = time.process_time() - worked + metrics.get("time/reward_cpu_s", 0.0)
                metrics["time/cpu_s"] = worked
                if group is not None:
                    metrics |= self._controlled(stage, step, state, placed, examples, group)
                line = self.log.step(stage.name, step, metrics, seconds=seconds, tokens=tokens)
                show(line)
                self._warn(line)
                ends.append(time.monotonic())
                if len(ends) == PACED and step < stage.steps and rest:
                    pace = (ends[-1] - ends[0]) / (PACED - 1)
                    self.say(told_by_pace(stage.name, pace * (stage.steps - step), rest(pace)))
                if group is not None:
                    self.log.samples(stage.name, step, sample_groups(examples, group, self.chat))
                self._refuse_divergence(stage)
                if metrics["skipped"]:
                    self._not_finite(stage, step, batch, int(metrics["skipped"]), state)
                wished = self.stopping()
                due = step % self.config.checkpoint.every == 0 and not course.astray
                if step == stage.steps or wished or due:
                    self._save(stage, step, state)
                    self.pause(f"after {stage.name} step {step}")
                ended = self._measured(stage, state, step)
        self._refuse_divergence(stage)  # which an earlier process may have gone through
        if skipped := int(state.skipped):
            raise NonFiniteError(
                f"{stage.name} ended on {skipped} updates that were not finite and so skipped: "
                f"begin another run with a lower {stage.name}.lr"
            )
        return self._handed_on(stage, state, last)

    def _after(self, forecast: Forecast, stage: Stage, pace: float) -> float:
        """Seconds that the run takes after `stage`, a step of which takes `pace`."""
        return forecast.after(stage.name, pace, min(self.took.values(), default=None))

    def _controlled(
        self,
        stage: Stage,
        step: int,
        state: TrainState,
        batch: Batch,
        examples: Sequence[Example],
        group: Group,
    ) -> dict[str, float]:
        """What the score of a stage's first groups is worth beside its control, until it is known.

        A stage of fewer than `FEW` groups tells nothing. What a run that goes on knows already is
        in `metrics.jsonl`.
        """
        looked, whole = (steps * stage.prompts for steps in (step - 1, stage.steps))
        known = self.symptoms.control.groups >= FEW or looked >= LOOKED or whole < FEW
        if stage.control is None or known or batch.given is not None:
            return {}
        return stage.control(step, state.params, batch, examples, group).metrics

    def _save(self, stage: Stage, step: int, state: TrainState) -> None:
        """A checkpoint behind what is logged, and no best state that no checkpoint can need."""
        self.log.flush()  # a line that is lost is never written again
        self.checkpoints.save(stage.before + step, Place(stage.name, step), state)
        if self.criterion:
            values = self._values(stage.model, stage.begun, self.criterion)
            ends = [number - stage.before for number in self.checkpoints.numbers()]
            needed = {
                self.criterion.best({at: value for at, value in values.items() if at <= end})
                for end in [*ends, step]
            }
            self.checkpoints.keep_best(stage.name, needed)
            if min(ends) > 0:  # no checkpoint leads back into the stage before
                for name in STAGES[: STAGES.index(stage.name)]:
                    self.checkpoints.keep_best(name, ())

    def _measured(self, stage: Stage, state: TrainState, step: int) -> bool:
        """Evaluate the state of `step` where that is due; whether the stage ends with it."""
        every, last = self.config.eval.every, step == stage.steps
        if not every or (step % every and not last) or (last and not self.criterion):
            return False  # without a criterion the last state's evaluation is the stage's own
        known = self.log.has(stage.model, step)
        found = None if known else self.evaluated(stage.model, step, state.params, keep=False)
        if self.criterion is None:
            return False
        values = self._values(stage.model, stage.begun, self.criterion)
        if self.criterion.best(values) == step:
            if found is not None:
                self.leading[stage.model] = (step, found)
            if not last:
                self.checkpoints.save_best(stage.name, step, state.params)
        if last or not self.criterion.spent(values):
            return False
        self._save(stage, step, state)
        self.say(
            f"{stage.name} ends after step {step} of {stage.steps}: "
            f"{counted(self.criterion.patience or 0, 'evaluation')} without a gain in "
            f"{self.criterion.metric}"
        )
        return True

    def _handed_on(self, stage: Stage, state: TrainState, last: int) -> tuple[Params, int]:
        """The chosen parameters of a stage whose last state is `state`, and their step."""
        if self.criterion is None:
            return state.params, last
        best = self.chosen(stage.model, stage.begun, last)
        self.say(
            f"{stage.name}: {self.criterion.metric} was best after step {best} of {last}: that "
            "state is handed on"
        )
        if best == last:
            return state.params, best
        return self.checkpoints.restore_best(stage.name, best, state.params), best

    def chosen(self, model: str, begun: tuple[str, int], last: int) -> int:
        """The step whose state is handed on by the stage that made `model`, `last` its last."""
        if self.criterion is None:
            return last
        return self.criterion.best(self._values(model, begun, self.criterion))

    def _values(
        self, model: str, begun: tuple[str, int], criterion: Criterion
    ) -> dict[int, float | None]:
        """The criterion's metric by step, as `metrics.jsonl` has it; 0 is what `begun` names."""
        key = f"eval/{criterion.metric}"
        values = {step: line.get(key) for step, line in self.log.evaluations(model).items()}
        name, step = begun
        first = self.log.evaluations(name)[step].get(key)
        require(
            first is not None,
            "checkpoint.best",
            criterion.metric,
            "no held-out prompt has it (a true answer?): choose another metric",
        )
        return values | {0: first}

    def _warn(self, line: Mapping[str, Any]) -> None:
        for said in self.symptoms.of(dict(line)):
            self.say(f"warning: {said}")

    def _refuse_divergence(self, stage: Stage) -> None:
        """Raise `DivergedError` where the stage is lost, before its state is saved or handed on."""
        course = self.symptoms.course(stage.name)
        if not course.diverged(stage.steps):
            return
        self.log.flush()
        ends = [number - stage.before for number in self.checkpoints.numbers()]
        good = max((end for end in ends if 0 < end <= course.good), default=None)
        left = f"{self.directory}/reference has what it began with"
        if good is not None:
            left = f"the last good checkpoint is {self.directory}/checkpoints/{stage.before + good}"
        elif stage.before == 0:
            left = "no checkpoint is from before"
        key, rate = f"{stage.name}.lr", getattr(self.config, stage.name).lr
        raise DivergedError(
            f"{stage.name} diverged after step {course.good} of {stage.steps}: {course.why}, after "
            f"{course.astray} such steps; {left}; nothing is exported: begin another run with a "
            f"lower {key} than {rate:g}"
        )

    def _not_finite(
        self, stage: Stage, step: int, batch: Batch, count: int, state: TrainState
    ) -> None:
        """Save the batch of a skipped update; give up after too many in a row."""
        path = self.directory / f"nonfinite-{stage.name}-{step}.npz"
        named = jax.tree_util.tree_leaves_with_path(batch)
        arrays = {jax.tree_util.keystr(at, simple=True, separator="."): x for at, x in named}

        def save() -> None:
            content = io.BytesIO()
            np.savez(content, **arrays)
            write_whole(path, content.getvalue())

        told(save)
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


def budget_for(data: Dataset, prompts: int, responses: int, ways: int = 1) -> TokenBudget | None:
    """The budget of real tokens with which a batch is expected to take the fewest.

    A smaller one leaves out more of the padding, and more batches don't fit it and are computed
    with all of theirs. So batches are drawn from the examples. For both at once, which the passes
    with a gradient read, it is the size of the least mean; for prompts and for responses alone what
    99 in 100 batches need. On a mesh that splits a batch in `ways` it is that of each part, and the
    longest part counts: all must fit. Candidates are taken to be as long as their anchors, or are
    as long as they were given. None where padding is too little to matter, or there is nothing.
    """
    if not data.examples:  # as of no anchors, where there is no SFT
        return None
    prompts = -(-prompts // ways)
    lengths = np.array(
        [(len(each.prompt_ids), responses * _response_length(each)) for each in data.examples]
    )
    drawn = np.random.default_rng(0).choice(lengths, (DRAWN, ways, prompts)).sum(axis=2)
    most = (prompts * data.prompt_size, prompts * responses * data.response_size)
    of_prompts, of_responses = map(_in_steps, np.quantile(drawn.max(axis=1), 0.99, axis=0), most)
    longest = [_in_steps(tokens, sum(most)) for tokens in drawn.sum(axis=2).max(axis=1)]
    whole, sizes = sum(most), sorted(set(longest))
    costs = [np.mean([size if size >= other else whole for other in longest]) for size in sizes]
    least = int(np.argmin(costs))
    if costs[least] >= 0.8 * whole:
        return None
    both = sizes[least]
    return TokenBudget(min(of_prompts, both), min(of_responses, both), ways, both)


def _in_steps(tokens: float, most: int) -> int:
    """As many, or up to 31 more, and at most so many; of empty answers too."""
    return min(max(1, -(-math.ceil(tokens) // 32)) * 32, most)


def _response_length(example: Example) -> float:
    """The mean length of an example's responses, as far as it is known."""
    lengths = [len(example.anchor_ids), *(len(response.ids) for response in example.given)]
    return sum(lengths) / len(lengths)


def sample_groups(examples: Sequence[Example], group: Group, chat: Chat) -> list[SampleGroup]:
    """A step's groups as a person reads them."""

    def text(b: int, g: int) -> str:
        return chat.decode(group.tokens[b, g][group.mask[b, g]].tolist())

    return [
        SampleGroup(
            id=example.prompt.id,
            prompt=example.prompt.messages[-1]["content"],
            anchor=example.anchor,
            candidates=[text(b, g) for g in there[1:]],
            scores=group.scores[b, there].tolist(),
            labels=group.labels[b, there].tolist(),
        )
        for b, example in enumerate(examples)
        for there in [np.flatnonzero(group.scores[b] != -np.inf)]
    ]
