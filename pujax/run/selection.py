"""Which state of a stage is handed on, and when a stage ends early: by a held-out metric.

Where `checkpoint.best` names a metric, the held-out prompts decide what the model is: they are a
*validation* set, and what the run's table says of them is too good. A claim needs other prompts,
that decided nothing (`pujax evaluate` on another run's, or a suite).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan

from pujax.config.settings import TrainConfig
from pujax.errors import one_of, require
from pujax.evaluation.metrics import Metric, is_of_samples

Values = Mapping[int, float | None]
"""A metric by the steps of a stage at which it was measured, 0 for what the stage began with."""


@dataclass(frozen=True)
class Criterion:
    """A held-out metric that chooses among a stage's states; `patience` may end the stage.

    All that it says is a function of the values in `metrics.jsonl`, so that a run which was killed
    chooses as one that was not.
    """

    metric: str
    higher: bool
    patience: int | None = None

    def best(self, values: Values) -> int:
        """The step with the best value, the first of several; NaN is none.

        >>> Criterion("exact", higher=True).best({0: 0.25, 10: 0.5, 20: 0.5, 30: None})
        10
        >>> Criterion("perplexity", higher=False).best({0: None, 10: 9.0, 20: 8.0})
        20
        """
        known = {
            step: value
            for step, value in sorted(values.items())
            if value is not None and not isnan(value)
        }
        if not known:
            return 0
        choose = max if self.higher else min  # each takes the first of several
        return choose(known, key=lambda step: known[step])

    def spent(self, values: Values) -> bool:
        """Whether the last `patience` measurements all brought no gain.

        >>> patient = Criterion("exact", higher=True, patience=2)
        >>> patient.spent({0: 0.25, 10: 0.5, 20: 0.5}), patient.spent({0: 0.5, 10: 0.4, 20: 0.5})
        (False, True)
        """
        best = self.best(values)
        return self.patience is not None and sum(step > best for step in values) >= self.patience


def criterion_of(config: TrainConfig, metrics: Mapping[str, Metric]) -> Criterion | None:
    """What `checkpoint.best` and `eval.patience` say; None where the last state is handed on.

    Raises `ConfigError` for a metric that is not measured or has no better end.
    """
    name = config.checkpoint.best
    if name is None:
        return None
    one_of("checkpoint.best", name, [key for key, one in metrics.items() if one.shown.better])
    drawn = config.eval.samples > 0 or not is_of_samples(metrics[name])
    require(drawn, "checkpoint.best", name, "is of sampled answers: set eval.samples too")
    return Criterion(name, metrics[name].shown.better == "higher", config.eval.patience)
