"""What the teacher is, how it is asked and where prompts are: settings that check themselves."""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from pujax.errors import ConfigError, one_of, require
from pujax.text import HARMLESS_HEADERS, secret_name, secret_query, secret_segment, secret_value


@dataclass(frozen=True)
class PriceConfig:
    """What a million tokens cost, in any one currency; null when unknown.

    Attributes:
        input: of a million tokens of prompts; null when unknown.
        output: of a million tokens of answers; null when unknown.
    """

    input: float | None = None
    output: float | None = None

    def __post_init__(self) -> None:
        for key in ("input", "output"):
            value = getattr(self, key)
            known = value is not None
            require(not known or 0 <= value < math.inf, f"teacher.price.{key}", value, ">= 0")


@dataclass(frozen=True)
class TeacherConfig:
    """The black box: a server at `base_url`, what is on this disk at `path`, or neither (replay).

    `model` and the sampling parameters (`system`, `temperature`, `max_tokens`, `extra_body`) are
    part of an anchor's key, so an answer is asked for again when one of them changes.

    Attributes:
        protocol: the function, by `_target_`, that opens the teacher; null is OpenAI's over HTTP.
        base_url: a server's address, up to the protocol's own path (such as /chat/completions).
        path: a model on this disk, with teacher=local: a Hugging Face directory, a GGUF file or
            package://NAME/FILE; with teacher=recorded a file of answers.
        model: the teacher's name there; in a replay, whose answers to take.
        api_key_env: the NAME of the environment variable that holds the key.
        api_key: never set; it is here to be refused without being shown.
        system: a system message, or @FILE, before each prompt's own.
        temperature: sampling temperature; null leaves it to the server.
        max_tokens: the longest answer, in tokens; null leaves it to the server.
        extra_body: more of the request's body, such as {top_p: 0.9}.
        headers: more headers; a value `env:NAME` is read from the environment.
        thoughts: what becomes of a leading <think> block: strip, keep, or fail the answer.
        price: what tokens cost.
    """

    protocol: Any = None
    base_url: str | None = None
    path: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    api_key: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    thoughts: str = "strip"
    price: PriceConfig = field(default_factory=PriceConfig)

    def __post_init__(self) -> None:
        self._refuse_secrets()
        require(
            self.base_url is None or self.path is None,
            "teacher.path",
            self.path,
            "set teacher.base_url or teacher.path, not both",
        )
        require(
            self.path is None or self.protocol is not None,
            "teacher.path",
            self.path,
            "a model on this disk needs teacher=local, a file of answers teacher=recorded",
        )
        if self.base_url is not None:
            require(
                self.base_url.startswith(("http://", "https://")),
                "teacher.base_url",
                self.base_url,
                "must start with http:// or https://",
            )
        where = (
            "name the model: a Hugging Face directory, a GGUF file or package://NAME/FILE; with "
            "teacher=recorded the file of answers"
        )
        require(self.path != "", "teacher.path", self.path, where)
        if self.asks:
            require(bool(self.model), "teacher.model", self.model, "name the teacher's model")
        require(
            self.temperature is None or 0 <= self.temperature < math.inf,
            "teacher.temperature",
            self.temperature,
            "must be >= 0",
        )
        require(
            self.max_tokens is None or self.max_tokens > 0,
            "teacher.max_tokens",
            self.max_tokens,
            "must be positive",
        )
        one_of("teacher.thoughts", self.thoughts, ("strip", "keep", "fail"))
        longest = self.extra_body.get("max_completion_tokens")
        require(
            longest is None or (type(longest) is int and longest > 0),
            "teacher.extra_body.max_completion_tokens",
            longest,
            "must be a positive number",
        )
        named = {"model", "messages", "system", "temperature", "max_tokens"}
        ours = sorted(named & set(self.extra_body))
        require(
            not ours,
            "teacher.extra_body",
            ours,
            "these have settings of their own or are made here: take them out",
        )
        for key, only, remedy in (
            ("stream", False, "answers are read whole: leave it out, or set false"),
            ("n", 1, "one answer a prompt: leave it out, or set 1"),
        ):
            value = self.extra_body.get(key)
            same = type(value) is type(only) and value == only  # True == 1, and both are odd here
            require(value is None or same, f"teacher.extra_body.{key}", value, remedy)

    def _refuse_secrets(self) -> None:
        """Raise `ConfigError`, which shows no value, for a secret: settings are kept in files."""
        if self.api_key is not None:
            raise ConfigError(
                "teacher.api_key: a key is never a setting: put it into an environment variable "
                "and that one's name into teacher.api_key_env"
            )
        if self.api_key_env is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", self.api_key_env):
            # Someone may have put the key itself here.
            raise ConfigError(
                "teacher.api_key_env must be an environment variable's name (capitals, digits, "
                "underscores), such as OPENAI_API_KEY, never the key itself"
            )
        if self.base_url is not None:
            try:
                name = secret_query(self.base_url)
            except ValueError as error:
                raise ConfigError(f"teacher.base_url is not an address: {error}") from error
            if "#" in self.base_url:
                raise ConfigError(
                    "teacher.base_url has a part after #, which no server gets: take it out"
                )
            if "@" in self.base_url:
                raise ConfigError("teacher.base_url holds a password: use teacher.api_key_env")
            segment = secret_segment(self.base_url)
            if name is not None or segment or secret_value(self.base_url):
                shown = "from the environment"
                if name is not None or segment:
                    shown = "in its path" if name is None else name
                if secret_value(shown):
                    shown = "in its query"
                raise ConfigError(
                    f"teacher.base_url holds a secret ({shown}): use "
                    "teacher.api_key_env, or a header as in +teacher.headers.NAME=env:VARIABLE"
                )
        for name, value in self.headers.items():
            harmless = name.casefold() in HARMLESS_HEADERS and not secret_value(value)
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
                raise ConfigError("teacher.headers: a header's name has letters, digits and -")
            if value.startswith("env:") and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", value[4:]):
                raise ConfigError(  # someone may have put the key itself here
                    f"teacher.headers.{name}: after env: comes an environment variable's name "
                    "(printable ASCII letters, digits, underscores), never the key itself"
                )
            if not value.startswith("env:") and not harmless:
                raise ConfigError(
                    f"teacher.headers.{name}: put the value into an environment variable and write "
                    f"env:VARIABLE here ({', '.join(sorted(HARMLESS_HEADERS))} may be plain)"
                )
            if not value.isascii() or not value.isprintable():
                raise ConfigError(f"teacher.headers.{name}: must be printable ASCII")
        for place, value in _leaves(self.extra_body, "teacher.extra_body"):
            why = secret_value(value) or secret_name(place.rsplit(".")[-1])
            if why:
                raise ConfigError(
                    f"{place} looks secret: settings are written to files; send a secret as a "
                    "header, +teacher.headers.NAME=env:VARIABLE"
                )
        for setting, text in (("system", self.system), ("model", self.model)):
            why = secret_value(text) if text is not None else None
            prose = setting == "system" and re.match("(?i:bearer|basic) ", text or "")
            if why is not None and "environment" in why:
                raise ConfigError(f"teacher.{setting} holds an environment's secret: take it out")
            if why is not None and not prose:
                raise ConfigError(f"teacher.{setting} holds what looks like a key: take it out")

    @property
    def asks(self) -> bool:
        """Whether there is a teacher to ask; a replay has the store alone."""
        return self.base_url is not None or self.path is not None

    @property
    def place(self) -> str | None:
        """Where the teacher is asked: its address, or the path of a local one."""
        return self.base_url or self.path

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings that change what the teacher says."""
        return {
            "system": self.system,
            "temperature": None if self.temperature is None else float(self.temperature),
            "max_tokens": self.max_tokens,
            **dict(self.extra_body),
        }

    @property
    def asked(self) -> dict[str, Any]:
        """What names an answer beside its messages: see `messages_key`."""
        return {"model": self.model, "sampling": self.sampling}


def _leaves(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every text in nested settings, with its dotted key."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part, place)
    elif isinstance(value, str):
        yield place, value


MOST_AT_ONCE = 4096
"""Requests in flight: each has a connection of its own, and an open file with it."""


@dataclass(frozen=True)
class BudgetConfig:
    """What one collection may spend at most; null is no limit.

    Attributes:
        requests: requests, retries among them.
        tokens: tokens of prompts and answers together.
        money: in the currency of `teacher.price`.
    """

    requests: int | None = None
    tokens: int | None = None
    money: float | None = None

    def __post_init__(self) -> None:
        for key in ("requests", "tokens", "money"):
            value = getattr(self, key)
            known = value is not None
            require(not known or value > 0, f"collect.budget.{key}", value, "must be positive")

    def __str__(self) -> str:
        """The limits as they are typed."""
        known = {key: value for key, value in vars(self).items() if value is not None}
        return ", ".join(f"collect.budget.{key}={value}" for key, value in known.items())


@dataclass(frozen=True)
class CollectConfig:
    """How the teacher is asked: pace, patience and budget.

    Attributes:
        concurrency: requests in flight at most, up to 4096.
        requests_per_minute: requests begun at most; null is no limit.
        tokens_per_minute: tokens of prompts and answers, as estimated; null is no limit.
        retries: how often a request that failed is tried again.
        timeout: seconds that one request may take.
        budget: what may be spent.
        dry_run: tell what it would take, and ask nothing.
        retry_failed: ask again for what was refused, filtered or empty.
    """

    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    retries: int = 8
    timeout: float = 120.0
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    dry_run: bool = False
    retry_failed: bool = False

    def __post_init__(self) -> None:
        for key in ("concurrency", "timeout", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, key)
            require(value is None or value > 0, f"collect.{key}", value, "must be positive")
        require(
            self.concurrency <= MOST_AT_ONCE,
            "collect.concurrency",
            self.concurrency,
            f"at most {MOST_AT_ONCE}, since each has a connection of its own",
        )
        require(self.retries >= 0, "collect.retries", self.retries, "must not be negative")


MAPPED = (
    *("id", "prompt", "messages", "answer", "kind"),
    *("chosen", "rejected", "responses", "ratings", "completion", "label"),
)
"""Our names of a data set's columns: those of a prompt, and those of preferences."""


@dataclass(frozen=True)
class DatasetConfig:
    """Prompts from `datasets.load_dataset(dataset, name, split=split, data_files=data_files)`.

    Attributes:
        dataset: a name on the hub, a folder, or a kind of file such as json.
        name: which of its configurations.
        split: which of its splits.
        data_files: the files, for a kind of file.
        slice: which rows, as in "100:200".
        columns: from our names (`MAPPED`) to the dataset's.
        template: the prompt, made from a row's columns as in "{question} Be brief."
    """

    dataset: str = MISSING
    name: str | None = None
    split: str = "train"
    data_files: str | None = None
    slice: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    place: InitVar[str] = "data.prompts"  # whose setting it is, for errors

    def __post_init__(self, place: str) -> None:
        for key in ("dataset", "name", "split", "data_files", "slice", "template"):
            value = getattr(self, key)
            is_text = isinstance(value, str) or (value is None and key not in ("dataset", "split"))
            require(is_text, f"{place}.{key}", value, "write a text")
        require(self.dataset not in ("", MISSING), f"{place}.dataset", "", "name a dataset")
        are_texts = isinstance(self.columns, Mapping) and all(
            isinstance(part, str) for pair in self.columns.items() for part in pair
        )
        remedy = "write our name and theirs, as in {prompt: question}"
        require(are_texts, f"{place}.columns", self.columns, remedy)
        require(
            self.slice is None or re.fullmatch(r"\d*:\d*", self.slice) is not None,
            f"{place}.slice",
            self.slice,
            "write START:STOP, such as 100:200",
        )
        unknown = sorted(set(self.columns) - set(MAPPED))
        require(not unknown, f"{place}.columns", unknown, f"choose from {sorted(MAPPED)}")


def dataset_of(mapping: Mapping[str, Any], place: str = "data.prompts") -> DatasetConfig:
    """What a mapping in place of files names, at the setting `place`.

    Raises `ConfigError` for a wrong key or value.
    """
    try:
        return DatasetConfig(**mapping, place=place)
    except TypeError as error:
        known = [field.name for field in fields(DatasetConfig)]
        wrong = next(str(key) for key in mapping if key not in known)
        near = difflib.get_close_matches(wrong, known, 1)
        told = f"no such key, did you mean {near[0]}?" if near else "no such key:"
        raise ConfigError(
            f"a dataset as a mapping: {wrong!r}: {told} its keys are {known}"
        ) from error


def check_source(key: str, source: Any) -> None:
    """Refuse what names neither files nor a dataset; None, and a list of none, are let through.

    Raises `ConfigError`.
    """
    if isinstance(source, Mapping):
        dataset_of(source, key)
        return
    named = source if isinstance(source, list) else [source]
    whole = source is None or all(isinstance(each, str | Path) and str(each) for each in named)
    remedy = "name a file, several as [A,B], or a dataset as {dataset: NAME}"
    require(whole, key, source, remedy)
