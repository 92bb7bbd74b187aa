"""Rewards: what a plain Python function says of a response. No jax; `scorer=reward` takes them.

A reward takes what it needs of these, by name, and its settings as keywords:

    prompt    the user's words; of several turns each under its role's name
    response  the candidate, as text
    anchor    the teacher's answer
    answer    the true answer of the prompt's line, or None
    row       that line: id, messages, answer, kind, and whatever else stands there

It returns a number, higher is better, or None for a prompt that lacks what it needs: that prompt's
responses then all score the same, which prefers none. What raises, takes too long or returns
anything else is counted and shown, and scores as the worst of its group. One of your own is a
function at the top level of a module that Python finds. A run repeats, and resumes, bit for bit as
far as its rewards do: by a clock, a server or a time limit they may not. How the ones below score
is ours.
"""

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from pujax.errors import ConfigError, one_of, require
from pujax.evaluation import text
from pujax.records import Prompt
from pujax.schemas import Schema, check_schema, is_valid, parsed

NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?"  # a sign, not a minus between two numbers
    # With a decimal comma, which no three digits alone follow; a list's commas are none.
    r"(?:(?P<comma>(?<![\d,.])"
    r"(?:(?:\d{1,3}(?:\.\d{3})+|\d+),(?!\d{3}(?!\d))|0,)\d+(?![\d,.]*\d))"
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)

TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
"""JSON Schema's names of types."""


def exact(response: str, answer: str | None, row: Mapping[str, Any]) -> float | None:
    """1 where the response is the true answer and nothing else (`evaluation.text.exact`)."""
    if answer is None:
        return None
    return float(text.exact(_asked(answer, row), response))


def contains(response: str, answer: str | None, row: Mapping[str, Any]) -> float | None:
    """1 where the true answer stands in the response (`evaluation.text.contains`)."""
    if answer is None:
        return None
    return float(text.contains(_asked(answer, row), response))


def correct(response: str, answer: str | None, row: Mapping[str, Any]) -> float | None:
    """How right the response is: 1 where it is the true answer alone, 1/2 where it contains it."""
    if answer is None:
        return None
    asked = _asked(answer, row)
    return (text.exact(asked, response) + text.contains(asked, response)) / 2


def _asked(answer: str, row: Mapping[str, Any]) -> Prompt:
    """What the checks of `evaluation.text` want to know of a line."""
    return Prompt("", (), answer, row.get("kind"))


def number(response: str, answer: str | None, *, tolerance: float = 0.0) -> float | None:
    """1 where the last number in the response is the last one in the true answer.

    None where the answer has no number. Thousands and decimals may be set off as in 1,250.5 or as
    in 1.250,5; a comma before three digits, or a point, is English.

    Settings:
        tolerance: how far they may be apart, a share of the larger of the two.

    >>> number("That makes 1,250 of 3,000: about 41.7 %.", "#### 41.7")
    1.0
    >>> number("41.7 or 42", "41.7"), number("no idea", "-3"), number("7", "seven")
    (0.0, 0.0, None)
    >>> number("13,7 km", "41,7"), number("1.250,50", "1,250.5"), number("1,2,3", "3")
    (0.0, 1.0, 1.0)
    """
    require(
        0 <= tolerance < math.inf,
        "scorer.score.function.tolerance",
        tolerance,
        "must be finite and not negative",
    )
    wanted = _last_number(answer or "")
    if wanted is None:
        return None
    found = _last_number(response)
    if found is None:
        return 0.0
    try:
        apart = abs(found - wanted)
        return float(apart <= Decimal(tolerance) * max(abs(found), abs(wanted)))
    except ArithmeticError:  # beyond all exponents
        return float(found == wanted)


def _last_number(words: str) -> Decimal | None:
    """The last number, exactly: floats of hundreds of digits would all be infinite."""
    every = list(NUMBER.finditer(words.replace("\u2212", "-")))
    if not every:
        return None
    last = every[-1]
    decimal = last[0].replace(".", "").replace(",", ".") if last["comma"] else last[0]
    try:
        return Decimal(decimal.replace(",", ""))
    except ArithmeticError:
        return None


def regex(response: str, *, pattern: str) -> float:
    """1 where `pattern` is found in the response; `^`, `$` and `(?i)` mean what they do in `re`.

    Settings:
        pattern: a regular expression.

    >>> regex("Dear Ann, ... Yours, Bob", pattern=r"^Dear .*Yours")
    1.0
    """
    _check_pattern(pattern)
    return float(re.search(pattern, response) is not None)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"scorer.score.function.pattern={pattern!r}: no regular expression ({error})"
        ) from error


def json_object(response: str, *, required: Mapping[str, str]) -> float:
    """1 where the response is a JSON object and nothing else, with `required` keys of these types.

    The types are named as in JSON Schema; what a whole schema can say, `json_schema` checks.

    Settings:
        required: the keys, each with its type: string, number, integer, boolean, array, object or
            null.

    >>> json_object('{"name": "Ann", "age": 7}', required={"name": "string", "age": "integer"})
    1.0
    >>> json_object('{"age": true}', required={"age": "integer"}), json_object("[]", required={})
    (0.0, 0.0)
    """
    for key, kind in required.items():
        one_of(f"scorer.score.function.required.{key}", kind, TYPES)
    try:
        value = parsed(response)
    except ValueError:
        return 0.0
    if not isinstance(value, dict):
        return 0.0
    return float(all(key in value and _is(value[key], kind) for key, kind in required.items()))


def json_schema(response: str, *, schema: Schema) -> float:
    """1 where the response is JSON and nothing else, valid against a JSON Schema.

    In the draft that its `$schema` names, 2020-12 where it names none. Patterns are Python's, a
    `format` is no rule, and nothing is fetched: a `$ref` leads within the schema.

    Settings:
        schema: a file, which each worker reads when it starts, or the schema itself; both take pip
            install 'pujax[json]'.
    """
    check_schema("scorer.score.function.schema", schema)
    try:
        value = parsed(response)
    except ValueError:
        return 0.0
    return float(is_valid(value, schema))


def _is(value: Any, kind: str) -> bool:
    """Whether a value of `json.loads` is of the type named; true and false are no numbers."""
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, TYPES[kind])


def column(row: Mapping[str, Any], *, name: str) -> float | None:
    """What stands in a column of the prompt's line, such as a judge's score of its anchor.

    It says the same of all responses, so it gates anchors (`data.gate.check`) and ranks nothing.

    Settings:
        name: the column.

    >>> column({"judge": 4}, name="judge"), column({}, name="judge")
    (4.0, None)
    """
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"scorer.score.function: {name}={value!r} in a prompt: write a number")
    return float(value)


def length(response: str, *, least: int = 0, most: int) -> float:
    """1 for `least` to `most` words, else the ratio to the nearer bound.

    Settings:
        least: the fewest words.
        most: the most words.

    >>> length("a b c", most=3), length("a b c", most=2), length("a b c", least=4, most=9)
    (1.0, 0.6666666666666666, 0.75)
    """
    require(0 <= least <= most, "scorer.score.function.least", least, f"must lie in [0, {most}]")
    count = len(text.words(response))
    if count < least:
        return count / least
    return 1.0 if count <= most else most / count
