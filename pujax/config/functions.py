"""The functions that settings name by `_target_`, checked and bound; nothing is called."""

import difflib
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from pujax.config.settings import EvalConfig
from pujax.config.stand_ins import names_in, stand_in
from pujax.errors import ConfigError, require
from pujax.evaluation.metrics import METRICS, Metric, Shown, try_metric
from pujax.files.settings import leaves, named_now
from pujax.teacher.settings import TeacherConfig

OURS = (
    "pujax.method.",
    "pujax.rewards.",
    "pujax.evaluation.",
    "pujax.teacher.",
    "pujax.inference.local_teacher.",
)
"""Where the functions live that settings may name, beside the packages in `trusted`."""


Make = Callable[[Any, str, Sequence[str]], Callable[..., Any]]
"""What makes a function of the node that names it: `build`, or `foresee`."""


def build(node: Any, key: str, trusted: Sequence[str] = ()) -> Callable[..., Any]:
    """The function that `node` names by `_target_`, its other entries bound as keywords.

    Nothing is called, so a node says `_partial_: true`; entries that are nodes themselves are built
    first. Only functions of pujax and of the packages in `trusted` are looked for. Raises
    `ConfigError` naming `key` for anything else, an unknown keyword, a missing one, or a value of
    another type than the function's signature says.
    """
    target = _named(node, key, trusted)
    module, _, name = target.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # a package of the user's may fail in any way
        said, hint = str(error) or repr(error), ""
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            hint = ": its folder must be on PYTHONPATH, as this one is by PYTHONPATH=."
        raise ConfigError(f"{key}: cannot build {target!r}: {said}{hint}") from error
    if not (inspect.isfunction(inspect.unwrap(function)) or inspect.isclass(function)):
        raise ConfigError(f"{key}: {target} is a {type(function).__name__}, not a function")
    return _bound(target, function, node, key, trusted, build)


def foresee(node: Any, key: str, trusted: Sequence[str] = ()) -> Callable[..., Any]:
    """Refuse what `build` would refuse, and a value that the function would, nothing imported.

    As far as that can be seen: of pujax's own functions, by their files. What those of a user's own
    packages take, shows when they are imported. Returns the `stand_in`, as `build` the function.
    Raises `ConfigError`.
    """
    if node == MISSING:  # as in a record made by hand, of which another part is asked for first
        return _anything
    target = _named(node, key, trusted)
    module, _, name = target.rpartition(".")
    if not target.startswith(OURS):
        for part, value in node.items():
            _built(value, f"{key}.{part}", trusted, foresee)
        return _anything
    function = stand_in(target)
    if function is None:
        names = names_in(module)
        if name in names:  # a class, or what another file has
            return _anything
        near = difflib.get_close_matches(name, names)
        meant = f", did you mean {near[0]}?" if near else ": take another, see --help"
        raise ConfigError(f"{key}: {module} has no {name}{meant}")
    bound = _bound(target, function, node, key, trusted, foresee)
    taken = inspect.signature(function).parameters.values()
    try:
        bound(*(None for each in taken if each.kind is not inspect.Parameter.KEYWORD_ONLY))
    except ConfigError as error:  # by a key of where such functions mostly are
        said = str(error)
        own = re.match(r"[\w.]+\.(\w+)(?=[=:])", said)
        if own is None or own[1] not in bound.keywords:
            raise
        raise ConfigError(f"{key}.{own[1]}{said[own.end() :]}") from error
    return bound


def _anything(*_: Any, **__: Any) -> None:
    """What stands in for a function of which nothing is known yet."""


def _named(node: Any, key: str, trusted: Sequence[str]) -> str:
    """The function that `node` names, in full: one of pujax, or of a package in `trusted`."""
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        whole = f": '{key}={{_target_: {node}, _partial_: true}}'" if isinstance(node, str) else ""
        raise ConfigError(
            f"{key}={node!r}: name a function by _target_, with _partial_: true{whole}"
        )
    target: str = named_now(node)["_target_"]
    if re.search(r"[:/]|\.py$", target) or not target.rpartition(".")[0]:
        *before, last = re.split(r"[:/]", target)
        module = before[-1] if before and before[-1].strip(".") else "mine"
        if last.endswith(".py"):
            module, last = last, "FUNCTION"
        named = f"{module.removesuffix('.py')}.{last}"
        raise ConfigError(f"{key}: _target_: {target}: name it with its module, as in {named}")
    if node.get("_partial_") is not True:
        raise ConfigError(f"{key}: {target} is not called here: write _partial_: true beside it")
    if not target.startswith((*OURS, *(f"{name}." for name in trusted))):
        remedy = f"if its code may run here, set trusted=[{target.split('.')[0]}]"
        if target.startswith("pujax."):
            remedy = "see --help for the functions of pujax that settings may name"
        raise ConfigError(f"{key}: {target} is neither pujax's nor of a trusted package: {remedy}")
    return target


def _bound(
    target: str,
    function: Callable[..., Any],
    node: Any,
    key: str,
    trusted: Sequence[str],
    make: Make,
) -> functools.partial[Any]:
    """`function` with the settings of `node` bound, checked; those that name others by `make`."""
    keywords = {
        str(name): _built(value, f"{key}.{name}", trusted, make)
        for name, value in node.items()
        if name not in ("_target_", "_partial_")
    }
    _check_bound(target, function, keywords, key)
    return functools.partial(function, **keywords)


def _built(value: Any, key: str, trusted: Sequence[str], make: Make) -> Any:
    """A keyword's value: a node as the function it names, alone or in a list."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_built(part, f"{key}[{i}]", trusted, make) for i, part in enumerate(value)]
    if isinstance(value, Mapping):
        if "_target_" in value:
            return make(value, key, trusted)
        for name in value:
            remedy = "is no text as YAML reads it: quote it"
            require(type(name) in (str, int), f"{key}: the name", name, remedy)
        return {str(n): _built(part, f"{key}.{n}", trusted, make) for n, part in value.items()}
    return value


def build_loss(
    node: Any, trusted: Sequence[str] = (), *, make: Make = build
) -> tuple[Callable[..., Any], dict[str, bool]]:
    """The loss that `node` names, and what its `needs` says (see `needs_of`).

    Raises `ConfigError` as `make` does, which is `build` or `foresee`, and for `needs` of another
    form.
    """
    if not isinstance(node, Mapping):
        return make(node, "loss", trusted), {}
    entries = dict(node)
    needs = dict(entries.pop("needs", None) or {})
    for name, said in needs.items():
        require(
            name in ("anchor", "reference") and isinstance(said, bool),
            f"loss.needs.{name}",
            said,
            "say `needs: {anchor: true}`, {reference: true} or both",
        )
    return make(entries, "loss", trusted), needs


def build_metrics(config: EvalConfig, trusted: Sequence[str] = ()) -> Mapping[str, Metric]:
    """The metrics that the settings name, or those that a run has when they name none.

    Each is called once, on a made-up prompt. Raises `ConfigError`, as `build` and `try_metric` do.
    """
    metrics = {
        name: _metric(name, node, trusted, build, tried=config.samples)
        for name, node in config.metrics.items()
    }
    return metrics or METRICS


def foresee_metrics(config: EvalConfig, trusted: Sequence[str] = ()) -> None:
    """Refuse what `build_metrics` would refuse of pujax's own, as `foresee` does."""
    for name, node in config.metrics.items():
        named = [str(value) for key, value in leaves(node) if key.endswith("_target_")]
        # ROUGE takes seconds to import, and no other metric of pujax's has anything to.
        quick = all(
            each.startswith("pujax.evaluation.metrics.") and not each.endswith(".rouge_l")
            for each in named
        )
        make, tried = (build, config.samples) if quick else (foresee, None)
        _metric(name, node, trusted, make, tried=tried)


def _metric(
    name: str, node: Any, trusted: Sequence[str], make: Make, *, tried: int | None
) -> Metric:
    """The metric that a node of eval.metrics is, called on so many made-up answers unless None."""
    key = f"eval.metrics.{name}"
    try:
        function, shown = node["function"], {k: v for k, v in node.items() if k != "function"}
        made = make(function, f"{key}.function", trusted)
        if tried is not None:
            try_metric(key, made, tried)
        try:
            return Metric(made, Shown(**shown))
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{key}={node!r}: {error}: it needs a function and a title, and may have digits "
            "and better, as in conf/eval/"
        ) from error


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
        first = f"{key}.{unset[0]}"
        raise ConfigError(f"{key}: {name} also needs {unset}: give +{first}=VALUE")
    try:
        wanted = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except Exception:  # an annotation that can't be read says nothing about the value
        return
    for name, value in keywords.items():
        if not fits(value, wanted.get(name, Any)):
            what = described(wanted[name])
            raise ConfigError(f"{key}.{name}={value!r}: write {what}")


TYPES: Mapping[Any, str] = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
}
"""The annotations that a setting's value is held against, and what each asks for."""


def fits(value: Any, wanted: Any) -> bool:
    """Whether a keyword's value is of the annotated type; any is where that is none we know."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Callable:
        return callable(value)
    if origin in (Sequence, list):
        return isinstance(value, list) and all(fits(each, parts[0]) for each in value)
    if origin in (Mapping, dict):
        return isinstance(value, Mapping)
    if wanted in (int, float):
        numbers = int if wanted is int else int | float
        return isinstance(value, numbers) and not isinstance(value, bool)
    return wanted not in TYPES or isinstance(value, wanted)


def described(wanted: Any) -> str:
    """What an annotation asks for, in a person's words."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return " or ".join(described(part) for part in parts)
    if origin is Callable:
        return "a function, by _target_ with _partial_: true"
    if origin in (Sequence, list):
        return f"a list, each {described(parts[0])}"
    if origin in (Mapping, dict):
        return "a mapping, as in {name: value}"
    return TYPES.get(wanted, str(wanted))
