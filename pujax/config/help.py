"""`--help`: every setting of a command with its value and what it means, and what there is to pick.

What a setting means stands in its record's docstring, under `Attributes:`, with its unit.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import hydra
import yaml
from omegaconf import MISSING, OmegaConf

from pujax.config.compose import conf_dir

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
    choices = [
        f"  {path.relative_to(root)}={'|'.join(sorted(file.stem for file in path.glob('*.yaml')))}"
        for root in dict.fromkeys((conf, Path(conf_dir())))
        for path in sorted(root.rglob("*"))
        if any(path.glob("*.yaml")) and path.name != "base"
        if path.relative_to(root).parts[0] in groups
    ]
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


def meanings(schema: type) -> dict[str, str]:
    """What each setting of a record means, of its docstring's `Attributes:` and of its bases'."""
    told = {}
    for record in reversed(schema.__mro__):
        _, _, listed = inspect.cleandoc(record.__doc__ or "").partition("Attributes:\n")
        entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", listed, re.MULTILINE)
        told |= {name: " ".join(text.split()) for name, text in entries}
    return told


def _listed(values: Mapping[Any, Any], schema: Any, indent: str = "") -> Iterator[str]:
    """The settings as YAML, each line of a setting that the schema has with its meaning."""
    known = isinstance(schema, type) and is_dataclass(schema)
    told, kinds = (meanings(schema), get_type_hints(schema)) if known else ({}, {})
    for key, value in values.items():
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
