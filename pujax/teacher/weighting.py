"""Prompts that state how much each dimension of their ratings counts, to be heeded later (ours)."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from pujax.errors import PromptError, require
from pujax.records import Preference

Mix = tuple[float, ...]
"""What each dimension counts; they sum to one."""


def stated(dimensions: Sequence[str], mix: Sequence[float]) -> str:
    """The line of a system message that says so.

    >>> stated(["helpfulness", "honesty"], [0.75, 0.25])
    'Weigh helpfulness 0.75, honesty 0.25.'
    """
    shares = (f"{name} {share:.2g}" for name, share in zip(dimensions, mix, strict=True))
    return f"Weigh {', '.join(shares)}."


def weighed(
    rows: Iterable[Preference],
    weightings: Sequence[Sequence[float]],
    system: str | None,
    bad: Callable[[PromptError], None],
) -> Iterator[tuple[Preference, Mix]]:
    """Each row once for each weighting, which its system message states and its scores follow.

    Without weightings each is itself, with none. `bad` is given the error of a row without ratings.
    Raises `ConfigError` for two weightings that are stated alike: one prompt would have two labels.
    """
    for row in rows:
        if weightings and not row.dimensions:
            why = "has no ratings for data.weightings to weigh: leave that out, or the row"
            bad(PromptError(f"{row.place}: {why}"))
            continue
        if not weightings:
            yield row, ()
        stated_before: dict[str, Sequence[float]] = {}
        for each in weightings:
            made, mix = _weighed(row, each, system)
            alike = stated_before.setdefault(made.prompt.id, each)
            require(
                alike is each,
                "data.weightings",
                [list(alike), list(each)],
                "to two digits a prompt states both alike: leave one out",
            )
            yield made, mix


def _weighed(
    row: Preference, weighting: Sequence[float], system: str | None
) -> tuple[Preference, Mix]:
    """The row under one weighting; its line stands behind its own system message, or `system`.

    Raises `ConfigError` for a weighting of another number of dimensions, and for one whose shares
    no float can hold.
    """
    require(
        len(weighting) == len(row.dimensions)
        and min(weighting) >= 0
        and 0 < sum(weighting) <= sys.float_info.max,
        "data.weightings",
        list(weighting),
        f"give one number for each of {', '.join(row.dimensions)}: none negative, not all 0, "
        "with a finite sum",
    )
    mix = tuple(weight / sum(weighting) for weight in weighting)
    first, *rest = turns = row.prompt.messages
    leads = first["role"] == "system"
    own, line = first["content"] if leads else system, stated(row.dimensions, mix)
    lead = {"role": "system", "content": f"{own}\n{line}" if own else line}
    messages = (lead, *(rest if leads else turns))
    prompt = replace(row.prompt, id=f"{row.prompt.id} {line}", messages=messages)
    responses = tuple(
        replace(each, score=sum(w * r for w, r in zip(mix, each.ratings, strict=True)))
        for each in row.responses
    )
    return replace(row, prompt=prompt, responses=responses), mix
