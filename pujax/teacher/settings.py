"""What the teacher is, how it is asked and where prompts are: settings that check themselves."""

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from pujax.errors import ConfigError, require


@dataclass(frozen=True)
class PriceConfig:
    """What a million tokens cost, in any one currency; null when unknown."""

    input: float | None = None
    output: float | None = None

    def __post_init__(self) -> None:
        for key in ("input", "output"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"teacher.price.{key}", value, "must be >= 0")


@dataclass(frozen=True)
class TeacherConfig:
    """The black box: an endpoint at `base_url`, a local model at `path`, or neither (replay).

    `model` and the sampling parameters (`system`, `temperature`, `max_tokens`, `extra_body`) decide
    an anchor's key. `api_key_env` names the environment variable that holds the key; a header's
    value `env:NAME` is read from the environment as well.
    """

    base_url: str | None = None
    path: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    price: PriceConfig = field(default_factory=PriceConfig)

    def __post_init__(self) -> None:
        require(
            self.base_url is None or self.path is None,
            "teacher.path",
            self.path,
            "set teacher.base_url or teacher.path, not both",
        )
        if self.base_url is not None:
            require(
                self.base_url.startswith(("http://", "https://")),
                "teacher.base_url",
                self.base_url,
                "must start with http:// or https://",
            )
            if "@" in self.base_url.split("/")[2]:  # the value holds a secret: do not show it
                raise ConfigError("teacher.base_url holds a password: use teacher.api_key_env")
        if self.base_url is not None or self.path is not None:
            require(bool(self.model), "teacher.model", self.model, "name the teacher's model")
        if self.api_key_env is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", self.api_key_env):
            # Someone may have put the key itself here: do not show the value.
            raise ConfigError(
                "teacher.api_key_env must be an environment variable's name (capitals, digits, "
                "underscores), such as OPENAI_API_KEY, never the key itself"
            )
        require(
            self.temperature is None or self.temperature >= 0,
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
        named = {"model", "messages", "system", "temperature", "max_tokens"}
        ours = sorted(named & set(self.extra_body))
        require(
            not ours,
            "teacher.extra_body",
            ours,
            "these have settings of their own or are made here: take them out",
        )
        for key, remedy in (("stream", "answers are read whole"), ("n", "one answer a prompt")):
            require(
                self.extra_body.get(key) in (None, False, 1),
                f"teacher.extra_body.{key}",
                self.extra_body.get(key),
                remedy,
            )


@dataclass(frozen=True)
class BudgetConfig:
    """What one collection may spend at most; null is no limit. Retries are requests too."""

    requests: int | None = None
    tokens: int | None = None
    money: float | None = None

    def __post_init__(self) -> None:
        for key in ("requests", "tokens", "money"):
            value = getattr(self, key)
            require(value is None or value > 0, f"collect.budget.{key}", value, "must be positive")


@dataclass(frozen=True)
class CollectConfig:
    """How the teacher is asked: pace, patience and budget. `timeout` is in seconds a request."""

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
        require(self.retries >= 0, "collect.retries", self.retries, "must not be negative")


@dataclass(frozen=True)
class DatasetConfig:
    """Prompts from `datasets.load_dataset(dataset, name, split=split, data_files=data_files)`.

    `slice` ("100:200") picks rows. `columns` maps ours (id, prompt, messages, answer, kind) to the
    dataset's; `template` makes the prompt from a row's columns, as in "{question} Be brief."
    """

    dataset: str = MISSING
    name: str | None = None
    split: str = "train"
    data_files: str | None = None
    slice: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    template: str | None = None

    def __post_init__(self) -> None:
        require(
            self.slice is None or re.fullmatch(r"\d*:\d*", self.slice) is not None,
            "data.prompts.slice",
            self.slice,
            "write START:STOP, such as 100:200",
        )
        ours = {"id", "prompt", "messages", "answer", "kind"}
        unknown = sorted(set(self.columns) - ours)
        require(not unknown, "data.prompts.columns", unknown, f"choose from {sorted(ours)}")


@dataclass(frozen=True)
class PromptsConfig:
    """Where prompts are: a file, a list of files, or a mapping with the keys of `DatasetConfig`."""

    prompts: Any = None


@dataclass(frozen=True)
class CollectRun:
    """Everything `python -m pujax.collect` is told. `stats` describes the store and asks nobody."""

    store: str = MISSING
    stats: bool = False
    data: PromptsConfig = field(default_factory=PromptsConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
