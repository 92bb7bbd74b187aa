"""What a loss makes of each response of a group, in words for whoever reads the groups."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pujax.evaluation.results import is_number
from pujax.method import labels as rules

Numbers = Sequence[float | None]

OURS = "pujax."  # a function of the same name elsewhere may be anything

RULES = {
    "pairs": ("best_vs_worst", "anchor_vs_worst", "anchor_vs_all"),
    "sides": ("best_and_worst", "anchor_and_candidates", "flags"),
}
"""What of `labels` makes a loss's pairs, and its sides, of scores alone."""


@dataclass(frozen=True)
class Regard:
    """What becomes of one response: in words, their style, how much of it, and a bar in [0, 1].

    Responses are shown by falling `preference`, which is negative where the loss lowers one; of
    what is shown by its label `above` says how far that is above what the loss takes off.
    """

    words: str
    style: str
    preference: float
    bar: float | None = None
    above: float | None = None

    @property
    def pull(self) -> float:
        """How far the loss raises the response or, negative, lowers it."""
        return self.preference if self.above is None else self.above


Rule = Callable[[Numbers, Numbers], list[Regard]]
"""A group's scores and labels, the anchor first and None where not finite, to what becomes of
each response."""

UNUSED = Regard("not used", "", 0.0)
BY_LABEL = "by falling label; the bar is the label."


def preference_of(loss: Any) -> tuple[str, Rule]:
    """How a loss's groups are ordered, in words, and what it makes of their responses.

    `loss` are its settings. A loss that isn't known here, one's own among them, is taken to learn
    from the labels.
    """
    name, parts = _name(loss), loss if isinstance(loss, Mapping) else {}
    pairs, sides = _rule("pairs", parts), _rule("sides", parts)
    gamma = parts.get("gamma", 0.1)
    if name == "spo" and pairs is not None and is_number(gamma):
        return (
            "by falling preference: the loss raises the chosen over the rejected, and orders all "
            "by their degree: those raised and those lowered at the reference; the bar is how far.",
            partial(_of_degrees, pairs, gamma),
        )
    if pairs is not None:
        return (
            "by falling preference: the loss raises the chosen over the rejected; the bar is the "
            "weight.",
            partial(_of_pairs, pairs),
        )
    if sides is not None:
        return (
            "by falling preference: the loss raises the good and lowers the bad, each by itself; "
            "the bar is the weight.",
            partial(_of_sides, sides),
        )
    if name in ("distill", "e_dpo"):
        return (
            "by falling score: the loss draws the candidates as far apart as their scores, raised "
            "above their mean and lowered below it; the bar is how far.",
            _of_scores,
        )
    if name == "grpo" and _name(parts.get("advantage")) in ("", "mean_std", "mean"):
        return (
            "by falling score: the loss raises the candidates above their mean and lowers those "
            "below it; the bar is how far.",
            _of_scores,
        )
    if name == "nnpu":
        return (
            "the anchor first, the positive; the candidates are unlabeled: this loss looks at no "
            "score.",
            _of_the_unlabeled,
        )
    if name == "raft":
        return "the best first: the loss imitates it, and nothing else.", _of_the_best
    if name == "sft":
        return "the anchor first: the loss imitates it, and nothing else.", _of_the_anchor
    if name == "beside_anchor":
        told, rule = preference_of(parts.get("loss"))
        told = f"the anchor first, which is imitated, and then {told}"
        return told, partial(_beside_anchor, rule)
    if name == "weighted_sft":
        return BY_LABEL, _of_labels
    return BY_LABEL, partial(_of_shares, name == "grpo")


def shown(value: float | None) -> str:
    """A score or a label as the cards show it."""
    return "not finite" if value is None else f"{value:.2f}"


def _name(node: Any) -> str:
    """What pujax calls the function that settings name; nothing for anybody else's."""
    target = str(node.get("_target_", "")) if isinstance(node, Mapping) else ""
    return target.rpartition(".")[2] if target.startswith(OURS) else ""


def _rule(key: str, parts: Mapping[str, Any]) -> Any:
    """The function of pujax that makes a loss's pairs or sides, by these settings of the loss."""
    name = _name(parts.get(key))
    return getattr(rules, name, None) if name in RULES[key] else None


def _of_labels(scores: Numbers, labels: Numbers) -> list[Regard]:
    return [Regard(f"label {shown(label)}", "", label or 0.0, label) for label in labels]


def _of_shares(without_anchor: bool, scores: Numbers, labels: Numbers) -> list[Regard]:
    """By the labels: above the mean of those that take part the loss raises, at the reference.

    The anchor takes part where it has a label and is not left out.
    """
    found = [replace(each, above=0.0) for each in _of_labels(scores, labels)]
    known = [at for at, score in enumerate(scores) if score is not None and labels[at] is not None]
    if known[:1] == [0] and (without_anchor or not labels[0]):
        del known[0]
    mean = sum(found[at].preference for at in known) / max(len(known), 1)
    for at in known:
        above = found[at].preference - mean
        # A label is kept with six digits.
        found[at] = replace(found[at], above=above if abs(above) > 1e-5 else 0.0)
    return found


def _of_pairs(pairs: Any, scores: Numbers, labels: Numbers) -> list[Regard]:
    """How much of the pairs' weight has each response as its chosen, and as its rejected one."""
    weights = np.nan_to_num(np.asarray(pairs(_row(scores))[0]))
    return [
        _weighed(float(chosen), float(rejected), "chosen", "rejected")
        for chosen, rejected in zip(weights.sum(axis=1), weights.sum(axis=0), strict=True)
    ]


def _of_sides(sides: Any, scores: Numbers, labels: Numbers) -> list[Regard]:
    values = np.nan_to_num(np.asarray(sides(_row(scores))[0]))
    return [_weighed(float(max(v, 0)), float(max(-v, 0)), "good", "bad") for v in values]


def _of_the_best(scores: Numbers, labels: Numbers) -> list[Regard]:
    weights = np.nan_to_num(np.asarray(rules.best(_row(scores))[0]))
    return [_weighed(float(weight), 0.0, "imitated", "") for weight in weights]


def _of_the_anchor(scores: Numbers, labels: Numbers) -> list[Regard]:
    return [UNUSED if at else Regard("imitated", "gain", 1.0) for at in range(len(scores))]


def _of_the_unlabeled(scores: Numbers, labels: Numbers) -> list[Regard]:
    return [Regard("positive", "gain", 1.0), *[Regard("unlabeled", "", -1.0)] * (len(scores) - 1)]


def _beside_anchor(rule: Rule, scores: Numbers, labels: Numbers) -> list[Regard]:
    anchor, *candidates = rule(scores, labels)
    far = math.inf
    anchor = replace(anchor, words="imitated", style="gain", preference=far, above=None)
    return [anchor, *candidates]


def _of_scores(scores: Numbers, labels: Numbers) -> list[Regard]:
    """Each candidate by how far it is above the candidates' mean; the anchor takes no part."""
    known = [score for score in scores[1:] if score is not None]
    above = [0.0 if score is None else score - sum(known) / len(known) for score in scores[1:]]
    # float32's noise, as labels.standardize has it.
    return _raised(above, near=1e-6 * max(map(abs, known), default=0.0))


def _of_degrees(pairs: Any, gamma: float, scores: Numbers, labels: Numbers) -> list[Regard]:
    """What `pair_losses.spo` pulls each candidate by where all implied rewards are 0."""
    weights = np.nan_to_num(np.asarray(pairs(_row(scores))[0]))
    pull = (weights.sum(axis=1) - weights.sum(axis=0))[1:] / 2
    known = [(at, score) for at, score in enumerate(scores[1:]) if score is not None]
    ordered = [(at, s) for at, s in known if any(other < s for _, other in known)]
    for at, degree in ordered:
        no_better = [other for other, score in known if score <= degree]
        pull[at] += gamma / len(ordered)
        pull[no_better] -= gamma / len(ordered) / len(no_better)
    return _raised(pull.tolist(), near=1e-6)


def _raised(pulls: Sequence[float], near: float) -> list[Regard]:
    """The candidates by what raises or lowers them, no more than `near` being nothing."""
    most = max(map(abs, pulls), default=0.0)
    found = [UNUSED]
    for far in pulls:
        words, style = ("raised", "gain") if far > 0 else ("lowered", "loss")
        if most <= near or abs(far) <= near:
            words, style = "neither", ""
        found.append(Regard(words, style, far, far / most if far > near else None))
    return found


def _row(scores: Numbers) -> Array:
    return jnp.array([[jnp.nan if score is None else score for score in scores]], jnp.float32)


def _weighed(raised: float, lowered: float, name: str, other: str) -> Regard:
    """A response by its weight on either side of a loss that takes sides."""
    if raised == lowered:
        return UNUSED
    word, weight, style = (name, raised, "gain") if raised > lowered else (other, lowered, "loss")
    words = word if weight == 1 else f"{word} {weight:.2f}"
    return Regard(words, style, raised - lowered, raised or None)
