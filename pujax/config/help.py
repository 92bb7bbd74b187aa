"""`--help`: every setting of a command with its value and what it means, and what there is to pick.

What a setting means stands in its record's docstring, under `Attributes:`, with its unit; of a
function that settings name, in that one's, under `Settings:`.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import hydra
import yaml
from omegaconf import MISSING, OmegaConf

from pujax.config.compose import conf_dir
from pujax.config.stand_ins import source_of
from pujax.files.settings import named_now

WIDTH, COLUMN = 100, 40  # of the whole, and where meanings begin


def help_of(
    name: str,
    conf: Path,
    schema: type,
    groups: list[str],
    overrides: list[str],
    *,
    purpose: str = "",
) -> str:
    """What a command is for, examples, and all that it can be told, as `overrides` leave it.

    The examples are the comment that its YAML begins with. Hydra's own help reads every file of
    every group, twice.
    """
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        composed = OmegaConf.to_container(hydra.compose(name, overrides=overrides))
    assert isinstance(composed, dict)
    choices = [f"  {group}={'|'.join(names)}" for group, names in choices_of(conf, groups).items()]
    examples = re.match(r"(#.*\n)*", (conf / f"{name}.yaml").read_text(encoding="utf-8"))
    assert examples is not None
    return "\n".join(
        [
            f"pujax {name} KEY=VALUE ...   (--hydra-help tells of more; -m runs each of A,B)",
            *([purpose] if purpose else []),
            "",
            *(line.replace("#", " ", 1) for line in examples[0].splitlines()),
            *(["", "Choices:", *choices] if choices else []),
            "",
            "Settings, with the values that they have:",
            *_listed(composed, schema),
        ]
    )


def choices_of(conf: Path, groups: Sequence[str]) -> dict[str, list[str]]:
    """What there is to pick of each of the `groups`, in `conf` itself or in conf/."""
    return {
        str(path.relative_to(root)): sorted(file.stem for file in path.glob("*.yaml"))
        for root in dict.fromkeys((conf, Path(conf_dir())))
        for path in sorted(root.rglob("*"))
        if any(path.glob("*.yaml")) and path.name != "base"
        if path.relative_to(root).parts[0] in groups
    }


def meanings(schema: type) -> dict[str, str]:
    """What each setting of a record means, of its docstring's `Attributes:` and of its bases'."""
    told = {}
    for record in reversed(schema.__mro__):
        told |= _entries(inspect.cleandoc(record.__doc__ or ""))
    return told


def said_of(target: str) -> tuple[str, dict[str, str]]:
    """What a function of pujax is for, and what each of its settings means.

    Of its docstring, read without importing it, since jax comes with most; nothing of a function
    from elsewhere.
    """
    module, _, name = str(named_now({"_target_": target})["_target_"]).rpartition(".")
    source = source_of(module)
    found = re.search(rf'^(?:def|class) {name}\b.*?"""(.*?)"""', source, re.MULTILINE | re.DOTALL)
    text = inspect.cleandoc(found[1]) if found else ""
    return text.partition("\n")[0], _entries(text)


def _entries(docstring: str) -> dict[str, str]:
    """What a docstring lists under `Attributes:` or `Settings:`."""
    _, *listed = re.split(r"^(?:Attributes|Settings):\n", docstring, maxsplit=1, flags=re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", "".join(listed), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _told(values: Mapping[Any, Any], schema: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """What the keys of settings mean, and which records their values are."""
    if isinstance(schema, type) and is_dataclass(schema):
        return meanings(schema), get_type_hints(schema)
    if "_target_" in values:
        purpose, told = said_of(values["_target_"])
        return {"_target_": purpose, **told}, {}
    if _is_metric(values):
        _, shown = said_of("pujax.evaluation.metrics.Shown")
        return {**said_of("pujax.evaluation.metrics.Metric")[1], **shown}, {}
    metrics = {key: value for key, value in values.items() if _is_metric(value)}
    return {key: said_of(value["function"]["_target_"])[0] for key, value in metrics.items()}, {}


def _is_metric(value: Any) -> bool:
    """Whether a value is an entry of eval.metrics, as in conf/eval/."""
    return isinstance(value, Mapping) and {"function", "title"} <= value.keys()


def _listed(values: Mapping[Any, Any], schema: Any, indent: str = "") -> Iterator[str]:
    """The settings as YAML, each with its meaning, but for `_partial_`, which is always true."""
    told, kinds = _told(values, schema)
    for key, value in values.items():
        if key == "_partial_":
            continue
        if isinstance(value, Mapping) and value:
            yield from _explained(f"{indent}{key}:", told.get(key, ""))
            yield from _listed(value, kinds.get(key), indent + "  ")
        else:
            yield from _explained(f"{indent}{key}: {_shown(value)}", told.get(key, ""))


def _shown(value: Any) -> str:
    if value == MISSING:
        return value
    form = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True, "width": 1 << 20}
    text = yaml.safe_dump(value, **form)
    return " ".join(text.removesuffix("\n").removesuffix("\n...").split("\n"))


def _explained(line: str, meaning: str) -> Iterator[str]:
    parts = textwrap.wrap(meaning, WIDTH - COLUMN - 2)
    if not parts or len(line) >= COLUMN:
        yield line
    else:
        yield f"{line.ljust(COLUMN)}# {parts.pop(0)}"
    for part in parts:
        yield f"{' ' * COLUMN}# {part}"
