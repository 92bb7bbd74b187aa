"""Text from outside: what UTF-8 holds, what a terminal may get, and what must not be shown."""

import codecs
import os
import re
import unicodedata
from pathlib import Path
from shlex import quote
from urllib.parse import parse_qsl, unquote, urlsplit

MASKED = "***"

HARMLESS_HEADERS = frozenset(
    {
        "accept",
        "accept-language",
        "anthropic-beta",
        "anthropic-version",
        "content-type",
        "http-referer",
        "openai-organization",
        "openai-project",
        "referer",
        "user-agent",
        "x-title",
    }
)
"""Headers whose values may stand in a file; every other header's comes from the environment."""

_SECRET_NAME = re.compile(
    r"api[-_. ]?key|secret|passw|credential|authorization|cookie|signature|private[-_. ]?key"
    r"|(access|auth|bearer|refresh|session)token$"
    r"|(^|[-_. ])(access|token|key|sig|auth|bearer|pat)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"(?i:bearer|basic) (?![a-z]+[.,:;!?]?$)\S{8,}"
    r"|(sk-|ghp_|gho_|github_pat_|hf_|xox[abp]-|AIza|eyJ)[\w.-]{16,}"
)
_BEGINS_AS_KEYS = re.compile(r"(sk|hf|gh[a-z])[-_]|(bearer|basic) ", re.IGNORECASE)
"""What is typed with such a beginning is not said, though it be too short for a key."""

_INNER = re.compile(r"([\w.-]+)['\"]?\s*[:=]\s*\{?\s*([^\s{},\]][^{},\]]*)")
"""What stands under a name in braces."""

_USER = re.compile(r"(?<=://)[^/@\s]+@")
_SURROGATES = re.compile("[\ud800-\udfff]")
LEAST_SECRET = 8
"""Characters: an environment variable shorter than this would be found in any text."""


def surrogate_at(text: str) -> int | None:
    """Where `text` has half of a surrogate pair, which UTF-8 can't hold; None when it has none."""
    found = _SURROGATES.search(text)
    return found.start() if found else None


def well_formed(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair."""
    return _SURROGATES.sub("\ufffd", text)


_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # first: it begins as the next one does
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF32_BE: "utf-32",
}
"""What a file in another encoding than UTF-8 begins with, where it says so itself."""


def encoding_of(beginning: bytes) -> str:
    """The encoding that a file's first four bytes say it has; of one that says nothing, UTF-8."""
    marked = (name for mark, name in _MARKS.items() if beginning.startswith(mark))
    return next(marked, "utf-8-sig")


def not_utf8(line: bytes, error: UnicodeDecodeError, file: object) -> str:
    """Where a line of a file is not UTF-8, what it likely is, and what to do.

    Likely is Windows' encoding of Western Europe, which Excel writes into a .csv. A guess is shown
    and not read: the text that it makes may look right and be another.
    """
    at = error.start
    told = f"not UTF-8 (byte {at + 1} is 0x{line[at]:02x})"
    path = Path(str(file))
    name, new = (quote(str(each)) for each in (path, path.with_stem(path.stem + "-utf8")))
    if b"\0" in line:
        return f"{told}, likely UTF-16: convert it: iconv -f UTF-16LE -t UTF-8 {name} > {new}"
    try:
        read = line.decode("cp1252")
    except UnicodeDecodeError:
        return f"{told}: save it as UTF-8, or convert it with iconv from what it is in"
    shown = printable(read[max(0, at - 20) : at + 20])
    return (
        f"{told}, likely CP1252, in which it reads “{shown}”: save it as UTF-8 (Excel: “CSV "
        f"UTF-8”), or convert it: iconv -f CP1252 -t UTF-8 {name} > {new}"
    )


def blank(text: str) -> bool:
    """Whether nothing of `text` shows: spaces, and what has no width."""
    return all(one.isspace() or unicodedata.category(one) in ("Cf", "Cc") for one in text)


def printable(text: str, limit: int = 300) -> str:
    r"""One line of `text`, at most `limit` characters: no control character reaches a terminal.

    >>> printable("red \x1b[31m\nalert")
    'red \\x1b[31m alert'
    """
    line = " ".join(text[: 4 * limit].split())
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return "".join(shown)[:limit]


def counted(count: int, one: str, several: str | None = None) -> str:
    """A number of things, in their right form; `several` is `one` with an s where it isn't given.

    >>> counted(1, "answer"), counted(2000, "answer"), counted(2, "prompt has", "prompts have")
    ('1 answer', '2000 answers', '2 prompts have')
    """
    return f"{count} {one if count == 1 else several or one + 's'}"


def secret_name(name: str) -> bool:
    """Whether what has this name is secret: OPENAI_API_KEY is, max_tokens and key_env are not.

    However it is written: Authorization, AUTHORIZATION, Api_Key, subscriptionKey.
    """
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name)
    found = _SECRET_NAME.search(name) or _SECRET_NAME.search(parted)
    return bool(found) and not name.casefold().endswith("_env")


def _are_headers(name: str) -> bool:
    return name.casefold() == "headers"


def _may_be_said(header: str) -> bool:
    return header.casefold() in HARMLESS_HEADERS


def secret_value(text: str) -> str | None:
    """Why `text` looks secret: it has the form of a key, or holds an environment's secret."""
    for name, value in os.environ.items():
        value = value.strip()
        known = secret_name(name) and len(value) >= LEAST_SECRET
        if known and value.casefold() in text.casefold():
            return f"the value of the environment variable {name}"
    return "what looks like a key" if _SECRET_VALUE.fullmatch(text) else None


def secret_query(url: str) -> str | None:
    """The name of the first part of a URL's query that looks secret."""
    query = parse_qsl(urlsplit(url).query, keep_blank_values=True)
    return next((name for name, value in query if _secret_part(name, value)), None)


def secret_segment(url: str) -> bool:
    """Whether a part of a URL's path has the form of a key."""
    return any(map(_SECRET_VALUE.fullmatch, map(unquote, urlsplit(url).path.split("/"))))


def _secret_part(name: str, value: str) -> bool:
    plain = unquote(name)
    named = secret_name(plain) or plain.casefold() == "code"
    return named or bool(_SECRET_VALUE.fullmatch(unquote(value)))


def secrets_in(key: str, value: str) -> list[str]:
    """What may not be said of a setting that was typed as `key=value`; `key` is dotted.

    That is all of it under a secret's name, among headers, and where it begins as keys do; what
    stands under such a name in braces; and a URL's user and password and what is secret in its
    query, of a base_url all the query.

    >>> secrets_in("teacher.base_url", "http://me:pw@h/v1?sig=1")
    ['me:pw', 'sig=1', '1']
    >>> secrets_in("+teacher.extra_body", "{a: {b: 1}, Api_Key: x y}")
    ['x y']
    """
    *above, name = key.split(".")
    bare = value.strip("'\"")
    if not bare:
        return []
    if any(map(_are_headers, above[-1:])):
        whole = not bare.startswith("env:") and not _may_be_said(name)
    else:
        whole = _are_headers(name) or secret_name(name)
    found = [value, bare] if whole or _BEGINS_AS_KEYS.match(bare) else []
    for inner, text in _INNER.findall(value) if "{" in value else ():
        if secret_name(inner) or _are_headers(inner):
            found.append(text.strip(" '\""))
    if "://" in value:
        found += re.findall(r"://(\S*)@", value)
        if name.casefold() == "base_url":
            found += re.findall(r"\?([^\s'\"]+)", value)
        for part, secret in re.findall(r"[?&]([^=&#\s]+)=([^&#\s'\"]+)", value):
            found += [secret] if _secret_part(part, secret) else []
    return list(dict.fromkeys(found))


def hide(text: str, secret: str) -> str:
    """`text` without `secret`, as it stands, as Python shows it or with its quotes escaped.

    In capitals or small letters, or folded into lines, it is the same secret.
    """
    forms = {secret, repr(secret)[1:-1], secret.replace('"', '\\"')}
    for form in sorted(forms, key=len, reverse=True):
        pattern = r"[\s\\]+".join(map(re.escape, form.split())) or re.escape(form)
        if len(form) < 4:  # inside of a word it would be found in any text
            pattern = rf"(?<!\w){pattern}(?!\w)"
        text = re.sub(pattern, MASKED, text, flags=re.IGNORECASE)
    return text


def mask(text: str) -> str:
    """`text` as it may be printed: what is secret in it becomes ***.

    Secret are the value of each secret of the environment, passwords and keys in a URL, and all of
    it where it has the form of a key.
    """
    if _SECRET_VALUE.fullmatch(text):
        return MASKED
    for variable, secret in os.environ.items():
        secret = secret.strip()
        if secret_name(variable) and len(secret) >= LEAST_SECRET:
            text = hide(text, secret)
    if "://" in text:
        text = _USER.sub(f"{MASKED}@", text)
        text = re.sub(
            r"([?&])([^=&#\s]+)=([^&#\s]+)",
            lambda found: (
                f"{found[1]}{found[2]}={MASKED if _secret_part(found[2], found[3]) else found[3]}"
            ),
            text,
        )
        text = re.sub(
            r"(?<=/)[^/?#\s]+",
            lambda found: MASKED if _SECRET_VALUE.fullmatch(unquote(found[0])) else found[0],
            text,
        )
    return text
