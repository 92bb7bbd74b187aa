"""What sets two evaluations apart, and how surely."""

from dataclasses import dataclass

import numpy as np

from pujax.evaluation.metrics import METRICS, Evaluation

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """A mean difference over `prompts` prompts, with its 95 % interval."""

    mean: float
    low: float
    high: float
    prompts: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def compare(first: Evaluation, second: Evaluation, *, seed: int = 0) -> dict[str, Difference]:
    """How far `second` is above `first` in each metric, prompt by prompt.

    The interval is a percentile bootstrap over prompts (Efron and Tibshirani, 1993, ch. 13), 10,000
    resamples of the paired differences: it says how much other prompts would change the difference,
    not how much another training seed would. Raises ValueError unless both answered the same
    prompts.
    """
    if [row.id for row in first.rows] != [row.id for row in second.rows]:
        raise ValueError(
            f"{first.model} and {second.model} were evaluated on different prompts "
            f"({len(first.rows)} and {len(second.rows)}): evaluate both again"
        )
    differences = {}
    for metric in METRICS:
        pairs = np.subtract(second.values(metric), first.values(metric))
        if len(pairs):
            low, high = np.percentile(_resampled_means(pairs, seed), [2.5, 97.5])
            differences[metric] = Difference(
                float(pairs.mean()), float(low), float(high), len(pairs)
            )
    return differences


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    # A hundred resamples at once: memory stays small however many prompts there are.
    means = [
        values[rng.integers(len(values), size=(100, len(values)))].mean(axis=1)
        for _ in range(RESAMPLES // 100)
    ]
    return np.concatenate(means)
