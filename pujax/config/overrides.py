"""What was typed as KEY=VALUE, in Hydra's words: a text stays the text that it is.

Hydra reads a value by a grammar of its own, in which commas, colons, quotes, brackets and letters
with accents mean something or are not allowed, and 1e3 is a number. Which settings are texts, their
records say: what was typed for those is quoted here. What Hydra has words for is left to it: null,
a value in quotes of its own, and with -m a list of values to go through; and `${...}` of a setting
or of the environment, but in what a model reads, where any may be meant as it stands. That may
stand in a file too, which is named as @FILE.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, ListConfig, OmegaConf

from pujax.errors import ConfigError
from pujax.files.locate import at_home
from pujax.files.settings import leaves
from pujax.text import encoding_of, not_utf8

_TYPED = re.compile(r"(\+{0,2}[^=\s]+)=(.+)", re.DOTALL)
_QUOTED = re.compile(r"'([^'\\]|\\.)*'|\"([^\"\\]|\\.)*\"", re.DOTALL)
_LIST = re.compile(r"\[([^][{}'\"]+)\]", re.DOTALL)
_SEVERAL = re.compile(r"[^'\"]*,.*|(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)

LISTS = frozenset({"eval"})
"""The groups of which several choices stand side by side."""

READ = frozenset({"prompt", "system", "start", "task"})
"""What keys are called, after their last point, whose text a model reads."""


def in_hydra_words(
    overrides: Sequence[str], schema: type, groups: Collection[str], *, sweep: bool = False
) -> list[str]:
    """The overrides as Hydra is to read them, of a command with the settings `schema`.

    `groups` are its configuration groups, whose values name files. A setting that the schema leaves
    open, to take a text or a list of texts, is a text unless it stands in brackets or braces. A
    mapping of any names, such as data.dimensions, takes a new one without a plus. With `sweep`,
    commas part the values to go through. Raises `ConfigError`.
    """
    for given in overrides:
        _refuse_deletion(given, schema, groups)
    _refuse_lost_choices(overrides, groups)
    words = (_in_hydra_words(given, schema, groups, sweep) for given in overrides)
    return [f"++{word}" if _opens(word, schema) else word for word in words]


def _refuse_deletion(given: str, schema: type, groups: Collection[str]) -> None:
    """Raise `ConfigError` for a ~KEY of what every record of its kind has.

    Of a section Hydra would put the defaults in place of what an experiment says, and tell nobody.
    """
    key = given.removeprefix("~").partition("=")[0]
    above, _, name = key.rpartition(".")
    record = type_of(schema, above) if above else schema
    known = is_dataclass(record) and name in get_type_hints(record)
    if given.startswith("~") and known and key not in groups:
        raise ConfigError(f"{given}: a setting can't be taken out: give it another value")


def _refuse_lost_choices(overrides: Sequence[str], groups: Collection[str]) -> None:
    """Raise `ConfigError` for +GROUP= beside GROUP=, of which Hydra keeps GROUP= alone."""
    for group in LISTS & set(groups):
        chosen = [given for given in overrides if given.startswith(f"{group}=")]
        more = [given for given in overrides if given.startswith(f"+{group}=")]
        if chosen and more:
            names = (given.partition("=")[2].strip("[]") for given in (chosen[-1], *more))
            whole = ",".join(name for name in names if name != "null")
            raise ConfigError(f"{more[0]}: {chosen[-1]} names all there are: {group}=[{whole}]")


def _opens(word: str, schema: type) -> bool:
    """Whether a KEY=VALUE sets a mapping of any names, or a name of one."""
    key, sign, _ = word.partition("=")
    keys = (key, key.rpartition(".")[0])
    return bool(sign) and any(get_origin(type_of(schema, each)) is dict for each in keys)


def _in_hydra_words(given: str, schema: type, groups: Collection[str], sweep: bool) -> str:
    found = _TYPED.fullmatch(given)
    if found is None:
        return given
    key, value = found.groups()
    if (group := key.lstrip("+")) in groups:
        listed = _LIST.fullmatch(value)
        if group in LISTS:
            return given
        named = listed and "null" not in listed[1].lower().split(",")
        if value.startswith("[") and not named:
            raise ConfigError(f"{given}: a choice is a name, see --help: give one")
        several = listed[1] if listed else value
        if "," in several and value[0] not in "{'\"" and not (sweep and listed is None):
            raise ConfigError(f"{given}: choose one, or go through them with -m {key}={several}")
        return given
    if value.strip("'\"") == "???":
        raise ConfigError(f"{given}: ??? alone says that a value is missing: put a space beside it")
    kind = type_of(schema, key.lstrip("+"))
    if value.lower() == "null" or _QUOTED.fullmatch(value) or (sweep and _SEVERAL.fullmatch(value)):
        return given
    names = None if key.rpartition(".")[2] in READ else _references(schema)
    listed = _LIST.fullmatch(value)
    if listed and kind in (Any, list[str]):
        each = (_quoted(text.strip(), names) for text in listed[1].split(","))
        return f"{key}=[{','.join(each)}]"
    if kind is str or (kind is Any and not value.startswith(("[", "{"))):
        return f"{key}={_quoted(value, names)}"
    if kind is Any:  # a mapping, or a list of more than words
        parts = _QUOTED.sub(lambda found: _literal(found[0], names), value)
        return f"{key}={parts}"
    return given


def _quoted(text: str, names: re.Pattern[str] | None) -> str:
    """`text` as a quoted value; `${` in it is two characters, unless `names` says what it names."""
    return QuotedString(_literal(text, names), Quote.single).with_quotes()


def _literal(text: str, names: re.Pattern[str] | None) -> str:
    r"""`text` with every `${` escaped that begins no reference, and the backslashes before it."""

    def escaped(found: re.Match[str]) -> str:
        refers = names is not None and names.match(text, found.end())
        return found[0] if refers else found[1] * 2 + r"\${"

    return re.sub(r"(\\*)\$\{", escaped, text)


def _references(schema: type) -> re.Pattern[str]:
    """What follows `${` where that refers to something: a setting, the environment or Hydra."""
    names = "|".join(map(re.escape, get_type_hints(schema)))
    return re.compile(
        rf"\s*(({names})\s*(?=[.\[}}])|(oc\.\w+|hydra|now|shipped):|hydra\.)[^}}]*\}}"
    )


def type_of(schema: Any, key: str) -> Any:
    """What a dotted key of a settings record holds, null aside; None for a key that it has not."""
    for name in key.split("."):
        if is_dataclass(schema):
            schema = _given(get_type_hints(schema).get(name))
        elif get_origin(schema) is dict:
            schema = get_args(schema)[1] if get_args(schema)[1] is not Any else None
        else:
            return None
    return schema


def kinds_of(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a settings record and what it holds, null aside."""
    for name, annotation in get_type_hints(schema).items():
        kind = _given(annotation)
        yield prefix + name, kind
        if is_dataclass(kind):
            assert isinstance(kind, type)
            yield from kinds_of(kind, f"{prefix}{name}.")


def _given(annotation: Any) -> Any:
    """A type without its null."""
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else None
    return annotation


# ---------------------------------------------------------------------- a text in a file


LONGEST = 2**24
"""Bytes of a text in a file, more than any model reads: a pipe may never end."""


def text_or_file(key: str, value: str) -> str:
    """A text, as it stands or from the file that `@FILE` names, without that one's last newline.

    `@-` is standard input. Raises `ConfigError`.
    """
    if not value.startswith("@"):
        return value
    if value.startswith("@@"):
        return value[1:]
    file = Path("/dev/stdin") if value == "@-" else at_home(value[1:])
    try:
        with file.open("rb") as opened:
            device = file.is_char_device() or file.is_block_device()  # some never end
            whole = b"" if device else opened.read(LONGEST + 1)
        if device or len(whole) > LONGEST:
            raise ValueError("a device" if device else f"more than {LONGEST} bytes")
        text = whole.decode(encoding_of(whole[:4]))
        return text.replace("\r\n", "\n").removesuffix("\n")
    except (OSError, ValueError) as error:
        told = str(error)
        if isinstance(error, UnicodeDecodeError):
            told = not_utf8(whole, error, file)
        reason = getattr(error, "strerror", None) or told
        raise ConfigError(
            f"{key}={value}: {reason}: name a file of text, or write @@ where a text begins with @"
        ) from error


def with_files_read(composed: DictConfig, typed: Sequence[str]) -> None:
    """Put into the composed settings, for each @FILE `typed` that a model is to read, its text.

    Settings keep the text, so that a run that goes on, and whoever reads them, needs no file of
    that name. In YAML an @ is a letter like others. Raises `ConfigError`.
    """
    for key in {given.partition("=")[0].lstrip("+") for given in typed}:
        value = OmegaConf.select(composed, key) if key.rpartition(".")[2] in READ else None
        if isinstance(value, str):
            OmegaConf.update(composed, key, _literal(text_or_file(key, value), None))


# ---------------------------------------------------------------------- a path at home


PATHS = frozenset(
    {
        *("prompts", "heldout", "anchors", "preferences", "dataset", "data_files"),
        *("root", "dir", "resume", "reference_cache", "store", "merge", "out", "schema"),
    }
)
"""What keys are called, after their last point, that name files: of any kind, or several."""


def with_paths_home(composed: DictConfig) -> None:
    """Put into the composed settings what a leading ~/ of a path stands for.

    No shell writes it out behind a key with a point, as in data.prompts=~/mine.jsonl. Raises
    `ConfigError` for the home of nobody.
    """
    given = leaves(OmegaConf.to_container(composed, resolve=False))
    for key in {key for key, value in given if re.match("~[^/]*/", str(value))}:
        if key.rpartition(".")[2] in PATHS and (value := OmegaConf.select(composed, key)):
            OmegaConf.update(composed, key, _home(value))


def _home(value: Any) -> Any:
    if isinstance(value, ListConfig):
        return [_home(each) for each in value]
    if isinstance(value, str) and value.startswith("~"):
        return _literal(str(at_home(value)), None)
    return value
