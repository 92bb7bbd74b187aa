"""Which of two models a judge prefers, each pair shown in both orders."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

RESAMPLES = 1_000  # of the fit of lengths, each of which takes a millisecond

PerPrompt = Float[np.ndarray, " n"]

RIDGE = 1e-4  # on the slope alone: without it one that separates the wins has no finite fit


@dataclass(frozen=True)
class WinRate:
    """`rate` and `controlled` are shares in [0, 1]; `bias` is the judge's lean to the first place.

    `wins` has the rate of each prompt, for an interval, and `preferred` whether A is ahead there
    once the lean is taken out: 1, 0, or a half where it can't be told.
    """

    rate: float
    controlled: float
    bias: float
    wins: PerPrompt
    preferred: PerPrompt


def win_rate(
    first_when_a_first: PerPrompt,
    first_when_b_first: PerPrompt,
    lengths_a: PerPrompt,
    lengths_b: PerPrompt,
) -> WinRate:
    """How often A wins against B, from how surely the judge took the answer shown first.

    Each entry is in [0, 1], a half for a tie. Averaging both orders cancels a lean to a place
    (Zheng et al., 2023): a judge that always takes the first gives one half, and `bias` one half.
    A judge that leans more than it tells answers apart has a rate near one half for all that it
    sees: then `preferred` says it, by whether the first place is taken more surely with A in it.
    """
    wins = wins_of(first_when_a_first, first_when_b_first)
    bias = (first_when_a_first + first_when_b_first).mean() / 2 - 0.5
    controlled = length_controlled(wins, lengths_a, lengths_b)
    preferred = preferred_of(first_when_a_first, first_when_b_first)
    return WinRate(float(wins.mean()), controlled, float(bias), wins, preferred)


def wins_of(first_when_a_first: PerPrompt, first_when_b_first: PerPrompt) -> PerPrompt:
    """How surely the judge took A, the mean of both orders."""
    return (first_when_a_first + 1 - first_when_b_first) / 2


def preferred_of(first_when_a_first: PerPrompt, first_when_b_first: PerPrompt) -> PerPrompt:
    """1 where the first place is taken more surely with A in it, 0 with B, a half where alike."""
    return (1 + np.sign(first_when_a_first - first_when_b_first)) / 2


def length_controlled(wins: PerPrompt, lengths_a: PerPrompt, lengths_b: PerPrompt) -> float:
    """The win rate that a logistic fit expects of answers of equal length.

    logit P(win) = θ + φ tanh(Δ), Δ the difference in length in standard deviations, read off at 0
    (Dubois et al., 2024, without their terms for prompts and models). The fit is Newton's.
    """
    difference = np.asarray(lengths_a - lengths_b, dtype=float)
    spread = difference.std()
    if spread == 0 or not 0 < wins.mean() < 1:
        return float(wins.mean())
    x = np.stack([np.ones_like(difference), np.tanh(difference / spread)], axis=1)
    penalty = np.diag([RIDGE / 100, RIDGE]) * len(wins)
    weights = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ weights))
        slope = x.T @ (wins - p) - penalty @ weights
        curve = (x * (p * (1 - p))[:, None]).T @ x + penalty
        step = np.linalg.solve(curve, slope)
        weights += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def controlled_interval(
    wins: PerPrompt, lengths_a: PerPrompt, lengths_b: PerPrompt, *, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of `length_controlled` over prompts."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(wins), size=(RESAMPLES, len(wins)))
    rates = [length_controlled(wins[i], lengths_a[i], lengths_b[i]) for i in picks]
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)
