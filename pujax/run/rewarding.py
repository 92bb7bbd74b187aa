"""The host's part of a step: the rewards of sampled responses, as arrays for the device."""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pujax.errors import ConfigError
from pujax.evaluation import text
from pujax.method.scoring import reward, rewards_of
from pujax.records import Example, Prompt
from pujax.run.workers import Outcome, PromptLine, Workers
from pujax.text import counted

TAKEN = ("prompt", "response", "anchor", "answer", "row")
"""What a reward may take, by name."""

AnchorCheck = Callable[[Sequence[Example]], list[Outcome]]
"""Examples to what is said of each one's anchor."""

TRIED = 4  # prompts at most that a reward is tried on before a run

HOPELESS = 3  # steps in a row in which a reward fails on every response, and the run ends


@dataclass(frozen=True)
class Rewarded:
    """One array [B G] for each reward, the step's metrics, and a line for each that failed."""

    scores: tuple[np.ndarray, ...]
    metrics: Mapping[str, float]
    failures: tuple[str, ...]


class Rewards:
    """The rewards of a scorer with their worker processes; close it, or use it in a `with`.

    Raises `ConfigError` for a function that takes what there is not.
    """

    def __init__(self, scorer: Any) -> None:
        self._rewards = [_Reward(found) for found in rewards_of(scorer)]
        self._stack = ExitStack()
        for each in self._rewards:
            self._stack.enter_context(each.workers)

    def __bool__(self) -> bool:
        return bool(self._rewards)

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def try_on(self, examples: Sequence[Example]) -> list[str]:
        """As `try_rewards`, which raises what this does."""
        remarks = []
        for each in self._rewards if examples else ():
            outcomes = []
            for example in examples:
                ((outcome,),) = each.outcomes([example], [[example.anchor]])
                if outcome.failure is None:
                    break
                outcomes.append(outcome)
            else:
                said = f"{each.name} failed on {outcome.failure}, on the teacher's answer to"
                where = f"prompt {example.prompt.id!r}"
                if all(outcome.ours for outcome in outcomes):
                    raise ConfigError(
                        f"scorer.score.function: {said} {where}: mend it, or the prompts; return "
                        "None where it has nothing to say"
                    )
                remarks.append(
                    f"warning: scorer.score.function: {said} {where}, the last of "
                    f"{counted(len(outcomes), 'answer')} that it was tried on and failed on: if it "
                    f"fails on every sampled response of {HOPELESS} steps too, the run ends"
                )
        return remarks

    def of(self, examples: Sequence[Example], responses: Sequence[Sequence[str]]) -> Rewarded:
        """The rewards of each example's anchor, at index 0, and of its `responses` [B K].

        A prompt for whose candidates a reward has no number (None for each: it lacks what the
        reward needs) gets equal scores, 0, and so no preference. What fails gets the worst score of
        its group's candidates: what raises, takes too long, or returns no number. Metrics:
        `score/failed`, the share of responses; `score/none`, of prompts; `time/reward_s`, wall
        seconds; `time/reward_cpu_s`, the workers' processor seconds.

        Raises `ConfigError` as `Workers.call` does, and for a reward that has failed on every
        response of several steps in a row.
        """
        begun = time.monotonic()
        texts = [[example.anchor, *some] for example, some in zip(examples, responses, strict=True)]
        scores, failures, failed, none, cpu_s = [], [], 0.0, 0.0, 0.0
        for each in self._rewards:
            worked = each.workers.cpu_s
            rows = each.outcomes(examples, texts)
            cpu_s += each.workers.cpu_s - worked
            scores.append(np.array([group_scores(row) for row in rows], np.float32))
            none += float(np.mean([_has_none(row) for row in rows]))
            wrong = [
                (b, g, failure)
                for b, row in enumerate(rows)
                for g, failure in enumerate(_failures(row))
                if failure is not None
            ]
            count = sum(map(len, rows))
            failed += len(wrong) / count
            each.hopeless = each.hopeless + 1 if len(wrong) == count else 0
            if wrong:
                b, g, failure = wrong[0]
                said = (
                    f"{each.name} failed on {len(wrong)} of {count} responses: {failure}, on "
                    f"{texts[b][g][:120]!r} to prompt {examples[b].prompt.id!r}"
                )
                if each.hopeless == HOPELESS:
                    raise ConfigError(
                        f"scorer.score.function: {said}; so it was for {HOPELESS} steps: mend it, "
                        "and the same command goes on from the last checkpoint"
                    )
                failures.append(said)
        count = max(len(self._rewards), 1)
        metrics = {
            "score/failed": failed / count,
            "score/none": none / count,
            "time/reward_s": time.monotonic() - begun,
            "time/reward_cpu_s": cpu_s,
        }
        return Rewarded(tuple(scores), metrics, tuple(failures))


def try_rewards(scorer: Any, examples: Sequence[Example]) -> list[str]:
    """Call each reward of a scorer on the anchors of the first prompts, before the first step.

    A line for each that fails on all of them, which may lie in these answers, or in a first call
    that takes its time. Raises `ConfigError` where it can't lie in a response: a column that their
    lines lack, or a name, a module or an attribute that there is not.
    """
    with Rewards(scorer) as rewards:
        return rewards.try_on(examples[:TRIED])


def anchor_check(function: Callable[..., Any], *, seconds: float) -> AnchorCheck:
    """What a reward says of examples' anchors, as `data.gate.check`.

    Raises `ConfigError` as `Rewards` does; and what it makes, for one that fails on every anchor.
    """
    with _said_of_the_gate():
        check = _Reward(partial(reward, function=function, seconds=seconds))

    def outcomes(examples: Sequence[Example]) -> list[Outcome]:
        with _said_of_the_gate(), check.workers:
            rows = check.outcomes(examples, [[example.anchor] for example in examples])
        made = [outcome for row in rows for outcome in row]
        if made and all(outcome.failure is not None for outcome in made):
            raise ConfigError(
                f"data.gate.check: {check.name} failed on all of {len(made)} anchors: "
                f"{made[0].failure}: mend it, or raise data.gate.seconds"
            )
        return made

    return outcomes


@contextmanager
def _said_of_the_gate() -> Iterator[None]:
    """What rewards say of the setting that usually holds them is said of the gate's."""
    try:
        yield
    except ConfigError as error:
        said = str(error).replace("scorer.score.function", "data.gate.check")
        raise ConfigError(said) from error


class _Reward:
    """One reward: its function's name and workers, and how often in a row all of it failed."""

    def __init__(self, found: partial) -> None:
        bound = inspect.signature(reward).bind_partial(**found.keywords)
        bound.apply_defaults()
        settings = bound.arguments
        self._function, self._batched = settings["function"], settings["batched"]
        plain = getattr(self._function, "func", self._function)
        self.name: str = plain.__name__
        self._takes = _takes(plain)
        self.workers = Workers(
            self._function,
            count=settings["workers"],
            seconds=settings["seconds"],
            batched=self._batched,
        )
        self.hopeless = 0

    def outcomes(
        self, examples: Sequence[Example], texts: Sequence[Sequence[str]]
    ) -> list[list[Outcome]]:
        """The outcome of each of the `texts` [B G]."""
        calls = [
            {name: value for name, value in _case(example, one).items() if name in self._takes}
            for example, group in zip(examples, texts, strict=True)
            for one in group
        ]
        if self._batched:
            calls = [{name: [call[name] for call in calls] for name in self._takes}]
        made = [outcome for outcomes in self.workers.call(calls) for outcome in outcomes]
        size = len(texts[0])
        return [made[start : start + size] for start in range(0, len(made), size)]


def _takes(function: Callable[..., Any]) -> list[str]:
    """Which of `TAKEN` a function takes. Raises `ConfigError` for any other that it needs."""
    takes = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return list(TAKEN)
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            continue
        if name in TAKEN and parameter.kind is not parameter.POSITIONAL_ONLY:
            takes.append(name)
        elif parameter.default is parameter.empty:
            raise ConfigError(
                f"scorer.score.function: {function.__name__} takes {name!r}: it may take "
                f"{', '.join(TAKEN)} by name, and its settings after a *"
            )
    if not takes:
        raise ConfigError(
            f"scorer.score.function: {function.__name__} takes none of {', '.join(TAKEN)}"
            ": name what it looks at"
        )
    return takes


def _case(example: Example, response: str) -> dict[str, Any]:
    prompt = example.prompt
    return {
        "prompt": text.shown(prompt),
        "response": response,
        "anchor": example.anchor,
        "answer": prompt.answer,
        "row": PromptLine(line_of(prompt)),
    }


def line_of(prompt: Prompt) -> dict[str, Any]:
    """A prompt's line as a reward gets it."""
    known = {"id": prompt.id, "messages": list(prompt.messages)}
    return {**prompt.rest, **known, "answer": prompt.answer, "kind": prompt.kind}


def group_scores(row: Sequence[Outcome]) -> list[float]:
    """The scores of one group, its anchor first: all 0 where no candidate has a number.

    >>> failed = Outcome(float("nan"), "took more than 10 s")
    >>> group_scores([Outcome(9.0), Outcome(1.0), Outcome(3.0), failed])
    [9.0, 1.0, 3.0, 1.0]
    >>> group_scores([Outcome(1.0), Outcome(None), Outcome(None)])
    [0.0, 0.0, 0.0]
    """
    numbers = [None if outcome.failure else outcome.value for outcome in row]
    worst = min((value for value in numbers[1:] if value is not None), default=None)
    if worst is None:
        return [0.0] * len(row)
    return [worst if value is None else value for value in numbers]


def _has_none(row: Sequence[Outcome]) -> bool:
    """Whether the prompt lacks what the reward needs."""
    return all(outcome.failure is None and outcome.value is None for outcome in row[1:])


def _failures(row: Sequence[Outcome]) -> list[str | None]:
    """Why each response of a group has no number, where that is a failure."""
    if _has_none(row):
        return [None] * len(row)
    none = "returned None here and not for all of the prompt's responses"
    return [none if each.value is None else each.failure for each in row]
