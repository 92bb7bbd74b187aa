"""The bridge from Hydra: schemas in, checked settings and bound functions out."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from pujax.errors import ConfigError, require
from pujax.teacher.settings import TeacherConfig

T = TypeVar("T")


def conf_dir() -> str:
    """The absolute path of the YAML tree: inside the installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "train.yaml").is_file():
            return str(candidate)
    raise ConfigError(f"no conf/train.yaml beside {package}: reinstall pujax")


def register(name: str, schema: type) -> None:
    """Make `schema` the Hydra schema `name`, so that composition rejects wrong keys and types."""
    node = OmegaConf.structured(schema)
    _unlock(node)  # a frozen dataclass is read-only at every level, which stops composition
    ConfigStore.instance().store(name=name, node=node)


def _unlock(node: DictConfig) -> None:
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(child, DictConfig):
            _unlock(child)


def from_hydra(schema: type[T], composed: DictConfig) -> T:
    """The composed settings as an instance of `schema`, every value present and checked.

    Raises `ConfigError` for a missing mandatory value, naming its key.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"missing value for {', '.join(missing)}: set it as KEY=VALUE")
    for key in _foreign(composed):
        raise ConfigError(f"{key}: no such setting: take it out")
    settings = OmegaConf.to_object(composed)
    if not isinstance(settings, schema):
        raise ConfigError(f"composed {type(settings).__name__}, need {schema.__name__}")
    return settings


def _foreign(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted keys that were added (`+key=value`) to a record that has no such field."""
    schema = OmegaConf.get_type(node)
    if schema is None or not is_dataclass(schema):
        return
    known = {field.name for field in fields(schema)}
    for key in node:
        if key not in known:
            yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _foreign(child, f"{prefix}{key}.")


def build(node: Any, key: str) -> Callable[..., Any]:
    """The function that `node` names by `_target_`, its other entries bound as keywords.

    Entries that are themselves nodes with a `_target_` are built first. Raises `ConfigError`
    naming `key` for an unknown function, an unknown keyword or a missing one.
    """
    from hydra.utils import instantiate

    try:
        function = instantiate(node, _convert_="all")
    except Exception as error:
        cause = error.__cause__ or error
        raise ConfigError(f"{key}: cannot build {node.get('_target_')!r}: {cause}") from error
    _check_bound(function, key)
    return function


def build_loss(node: Any) -> tuple[Callable[..., Any], dict[str, bool]]:
    """The loss that `node` names, and what its `needs` says (see `needs_of`).

    Raises `ConfigError` as `build` does, and for `needs` of another form.
    """
    entries = dict(node)
    needs = dict(entries.pop("needs", None) or {})
    for name, said in needs.items():
        require(
            name in ("anchor", "reference") and isinstance(said, bool),
            f"loss.needs.{name}",
            said,
            "say `needs: {anchor: true}`, {reference: true} or both",
        )
    return build(entries, "loss"), needs


def with_protocol(teacher: TeacherConfig) -> TeacherConfig:
    """`teacher` with the function that its `protocol` names. Raises `ConfigError`."""
    if teacher.protocol is None:
        return teacher
    return replace(teacher, protocol=build(teacher.protocol, "teacher.protocol"))


def _check_bound(function: Any, key: str) -> None:
    """`functools.partial` takes any keyword silently: hold what it bound against the signature."""
    keywords = dict(getattr(function, "keywords", {}))
    target = getattr(function, "func", function)
    parameters = inspect.signature(target).parameters
    choices = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    unknown = sorted(set(keywords) - set(choices))
    if unknown:
        raise ConfigError(f"{key}: {target.__name__} has no {unknown}; it takes {sorted(choices)}")
    unset = [
        name
        for name, parameter in choices.items()
        if name not in keywords and parameter.default is inspect.Parameter.empty
    ]
    if unset:
        raise ConfigError(f"{key}: {target.__name__} also needs {unset}")
    for name, value in keywords.items():
        for part in value if isinstance(value, list | tuple) else [value]:
            if hasattr(part, "func"):
                _check_bound(part, f"{key}.{name}")
