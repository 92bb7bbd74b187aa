"""Metrics: what each held-out prompt's reading by a model says of it, one function a metric.

A metric is a function of a `Reading` to a number, or None where the prompt has none, and a YAML in
`conf/eval/` that names it and says how it is shown.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb, exp, inf, isnan, nan
from typing import Any

from pujax.errors import ConfigError, PujaxError, in_code, name_of, raised_in, require
from pujax.evaluation import text
from pujax.records import Example, Prompt


@dataclass(frozen=True)
class Reading:
    """What one model made of one held-out prompt.

    `response` is the greedy answer, `length` tokens long with its EOS; `anchor_logp` is the mean
    log-prob of the anchor's tokens in nats; `samples` are answers drawn at a temperature; `rated`
    are the responses that someone rated, each by its score and its log-prob in nats, summed.
    """

    prompt: Prompt
    anchor: str
    response: str
    anchor_logp: float
    length: float
    finished: float
    samples: tuple[str, ...] = ()
    rated: tuple[tuple[float, float], ...] = ()


def of_text(prompt: Prompt, anchor: str, response: str) -> Reading:
    """A text as a reading, for metrics of texts: its log-prob and length are nobody's to know."""
    return Reading(prompt, anchor, response, anchor_logp=0.0, length=0.0, finished=0.0)


MetricFn = Callable[[Reading], float | None]


@dataclass(frozen=True)
class Shown:
    """How tables show a metric.

    Attributes:
        title: what it is called.
        digits: after the decimal point.
        better: higher, lower, or null where it has no better end.
    """

    title: str
    digits: int = 3
    better: str | None = None

    def __post_init__(self) -> None:
        for key, kind in (("title", str), ("digits", int)):
            value = getattr(self, key)
            require(isinstance(value, kind), f"a metric's {key}", value, f"must be {kind.__name__}")
        require(0 <= self.digits <= 15, "a metric's digits", self.digits, "must lie in [0, 15]")
        require(
            self.better in ("higher", "lower", None),
            "a metric's better",
            self.better,
            "choose higher, lower or None, which YAML writes as null",
        )


@dataclass(frozen=True)
class Metric:
    """A metric's function, its settings bound, and how it is shown.

    Attributes:
        function: from what a model made of a prompt to a number, or none.
        shown: in tables.
    """

    function: MetricFn
    shown: Shown


def anchor_logp(reading: Reading) -> float:
    """The mean log-prob of the anchor's tokens, in nats."""
    return reading.anchor_logp


def perplexity(reading: Reading) -> float:
    """exp of minus the anchor's mean log-prob: how many words the model was torn between.

    Infinity where float64 can't hold that, beyond 709 nats.
    """
    try:
        return exp(-reading.anchor_logp)
    except OverflowError:
        return inf


def rouge_l(reading: Reading) -> float:
    """ROUGE-L F1 of the response with the anchor."""
    return text.rouge_l(reading.anchor, reading.response)


def exact(reading: Reading) -> float | None:
    """1 where the response is the true answer and nothing else."""
    if reading.prompt.answer is None:
        return None
    return float(text.exact(reading.prompt, reading.response))


def contains(reading: Reading) -> float | None:
    """1 where the true answer stands in the response."""
    if reading.prompt.answer is None:
        return None
    return float(text.contains(reading.prompt, reading.response))


def correct(reading: Reading) -> float | None:
    """How right the response is: 1 where it is the true answer alone, 1/2 where it contains it."""
    if reading.prompt.answer is None:
        return None
    found = (
        text.exact(reading.prompt, reading.response),
        text.contains(reading.prompt, reading.response),
    )
    return sum(found) / 2


def length(reading: Reading) -> float:
    """The response's tokens, EOS included."""
    return reading.length


def finished(reading: Reading) -> float:
    """1 where the response ended by itself."""
    return reading.finished


def distinct_n(reading: Reading, *, n: int = 2) -> float | None:
    """Distinct n-grams of words among all of the response's: below 1 it repeats itself.

    Li et al. (2016) count over all responses at once; within each, prompts can be paired.

    Settings:
        n: words in a gram.
    """
    require(n > 0, "eval.metrics.distinct_n.function.n", n, "must be positive")
    found = text.words(reading.response)
    grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def sampled(reading: Reading, *, metric: MetricFn) -> float | None:
    """The mean of a metric of texts (`exact`, `contains`, `rouge_l`) over the sampled answers.

    Settings:
        metric: of each of the eval.samples answers; a prompt has none while that is 0.
    """
    import numpy as np  # no command that asks a teacher needs it, and each names metrics

    values = [metric(of_text(reading.prompt, reading.anchor, sample)) for sample in reading.samples]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def pass_at_k(reading: Reading, *, k: int = 4, metric: MetricFn = exact) -> float | None:
    """The chance that one of k sampled answers is right, without bias from n >= k of them.

    1 - C(n - c, k) / C(n, k), c the right ones (Chen et al., 2021, eq. 1).

    Settings:
        k: answers that one has; eval.samples, n, must be as many or more.
        metric: 1 for a right answer, 0 for a wrong one.
    """
    require(k > 0, "eval.metrics.pass_at_k.function.k", k, "must be positive")
    n = len(reading.samples)
    share = sampled(reading, metric=metric)
    if share is None:
        return None
    need = (
        f"pass@{k} needs at least {k}: draw more, or measure others, as eval=[exact,sampled_exact]"
    )
    require(n >= k, "eval.samples", n, need)
    return 1.0 - comb(n - round(share * n), k) / comb(n, k)


def pair_accuracy(reading: Reading) -> float | None:
    """The share of pairs of rated responses of which the better one is no less likely.

    By summed log-probs, as the ranking accuracy of Chen et al. (2024): of two responses the shorter
    one is often the likelier before any training.
    """
    margins = _margins(reading)
    return sum(margin >= 0 for margin in margins) / len(margins) if margins else None


def pair_margin(reading: Reading) -> float | None:
    """How much likelier the better of two rated responses is, in nats: the mean over the pairs.

    By summed log-probs. What it has gained over the reference's, times beta, is the margin of the
    rewards that DPO implies (Rafailov et al., 2023).
    """
    margins = _margins(reading)
    return sum(margins) / len(margins) if margins else None


def _margins(reading: Reading) -> list[float]:
    """log π(better|x) - log π(worse|x) of each pair of rated responses that differ in score."""
    return [
        better - worse
        for score, better in reading.rated
        for other, worse in reading.rated
        if score > other
    ]


METRICS: dict[str, Metric] = {
    "anchor_logp": Metric(anchor_logp, Shown("anchor log-prob", better="higher")),
    "rouge_l": Metric(rouge_l, Shown("anchor ROUGE-L", better="higher")),
    "exact": Metric(exact, Shown("exact answer", better="higher")),
    "contains": Metric(contains, Shown("contains answer", better="higher")),
    "length": Metric(length, Shown("length (tokens)", digits=1)),
    "finished": Metric(finished, Shown("finished", better="higher")),
}
"""Those that a run has when its settings name no others; files need not say how they are shown."""

PAIRS: dict[str, Metric] = {
    "pair_accuracy": Metric(pair_accuracy, Shown("pair accuracy", better="higher")),
    "pair_margin": Metric(pair_margin, Shown("pair margin (nats)", digits=2, better="higher")),
}
"""Those of rated responses."""

QUALITY = ("anchor_logp", "rouge_l", "exact", "contains", *PAIRS)
"""Those that are shown by kind of prompt, and that a verdict speaks of."""


def measure(reading: Reading, metrics: Mapping[str, Metric]) -> dict[str, float | None]:
    """Each metric's value on one reading.

    Raises `ConfigError` naming the metric and the prompt, for one that raises or gives no number.
    NaN is none, but where the model's own log-prob is NaN that is no fault of a metric's.
    """
    values: dict[str, float | None] = {}
    for name, metric in metrics.items():
        at = f"on prompt {reading.prompt.id!r}"
        try:
            made = metric.function(reading)
        except PujaxError:
            raise
        except Exception as error:
            said = f"{raised_in(metric.function, error)}, {at}: mend it, or leave it out"
            raise ConfigError(f"eval.metrics.{name}: {said}") from error
        if isnan(reading.anchor_logp) and isinstance(made, float) and isnan(made):
            values[name] = made
        else:
            values[name] = _number(f"eval.metrics.{name}", metric.function, made, at)
    return values


OF_SAMPLES = (sampled, pass_at_k)
"""What no prompt has where `eval.samples` is 0."""


def is_of_samples(metric: Metric) -> bool:
    """Whether its function is one of `OF_SAMPLES`."""
    return getattr(metric.function, "func", metric.function) in OF_SAMPLES


def missing(
    metrics: Mapping[str, Metric],
    found: Collection[str],
    *,
    samples: int,
    examples: Sequence[Example],
) -> str | None:
    """The line on the metrics that no prompt had a value of, `found` left out; None for no such.

    Those of sampled answers are no loss where none are drawn, nor those of pairs where the
    `examples` have no rated responses; nor, beside others, those of true answers where none has
    one, which the table's note says.
    """
    rated = any(example.given for example in examples)
    answered = any(example.prompt.answer is not None for example in examples) or not found
    lacking = [
        *(() if samples else OF_SAMPLES),
        *(() if rated else (pair_accuracy, pair_margin)),
        *(() if answered else (exact, contains, correct)),
    ]

    def idle(function: Any) -> bool:
        """Whether it, or what it is the mean of, lacks what it measures."""
        of = getattr(function, "func", function)
        inner = getattr(function, "keywords", {}).get("metric", exact if of is pass_at_k else None)
        return of in lacking or (inner is not None and idle(inner))

    names = [
        name for name, metric in metrics.items() if name not in found and not idle(metric.function)
    ]
    if not names:
        return None
    return (
        f"in no table: {', '.join(f'eval.metrics.{name}' for name in names)}: no held-out prompt "
        "has a value: give prompts what it asks for, such as a true `answer`, mend a function that "
        "returns None to all, or leave it out of eval"
    )


def try_metric(key: str, function: MetricFn, samples: int = 2) -> None:
    """Call a metric on a made-up reading of so many sampled answers.

    Raises `ConfigError` for what no reading can mend: a function that takes something else, returns
    no number, names what there is not, or says itself that a setting doesn't fit. Whatever else it
    raises may lie in the reading, and is left to `measure`.
    """
    reading = replace(MADE_UP, samples=("4", "5", *("4",) * samples)[:samples])
    try:
        inspect.signature(function).bind(reading)
    except TypeError as error:
        raise ConfigError(
            f"{key}: {name_of(function)}: {error}: a metric takes one reading, and its settings "
            "after a *"
        ) from error
    try:
        made = function(reading)
    except ConfigError:
        raise
    except Exception as error:
        if not in_code(error, reading, reading.prompt, reading.response, reading.anchor):
            return
        said = f"{raised_in(function, error)}, on a made-up prompt: mend it, or leave it out"
        raise ConfigError(f"{key}: {said}") from error
    _number(key, function, made, "on a made-up prompt")


MADE_UP = Reading(
    Prompt("made-up", ({"role": "user", "content": "2 + 2?"},), "4", "sum"),
    *("4", "It is 4.", -1.0, 6.0, 1.0, ("4", "5"), ((1.0, -2.0), (-1.0, -3.0))),
)


def _number(key: str, function: MetricFn, made: Any, at: str) -> float | None:
    """What a metric made, as a float or None. Raises `ConfigError`, as for NaN."""
    if made is None:
        return None
    returned = f"{key}: {name_of(function)} returned"
    if isinstance(made, int | float) or getattr(made, "shape", None) == ():  # numpy's have one
        try:
            value = float(made)
        except OverflowError as error:
            beyond = "a number that float64 can't hold, beyond 1.8e308"
            raise ConfigError(f"{returned} {beyond}, {at}: scale it, or return None") from error
        except (TypeError, ValueError):
            value = nan
        if not isnan(value):
            return value
    raise ConfigError(f"{returned} {made!r}, want a number or None, {at}")
