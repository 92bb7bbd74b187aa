"""The bridge from Hydra: schemas in, checked settings and bound functions out."""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

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


def shipped(path: str) -> str:
    """Where an experiment's file lies: below the folder one is in, as in a clone, or with pujax.

    What `${shipped:quickstart/train.jsonl}` stands for in conf/experiment/.
    """
    name, package = f"experiments/{path}", Path(__file__).resolve().parents[1]
    if not Path(name).is_file():
        for folder in (package, package.parent):
            if (folder / name).is_file():
                return str(folder / name)
    return name


OmegaConf.register_new_resolver("shipped", shipped, replace=True)


def register(name: str, schema: type) -> None:
    """Make `schema` the Hydra schema `name`, so that composition rejects wrong keys and types."""
    ConfigStore.instance().store(name=name, node=structured(schema))


@contextmanager
def offered(groups: Sequence[str]) -> Iterator[None]:
    """Within the block, Hydra knows the choices of these `groups` of `conf/`.

    For a command whose YAML lies further down. With `conf/` itself on its path Hydra would take
    each of the folders there for a group, and a setting called `model` could not be told a path.
    """
    root, repository = Path(conf_dir()), ConfigStore.instance().repo
    for path in (path for group in groups for path in sorted((root / group).rglob("*.yaml"))):
        text = path.read_text(encoding="utf-8")
        packaged = re.match(r"# @package (\S+)\n", text)
        ConfigStore.instance().store(
            name=path.stem,
            node=OmegaConf.create(text),
            group=str(path.parent.relative_to(root)),
            package=packaged and packaged[1],
        )
    try:
        yield
    finally:
        # Where the folders are on the path, Hydra would find each choice twice.
        for group in groups:
            repository.pop(group, None)


def structured(schema: type) -> DictConfig:
    """The node of a settings record, to merge values into."""
    node = OmegaConf.structured(schema)
    _unlock(node)  # a frozen dataclass is read-only at every level, which stops composition
    return node


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


OURS = (
    "pujax.method.",
    "pujax.rewards.",
    "pujax.evaluation.",
    "pujax.teacher.",
    "pujax.run.local_teacher.",
)
"""Where the functions live that settings may name, beside the packages in `trusted`."""


def build(node: Any, key: str, trusted: Sequence[str] = ()) -> Callable[..., Any]:
    """The function that `node` names by `_target_`, its other entries bound as keywords.

    Nothing is called, so a node says `_partial_: true`; entries that are nodes themselves are built
    first. Only functions of pujax and of the packages in `trusted` are looked for. Raises
    `ConfigError` naming `key` for anything else, an unknown keyword, a missing one, or a value of
    another type than the function's signature says.
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key}={node!r}: name a function by _target_, with _partial_: true")
    target: str = node["_target_"]
    module, _, name = target.rpartition(".")
    if not module:
        raise ConfigError(
            f"{key}: _target_: {target}: name it with its module, as in mine.{target}"
        )
    if node.get("_partial_") is not True:
        raise ConfigError(f"{key}: {target} is not called here: write _partial_: true beside it")
    if not target.startswith((*OURS, *(f"{name}." for name in trusted))):
        raise ConfigError(
            f"{key}: {target} is neither pujax's nor of a trusted package: if its code may run "
            f"here, set trusted=[{target.split('.')[0]}]"
        )
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # a package of the user's may fail in any way
        hint = ""
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            hint = ": its folder must be on PYTHONPATH, as this one is by PYTHONPATH=."
        raise ConfigError(f"{key}: cannot build {target!r}: {error}{hint}") from error
    if not (inspect.isfunction(inspect.unwrap(function)) or inspect.isclass(function)):
        raise ConfigError(f"{key}: {target} is a {type(function).__name__}, not a function")
    keywords = {
        str(name): _built(value, f"{key}.{name}", trusted)
        for name, value in node.items()
        if name not in ("_target_", "_partial_")
    }
    _check_bound(target, function, keywords, key)
    return functools.partial(function, **keywords)


def _built(value: Any, key: str, trusted: Sequence[str]) -> Any:
    """A keyword's value: a node as the function it names, alone or in a list."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_built(part, f"{key}[{i}]", trusted) for i, part in enumerate(value)]
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build(value, key, trusted)
        return {str(name): _built(part, f"{key}.{name}", trusted) for name, part in value.items()}
    return value


def build_loss(
    node: Any, trusted: Sequence[str] = ()
) -> tuple[Callable[..., Any], dict[str, bool]]:
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
    return build(entries, "loss", trusted), needs


def with_protocol(teacher: TeacherConfig, trusted: Sequence[str] = ()) -> TeacherConfig:
    """`teacher` with the function that its `protocol` names. Raises `ConfigError`."""
    if teacher.protocol is None:
        return teacher
    return replace(teacher, protocol=build(teacher.protocol, "teacher.protocol", trusted))


def _check_bound(target: str, function: Any, keywords: Mapping[str, Any], key: str) -> None:
    """`functools.partial` takes any keyword silently: hold those against the signature."""
    choices = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    name = target.rpartition(".")[2]
    unknown = sorted(set(keywords) - set(choices))
    before = [each for each in unknown if each in inspect.signature(function).parameters]
    if before:
        raise ConfigError(
            f"{key}: {name} takes {before[0]} as an argument, not as a setting: write a * before "
            f"it, as in def {name}(..., *, {', '.join(before)})"
        )
    if unknown:
        raise ConfigError(f"{key}: {name} has no {unknown}; it takes {sorted(choices)}")
    unset = [
        name
        for name, parameter in choices.items()
        if name not in keywords and parameter.default is inspect.Parameter.empty
    ]
    if unset:
        raise ConfigError(f"{key}: {name} also needs {unset}")
    try:
        wanted = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except Exception:  # an annotation that can't be read says nothing about the value
        return
    for name, value in keywords.items():
        if not _fits(value, wanted.get(name, Any)):
            what = _described(wanted[name])
            raise ConfigError(f"{key}.{name}={value!r}: write {what}")


TYPES: Mapping[Any, str] = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
}
"""The annotations that a setting's value is held against, and what each asks for."""


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a keyword's value is of the annotated type; any is where that is none we know."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Callable:
        return callable(value)
    if origin in (Sequence, list):
        return isinstance(value, list) and all(_fits(each, parts[0]) for each in value)
    if wanted in (int, float):
        numbers = int if wanted is int else int | float
        return isinstance(value, numbers) and not isinstance(value, bool)
    return wanted not in TYPES or isinstance(value, wanted)


def _described(wanted: Any) -> str:
    """What an annotation asks for, in a person's words."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return " or ".join(_described(part) for part in parts)
    if origin is Callable:
        return "a function, by _target_ with _partial_: true"
    if origin in (Sequence, list):
        return f"a list, each {_described(parts[0])}"
    return TYPES.get(wanted, str(wanted))
