"""The bridge from Hydra: schemas in, checked settings out."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra._internal import hydra as application_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf

from pujax.errors import ConfigError
from pujax.files.settings import leaves
from pujax.text import secret_name, variables

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


SILENT = {"version": 1, "root": None, "disable_existing_loggers": False}
"""Hydra's choice `none` of what it logs, which every command makes."""


class WaryLoader(ConfigLoaderImpl):
    """Hydra's composing, which refuses settings by which Hydra would call what they name.

    That would be before any check of ours. Overridden, since Hydra asks nobody between composing
    and calling; the processes of a launcher get this loader too, and compose by it.
    """

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *given: Any, **named: Any
    ) -> DictConfig:
        """The settings composed. Raises `ConfigError` as `refuse_calls` does."""
        composed = super().load_configuration(config_name, overrides, *given, **named)
        if config_name is not None or overrides:  # else they are Hydra's own, as --hydra-help asks
            refuse_calls(composed.hydra)
        return composed


@contextmanager
def wary() -> Iterator[None]:
    """Within the block, Hydra composes by `WaryLoader`."""
    application: Any = application_module
    before = application.ConfigLoaderImpl
    application.ConfigLoaderImpl = WaryLoader
    try:
        yield
    finally:
        application.ConfigLoaderImpl = before


def refuse_calls(hydra: DictConfig) -> None:
    """Raise `ConfigError` for what in Hydra's own settings has it call, or write, what they name.

    That is callbacks; logging, whose handlers are built by name and open files; a `_target_` within
    a sweeper's or a launcher's settings (Hydra holds their own against its plugins); and a folder
    for Hydra's copy of all settings.
    """
    remedy = "it may come from a file that somebody else wrote: take it out"
    if hydra.callbacks:
        names = ", ".join(map(str, hydra.callbacks))
        raise ConfigError(f"hydra.callbacks ({names}): Hydra would call what it names; {remedy}")
    for key in ("hydra_logging", "job_logging"):
        if OmegaConf.to_container(hydra[key]) != SILENT:
            raise ConfigError(f"hydra.{key}: pujax logs nothing by it, leave it at none; {remedy}")
    for key in ("launcher", "sweeper"):
        for place in _targets(hydra[key], f"hydra.{key}"):
            if place != f"hydra.{key}._target_":
                raise ConfigError(f"{place}: Hydra would call what it names; {remedy}")
    if hydra.output_subdir is not None:
        raise ConfigError(f"hydra.output_subdir: a run keeps its own settings; {remedy}")


def _targets(node: Any, key: str) -> Iterator[str]:
    """The dotted key of each `_target_` below a node, also of those that a reference leads to."""
    if not isinstance(node, DictConfig | ListConfig) or node._is_none():
        return
    nodes: Any = node
    for name in nodes if isinstance(node, DictConfig) else range(len(node)):
        child = nodes._get_node(name)
        if child is not None and child._is_interpolation():
            child = child._maybe_dereference_node()  # None where there is nothing yet
        if name == "_target_":
            yield f"{key}.{name}"
        yield from _targets(child, f"{key}.{name}")


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

    Raises `ConfigError` for a missing mandatory value, naming its key, and for what the environment
    calls a secret, which no setting but the teacher's may take; and for a NUL character, or bytes
    that are not UTF-8, which no file of ours could hold.
    """
    for key, value in leaves(OmegaConf.to_container(composed, resolve=False)):
        if "\0" in str(value):
            raise ConfigError(f"{key}: has a NUL character, which no path or text may: take it out")
        for name in variables(str(value)) if key.partition(".")[0] != "teacher" else ():
            if secret_name(name):
                raise ConfigError(
                    f"{key} takes the environment variable {name}, a secret by its name: take it "
                    "out, and let what needs it read the environment"
                )
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"missing value for {', '.join(missing)}: set it as KEY=VALUE")
    for key in _foreign(composed):
        raise ConfigError(f"{key}: no such setting: take it out")
    for key, value in leaves(OmegaConf.to_container(composed, resolve=True)):
        if re.search("[\ud800-\udfff]", f"{key}{value}"):
            raise ConfigError(f"{key}: not all of it is UTF-8: give it, or the file, another name")
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
