"""Typed settings that check themselves: frozen records, without Hydra."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from omegaconf import MISSING

from pujax.config.model_settings import ModelConfig
from pujax.errors import one_of, require
from pujax.records import Sampling, check_temperature
from pujax.teacher.settings import CollectConfig, TeacherConfig, check_source


@dataclass(frozen=True)
class RunConfig:
    """Where a run is kept: `root`/`name`/<time>, unless `dir` says otherwise.

    Attributes:
        name: what its runs are called, one folder in `root`.
        root: the folder of all runs.
        dir: the very directory, of any path; null makes one named by the time.
    """

    name: str = MISSING
    root: str = "runs"
    dir: str | None = None

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"(?!\.+$)[^/\\\0]+", self.name) is not None,
            "run.name",
            self.name,
            "it names one folder in run.root: no slashes, not .. (run.dir takes any path)",
        )
        for key in ("root", "dir"):
            remedy = "name a folder: . is the one that you are in"
            require(getattr(self, key) != "", f"run.{key}", "", remedy)


@dataclass(frozen=True)
class GateConfig:
    """Which of the teacher's anchors are not to be learnt; the held-out ones are left alone.

    Attributes:
        answer: what an anchor must be of its prompt's true answer, where there is one: off, exact,
            or contains.
        refusals: whether anchors that begin as a refusal are distrusted.
        near_duplicates: the share of word triples that an anchor has in common with an earlier one,
            from which on it is a copy; 0 is off.
        check: a function as in pujax.rewards, by `_target_`, such as a verifier or a judge of your
            own; null is none.
        least: the number of its that an anchor must reach.
        seconds: that a call of it may take.
        weight: what distrusted anchors count in SFT; 0 leaves them out of the run.
    """

    answer: str = "off"
    refusals: bool = False
    near_duplicates: float = 0.0
    check: Any = None
    least: float = 0.5
    seconds: float = 10.0
    weight: float = 0.0

    def __post_init__(self) -> None:
        require(math.isfinite(self.least), "data.gate.least", self.least, "must be finite")
        require(self.seconds > 0, "data.gate.seconds", self.seconds, "must be positive")
        require(
            self.answer in ("off", "exact", "contains"),
            "data.gate.answer",
            self.answer,
            "choose off, exact or contains",
        )
        for key in ("near_duplicates", "weight"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"data.gate.{key}", value, "must lie in [0, 1]")


@dataclass(frozen=True)
class DataConfig:
    """Prompts, anchors and the static shapes they are padded to.

    Attributes:
        prompts: what to train on: a file, a list of files, or a dataset as in {dataset: NAME,
            split: train, slice: "0:100", columns: {prompt: question}, template: "{question}"}.
        anchors: the store of the teacher's answers to both, a .jsonl file.
        heldout: what to evaluate on, as `prompts`; without `anchors`, as `preferences`.
        preferences: prompts with responses that someone rated, given as `prompts` are: in place of
            these or beside them.
        preference_share: the share of the steps that learns from them, beside `prompts`.
        dimensions: weights of their ratings by name; none takes the mean of all.
        weightings: how to weigh those dimensions, a list of numbers each: every row stands once for
            each, which its system message states, to be heeded when a prompt states another.
        degrees: the candidates of `prompts` are their anchors with more and more key words removed,
            in so many degrees; 0 has the student sample them.
        on_bad_row: what a row of them is that can't be used, such as one with a response beyond
            `max_response_tokens`: an error, or to drop.
        reference_cache: the folder that keeps the reference's log-probs of given responses, by
            model and data; null computes them in each step.
        gate: which anchors are not learnt.
        system: the student's system message, or @FILE, where a prompt has none; null leaves it to
            the chat template.
        max_prompt_tokens: the longest prompt, in tokens.
        max_response_tokens: the longest answer, in tokens.
        on_too_long: what a prompt beyond that is: an error, to drop, or to truncate (at the
            beginning of its last message).
    """

    prompts: Any = MISSING
    anchors: str | None = MISSING
    heldout: Any = MISSING
    preferences: Any = None
    preference_share: float = 0.5
    dimensions: dict[str, float] = field(default_factory=dict)
    weightings: Any = field(default_factory=list)
    degrees: int = 0
    on_bad_row: str = "error"
    reference_cache: str | None = "runs/.reference"
    gate: GateConfig = field(default_factory=GateConfig)
    system: str | None = None
    max_prompt_tokens: int = 128
    max_response_tokens: int = 128
    on_too_long: str = "error"

    def __post_init__(self) -> None:
        require(
            self.on_too_long in ("error", "drop", "truncate"),
            "data.on_too_long",
            self.on_too_long,
            "choose error, drop or truncate",
        )
        require(
            self.on_bad_row in ("error", "drop"),
            "data.on_bad_row",
            self.on_bad_row,
            "choose error or drop",
        )
        for key in ("prompts", "heldout"):
            check_source(f"data.{key}", getattr(self, key))
        require(self.preferences != "", "data.preferences", "", "name what someone rated")
        check_source("data.preferences", self.preferences)
        require(self.anchors != "", "data.anchors", "", "name the store of the teacher's answers")
        require(
            self.prompts is not None or self.preferences is not None,
            "data.prompts",
            self.prompts,
            "name prompts, or data.preferences, or both",
        )
        require(
            self.prompts in (None, MISSING) or self.anchors is not None,
            "data.anchors",
            self.anchors,
            "name the store that answers data.prompts",
        )
        require(
            0 < self.preference_share < 1,
            "data.preference_share",
            self.preference_share,
            "must lie in (0, 1); without data.prompts every step takes data.preferences",
        )
        rated = self.preferences is not None
        for key, idle, used, remedy in (
            (
                "dimensions",
                {},
                rated or self.anchors is None,  # of data.heldout
                "it weighs ratings: give data.preferences, or take it out",
            ),
            ("weightings", [], rated, "it weighs ratings: give data.preferences"),
            (
                "preference_share",
                0.5,
                rated and self.prompts is not None,
                "it is between data.prompts and data.preferences: give both",
            ),
        ):
            require(used or getattr(self, key) == idle, f"data.{key}", getattr(self, key), remedy)
        require(
            self.degrees >= 0 and not (self.degrees and self.prompts is None),
            "data.degrees",
            self.degrees,
            "must not be negative, and is of the anchors of data.prompts",
        )
        for weighting in self.weightings if isinstance(self.weightings, list) else [None]:
            require(
                isinstance(weighting, list)
                and all(isinstance(each, int | float) for each in weighting),
                "data.weightings",
                self.weightings,
                "give a list of numbers for each, as in [[1, 0], [0.5, 0.5]]",
            )
        for name, weight in self.dimensions.items():
            require(
                -math.inf < weight < math.inf, f"data.dimensions.{name}", weight, "must be finite"
            )
        for key in ("max_prompt_tokens", "max_response_tokens"):
            require(getattr(self, key) > 1, f"data.{key}", getattr(self, key), "must exceed 1")


@dataclass(frozen=True)
class ScorerConfig:
    """How the candidates are ranked.

    Attributes:
        score: the function, by `_target_`.
        by: whose scores they are: the frozen reference's or the current policy's.
    """

    score: Any = MISSING
    by: str = "reference"

    def __post_init__(self) -> None:
        require(
            self.by in ("reference", "policy"), "scorer.by", self.by, "choose reference or policy"
        )


@dataclass(frozen=True)
class SftConfig:
    """The first stage.

    Attributes:
        steps: updates; 0 skips the stage.
        batch: anchors a step.
        lr: peak learning rate, in [0, 1].
    """

    steps: int = 100
    batch: int = 8
    lr: float = 2e-5

    def __post_init__(self) -> None:
        require(self.steps >= 0, "sft.steps", self.steps, "must not be negative")
        require(0 <= self.lr <= 1, "sft.lr", self.lr, "must lie in [0, 1]")
        require(self.batch > 0, "sft.batch", self.batch, "must be positive")


@dataclass(frozen=True)
class AlignConfig:
    """The second stage.

    Attributes:
        steps: groups of `prompts` to learn from; 0 skips the stage.
        prompts: prompts a step.
        lr: peak learning rate, in [0, 1].
        inner_epochs: how often each is learnt from.
        microbatch: prompts that go through the gradient at a time, for memory; null is all.
    """

    steps: int = 100
    prompts: int = 4
    lr: float = 5e-6
    inner_epochs: int = 1
    microbatch: int | None = None

    def __post_init__(self) -> None:
        require(self.steps >= 0, "align.steps", self.steps, "must not be negative")
        require(0 <= self.lr <= 1, "align.lr", self.lr, "must lie in [0, 1]")
        require(self.prompts > 0, "align.prompts", self.prompts, "must be positive")
        require(self.inner_epochs > 0, "align.inner_epochs", self.inner_epochs, "must be positive")
        if self.microbatch is not None:
            require(
                self.microbatch > 0 and self.prompts % self.microbatch == 0,
                "align.microbatch",
                self.microbatch,
                f"must divide align.prompts={self.prompts}",
            )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with global-norm clipping.

    Attributes:
        b1: decay of the gradient's mean.
        b2: decay of the gradient's square.
        weight_decay: a share of the learning rate.
        clip_norm: the largest global norm of a gradient.
        warmup: the share of a stage's steps with a rising learning rate.
        schedule: of the learning rate after that: cosine (to 0) or constant.
        max_skipped: how many non-finite updates in a row stop the run.
    """

    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    warmup: float = 0.1
    schedule: str = "cosine"
    max_skipped: int = 3

    def __post_init__(self) -> None:
        require(
            self.schedule in ("cosine", "constant"),
            "optim.schedule",
            self.schedule,
            "choose cosine or constant",
        )
        require(0 <= self.warmup <= 1, "optim.warmup", self.warmup, "must lie in [0, 1]")
        require(self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "must be positive")
        for key in ("b1", "b2"):
            require(
                0 <= getattr(self, key) < 1, f"optim.{key}", getattr(self, key), "lie in [0, 1)"
            )
        require(
            0 <= self.weight_decay < math.inf,
            "optim.weight_decay",
            self.weight_decay,
            "must be finite and not negative",
        )
        require(self.max_skipped > 0, "optim.max_skipped", self.max_skipped, "must be positive")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, beside the end of each stage, and which one is handed on.

    With `best` the held-out prompts are a validation set, which chose the model: a claim needs
    other prompts.

    Attributes:
        every: steps.
        keep: how many of the newest stay.
        best: a metric of eval.metrics: of the states that eval.every measures, and the one that a
            stage begins with, the best goes on to alignment, or to the export; null: the last.
        clean: remove them all when the run is done, which goes on from none of them any more.
    """

    every: int = 50
    keep: int = 2
    best: str | None = None
    clean: bool = False

    def __post_init__(self) -> None:
        require(self.every > 0, "checkpoint.every", self.every, "must be positive")
        require(self.keep > 0, "checkpoint.keep", self.keep, "must be positive")


@dataclass(frozen=True)
class LogConfig:
    """Who is told of a run's metrics, beside its own files.

    Attributes:
        to: trackers: any of trackio, wandb and mlflow, each an extra of that name.
    """

    to: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in self.to:
            one_of("log.to", name, ("trackio", "wandb", "mlflow"))


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation.

    Attributes:
        every: steps of each stage; 0 evaluates between the stages alone.
        prompts: how many of the held-out prompts; null is all.
        batch: prompts at once.
        samples: answers a prompt that are drawn beside the greedy one.
        temperature: at which they are drawn.
        patience: evaluations without a gain in checkpoint.best that end a stage; null is none.
        metrics: what is measured, by name as in conf/eval/; none at all stands for the usual ones.
    """

    every: int = 0
    prompts: int | None = None
    batch: int = 16
    samples: int = 0
    temperature: float = 0.7
    patience: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.batch > 0, "eval.batch", self.batch, "must be positive")
        require(self.every >= 0, "eval.every", self.every, "must not be negative")
        require(
            self.prompts is None or self.prompts > 0,
            "eval.prompts",
            self.prompts,
            "must be positive",
        )
        require(
            self.patience is None or self.patience > 0,
            "eval.patience",
            self.patience,
            "must be positive, or null",
        )
        require(self.samples >= 0, "eval.samples", self.samples, "must not be negative")
        check_temperature("eval.temperature", self.temperature)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes all that the others leave. One each is one alone.

    Attributes:
        data: devices that part a batch.
        fsdp: devices that part parameters, and a batch too; of data and this both -1 this takes
            all.
        tensor: devices that part matrices by heads; of several -1 this takes all.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis, size in vars(self).items():
            require(size > 0 or size == -1, f"mesh.{axis}", size, "must be positive, or -1")


@dataclass(frozen=True)
class DistributedConfig:
    """Whether several processes do the run together, each on its own devices.

    Attributes:
        detect: whether Slurm, Open MPI, Kubernetes or the variables JAX_COORDINATOR_ADDRESS,
            JAX_NUM_PROCESSES and JAX_PROCESS_ID say so; without any of them it is one process.
        coordinator: HOST:PORT of the first process, which the others can reach.
        processes: how many there are.
        process: which one this is, from 0.
    """

    detect: bool = True
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        given = (self.coordinator, self.processes, self.process)
        if self.coordinator is not None:
            require(
                (found := re.fullmatch(r"[^\s/]+:(\d{1,5})", self.coordinator)) is not None
                and 0 < int(found[1]) < 2**16,
                "distributed.coordinator",
                self.coordinator,
                "write HOST:PORT",
            )
        require(
            self.detect or None not in given or given == (None,) * 3,
            "distributed.coordinator",
            self.coordinator,
            "without distributed.detect set distributed.processes and distributed.process too",
        )
        require(
            self.processes is None or self.processes > 0,
            "distributed.processes",
            self.processes,
            "must be positive",
        )
        if self.process is not None:
            require(
                0 <= self.process < (self.processes or self.process + 1),
                "distributed.process",
                self.process,
                f"must lie in [0, distributed.processes={self.processes})",
            )


@dataclass(frozen=True)
class TrainConfig:
    """Everything `pujax train` is told.

    Attributes:
        run: where it is kept.
        seed: of all that is random, in [0, 2**63).
        resume: auto (go on with the newest unfinished run of these settings), never, or a run's
            directory.
        trusted: packages beside pujax whose functions may be named by `_target_`: their code runs
            here.
        model: the student.
        data: prompts, anchors and lengths.
        teacher: whom to ask for the anchors that the store lacks; teacher=replay asks nobody.
        collect: how to ask.
        sampling: of candidates.
        scorer: how candidates are ranked.
        labels: from scores to labels: a function, by `_target_`, and its keywords.
        loss: a function, by `_target_`, and its keywords.
        sft: the first stage: supervised fine-tuning on the anchors.
        align: the second stage: learning from ranked candidates.
        optim: AdamW, of both stages.
        checkpoint: when the state is saved.
        log: who is told of its metrics.
        eval: held-out evaluation.
        mesh: devices.
        distributed: processes.
    """

    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0
    resume: str = "auto"
    trusted: list[str] = field(default_factory=list)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    sampling: Sampling = field(default_factory=Sampling)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    labels: Any = MISSING
    loss: Any = MISSING
    sft: SftConfig = field(default_factory=SftConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        best, measured = self.checkpoint.best, self.eval.metrics
        require(
            self.eval.patience is None or best is not None,
            "eval.patience",
            self.eval.patience,
            "by which metric? set checkpoint.best too",
        )
        if best is None:
            return
        if measured:  # else those that a run has when none are named
            nodes = {name: node for name, node in measured.items() if isinstance(node, Mapping)}
            directed = [name for name, node in nodes.items() if node.get("better")]
            one_of("checkpoint.best", best, directed)
        require(
            self.eval.every > 0,
            "checkpoint.best",
            best,
            "it is measured every eval.every steps, which is 0: set that too",
        )


def check_seed(seed: int) -> None:
    """Refuse what makes no random key."""
    require(0 <= seed < 2**63, "seed", seed, "must lie in [0, 2**63)")


def default_of(key: str) -> Any:
    """The default of a dotted key of `TrainConfig`; None where it has none."""
    value: Any = TrainConfig()
    for name in key.split("."):
        if not is_dataclass(value) or not hasattr(value, name):
            return None
        value = getattr(value, name)
    return value
