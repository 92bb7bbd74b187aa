"""What goes wrong while a run trains: metrics that tell, and a line with a remedy for each, once.

The thresholds are ours. They are where a person should look, not where a run is lost.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev

import numpy as np

from pujax.evaluation.signal import Control
from pujax.files.durable import Line
from pujax.types import Group

WINDOW = 20  # steps that are looked at together: a step alone is noise
FEWEST = 8  # and all of a shorter stage, if it has so many

CORRELATED = 0.5  # |r| of scores with lengths, by SURE standard errors of its mean over steps too
ONE_HOT, FLAT = 0.05, 0.95  # the labels' entropy as a share of log K; τ = 0.5 gives about 0.6
FALLEN = 1 / 3  # by which a summed log-prob has sunk, and by SURE standard errors at least
SURE = 4.0
CUT_OFF = 0.3  # the share of responses that reach T tokens
FAR = 0.5  # nats a token from the reference
WORSE = 0.02  # nats a token that SFT may lose on held-out anchors before it is said

LASTING = 10  # steps in a row that are astray before a stage is given up
ABOVE = 2.0  # times what a loss is at first or at its best, by which it is astray
GONE = 5.0  # nats a token from the reference: each token is e^5 times as likely as it was, or less


def group_notes(group: Group) -> dict[str, float]:
    """Metrics of a step's groups, on the host.

    `score/length_correlation` is Pearson's r of the candidates' scores with their lengths in
    tokens, each less its mean within its group; 0 where either is all equal. `label/entropy_share`
    is the mean entropy of the labels over the candidates, as a share of log K: 1 where they are
    uniform.
    """
    scores = np.asarray(group.scores, np.float64)[:, 1:]
    lengths = np.asarray(group.mask).sum(axis=-1)[:, 1:].astype(np.float64)
    there = scores != -np.inf  # a group with fewer candidates than others
    count = np.maximum(there.sum(axis=1, keepdims=True), 1)
    scores, lengths = (np.where(there, x, 0) for x in (scores, lengths))
    scores, lengths = (
        np.where(there, x - x.sum(axis=1, keepdims=True) / count, 0) for x in (scores, lengths)
    )
    spread = math.sqrt((scores**2).sum() * (lengths**2).sum())
    labels = np.asarray(group.labels, np.float64)[:, 1:]
    shares = labels / np.maximum(labels.sum(axis=1, keepdims=True), 1e-30)
    entropy = -(shares * np.log(np.maximum(shares, 1e-30))).sum(axis=1)
    return {
        "score/length_correlation": float((scores * lengths).sum() / spread) if spread else 0.0,
        "label/entropy_share": float(entropy.mean() / math.log(max(labels.shape[1], 2))),
    }


class Course:
    """How far a stage has come without going astray; takes its lines in their order.

    A step is astray whose loss exceeds the best so far by `ABOVE` times what it was at first or at
    its best, whichever is more, and at least that many nats; the best is the lowest mean of
    `LASTING` steps in a row. Where a line has the distance to the reference, that decides in the
    loss's place, from `GONE` on: a policy gradient's loss measures nothing, and says nothing where
    there is no reference either. A loss that isn't finite is skipped by the update, and here too.
    """

    def __init__(self) -> None:
        self.good, self.astray, self.why = 0, 0, ""
        self._first = self._best = math.nan
        self._recent: deque[float] = deque(maxlen=LASTING)

    def take(self, line: Line) -> None:
        """Take in one more step."""
        loss = line.get("loss")
        if loss is None:
            return
        if math.isnan(self._first):
            self._first = self._best = loss
        if name := next((name for name in ("kl/ref", "log_ratio/ref") if name in line), None):
            distance = math.inf if line[name] is None else line[name]
            lost = abs(distance) >= GONE
            self.why = f"the policy is {distance:.3g} nats a token from its reference"
        elif "policy/clip_fraction" in line or loss < 0:
            lost = False
        else:
            lost = loss - self._best > ABOVE * max(1.0, abs(self._first), abs(self._best))
            self.why = f"the loss is {loss:.3g}, and was {self._best:.3g} at best"
        if lost:
            self.astray += 1
            return
        self.good, self.astray = line["step"], 0
        self._recent.append(loss)
        if len(self._recent) == LASTING:
            self._best = min(self._best, fmean(self._recent))

    def diverged(self, steps: int) -> bool:
        """Whether a stage of so many steps is lost: all but the first are, where it is short."""
        return self.astray >= max(1, min(LASTING, steps - 1))


class Symptoms:
    """Sees every line of `metrics.jsonl` in its order; `of` returns what there is to say of one.

    Each symptom is told of once. A resumed run shows the lines that it had to a new one first, and
    so doesn't say again what was said. `steps` is how many alignment has.
    """

    def __init__(self, steps: int = WINDOW) -> None:
        self._window = max(FEWEST, min(WINDOW, steps))
        self._told: set[str] = set()
        self._first: dict[str, list[Line]] = {}
        self._last: dict[str, deque[Line]] = {}
        self._anchors: list[tuple[str, float]] = []
        self._courses: dict[str, Course] = {}
        self.control = Control()
        self.failed: list[float] = []  # the share of responses that a reward failed on, by step

    def of(self, line: Line) -> list[str]:
        """The warnings that this line brings, each a sentence with its remedy."""
        if line["stage"] == "eval":
            return self._once({"memorised": self._memorised(line)})
        self.course(line["stage"]).take(line)
        first = self._first.setdefault(line["stage"], [])
        last = self._last.setdefault(line["stage"], deque(maxlen=self._window))
        if len(first) < WINDOW:
            first.append(line)
        last.append(line)
        self.control = self.control.and_of(line)
        if (failed := line.get("score/failed")) is not None:
            self.failed.append(failed)
        found = {"control": self.control.warning}
        if line["stage"] == "align" and len(last) == self._window:
            found |= {name: rule(first, last) for name, rule in RULES.items()}
        where = f"align step {line['step']}: "
        return self._once({name: said and where + said for name, said in found.items()})

    def course(self, stage: str) -> Course:
        """How the stage goes, by the lines that were seen of it."""
        return self._courses.setdefault(stage, Course())

    def _once(self, found: Mapping[str, str | None]) -> list[str]:
        fresh = {name: said for name, said in found.items() if said and name not in self._told}
        self._told |= fresh.keys()
        return list(fresh.values())

    def _memorised(self, line: Line) -> str | None:
        """SFT makes the log-prob of held-out anchors worse than it was, base included."""
        value = line.get("eval/anchor_logp")
        if line["model"] not in ("base", "sft") or value is None:
            return None
        place = "before it" if line["model"] == "base" else f"at step {line['step']}"
        best = max(self._anchors, key=lambda one: one[1], default=(place, value))
        self._anchors.append((place, value))
        if value >= best[1] - WORSE:
            return None
        return (
            f"sft step {line['step']}: held-out anchor log-prob {value:.3f}, and it was "
            f"{best[1]:.3f} {best[0]}: SFT has gone too far: checkpoint.best=anchor_logp keeps the "
            "best (with eval.every), or lower sft.steps or sft.lr"
        )


def _values(lines: Sequence[Line] | deque[Line], metric: str) -> list[float]:
    """A metric of all these lines; empty where one lacks it."""
    values = [line.get(metric) for line in lines]
    return [value for value in values if value is not None] if None not in values else []


def _by_length(first: Sequence[Line], last: deque[Line]) -> str | None:
    values = _values(last, "score/length_correlation")
    if not values:
        return None
    error = stdev(values) / math.sqrt(len(values))
    if abs(fmean(values)) < max(CORRELATED, SURE * error):
        return None
    way = "longer" if fmean(values) > 0 else "shorter"
    scored = "score/mean" in last[-1]  # by the run itself, and not by whoever gave the responses
    what = "scores" if scored else "ratings"
    remedy = "another scorer" if scored else "loss=simpo or another by mean log-probs"
    return (
        f"{what} go with length (correlation {fmean(values):.2f} over {len(values)} steps): "
        f"the student is taught to write {way} answers: read samples.jsonl, or take {remedy}"
    )


def _labels(first: Sequence[Line], last: deque[Line]) -> str | None:
    values = _values(last, "label/entropy_share")
    if values and fmean(values) < ONE_HOT:
        return (
            f"labels put all on one candidate (entropy {fmean(values):.3f} of log K): raise "
            "labels.tau"
        )
    if values and fmean(values) > FLAT:
        return (
            f"labels are nearly uniform (entropy {fmean(values):.3f} of log K): the scores hardly "
            "tell candidates apart: raise sampling.temperature, lower labels.tau, or take another "
            "scorer"
        )
    return None


def _sinking(first: Sequence[Line], last: deque[Line]) -> str | None:
    before, now = _values(first, "logps/chosen"), _values(last, "logps/chosen")
    if not before or len(now) < WINDOW:  # the prompts of a few steps differ by more
        return None
    error = math.hypot(stdev(before), stdev(now)) / math.sqrt(WINDOW)
    if fmean(before) - fmean(now) < max(FALLEN * abs(fmean(before)), SURE * error):
        return None
    return (
        f"the log-prob of chosen responses sinks ({fmean(before):.1f} at first, {fmean(now):.1f} "
        "now): lower align.lr, or give the loss a weight on it (loss.nll_weight of dpo)"
    )


def _cut_off(first: Sequence[Line], last: deque[Line]) -> str | None:
    values = _values(last, "samples/finished")
    if not values or 1 - fmean(values) < CUT_OFF:
        return None
    return (
        f"{1 - fmean(values):.0%} of the responses are cut off: raise data.max_response_tokens, or "
        "set loss.mask_unfinished=true (grpo, ldl_grpo)"
    )


def _far(first: Sequence[Line], last: deque[Line]) -> str | None:
    values = _values(last, "kl/ref")
    if not values or fmean(values) < FAR:
        return None
    return (
        f"the policy runs away from its reference (KL {fmean(values):.2f} nats a token): lower "
        "align.lr, or raise loss.kl_coef or loss.beta"
    )


RULES: Mapping[str, Callable[[Sequence[Line], deque[Line]], str | None]] = {
    "length": _by_length,
    "labels": _labels,
    "sinking": _sinking,
    "cut off": _cut_off,
    "far": _far,
}
"""What is looked for in the first and the last lines of alignment."""
