"""How well scores rank a prompt's candidates, held against an oracle."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Signal:
    """What one group's scores and labels say of the oracle's order.

    `tau` is Kendall's τ-b; `top` the oracle's regard for the best-scored candidate, 1 where that is
    the best and 0 where it isn't, ties shared; `pairs` the share of pairs in the oracle's order, a
    tied score half; `entropy` that of the labels, in nats; `near` the labels' mass on candidates
    within `margin` of the oracle's best. None where it is not defined: all but the last two for a
    group whose candidates are equally good.
    """

    tau: float | None
    top: float | None
    pairs: float | None
    entropy: float
    near: float


def signal_of(
    scores: Sequence[float],
    oracle: Sequence[float],
    labels: Sequence[float],
    *,
    margin: float = 0.0,
) -> Signal:
    """The signal of one group: a score, the oracle's value and a label for each candidate."""
    s, r, q = (np.asarray(values, dtype=float) for values in (scores, oracle, labels))
    spread = np.ptp(r) > 0
    return Signal(
        tau=kendall(s, r),
        top=_top(s, r) if spread else None,
        pairs=_pairs(s, r) if spread else None,
        entropy=float(-np.sum(q[q > 0] * np.log(q[q > 0]))),
        near=float(q[r >= r.max() - margin].sum()),
    )


def kendall(
    scores: Sequence[float] | np.ndarray, oracle: Sequence[float] | np.ndarray
) -> float | None:
    """Kendall's τ-b (Kendall, 1945), ties in either corrected for; None where all are tied in one.

    A score that ties all candidates ranks nothing, though the oracle ranks them: that is 0.
    """
    from scipy.stats import kendalltau  # takes a moment to load

    s, r = np.asarray(scores, dtype=float), np.asarray(oracle, dtype=float)
    if np.ptp(r) == 0:
        return None
    if np.ptp(s) == 0:
        return 0.0
    tau, _ = np.asarray(kendalltau(s, r, variant="b"))
    return float(tau)


def _top(scores: np.ndarray, oracle: np.ndarray) -> float:
    return float(np.mean(oracle[scores == scores.max()] == oracle.max()))


def _pairs(scores: np.ndarray, oracle: np.ndarray) -> float:
    better = np.sign(oracle[:, None] - oracle[None, :])
    agree = better * np.sign(scores[:, None] - scores[None, :])
    return float(np.mean((agree[better > 0] + 1) / 2))
