"""Settings of the commands that don't train, as far as more than their own file reads them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING

from pujax.config.commands import listed, one_source
from pujax.config.model_settings import ModelConfig
from pujax.config.settings import DataConfig, EvalConfig, MeshConfig, ScorerConfig, check_seed
from pujax.errors import ConfigError, PujaxError, require
from pujax.files.locate import at_home
from pujax.teacher.settings import CollectConfig, TeacherConfig

T = TypeVar("T", DataConfig, EvalConfig)


@dataclass(frozen=True)
class WorkConfig:
    """The work that a benchmark times; every prompt and response has its full length.

    Attributes:
        prompts: how many in a step.
        candidates: responses to each prompt.
        prompt_tokens: how long each prompt is.
        response_tokens: how long each response is.
        offline: take the responses as given, so that a step is the reference's pass and the update:
            with one candidate, a DPO step on pairs.
        steps: how many are timed, after a first one.
        sweep: time other numbers of candidates and other lengths too, each for itself.
        out: the folder for a sweep's table and plot.
    """

    prompts: int = 4
    candidates: int = 4
    prompt_tokens: int = 64
    response_tokens: int = 64
    offline: bool = False
    steps: int = 5
    sweep: bool = False
    out: str = "."

    def __post_init__(self) -> None:
        for key, least in (
            ("prompts", 1),
            ("candidates", 1 if self.offline else 2),
            ("prompt_tokens", 1),
            ("response_tokens", 2),
            ("steps", 1),
        ):
            value = getattr(self, key)
            require(value >= least, f"benchmark.{key}", value, f"must be at least {least}")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Everything `pujax benchmark` is told.

    Attributes:
        seed: of all that is random, in [0, 2**63).
        trusted: packages beside pujax whose functions may be named by `_target_`: their code runs
            here.
        model: the student.
        scorer: how candidates are ranked.
        labels: from scores to labels: a function, by `_target_`, and its keywords.
        loss: a function, by `_target_`, and its keywords.
        mesh: devices.
        benchmark: the work.
        plan: run nothing: say what the step would take on devices that need not be here.
    """

    seed: int = 0
    trusted: list[str] = field(default_factory=list)
    model: ModelConfig = field(default_factory=ModelConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    labels: Any = MISSING
    loss: Any = MISSING
    mesh: MeshConfig = field(default_factory=MeshConfig)
    benchmark: WorkConfig = field(default_factory=WorkConfig)
    plan: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)


@dataclass(frozen=True)
class HeldoutConfig:
    """Which held-out prompts `pujax evaluate` asks, and how they are laid out: as in `DataConfig`.

    What is null is as the run has it, and without a run `DataConfig`'s default.

    Attributes:
        heldout: prompts, or without `anchors` preferences, also for a run that learnt from prompts:
            a file, a list of files, or a mapping as for `data.prompts`.
        anchors: the store that answers them.
        dimensions: weights of preferences' ratings by name.
        on_bad_row: what a row of preferences is that can't be used: error, drop.
        system: the student's system message, or @FILE, where a prompt has none.
        max_prompt_tokens: the longest prompt.
        max_response_tokens: the longest response.
        on_too_long: what becomes of a longer prompt: error, drop, truncate.
    """

    heldout: Any = None
    anchors: str | None = None
    dimensions: dict[str, float] = field(default_factory=dict)
    on_bad_row: str | None = None
    system: str | None = None
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    on_too_long: str | None = None

    def __post_init__(self) -> None:
        over(DataConfig(anchors=None), self)  # which checks itself


@dataclass(frozen=True)
class MeasureConfig:
    """How `pujax evaluate` measures, as in `EvalConfig`; `metrics` are beside the run's own.

    What is null is as the run has it, and without a run `EvalConfig`'s default.

    Attributes:
        prompts: how many of the held-out prompts; of other prompts than the run's, null is all.
        batch: prompts at once.
        samples: answers a prompt that are drawn beside the greedy one.
        temperature: at which they are drawn.
        metrics: what is measured beside what the run has, by name as in conf/eval/.
    """

    prompts: int | None = None
    batch: int | None = None
    samples: int | None = None
    temperature: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        over(EvalConfig(), self)  # which checks itself


def over(record: T, told: Any) -> T:
    """`record` with what `told` has of it that is neither null nor an empty mapping.

    Raises what such a record raises.
    """
    return replace(record, **{key: v for key, v in vars(told).items() if v not in (None, {})})


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything `python -m pujax.evaluate` is told: a run or several, and models to put beside.

    `model` names what is evaluated on the run's held-out prompts, `name` what each is called.
    Without a model, `name` says what each of several runs is called; those of one name are an arm.
    With anything of `data`, `eval` or `out`, or without a run, the prompts are a split of their
    own, asked of the `model`s or else of what each run ended with. A suite asks more: of the model,
    or what the run ended with, or of what has been evaluated; its judge is a teacher.

    Attributes:
        run: a run's directory, a folder of runs (its newest finished one), or a list: [A,B].
        model: evaluate this too, or a list: a run, a Hugging Face directory, a GGUF file, a hub id.
        name: what to call it, one a model; without a model one a run, runs of a name are an arm.
        suite: larger questions, by name, such as signal, ranking or winrate.
        out: the folder for what isn't a run's own table: RUN/heldout-FILE, evaluations/FILE.
        store: the judge's verdicts: verdicts.jsonl in the run's directory or in `out`.
        trusted: packages beside pujax whose functions may be named, by the run's own settings too:
            their code runs here.
        data: other held-out prompts, or the run's own laid out otherwise.
        eval: how they are measured.
        teacher: a suite's judge; of replay, `model` is whose anchors, where several are stored.
        collect: how the judge is asked.
    """

    run: Any = None
    model: Any = None
    name: Any = None
    suite: Any = None
    out: str | None = None
    store: str | None = None
    trusted: list[str] = field(default_factory=list)
    data: HeldoutConfig = field(default_factory=HeldoutConfig)
    eval: MeasureConfig = field(default_factory=MeasureConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)

    def __post_init__(self) -> None:
        if not self.runs and not (self.models and self.data.heldout is not None):
            raise ConfigError(
                "missing value for run: set run=DIRECTORY, or model= and data.heldout=, and beside "
                "prompts data.anchors=, where their answers are"
            )
        stages = len(self.runs) == 1 and not self.models
        needless = "a run alone shows its stages: take it out, or give several runs or a model"
        require(not (stages and self.names), "name", self.name, needless)
        if self.suite is not None and not self.names:
            return  # what it asks for says what it needs
        wanted = len(self.models) or (len(self.names) and len(self.runs))
        what = "model" if self.models else "run"
        remedy = f"give one a {what}, {wanted} in all"
        if self.models and not self.names:
            remedy = f"give each model a name: name={'NAME' if wanted == 1 else '[A,B]'}"
        require(len(self.names) == wanted, "name", self.name, remedy)
        distinct = not self.models or len(set(self.names)) == wanted
        require(distinct, "name", self.names, "give each model one of its own: name=[A,B]")
        one = not self.models or len(self.runs) < 2
        require(one, "run", self.run, "give one run whose held-out prompts the models answer")
        several = len(self.runs) > 1 and self.out is not None
        require(not several, "out", self.out, "one folder for several runs: take it out")

    @property
    def runs(self) -> list[str]:
        """The runs' directories."""
        return listed("run", self.run)

    @property
    def models(self) -> list[str]:
        """The models' paths."""
        return listed("model", self.model)

    @property
    def names(self) -> list[str]:
        """The names, one a model or a run; of models on a split their files' names will do."""
        names = listed("name", self.name)
        if names or not self.models or not self.splits:
            return names
        return [re.sub(r"[^\w.-]+", "-", Path(model.rstrip("/")).stem) for model in self.models]

    @property
    def splits(self) -> bool:
        """Whether other prompts are meant than a run's own, or the same asked otherwise."""
        changed = (self.data, self.eval, self.out) != (HeldoutConfig(), MeasureConfig(), None)
        return changed or not self.runs


@contextmanager
def own_names() -> Iterator[None]:
    """Tells what is wrong by this command's settings, which are a run's without `data.`."""
    try:
        yield
    except PujaxError as error:
        names = "|".join(each.name for each in fields(DataConfig))
        said = re.sub(rf"\bdata\.({names})\b", r"\1", str(error))
        raise type(error)(said) from error


@dataclass(frozen=True)
class AdaptConfig:
    """Everything `pujax adapt` is told.

    Attributes:
        run: a run's directory, or a folder of runs: its newest finished one; or
        model: a hub id, a Hugging Face directory, a GGUF file, package://NAME/FILE.
        preferences: what the user prefers, in the forms of `data.preferences`; null only beside
            `fitted`: what was sampled is then not fitted further.
        heldout: more of the same user's, on which the model is judged before and after; null judges
            on `preferences`.
        out: the soft prompt's file, which ends in .safetensors.
        tokens: how many virtual tokens stand before a prompt.
        start: a text, or @FILE, whose tokens they are at first, over again where it has fewer.
        task: what the user is after, in words, or @FILE: kept with the soft prompt, for `fitted` of
            others.
        fitted: soft prompts of other users, each with a task: one for this `task` is sampled from a
            diffusion model of them, and fitting begins with that in place of `start`.
        system: the system message, or @FILE, where a prompt has none; null is the one that the run
            was trained with, or else the chat template's own.
        dimensions: weights of the ratings by name; none takes the mean of all.
        loss: a function, by `_target_`, and its keywords.
        steps: updates.
        batch: prompts a step.
        lr: peak learning rate, in (0, 1].
        seed: of the order of the prompts and of sampling, in [0, 2**63).
        max_prompt_tokens: the longest prompt, in tokens.
        max_response_tokens: the longest response, in tokens.
        on_bad_row: what a row that can't be used is: an error, or to drop.
        on_too_long: what a prompt beyond `max_prompt_tokens` is: an error, to drop, or to truncate.
        trusted: packages beside pujax whose functions may be named by `_target_`: their code runs
            here.
    """

    run: str | None = None
    model: str | None = None
    preferences: Any = None
    heldout: Any = None
    out: str = MISSING
    tokens: int = 8
    start: str = "Answer as I like it best."
    task: str | None = None
    fitted: list[str] = field(default_factory=list)
    system: str | None = None
    dimensions: dict[str, float] = field(default_factory=dict)
    loss: Any = MISSING
    steps: int = 100
    batch: int = 4
    lr: float = 0.01
    seed: int = 0
    max_prompt_tokens: int = 128
    max_response_tokens: int = 128
    on_bad_row: str = "error"
    on_too_long: str = "error"
    trusted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        one_source(self.run, self.model)
        check_seed(self.seed)
        out = at_home(self.out)
        suffix = out.suffix == ".safetensors"
        require(suffix, "out", self.out, "name a file that ends in .safetensors")
        word = re.fullmatch(r"[\w.-]+", out.stem) is not None
        require(word, "out", self.out, "its user is called by the file's name: take one word")
        given = [at_home(path).resolve() for path in self.fitted]
        another = "is one of `fitted`: choose another name"
        require(out.resolve() not in given, "out", self.out, another)
        for key, most in (("tokens", 1024), ("steps", 1_000_000), ("batch", 4096)):
            value = getattr(self, key)
            require(0 < value <= most, key, value, f"must lie in [1, {most}]")
        require(0 < self.lr <= 1, "lr", self.lr, "must lie in (0, 1]")
        require(self.start.strip() != "", "start", self.start, "write a text of a token at least")
        require(
            self.preferences is not None or bool(self.fitted),
            "preferences",
            self.preferences,
            "name what the user prefers, or `fitted` soft prompts of others, or both",
        )
        require(
            self.preferences is not None or self.heldout is None,
            "heldout",
            self.heldout,
            "without preferences nothing is fitted that could be judged: take it out",
        )
        told = self.task is not None and self.task.strip() != ""
        require(
            told or not self.fitted,
            "task",
            self.task,
            "say what the user is after: it is sampled for",
        )
        require(
            len(self.fitted) != 1, "fitted", self.fitted, "a diffusion model needs two at the least"
        )
        if self.preferences is not None:
            self.laid_out(None)

    def laid_out(self, system: str | None) -> DataConfig:
        """The preferences as those of a run with that `system` message. Raises `ConfigError`."""
        with own_names():
            return DataConfig(
                prompts=None,
                anchors=None,
                heldout=self.heldout,
                preferences=self.preferences,
                dimensions=self.dimensions,
                on_bad_row=self.on_bad_row,
                on_too_long=self.on_too_long,
                system=system,
                max_prompt_tokens=self.max_prompt_tokens,
                max_response_tokens=self.max_response_tokens,
            )
