"""The bridge from Hydra: schemas in, checked settings out."""

import os
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from hydra._internal import hydra as application_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.resolvers import oc

from pujax.errors import ConfigError
from pujax.files.settings import TORN, leaves
from pujax.text import secret_name

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

    `${shipped:quickstart/train.jsonl}` in conf/experiment/ stands for it, and for a list where it
    names several. Not a list of such words: over that no mapping could be typed, as a dataset is.
    """
    name, package = f"experiments/{path}", Path(__file__).resolve().parents[1]
    if not Path(name).is_file():
        for folder in (package, package.parent):
            if (folder / name).is_file():
                return str(folder / name)
    return name


OmegaConf.register_new_resolver(
    "shipped",
    lambda *paths: OmegaConf.create([*map(shipped, paths)]) if paths[1:] else shipped(*paths),
    replace=True,
)

taken: dict[str, str] = {}
"""What settings took of the environment since the command began, by name: no message may say it."""


def _environment(name: str, *default: Any) -> str | None:
    """What `${oc.env:NAME}` stands for, however it is written, noted in `taken`."""
    if (value := os.environ.get(name)) is not None:
        taken[name] = value
    return oc.env(name, *default)


OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


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


_VALUES = 10_000
"""How many values of one file's aliases may stand for. OmegaConf writes each of them out, at about
a hundred thousand a second; conf/ has no alias, and a thousand values in all."""


class WaryFiles(FileConfigSource):
    """Hydra's YAML files, of which none is taken whose aliases would fill the memory."""

    def load_config(self, config_path: str) -> ConfigResult:
        """The file's settings. Raises `ConfigError` that names it."""
        path = self.place(config_path)
        try:
            if path.is_file():
                refuse_aliases(path)
            found = super().load_config(config_path)
            repr(found.config)  # an integer can have more digits than Python writes out
            return found
        except RecursionError as error:
            raise ConfigError(f"{path}: nested too deep: take that out") from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: a YAML file of the settings is not UTF-8 (byte {error.start} of "
                f"{error.object[:20]!r}...): save it so"
            ) from error

    def place(self, config_path: str) -> Path:
        """Where that file lies."""
        return Path(self.path, self._normalize_file_name(config_path))


class WaryRepository(ConfigRepository):
    """Hydra's YAML of all places, in which a file that can't be read is named."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        """The file's settings and its defaults list. Raises `ConfigError` that names it."""
        try:
            return super().load_config(config_path)
        except (ConfigError, HydraException, yaml.MarkedYAMLError, yaml.reader.ReaderError):
            raise  # which have the name, or what to look for
        except (*TORN, AssertionError) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise
            source = self._find_object_source(config_path, ObjectType.CONFIG)
            place = source.place(config_path) if isinstance(source, WaryFiles) else config_path
            why = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ConfigError(f"{place}: not settings ({why}): mend it, or leave it out") from error


def refuse_aliases(path: Path) -> None:
    """Raise `ConfigError` for an alias within what it stands for, and for too many values by them.

    Nothing is written out for it: each node is counted once.
    """
    with path.open(encoding="utf-8") as file:
        if "*" not in file.read():
            return
        file.seek(0)
        root = yaml.compose(file, Loader=yaml.SafeLoader)
    counts: dict[int, int] = {}  # of values, by node; none yet while its own are counted

    def count(node: Any) -> int:
        known = counts.get(id(node))
        place = f"{path}:{node.start_mark.line + 1}"
        if known == 0:
            raise ConfigError(
                f"{place}: has an alias (*name) within what it stands for (&name): take that out"
            )
        if known is None:
            counts[id(node)] = 0
            parts = [] if isinstance(node, yaml.ScalarNode) else node.value
            pairs = isinstance(node, yaml.MappingNode)
            known = 1 + sum(count(part) for each in parts for part in (each if pairs else [each]))
            counts[id(node)] = known
            if known > max(_VALUES, len(counts)):  # so many by aliases alone
                raise ConfigError(
                    f"{place}: its aliases (*name) stand for {known} values or more: write out "
                    "what you need of them"
                )
        return known

    if root is not None:
        count(root)


class WaryLoader(ConfigLoaderImpl):
    """Hydra's composing, which refuses settings by which Hydra would do what they name.

    That would be before any check of ours. Overridden, since Hydra asks nobody between composing
    and calling; the processes of a launcher get this loader too, and compose by it.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.repository = WaryRepository(config_search_path)
        self.repository.sources = [
            WaryFiles(each.provider, each.path) if each.scheme() == "file" else each
            for each in self.repository.sources
        ]

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *given: Any, **named: Any
    ) -> DictConfig:
        """The settings composed. Raises `ConfigError` as `refuse_calls` does."""
        try:
            composed = super().load_configuration(config_name, overrides, *given, **named)
        except KeyError as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if frame.f_globals.get("__name__") != "os":  # not of os.environ
                raise
            raise ConfigError(f"hydra.job.env_copy ({error.args[0]}): {_OF_SHELL}") from error
        if config_name is not None or overrides:  # else they are Hydra's own, as --hydra-help asks
            refuse_calls(composed.hydra)
            # By its own word, which comes last, -m alone decides.
            by_word = any(each.startswith("hydra.mode=") for each in overrides)
            if composed.hydra.mode and not by_word:
                raise ConfigError("hydra.mode: add -m for a sweep, and leave it out for one run")
        return composed

    def _process_config_searchpath(
        self, config_name: str | None, parsed_overrides: list[Any], repo: Any
    ) -> None:
        """Refuse another place to look for YAML in, which may be a package that is imported so."""
        given = any(each.get_key_element() == "hydra.searchpath" for each in parsed_overrides)
        primary = repo.load_config(config_path=config_name) if config_name is not None else None
        if given or (primary and OmegaConf.select(primary.config, "hydra.searchpath") is not None):
            raise ConfigError("hydra.searchpath: give the folder of your own YAML by --config-dir")


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


_THEIRS = "it may come from a file that somebody else wrote: take it out"
_OF_SHELL = f"a command's environment is its shell's, set it there; {_THEIRS}"


def refuse_calls(hydra: DictConfig) -> None:
    """Raise `ConfigError` for what in Hydra's own settings has it call, or write, what they name.

    That is callbacks; logging, whose handlers are built by name and open files; a `_target_` within
    a sweeper's or a launcher's settings (Hydra holds their own against its plugins); a folder for
    Hydra's copy of all settings, or to work in, by which every relative path would be another; and
    variables for the environment, by which other programs and libraries run, or to copy from it,
    secrets among them.
    """
    if hydra.callbacks:
        names = ", ".join(map(str, hydra.callbacks))
        raise ConfigError(f"hydra.callbacks ({names}): Hydra would call what it names; {_THEIRS}")
    for key in ("hydra_logging", "job_logging"):
        if OmegaConf.to_container(hydra[key]) != SILENT:
            raise ConfigError(f"hydra.{key}: pujax logs nothing by it, leave it at none; {_THEIRS}")
    for key in ("launcher", "sweeper"):
        for place in _targets(hydra[key], f"hydra.{key}"):
            if place != f"hydra.{key}._target_":
                raise ConfigError(f"{place}: Hydra would call what it names; {_THEIRS}")
    if hydra.output_subdir is not None:
        raise ConfigError(f"hydra.output_subdir: a run keeps its own settings; {_THEIRS}")
    for key in ("env_copy", "env_set"):  # what is copied is set
        if names := ", ".join(map(str, hydra.job[key])):
            raise ConfigError(f"hydra.job.{key} ({names}): {_OF_SHELL}")
    if hydra.job.chdir or OmegaConf.to_container(hydra.run) != {"dir": "."}:
        raise ConfigError(
            "hydra.run.dir, hydra.job.chdir: a command works where it was started; say run.dir or "
            f"run.root for where a run goes; {_THEIRS}"
        )


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
    calls a secret, which no setting but the teacher's may take; for a NUL character, or bytes
    that are not UTF-8, which no file of ours could hold; and for a whole number beyond 64 bits.
    """
    for key, value in leaves(OmegaConf.to_container(composed, resolve=False)):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{key}: a whole number of more than 64 bits: give a smaller one")
        if "\0" in str(value):
            raise ConfigError(f"{key}: has a NUL character, which no path or text may: take it out")
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        begin = ", or begin with an experiment, as +experiment=quickstart"
        ready = begin if "run.name" in missing else ""
        raise ConfigError(f"missing value for {', '.join(missing)}: set it as KEY=VALUE{ready}")
    for key in _foreign(composed):
        raise ConfigError(f"{key}: no such setting: take it out")
    for key in composed:
        for place, name in _takers(composed, str(key)) if key != "teacher" else ():
            if secret_name(name):
                raise ConfigError(
                    f"{place} takes the environment variable {name}, a secret by its name: take it "
                    "out, and let what needs it read the environment"
                )
    for key, value in leaves(OmegaConf.to_container(composed, resolve=True)):
        if re.search("[\ud800-\udfff]", f"{key}{value}"):
            raise ConfigError(f"{key}: not all of it is UTF-8: give it, or the file, another name")
    for key, remedy in _of_another_form(composed, schema):
        raise ConfigError(f"{key}: {remedy}")
    settings = OmegaConf.to_object(composed)
    if not isinstance(settings, schema):
        raise ConfigError(f"composed {type(settings).__name__}, need {schema.__name__}")
    return settings


A_LIST = "a list is wanted, as in [A] or [A,B]"
A_MAPPING = "a mapping is wanted, as in {NAME: VALUE}"


def a_section(key: str, kind: Any) -> str:
    """What to write for the settings `key`, a record of class `kind`."""
    return f"holds settings of its own: set those, as in {key}.{fields(kind)[0].name}"


def _of_another_form(node: Any, schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The dotted key of each section, list and mapping of `schema` that is none, and the remedy.

    OmegaConf checks what is written there, but not what a reference such as `${seed}` leads to.
    """
    for field in fields(schema):
        key, kind = f"{prefix}{field.name}", field.type
        if isinstance(kind, type) and is_dataclass(kind):
            inner = node[field.name]
            if OmegaConf.get_type(inner) is kind:
                yield from _of_another_form(inner, kind, f"{key}.")
            else:
                yield key, a_section(key, kind)
        elif get_origin(kind) is list and not isinstance(node[field.name], ListConfig):
            yield key, A_LIST
        elif get_origin(kind) is dict and not isinstance(node[field.name], DictConfig):
            yield key, A_MAPPING


def _takers(parent: Any, name: Any, above: str = "") -> Iterator[tuple[str, str]]:
    """The dotted key of each value at and below `name` that takes a variable, with the variable."""
    key = f"{above}{name}"
    node = parent._get_node(name)
    if node._is_interpolation():
        before = dict(taken)
        taken.clear()
        try:
            node = node._dereference_node()
            read = list(taken)
        finally:
            taken.update(before)
        yield from ((key, variable) for variable in read)
    if isinstance(node, DictConfig | ListConfig) and not node._is_none():
        for part in node if isinstance(node, DictConfig) else range(len(node)):
            yield from _takers(node, part, f"{key}.")


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
