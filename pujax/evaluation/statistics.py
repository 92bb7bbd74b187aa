"""What sets two evaluations apart, and how surely."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from pujax.errors import EvaluationError
from pujax.evaluation.results import Evaluation, Row

RESAMPLES = 10_000

KEPT = 1000  # prompts up to which the draws of all resamples are kept, at most 80 MB in all

FEW = 30  # prompts below which no difference is called clear: the bootstrap is too narrow there


def few(prompts: int) -> str:
    """The sentence on an interval over fewer than `FEW` prompts; nothing for more, or for none."""
    return f" Under {FEW} prompts an interval is too narrow." if 0 < prompts < FEW else ""


@dataclass(frozen=True)
class Difference:
    """A mean difference over `prompts` prompts, with its 95 % interval."""

    mean: float
    low: float
    high: float
    prompts: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0, and rests on no few prompts."""
        return (self.low > 0 or self.high < 0) and self.prompts >= FEW


def compare(first: Evaluation, second: Evaluation, *, seed: int = 0) -> dict[str, Difference]:
    """How far `second` is above `first` in each metric that both have, prompt by prompt.

    The interval is a percentile bootstrap over prompts (Efron and Tibshirani, 1993, ch. 13), 10,000
    resamples of the paired differences: it says how much other prompts would change the difference,
    not how much another training seed would. Raises `EvaluationError` unless both answered the same
    prompts.
    """
    same_prompts(first, second)
    differences = {}
    for metric in first.shown:
        pairs = _paired(first, second, metric)
        if len(pairs):
            means = _resampled_means(pairs, seed)
            differences[metric] = _difference(pairs.mean(), means, len(pairs))
    return differences


def compare_runs(
    first: Sequence[Evaluation],
    second: Sequence[Evaluation],
    *,
    matched: bool = False,
    seed: int = 0,
) -> dict[str, Difference]:
    """How far the runs of one arm, `second`, are above those of another, in each metric.

    The runs of an arm differ in their seed alone. Each resample draws runs of either arm and, for
    all of them together, prompts (the bootstrap of crossed factors: Owen, 2007), so the interval
    says how much other seeds *and* other prompts would change the difference. `matched` runs stand
    in pairs, as a model and what was made of it do: then pairs are drawn, and how far the pairs lie
    apart widens nothing. Raises `EvaluationError` unless all answered the same prompts.
    """
    for other in (*first, *second):
        same_prompts(first[0], other)
    differences = {}
    for metric in first[0].shown:
        arms = [np.array([_column(run, metric) for run in runs]) for runs in (first, second)]
        known = ~np.isnan(np.concatenate(arms)).any(axis=0)
        if known.any():
            one, other = (arm[:, known] for arm in arms)
            if matched:
                means = _crossed_means(other - one, seed, 0)
            else:
                means = _crossed_means(other, seed, 1) - _crossed_means(one, seed, 0)
            mean = other.mean() - one.mean()
            differences[metric] = _difference(mean, means, int(known.sum()))
    return differences


def interval_of_mean(values: Sequence[float], *, seed: int = 0) -> Difference:
    """The mean of one number a prompt, with its interval.

    The bootstrap is bias-corrected and accelerated (BCa: Efron, 1987) where that is defined, and
    takes percentiles where it isn't: for equal values, and for fewer than three.
    """
    from scipy.stats import bootstrap  # takes a moment to load

    array = np.asarray(values, dtype=float)
    means = _resampled_means(array, seed)
    found = _difference(array.mean(), means, len(array))
    if len(array) < 3 or np.ptp(array) == 0:
        return found
    # Where it isn't defined, as for values equal but for rounding, scipy warns and gives NaN.
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        limits = bootstrap(
            (array,), np.mean, n_resamples=RESAMPLES, batch=100, method="BCa", rng=seed
        ).confidence_interval
    if np.isnan([limits.low, limits.high]).any():
        return found
    return Difference(found.mean, float(limits.low), float(limits.high), len(array))


def interval_over_runs(values: ArrayLike, *, seed: int = 0) -> Difference:
    """The mean of one number a run and prompt [R N], with the interval over both at once.

    The bootstrap is that of `compare_runs`.
    """
    array = np.asarray(values, dtype=float)
    return _difference(array.mean(), _crossed_means(array, seed, 0), array.shape[1])


def same_prompts(first: Evaluation, second: Evaluation, *, of: tuple[object, ...] = ()) -> None:
    """Raise `EvaluationError` unless row by row prompt, truth and the teacher's words are equal.

    `of` are the runs' directories, where models of one name may be of several.
    """
    if differing := differing_prompts(first.rows, second.rows):
        one, other, remedy = first.model, second.model, "evaluate both on the same"
        if of:
            one, other = f"{one} of {of[0]}", f"{other} of {of[1]}"
            remedy += f": pujax evaluate 'run=[{of[0]},{of[1]}]' data.heldout=FILE out=FOLDER"
        raise EvaluationError(
            f"{one} and {other} were evaluated on different prompts ({differing}): {remedy}"
        )


def differing_prompts(first: Sequence[Row], second: Sequence[Row]) -> str | None:
    """Where the prompts of two evaluations differ, the truth or the teacher's words; or None."""

    def asked(row: Row) -> tuple[str | None, ...]:
        return row.id, row.kind, row.prompt, row.answer, row.anchor

    if len(first) != len(second):
        return f"{len(first)} and {len(second)}"
    different = [a.id for a, b in zip(first, second, strict=True) if asked(a) != asked(b)]
    return f"the first is {different[0]}" if different else None


def _paired(first: Evaluation, second: Evaluation, metric: str) -> np.ndarray:
    """The differences on the prompts where both have the metric."""
    one, other = _column(first, metric), _column(second, metric)
    known = ~(np.isnan(one) | np.isnan(other))
    with np.errstate(invalid="ignore"):  # of two infinities, which is told as NaN
        return other[known] - one[known]


def _column(evaluation: Evaluation, metric: str) -> np.ndarray:
    """The metric on every prompt, NaN where it has none."""
    return np.array([row.values.get(metric) for row in evaluation.rows], dtype=float)


def _difference(mean: float, means: np.ndarray, prompts: int) -> Difference:
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(mean), float(low), float(high), prompts)


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    # A hundred resamples at once: memory stays small however many prompts there are.
    means = [
        values[rng.integers(len(values), size=(100, len(values)))].mean(axis=1)
        for _ in range(RESAMPLES // 100)
    ]
    return np.concatenate(means)


def _crossed_means(values: np.ndarray, seed: int, arm: int) -> np.ndarray:
    """Means of `values` [runs, prompts], both drawn again; all arms of a seed draw one prompts."""
    runs, prompts = values.shape
    of_runs = np.random.default_rng([seed, arm])
    means = []
    for counts in (_kept_draws if prompts <= KEPT else _draws)(prompts, seed):
        shares = of_runs.multinomial(runs, np.full(runs, 1 / runs), size=len(counts)) / runs
        means.append((shares @ values * counts).sum(axis=1) / prompts)
    return np.concatenate(means)


def _draws(prompts: int, seed: int) -> Iterator[np.ndarray]:
    """How often each prompt is drawn in each resample, a hundred of these at a time."""
    rng = np.random.default_rng([seed, 2])
    for _ in range(RESAMPLES // 100):
        counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=100)
        yield counts.astype(np.min_scalar_type(prompts))


@lru_cache(maxsize=4)
def _kept_draws(prompts: int, seed: int) -> tuple[np.ndarray, ...]:
    """Those of few prompts, kept: a table asks for them hundreds of times, and drawing is slow."""
    return tuple(_draws(prompts, seed))
