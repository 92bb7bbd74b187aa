"""Preference data: rows of JSONL, tables and datasets to prompts with rated responses."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from pujax.errors import PromptError
from pujax.records import LARGEST, Preference, Prompt, Rated, messages_key
from pujax.teacher.prompts import (
    ROLES,
    SHAREGPT,
    alpaca_turns,
    checked_text,
    prompt_of,
    rows,
    sharegpt_turns,
    speaker,
)
from pujax.text import blank

RESPONSES = ("responses", "completions", "candidates")
"""The names of a row's list of responses."""

TEXTS = ("text", "response", "content", "completion", "value")
"""The names of a response's text in such a list."""

RATINGS = ("ratings", "rating", "scores", "score")
"""The names of a response's ratings, in such a list or beside it."""

FLAGS = ("label", "kto_tag")
"""The names of a flag that says whether the row's one response is good."""

GOOD_OR_BAD = {
    **dict.fromkeys(("true", "good", "1", "1.0"), 1.0),
    **dict.fromkeys(("false", "bad", "0", "0.0"), -1.0),  # a point: of a column with gaps
}

TURNS = ("prompt", "chosen", "rejected", "completion", "response", "output")
"""The names of what is a text or turns."""

PRINTED = re.compile(r"\[?\{'(role|content|from|value)': ")
"""How turns begin as Python prints them, and with it whoever writes a table without JSON."""

SIDE = ""
"""In place of a dimension: on which side a response stands, 1 or -1, which is no rating."""

Ratings = Mapping[str, float]


def stop(error: PromptError) -> None:
    """Raise it: what is done about a bad row unless it may be left out."""
    raise error


def load_preferences(
    source: str | Sequence[str] | Mapping[str, Any],
    *,
    weights: Mapping[str, float] | None = None,
    bad: Callable[[PromptError], None] = stop,
) -> Iterator[Preference]:
    """The prompts of files or of a dataset (as for `load_prompts`) with their rated responses.

    A row has, beside a prompt in any form that `load_prompts` reads, one of

    * `chosen` and `rejected`: texts, turns, or whole conversations, which have the prompt too;
    * `responses` (or `completions`, `candidates`): texts with `ratings` beside them, or objects of
      a `text` and its `ratings`; a rating is a number, or an object of numbers by dimension;
    * a `completion` (or `response`, `output`, a conversation's last turn) and its `label` (or
      `kto_tag`): true, false, good, bad, 1 or 0.

    A response's score is the sum of its ratings times `weights`; without any, the mean over the
    dimensions of the first row. The chosen and the good score 1, the rejected and the bad -1.

    `bad` is given the error of a row that can't be used: text for a rating, a missing dimension,
    the same response twice, another prompt's id; what it returns from leaves the row out. Raises
    `PromptError` naming the place of whatever can't be read at all.
    """
    dimensions: list[str] | None = list(weights) if weights else None
    seen: dict[str, str] = {}
    for place, row in rows(source):
        try:
            prompt, rated = _read(row, place)
            own = None if SIDE in rated[0][1] else list(rated[0][1])
            scored = _scored(rated, dimensions or own or [], weights, place)
            key = messages_key(prompt.messages)
            if seen.setdefault(prompt.id, key) != key:
                raise PromptError(
                    f"{place}: id {prompt.id!r} came before with another prompt: give each its own"
                )
        except PromptError as error:
            bad(error)
            continue
        dimensions = dimensions or own
        named = () if own is None else tuple(dimensions or ())
        yield Preference(prompt, scored, place, named)


def refuse_bad_rows(
    source: str | Sequence[str] | Mapping[str, Any], *, weights: Mapping[str, float] | None = None
) -> int | None:
    """How many rows there are; `PromptError` for one of files that `load_preferences` can't use.

    For who is about to load jax and a model. A dataset isn't read for that, and gives None.
    """
    if isinstance(source, Mapping):
        return None
    return sum(1 for _ in load_preferences(source, weights=weights))


def _read(row: Mapping[str, Any], place: str) -> tuple[Prompt, list[tuple[str, Ratings]]]:
    """The prompt of a row, and its responses with their ratings: by side, flag or dimension."""
    row = _unfolded(row, place)
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return _pair(row, place)
    name = next((name for name in RESPONSES if row.get(name) is not None), None)
    if name is not None:
        return _prompt(row, place), _listed(row, name, place)
    flag = next((name for name in FLAGS if row.get(name) is not None), None)
    if flag is not None:
        return _flagged(row, flag, place)
    raise PromptError(
        f"{place}: needs `chosen` and `rejected`, `responses` with `ratings`, or a `completion` "
        f"with its `label` (it has {sorted(name for name in row if row[name] is not None)})"
    )


def _unfolded(row: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """The row with turns, responses and ratings that stand as text in it, as a table's cell has.

    Raises `PromptError` for turns that are no JSON: they would be learnt as they stand.
    """
    found = dict(row)
    for name in (*RESPONSES, *RATINGS, *TURNS):
        cell = row.get(name)
        if not isinstance(cell, str) or cell.lstrip()[:1] not in ("[", "{"):
            continue
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            if name in TURNS and PRINTED.match(cell.lstrip()):
                raise PromptError(
                    f"{place}: `{name}` has turns as Python prints them: write them as JSON"
                ) from None
            continue
        if name not in TURNS or _are_turns(value):
            found[name] = value
    return found


def _are_turns(value: Any) -> bool:
    turns = value if isinstance(value, list) else [value]
    return bool(turns) and all(
        isinstance(turn, Mapping)
        and speaker(turn)[1] in (*ROLES, *SHAREGPT)
        and any(isinstance(turn.get(name), str) for name in ("content", "value"))
        for turn in turns
    )


# --- pairs, lists and flags -----------------------------------------------------------------------


def _pair(row: Mapping[str, Any], place: str) -> tuple[Prompt, list[tuple[str, Ratings]]]:
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            known = sorted(str(key) for key in row if row[key] is not None)
            raise PromptError(f"{place}: `{name}` is missing (it has {known})")
    sides = [_answer(row[name], name, place) for name in ("chosen", "rejected")]
    (before, chosen), (other, rejected) = sides
    if before != other:
        raise PromptError(f"{place}: `chosen` and `rejected` answer different conversations")
    if chosen == rejected:
        raise PromptError(
            f"{place}: `chosen` and `rejected` are the same text: take the row out, or set "
            "data.on_bad_row=drop"
        )
    if before or isinstance(row.get("prompt"), list):
        for i, turn in enumerate(before):
            checked_text(turn["content"], f"messages[{i}].content", place)
        for name, own in _own_turns(row, place):
            before = _joined(own, before, name, place)
        row = {**row, "prompt": None, "messages": before}
    return _prompt(row, place), [(chosen, {SIDE: 1.0}), (rejected, {SIDE: -1.0})]


def _own_turns(row: Mapping[str, Any], place: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The conversations that a row has beside `chosen`, in each form of a prompt, by its name."""
    for name in ("prompt", "messages", "conversations", "instruction"):
        told = row.get(name)
        if told is None or told == [] or (isinstance(told, str) and blank(told)):
            continue
        if name == "instruction":
            yield name, alpaca_turns(row, place)
        elif name == "prompt" and isinstance(told, str):
            yield name, [{"role": "user", "content": told}]
        else:
            yield name, sharegpt_turns(told, place, name)


def _joined(
    own: list[dict[str, Any]], before: list[dict[str, Any]], name: str, place: str
) -> list[dict[str, Any]]:
    """What `chosen` answers: the turns `before` it, with the row's `own`, which it may repeat.

    Either may be a part of the other, at its beginning or end, or go on where the other ends; the
    row's own may have an answer too. Raises `PromptError` for turns that contradict each other.
    """

    def split(turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        count = 1 if turns and turns[0]["role"] == "system" else 0
        return turns[:count], turns[count:]

    def said(turns: list[dict[str, Any]]) -> list[tuple[object, str]]:
        return [(turn["role"], str(turn["content"]).strip()) for turn in turns]

    (system, asked), (other, turns) = split(own), split(before)
    of_own, of_turns = said(asked), said(turns)
    count = len(of_own)
    answered = of_own[:-1] == of_turns and own[-1]["role"] == "assistant"
    if system and other and said(system) != said(other):
        joined = None
    elif answered or of_own in (of_turns[:count], of_turns[max(0, len(turns) - count) :]):
        joined = turns
    elif of_own[max(0, count - len(turns)) :] == of_turns:
        joined = asked
    elif of_own[-1][0] != of_turns[0][0]:
        joined = [*asked, *turns]
    else:
        joined = None
    if joined is None:
        raise PromptError(
            f"{place}: `{name}` is not what `chosen` answers: take the one or the other out"
        )
    return [*(system or other), *joined]


def _listed(row: Mapping[str, Any], name: str, place: str) -> list[tuple[str, Ratings]]:
    """The responses of a list, with ratings in it or beside it."""
    responses = row[name]
    if not isinstance(responses, list) or len(responses) < 2:
        raise PromptError(f"{place}: `{name}` must be a list of at least two responses")
    beside = next((key for key in RATINGS if row.get(key) is not None), None)
    if beside is None:
        ratings = [_inside(each, f"{name}[{i}]", place) for i, each in enumerate(responses)]
    else:
        ratings = _columns(row[beside], beside, len(responses), place)
    rated = []
    for i, (each, rating) in enumerate(zip(responses, ratings, strict=True)):
        where = f"{name}[{i}]"
        if isinstance(each, Mapping):
            key = next((key for key in TEXTS if each.get(key) is not None), TEXTS[0])
            each, where = each.get(key), f"{where}.{key}"
        text = checked_text(each, where, place)
        if text in (before for before, _ in rated):
            raise PromptError(f"{place}: `{where}` is the same text as one before it")
        rated.append((text, _ratings(rating, f"{name}[{i}]'s rating", place)))
    return rated


def _inside(response: Any, name: str, place: str) -> Any:
    found = response if isinstance(response, Mapping) else {}
    key = next((key for key in RATINGS if found.get(key) is not None), None)
    if key is None:
        raise PromptError(f"{place}: `{name}` has no `ratings`, in it or in a list beside")
    return found[key]


def _columns(ratings: Any, name: str, count: int, place: str) -> list[Any]:
    """The ratings of each response: from a list of them, or from a list a dimension."""
    lists = {"": ratings}
    if isinstance(ratings, Mapping):  # Parquet fills up an object that lacks one
        lists = {dimension: each for dimension, each in ratings.items() if each is not None}
    for dimension, each in lists.items():
        if not isinstance(each, list) or len(each) != count:
            where = f"{name}.{dimension}".rstrip(".")
            raise PromptError(f"{place}: `{where}` must be a list of {count}, one a response")
    if not isinstance(ratings, Mapping):
        return ratings
    return [{dimension: each[i] for dimension, each in lists.items()} for i in range(count)]


def _ratings(value: Any, name: str, place: str) -> Ratings:
    """Numbers by dimension; a single one is of the dimension "rating"."""
    by_name = value if isinstance(value, Mapping) else {"rating": value}
    found = {}
    for dimension, number in by_name.items():
        if number is None:  # as Parquet fills up an object that lacks it
            continue
        if isinstance(number, bool) or not isinstance(number, int | float | Decimal):
            of = f" {dimension!r}" if isinstance(value, Mapping) else ""
            raise PromptError(f"{place}: {name}{of} must be a number, found {number!r:.60}")
        try:
            rating = float(number)
        except OverflowError:  # a whole number of hundreds of digits
            rating = math.inf
        if not math.isfinite(rating):
            raise PromptError(f"{place}: {name} {dimension!r} is {rating}: it must be finite")
        if abs(rating) > LARGEST:
            raise PromptError(
                f"{place}: {name} {dimension!r} is {rating:g}, more than {LARGEST:g}: scale it down"
            )
        if dimension == SIDE:
            raise PromptError(f"{place}: {name} has a dimension without a name: name it")
        found[str(dimension)] = rating
    if not found:
        raise PromptError(f"{place}: {name} is missing")
    return found


def _flagged(
    row: Mapping[str, Any], flag: str, place: str
) -> tuple[Prompt, list[tuple[str, Ratings]]]:
    value = row[flag]
    score = GOOD_OR_BAD.get(str(value).strip().casefold())
    if score is None:
        raise PromptError(
            f"{place}: `{flag}` must be true, false, good, bad, 1 or 0, found {value!r:.60}"
        )
    given = {name: row.get(name) for name in ("completion", "response", "output")}
    name = next((name for name, each in given.items() if each is not None), None)
    if name is None and isinstance(row.get("conversations"), list):
        *_, last = sharegpt_turns(row["conversations"], place) or [{}]
        name, given = "conversations", {"conversations": [last]}
    if name is None:
        raise PromptError(f"{place}: `{flag}` needs a `completion` that it is about")
    before, text = _answer(given[name], name, place)
    if before:
        raise PromptError(f"{place}: `{name}` must be one answer, not a conversation")
    return _prompt(row, place), [(text, {SIDE: score})]


# --- what they share ------------------------------------------------------------------------------


def _prompt(row: Mapping[str, Any], place: str) -> Prompt:
    """The row's prompt. What Alpaca's and ShareGPT's forms have as its answer is a response."""
    if isinstance(row.get("prompt"), list):
        row = {**row, "prompt": None, "messages": row["prompt"]}
    turns = row.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
        turns = turns[:-1] if speaker(turns[-1])[1] in ("gpt", "assistant") else turns
    asked = {name: row[name] for name in row if name not in ("output", "conversations")}
    return prompt_of(asked if turns is None else {**asked, "conversations": turns}, place)


def _answer(value: Any, name: str, place: str) -> tuple[list[dict[str, str]], str]:
    """The turns before an answer, and its text, from a text, a turn or a conversation."""
    if value is None:
        raise PromptError(f"{place}: `{name}` is missing")
    if isinstance(value, str):
        return [], checked_text(value, name, place)
    if not isinstance(value, Mapping | list):
        raise PromptError(f"{place}: `{name}` must be a text or turns, found {value!r:.60}")
    turns = sharegpt_turns([value] if isinstance(value, Mapping) else value, place, name)
    if not turns or turns[-1]["role"] != "assistant":
        raise PromptError(f"{place}: `{name}` must end with the assistant's turn")
    return turns[:-1], checked_text(turns[-1]["content"], name, place)


def _scored(
    rated: Sequence[tuple[str, Ratings]],
    dimensions: Sequence[str],
    weights: Mapping[str, float] | None,
    place: str,
) -> tuple[Rated, ...]:
    """The responses with one score each."""
    if SIDE in rated[0][1]:
        return tuple(Rated(text, ratings[SIDE]) for text, ratings in rated)
    used = weights or dict.fromkeys(dimensions, 1 / len(dimensions))
    scored = []
    for i, (text, ratings) in enumerate(rated):
        missing = [name for name in used if name not in ratings]
        if missing:
            raise PromptError(
                f"{place}: response {i} has no rating {missing[0]!r} (it has {sorted(ratings)}): "
                "add it, or name the dimensions that all have in data.dimensions"
            )
        more = sorted(set(ratings) - set(used))
        if more and not weights:
            raise PromptError(
                f"{place}: response {i} has a rating {more[0]!r}, which the first row has not: "
                "name those that count in data.dimensions"
            )
        score = sum(weight * ratings[name] for name, weight in used.items())
        if not abs(score) <= LARGEST:
            raise PromptError(f"{place}: response {i}'s ratings add up to {score}: scale them down")
        scored.append(Rated(text, score, tuple(ratings[name] for name in used)))
    return tuple(scored)
