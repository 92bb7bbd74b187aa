"""How well scores rank a prompt's candidates, held against an oracle."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pujax.evaluation.statistics import FEW
from pujax.text import counted

SLIGHT = 0.05
"""Of all pairs, by how many more a score must put into the oracle's order than its control does.

Over `FEW` groups of four the difference has a standard error of about as much, and less where both
rank alike; what ranks by the anchor gets several times that.
"""

SHUFFLED = ", shuffled anchor"
"""What follows the name of a scorer that sees another prompt's anchor."""

FAILING = 0.1
"""The share of a run's responses from which on a reward's failures are said at its end."""


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
        pairs=pair_accuracy(s, r) if spread else None,
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


def pair_accuracy(scores: np.ndarray, oracle: np.ndarray) -> float:
    """The share of the pairs that `oracle` orders in which `scores` do so too; a tie is half.

    Some two of `oracle` must differ.
    """
    better = np.sign(oracle[:, None] - oracle[None, :])
    agree = better * np.sign(scores[:, None] - scores[None, :])
    return float(np.mean((agree[better > 0] + 1) / 2))


@dataclass(frozen=True)
class Control:
    """How well a run's score ranked its candidates, beside the same score of other anchors.

    `pairs` is the pair accuracy with the prompt's own anchor in view, `shuffled` with another
    prompt's: means over `groups` whose candidates the oracle tells apart.
    """

    groups: int = 0
    pairs: float = 0.0
    shuffled: float = 0.0

    def and_of(self, line: Mapping[str, Any]) -> "Control":
        """This with the groups of a step's line, where it has looked at any (`metrics`)."""
        names = ("groups", "pairs", "pairs_shuffled")
        more, pairs, shuffled = (line.get(f"signal/{name}") for name in names)
        if more is None or more <= 0 or pairs is None or shuffled is None:
            return self
        whole = self.groups + more

        def mean(before: float, now: float) -> float:
            return (self.groups * before + more * now) / whole

        return Control(int(whole), mean(self.pairs, pairs), mean(self.shuffled, shuffled))

    @property
    def metrics(self) -> dict[str, float]:
        """What a step logs of its own groups."""
        found = {"signal/pairs": self.pairs, "signal/pairs_shuffled": self.shuffled}
        return {"signal/groups": self.groups} | (found if self.groups else {})

    @property
    def warning(self) -> str | None:
        """That the score is no better than its control, once there are groups enough to say so."""
        if self.groups < FEW or self.pairs - self.shuffled >= SLIGHT:
            return None
        return (
            f"the score ranks candidates no better than its control: {self.pairs:.2f} of the pairs "
            f"in {self.groups} groups are in the order of the true answers (or of likeness to the "
            f"anchor), and {self.shuffled:.2f} with another prompt's anchor in view: what it "
            "teaches does not come from the anchor: take another scorer (suite=signal compares "
            "them)"
        )


UNKNOWN = Control()
"""That of a run which has not looked."""


def control_of(lines: Iterable[Mapping[str, Any]]) -> Control:
    """The control of a run, by the lines of its `metrics.jsonl`."""
    found = UNKNOWN
    for line in lines:
        found = found.and_of(line)
    return found


def failing(shares: Sequence[float]) -> str | None:
    """That a run's reward has failed on many responses, by each step's share (`score/failed`)."""
    if not len(shares) or (share := float(np.mean(shares))) < FAILING:
        return None
    steps = counted(len(shares), "alignment step")
    return (
        f"the reward failed on {share:.0%} of the responses of {steps}, which so got the worst "
        "score of their group, or none: the output names one a step with its error: mend the "
        "function"
    )
