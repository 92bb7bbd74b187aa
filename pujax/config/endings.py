"""How a command ends: its exit status, and the one line that says what went wrong."""

import difflib
import errno
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pujax.config.compose import A_LIST, A_MAPPING, a_section, conf_dir
from pujax.config.overrides import type_of
from pujax.config.stand_ins import stand_in
from pujax.config.sweeps import LAUNCHERS
from pujax.errors import PujaxError, StopRequested
from pujax.text import MASKED

REMEDIES = {
    errno.ENOSPC: "make room and start the same command again",
    errno.EDQUOT: "make room and start the same command again",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "mend its permissions, or choose another place",
}

# What the runtimes of GPUs and TPUs say in an error of the device's, and not of the program's.
_DEVICE = re.compile(r"\bCUDA|\bcu(DNN|BLAS)|\bhip[A-Z]|\bROCM|^(UNAVAILABLE|DATA_LOSS|ABORTED)\b")


def ending(error: BaseException, overrides: Sequence[str], schema: type) -> tuple[int, str | None]:
    """The exit status and the one line for what ended a command; no line for a fault of ours."""
    if isinstance(error, StopRequested):
        return 128 + error.number, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return 1, _composition(error, overrides, schema)
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        at = f"{mark.name}:{mark.line + 1}: " if mark else ""
        return 1, f"{at}no YAML: {error.problem}: mend that line, or the indentation above it"
    if isinstance(error, yaml.reader.ReaderError):  # a NUL, or a byte that is no UTF-8
        why = f"{error.reason} at position {error.position}"
        return 1, f"{error.name}: no YAML: {why}: take it out, and save it as UTF-8"
    if isinstance(error, PujaxError):
        return 1, str(error)
    if type(error).__module__.partition(".")[0] in LAUNCHERS.values():
        why = " ".join(re.split(r"\. |\n[A-Z]", str(error).strip())[0].split())
        return 1, f"a job's process ended by itself ({why}): the same command does what is left"
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on
        return 1, "the reader of the output went away"
    if isinstance(error, OSError):
        remedy = REMEDIES.get(error.errno or 0)
        where = error.filename or ("standard output" if _is_of_output(error) else "")
        place = f"{where}: " if where else ""
        return 1, f"{place}{error.strerror or error}" + (f": {remedy}" if remedy else "")
    return 1, _of_device(error) or _of_environment(error)


def _of_device(error: BaseException) -> str | None:
    """What an accelerator's failure, or too little memory on it, is called; else None."""
    said = " ".join(str(error).split())
    if type(error).__name__ != "JaxRuntimeError":  # by name, for jax may not have been imported
        return None
    if "RESOURCE_EXHAUSTED" in said:
        return (
            f"the device has too little memory ({said[:200]}): take fewer at a time (sft.batch, "
            "align.prompts or align.microbatch=1, eval.batch), recompute more (model.remat=full), "
            "train adapters alone (model.lora.rank=16), split the model (mesh.fsdp), or end what "
            "else uses the device; `pujax benchmark plan=true` says what fits"
        )
    if _DEVICE.search(said):
        return (
            f"the device failed ({said[:200]}): the same command goes on from what was saved last; "
            "where it fails again, see to driver, device and jax's version"
        )
    return None


def _is_of_output(error: OSError) -> bool:
    """Whether what is printed can't be written, as to a file on a disk that is full."""
    try:
        sys.stdout.flush()  # what could not be written may wait there still, or be given up
        os.write(sys.stdout.fileno(), b"\n")
    except OSError as again:
        return again.errno is not None and again.errno == error.errno
    return False


def _of_environment(error: BaseException) -> str | None:
    """Which variables JAX or matplotlib could not begin with; None where it was not that."""
    walked = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    frames = [(frame.f_globals.get("__name__"), frame.f_code.co_name) for frame in walked]
    imported = {str(module) for module, function in frames if function == "<module>"}
    if "matplotlib" in imported:
        read = "MPL"
    elif any(module.startswith("jax._src.") for module in imported):
        read = "JAX_"
    elif ("jax._src.xla_bridge", "backends") in frames:
        read = "JAX_PLATFORM"
    else:
        return None
    given = [name for name in sorted(os.environ) if name.startswith(read)]
    given = [name for name in given if name.lower() in str(error).lower()] or given
    if not given or not isinstance(error, ValueError | RuntimeError | AssertionError):
        return None
    named = ", ".join(f"{name}={os.environ[name]}" for name in given)
    why = next(iter(str(error).splitlines()), "")[:120]
    library = "matplotlib" if read == "MPL" else "jax"
    return (
        f"{named}: {library} can't begin with that{f' ({why})' if why else ''}: unset it, or give "
        "it another value"
    )


def _composition(error: Exception, overrides: Sequence[str], schema: type) -> str:
    """What Hydra or OmegaConf could not take, as one line without their internals."""
    text, cause = str(error), str(error.__cause__ or "")
    if isinstance(error, OverrideParseException):
        word = error.override
        if word not in overrides:  # of an open mapping, with the plus signs that it got
            word = word.removeprefix("++")
        key, _, value = word.partition("=")
        if not value:
            return f"{word!r}: write it as KEY=VALUE"
        if whole := _parted(word, overrides):
            return (
                f"{key}: {value!r} has no end: write no space after a comma, or quote the whole, "
                f"as in '{whole}'"
            )
        quoted = value.replace('"', '\\"')
        twice = f"'{key}=\"{quoted}\"'"
        if any(value.count(one) != value.count(other) for one, other in ("[]", "{}")):
            return (
                f"{key}: {value!r}: close its brackets, as in [A,B] or {{A: B}}; a text with some "
                f"in it is quoted twice, as in {twice}"
            )
        if value.startswith("{"):  # of which a text is a part, and not the whole
            bare = re.sub(r'"([\w$-]+)"(?=\s*:)', r"\1", value)
            if bare != value:
                return f"{key}: its names stand without quotes, as in '{key}={bare}'"
            inside = re.sub(_UNQUOTED, r'"\g<0>"', value)
            return f"{key}: can't read its value: quote the texts in it, as in '{key}={inside}'"
        return f"{key}: can't read its value: quote it twice, as in {twice}"
    if found := re.search(r"Could not override '([^']*)'|could not delete.*'([^']*)'", text, re.I):
        return _unknown_key(found[1] or found[2], error, schema)
    if isinstance(error, MissingConfigException):
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        if not group:  # a command's own YAML
            return "--config-path, --config-name: no such folder, or file in it: leave them out"
        choices = list(error.options or _choices(group))
        if group == "hydra/launcher" and choice in LAUNCHERS:
            return f"{group}={choice}: not installed: pip install 'pujax[{LAUNCHERS[choice]}]'"
        listed = f" ({group} has {', '.join(choices)})" if choices else ""
        if group == "model":
            listed += f"; a folder, a file or a hub's name is model.path={choice}"
        return f"{group}={choice}: no such choice{_nearest(choice, choices)}{listed}"
    if found := re.search(r"full_key: (\S+)", cause or text):
        lines = (cause or text).splitlines()
        # Of a file that does not fit, the first line says which and the next one why.
        why = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
        if "Environment variable" in why:
            why = re.sub(r'.*"(.*)".*', r"\1: set it", why)
        why = _of_form(_of_ones_own(_plain(why)), found[1], schema)
        given = [o for o in overrides if o.lstrip("+~").split("=")[0] == found[1]]
        # What was not typed came from a file or an interpolation, and may be anything.
        if (value := re.search(r"Value '(.*)'", why)) and not any(value[1] in o for o in given):
            why = why.replace(value[1], MASKED)
        return f"{given[-1] if given else found[1]}: {why}"  # of several the last one counts
    if "Ambiguous value" in text:
        key, _, value = text.split("'")[1].partition("=")
        if re.fullmatch(r"-?\d+,\d+", value) and type_of(schema, key.lstrip("+")) is float:
            return f"{key}={value}: a number has a point: write {key}={value.replace(',', '.')}"
        return (
            f"{key}: a value with a comma: write '{key}=\"{value}\"' for a text, "
            f"'{key}=[{value}]' for a list, or add -m to run one after the other"
        )
    if found := re.search(r"Sweep parameters '(.*)' requires --multirun", text):
        return f"{found[1]}: goes through several values: add -m, or give one"
    if found := re.search(r"Multiple values for ([\w/]+)\.", text):
        given = [
            o for o in overrides if o.lstrip("+~").startswith((f"{found[1]}=", f"{found[1]}@"))
        ]
        return f"{found[1]}: is given twice ({' '.join(given)}): take one out"
    if found := re.search(r"Additional config directory '(.*)' not found", text):
        return f"--config-dir {found[1]}: no such folder: name the one that your own YAML is in"
    return _plain(" ".join(text.split("\nSee https")[0].split()))


def of_hydra(error: BaseException, words: Sequence[str]) -> str | None:
    """What Hydra fell over, with the words that it was at; None where that was not in Hydra."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    code = {(frame.f_globals.get("__name__"), frame.f_code.co_name) for frame in frames}
    composing = any(str(module).startswith("hydra.") for module, _ in code)
    if not composing or (__name__, "job") in code:
        return None
    last = frames[-1]
    listing = last.f_globals.get("__name__") == "hydra._internal.defaults_list"
    word = getattr(last.f_locals.get("override") if listing else None, "input_line", None)
    of_hydra = dict.fromkeys(each for each in words if re.match(r"[+~]*hydra\b", each))
    at = list(of_hydra) if word is None else [word]
    why = next(iter(str(error).splitlines()), "") or type(error).__name__
    if "--resolve flag" in why:
        return "--resolve: goes with --cfg job or --help: add one of them, or take it out"
    if "must be a string" in why and at:
        return f"{at[0]}: a choice is a name, see --help: give one, or take it out"
    named = " ".join(at) or "these settings"
    remedy = "give it another value, or take it out" if at else "HYDRA_FULL_ERROR=1 shows where"
    return f"{named}: can't be composed ({why}): {remedy}"


_UNQUOTED = r"""(?<=[{\[:, ])[^\s{}\[\],:"']*[^\w\s{}\[\],:"'.-][^\s{}\[\],"']*"""
"""A text within braces that has a sign which Hydra reads in quotes alone."""


def _parted(word: str, words: Sequence[str]) -> str | None:
    """What a list was typed as that the shell parted at its spaces; None where it is none."""
    if word not in words or word.count("[") <= word.count("]"):
        return None
    parts: list[str] = []
    for part in words[words.index(word) :]:
        parts.append(part)
        if "".join(parts).count("[") == "".join(parts).count("]"):
            return " ".join(parts)
    return None


def _of_ones_own(why: str) -> str:
    """What to write where a scorer's or a metric's file has not the form that those have."""
    found = re.match(r"In '(scorer|eval)/([^']+)': .*Key '\w+' not in", why)
    if found is None:
        return why
    group, name = found.groups()
    if group == "eval":
        return f"eval/{name}.yaml: begin it with the line `# @package eval.metrics.{name}`"
    return (
        f"scorer/{name}.yaml: its function stands under `score:`, and beside that "
        "`by: reference` or `by: policy`"
    )


# What OmegaConf says of a value of another form than the setting has, and what to write instead.
_FORMS = {
    "could not be converted to Integer": "write a whole number in digits alone, with neither a "
    "point nor an exponent",
    "could not be converted to Float": "write a number, such as 0.5",
    "is not a valid bool": "write true or false",
    "is not a ListConfig": A_LIST,
    "is not Optional": "is never null: give it a value, or leave it out",
    r"Cannot assign \w+ to Dict|Cannot merge DictConfig with": A_MAPPING,
}


_NOT_SECTION = "is not a subclass|Cannot merge DictConfig with|is not Optional"


def _of_form(why: str, key: str, schema: type) -> str:
    """What to write where a value has another form than its setting; else `why` as it is."""
    file = re.match(r"In '[^']+': ", why)
    inner = type_of(schema, key)
    if is_dataclass(inner) and re.search(_NOT_SECTION, why):
        return f"{file[0] if file else ''}{a_section(key, inner)}"
    for said, remedy in _FORMS.items():
        if re.search(said, why):
            return f"{file[0] if file else ''}{remedy}"
    return why


def _unknown_key(key: str, error: Exception, schema: type) -> str:
    """A key that the settings don't have, with the nearest that they have."""
    inner = str(getattr(error.__cause__, "full_key", None))
    if inner.startswith(f"{key}."):  # of KEY={...} what in it is unknown
        key = inner
    known = list(_keys(schema))
    node = getattr(error.__cause__, "parent_node", None)
    place, _, last = key.rpartition(".")
    target = _target(node, place)
    if target is not None:  # inside of a function's node, which no schema describes
        function = stand_in(target) if target.startswith("pujax.") else None
        names = _settings(function) if function else [str(name) for name in node or ()]
        if last in names or (function is None and not _nearest(last, names)):
            return f"{key}: is not set yet: write +{key}="
        known += [f"{place}.{name}" for name in names]
    others = [other for other in known if other != key]
    alike = [other for other in others if other.rpartition(".")[2] == last and "." in other]
    near = _nearest(key, others)
    if alike:  # of another section
        near = f", did you mean {' or '.join(alike[:3])}?"
    if key.startswith("scorer.score.function") and _lacks(node, "scorer.score.function"):
        near = ": only a reward has a function: add scorer=reward"
    if key == "prompt":  # of chat, say, which is for several
        near = ", `pujax generate` takes one"
    return f"{key}: no such setting{near or ': take it out'}"


def _target(node: Any, place: str) -> str | None:
    """The function that a node names, where it is the one at `place` and names one."""
    if not isinstance(node, DictConfig) or node._get_full_key(None) != place:
        return None
    content: Any = OmegaConf.to_container(node, resolve=False)
    return content["_target_"] if isinstance(content.get("_target_"), str) else None


def _settings(function: Callable[..., Any]) -> list[str]:
    """What a function takes by name alone."""
    found = inspect.signature(function).parameters.values()
    return [each.name for each in found if each.kind is each.KEYWORD_ONLY]


def _lacks(node: Any, key: str) -> bool:
    """Whether the settings that a node is part of are known to have no section of that name."""
    root = node._get_root() if isinstance(node, DictConfig) else None
    return root is not None and OmegaConf.select(root, key, throw_on_missing=False) is None


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a settings record."""
    for name, field in getattr(schema, "__dataclass_fields__", {}).items():
        yield prefix + name
        yield from _keys(field.type, f"{prefix}{name}.")


def _choices(group: str) -> list[str]:
    """The choices of a group of conf/, which Hydra does not tell of a list of them."""
    return sorted(path.stem for path in Path(conf_dir(), group).glob("*.yaml"))


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3)
    # Letters in another order are a likelier slip than other letters.
    swapped = [other for other in near if sorted(other) == sorted(word)]
    return f", did you mean {(swapped or near)[0]}?" if near else ""


def _plain(text: str) -> str:
    return re.sub(r" of type '(str|float|int|bool)'", "", text).strip()
