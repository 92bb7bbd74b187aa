"""How long a run takes: a guess by its arithmetic at the start, then by the pace of its steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import jax

from pujax.config.settings import TrainConfig
from pujax.config.tool_settings import WorkConfig
from pujax.method.step import Recipe
from pujax.models.decoder import LanguageModel
from pujax.records import STAGES, Example
from pujax.run.data import Dataset
from pujax.run.measure import flops, forward, matmul_rate

PACED = 6  # steps whose ends tell a pace: the first one compiles

SHARE = 0.5
"""Of a matrix product's speed, what a whole run gets out of a CPU: a benchmark's steps, which have
no padding, got 0.4 to 0.75, and sampling of 16 and 32 responses 0.4 and 0.55."""


@dataclass(frozen=True)
class Forecast:
    """What a run has to do, in floating-point operations.

    `step` is the work of one step by stage and `steps` how many there are, `evaluation` that of one
    evaluation and `evaluations` how many there are in each stage and at its end, beside the base's.
    """

    step: Mapping[str, float]
    steps: Mapping[str, int]
    evaluation: float
    evaluations: Mapping[str, int]

    @property
    def whole(self) -> float:
        """The work of the run."""
        return self._work(STAGES) + self.evaluation * (1 + sum(self.evaluations.values()))

    def seconds(self, dtype: str) -> float | None:
        """How long that takes in `dtype`, without compiling, where nothing else runs.

        None but on a CPU, where arithmetic is what takes the time.
        """
        if jax.default_backend() != "cpu":
            return None
        return self.whole / (SHARE * _rate(dtype))

    def after(self, stage: str, pace: float, evaluation: float | None = None) -> float:
        """How many seconds the run takes after the last step of `stage`.

        `pace` is how many a step of that takes here, `evaluation` how many one took.
        """
        rate = self.step[stage] / pace
        later = STAGES[STAGES.index(stage) + 1 :]
        each = self.evaluation / rate if evaluation is None else evaluation
        return self._work(later) / rate + each * (1 + sum(self.evaluations[s] for s in later))

    def _work(self, stages: Sequence[str]) -> float:
        return sum(self.steps[stage] * self.step[stage] for stage in stages)


def forecast(
    config: TrainConfig,
    model: LanguageModel,
    recipe: Recipe,
    data: Dataset,
    asked: Sequence[Example],
) -> Forecast:
    """The work of both stages and all evaluations, of `asked`.

    Ours, and rough: prompts and anchors have their mean lengths, what is learnt of candidates is as
    long as anchors, and all that is drawn goes on to `data.response_size`, as the longest answer of
    a batch mostly does. A score reads every response once.
    """
    sft, align, best = config.sft, config.align, config.checkpoint.best is not None

    def of(examples: Sequence[Example], prompts: int) -> WorkConfig:
        return WorkConfig(
            prompts=prompts,
            candidates=data.candidates or config.sampling.candidates,
            prompt_tokens=_mean([len(e.prompt_ids) for e in examples], 1),
            response_tokens=_mean([len(e.anchor_ids) for e in examples], 2),
            offline=True,
        )

    def drawn(shape: WorkConfig, responses: int) -> float:
        whole = replace(shape, response_tokens=max(2, data.response_size))
        return forward(model.config, whole, responses)[1]

    one, held = of(data.examples, align.prompts), of(asked, len(asked))
    trained, rest = flops(model.config, one, recipe)
    prompts, responses = forward(model.config, one, one.candidates + 1)
    if not data.candidates:
        rest += prompts + responses + drawn(one, one.candidates)
    supervised = of(data.with_anchors.examples, sft.batch)
    steps = {"sft": sft.steps, "align": align.steps}
    return Forecast(
        step={
            "sft": 3 * sum(forward(model.config, supervised, 1)),
            "align": align.inner_epochs * trained + rest,
        },
        steps=steps,
        evaluation=sum(forward(model.config, held, 1)) + drawn(held, 1 + config.eval.samples),
        evaluations={
            stage: _measured(count, config.eval.every) + 1 + best if count else 0
            for stage, count in steps.items()
        },
    )


def _measured(steps: int, every: int) -> int:
    """How often a stage is evaluated before its last step."""
    return (steps - 1) // every if every else 0


@cache
def _rate(dtype: str) -> float:
    """Of the fastest try: what else the machine does at this moment may soon be over."""
    return matmul_rate(dtype, repeats=9, size=1024, of=min)


def _mean(lengths: Sequence[int], least: int) -> int:
    return max(least, round(sum(lengths) / max(1, len(lengths))))
