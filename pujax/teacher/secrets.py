"""The keys that a teacher's headers need: read from the environment, and kept out of all text."""

import base64
import json
import os
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from urllib.parse import quote, quote_plus

from pujax.errors import ConfigError
from pujax.text import MASKED, printable

LEAST_PART = 8  # characters of a secret that are enough to be kept out of a message

LEAST_QUOTED = 16
"""Characters of a secret that are enough to be kept out of an answer.

An answer may speak of keys and name how they begin (sk-ant-api03-), which has fewer.
"""


class Secrets:
    """Secrets from the environment, and `clean`, which takes them out of what a server says."""

    def __init__(self) -> None:
        self._forms: set[str] = set()

    def read(self, variable: str) -> str:
        """The value of an environment variable, stripped. Raises `ConfigError`, not showing it."""
        value = os.environ.get(variable, "").strip()
        if not value:
            raise ConfigError(f"environment variable {variable} is not set: put the key there")
        odd = re.search(r"[^\x21-\x7e]", value)
        if odd and not re.fullmatch("(Bearer|Basic) [\x21-\x7e]+", value):
            what = "a line break" if odd[0] in "\r\n" else f"the character U+{ord(odd[0]):04X}"
            raise ConfigError(
                f"environment variable {variable} holds {what} at position {odd.start()}: put the "
                "key there alone, in plain ASCII"
            )
        for secret in {value, value.split(" ")[-1]}:
            escaped = (
                json.dumps(secret)[1:-1],
                repr(secret)[1:-1],
                quote(secret),
                quote(secret, ""),
            )
            coded = base64.b64encode(secret.encode()).decode()
            self._forms |= {secret, *escaped, quote_plus(secret), coded}
        return value

    def headers(self, settings: Mapping[str, str]) -> dict[str, str]:
        """The headers as sent: `env:NAME` is the variable's value."""
        return {
            name: self.read(value[4:]) if value.startswith("env:") else value
            for name, value in settings.items()
        }

    def mask(self, text: str) -> str:
        """The whole of `text`, with *** for each secret in it or long part of one, in any case.

        A short secret could be any word, and stays.
        """
        forms = [form for form in self._forms if len(form) >= LEAST_PART]
        lower = _lower(text)
        # Any part of that length holds one of these: with none in it, as ever, that is all.
        half = LEAST_QUOTED // 2
        starts = (
            (form, at) for form in forms for at in range(0, max(1, len(form) - half + 1), half)
        )
        if not any(form[at : at + half].lower() in lower for form, at in starts):
            return text
        return _without(text, forms, LEAST_QUOTED)

    def clean(self, text: str) -> str:
        """One short printable line of `text`, without secrets, whole, escaped or in parts."""
        plain = re.sub(r"\\u([0-9a-fA-F]{4})", lambda code: chr(int(code[1], 16)), text[:4000])
        return printable(_without(plain, self._forms, LEAST_PART))


def _without(text: str, forms: Iterable[str], least: int) -> str:
    """`text` with *** for each form in it and each part of one that has `least` characters.

    Capitals and small letters count as one, but of a short form (EMPTY), which could be a word.
    """
    lower = _lower(text)
    hidden = [False] * len(text)
    for form in forms:
        within = text
        if len(form) >= LEAST_PART:
            form, within = form.lower(), lower
        size = min(least, len(form))
        for start in range(len(form) - size + 1):
            part = form[start : start + size]
            at = within.find(part)
            while at >= 0:
                hidden[at : at + size] = [True] * size
                at = within.find(part, at + 1)
    runs = groupby(zip(hidden, text, strict=True), key=lambda pair: pair[0])
    return "".join(MASKED if hide else "".join(c for _, c in run) for hide, run in runs)


def _lower(text: str) -> str:
    """`text` in small letters, each in its place: of some letters they are two."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(small if len(small := one.lower()) == 1 else one for one in text)
