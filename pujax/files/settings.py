"""A run's settings, as its directory keeps them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pujax.errors import ConfigError
from pujax.files.durable import write_whole
from pujax.text import secret_name, secret_value

SETTINGS, SWEPT, DONE = "config.yaml", "swept.json", "done"
"""Files of a run: all its settings; those that its sweep gave to it alone, as they were typed; and
an empty one that says that it is done."""

UNTOUCHED = (
    "run",
    "resume",
    "trusted",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.clean",
    "log",
    "mesh",
    "distributed",
    "collect",
)
"""Settings that don't touch a run's numbers.

A mesh adds in another order, so with another one numbers agree to float32's last digits.
"""


MOVED = {
    "pujax.labels.": "pujax.method.labels.",
    "pujax.losses.": "pujax.method.losses.",
    "pujax.scoring.": "pujax.method.scoring.",
    "pujax.run.local_teacher.": "pujax.inference.local_teacher.",
}
"""What the settings of older runs call a module, and what it is called now."""

PAIR_LOSSES = ("distill", "dpo", "e_dpo", "gamma_dpo", "ipo", "kto", "orpo", "simpo", "slic")
MOVED_ALONE = {
    f"pujax.method.losses.{name}": f"pujax.method.pair_losses.{name}" for name in PAIR_LOSSES
}
"""The same of single functions, after `MOVED`: their former module is there still."""


def named_now(settings: Any) -> Any:
    """Settings of any age, their `_target_`s under the names that pujax's functions have now."""
    if isinstance(settings, Mapping):
        return {
            key: _moved(value) if key == "_target_" else named_now(value)
            for key, value in settings.items()
        }
    return [named_now(each) for each in settings] if isinstance(settings, list) else settings


def _moved(target: Any) -> Any:
    if not isinstance(target, str):
        return target
    for before, now in MOVED.items():
        if target.startswith(before):
            target = now + target.removeprefix(before)
    return MOVED_ALONE.get(target, target)


def refuse_secrets(settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError`, which shows no value, for a setting outside of `teacher` that is secret.

    A run writes its settings into its directory, its report and its model's card, and is known
    again by them: one that was masked would be another. A teacher's are held by its own record.
    """
    for key, value in leaves(settings):
        if key.partition(".")[0] == "teacher":
            continue
        named = isinstance(value, str) and value and secret_name(key.rpartition(".")[2])
        why = secret_value(str(value)) or ("what its name says is secret" if named else None)
        if why is not None:
            raise ConfigError(
                f"{key} holds {why}, and a run writes its settings down: take it out, and let what "
                "needs it read the environment"
            )


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested settings with its dotted key, which those of a list share."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from leaves(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part, key)
    else:
        yield key, value


def keep_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Write a run's resolved settings into its directory. Raises `DiskError`."""
    text = yaml.dump(settings, Dumper=_WithoutAliases, sort_keys=False, allow_unicode=True)
    write_whole(directory / SETTINGS, text.encode())


class _WithoutAliases(yaml.SafeDumper):
    """Of a list that stands in two places, both in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _NoAliases(yaml.SafeLoader):
    """What `keep_settings` writes: an alias can hold itself, or more than fits into a memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"an alias, *{alias.anchor}, which no run writes")
        return super().compose_node(parent, index)


TORN = (
    *(yaml.YAMLError, ValueError, RecursionError, OSError),
    *(LookupError, AttributeError, TypeError, ArithmeticError),
)
"""What reading a YAML file of anybody's can raise: the second line is PyYAML's own (6.0), for
`!!bool x`, a code point that is none, a number beyond floats, and their like."""


def kept_settings(directory: Path) -> dict[str, Any]:
    """The settings that a run's directory keeps, by name: nothing is resolved.

    Functions have today's names (see `named_now`). Raises `ConfigError` where there are no
    settings, or they are torn or of another form.
    """
    path = directory / SETTINGS
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_NoAliases)
        if isinstance(settings, dict):
            settings = {str(key): named_now(value) for key, value in settings.items()}
        repr(settings)  # an integer can have more digits than Python writes out
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{path} is not there: is {directory} a run's directory?") from error
    except TORN as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _not_settings(path, f" ({why})") from error
    if not isinstance(settings, dict):
        raise _not_settings(path, " by name")
    if not settings:
        raise _not_settings(path, ": there are none in it")
    return settings


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested settings by dotted key."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    items: dict[str, Any] = {}
    for key, part in value.items():
        items |= flat(part, f"{prefix}.{key}" if prefix else str(key))
    return items


def only_preferred(settings: Mapping[str, Any]) -> bool:
    """Whether a run of these settings learnt from given responses alone: no teacher, no scorer."""
    data = settings.get("data")
    return isinstance(data, Mapping) and bool(data.get("preferences")) and not data.get("prompts")


def of_asking(key: str) -> bool:
    """Whether a setting is one of how a teacher is asked, and not of which model it is."""
    return key.startswith("teacher") and key != "teacher.model"


def within(key: str, keys: Iterable[str]) -> bool:
    """Whether a dotted key is one of `keys`, or below one."""
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def _not_settings(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path}: not settings{why}: restore it, or begin another run: move {path.parent} away"
    )
