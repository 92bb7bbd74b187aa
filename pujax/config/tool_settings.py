"""Settings of the commands that don't train, as far as more than their own file reads them."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from pujax.config.settings import MeshConfig, ModelConfig, ScorerConfig, check_seed
from pujax.errors import require


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
        heldout: prompts: a file, a list of files, or a mapping as for `data.prompts`.
        anchors: the store that answers them.
        system: the student's system message where a prompt has none.
        max_prompt_tokens: the longest prompt.
        max_response_tokens: the longest response.
        on_too_long: what becomes of a longer prompt: error, drop, truncate.
    """

    heldout: Any = None
    anchors: str | None = None
    system: str | None = None
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    on_too_long: str | None = None


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
