"""`--help` says what every setting means."""

import importlib
import inspect
import re
import shlex
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_dir

from pujax.chat import ChatConfig
from pujax.collect import CollectRun
from pujax.config.commands import groups_of
from pujax.config.compose import conf_dir, from_hydra, offered, register
from pujax.config.help import COLUMN, WIDTH, help_of, meanings, said_of
from pujax.config.overrides import in_hydra_words
from pujax.config.settings import TrainConfig
from pujax.config.tool_settings import AdaptConfig, BenchmarkConfig
from pujax.evaluate import GROUPS as SHARED
from pujax.evaluate import EvaluateConfig
from pujax.export import ExportConfig
from pujax.generate import GenerateConfig
from pujax.report import ReportConfig
from pujax.serve import ServeConfig
from pujax.teacher.settings import DatasetConfig

COMMANDS = (
    *(TrainConfig, BenchmarkConfig, CollectRun, GenerateConfig, ExportConfig),
    *(EvaluateConfig, ReportConfig, DatasetConfig, ChatConfig, ServeConfig),
)


def records(schema):
    yield schema
    for kind in get_type_hints(schema).values():
        if is_dataclass(kind):
            yield from records(kind)


# In an order of its own: a set's differs from process to process, which xdist refuses.
SCHEMAS = dict.fromkeys(record for command in COMMANDS for record in records(command))


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_setting_has_a_meaning_and_no_meaning_is_left_over(schema):
    assert set(meanings(schema)) == {field.name for field in fields(schema)}


def test_a_meaning_may_take_several_lines():
    @dataclass
    class Record:
        """A record.

        Attributes:
            one: the first,
                and more of it.
            two: the second: with a colon.
        """

        one: int = 1
        two: int = 2

    assert meanings(Record) == {
        "one": "the first, and more of it.",
        "two": "the second: with a colon.",
    }


def test_help_shows_each_setting_with_its_value_and_what_it_means():
    register("generate_schema", GenerateConfig)
    conf, given = Path(conf_dir(), "tools"), ["max_tokens=7", "system='a: b'"]
    lines = help_of("generate", conf, GenerateConfig, [], given).splitlines()
    assert "max_tokens: 7".ljust(COLUMN) + "# the longest answer, in tokens." in lines
    (system,) = (line for line in lines if line.startswith("system: 'a: b' "))
    rest = lines[lines.index(system) + 1]
    assert (system.partition("# ")[2] + " " + rest.strip(" #")) == meanings(GenerateConfig)[
        "system"
    ]
    assert max(map(len, lines)) <= WIDTH


OF_COMMANDS = {
    "train": TrainConfig,
    "collect": CollectRun,
    "benchmark": BenchmarkConfig,
    "generate": GenerateConfig,
    "chat": ChatConfig,
    "serve": ServeConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "adapt": AdaptConfig,
}


@pytest.mark.parametrize("name", OF_COMMANDS)
def test_help_says_what_a_command_is_for_and_gives_examples_that_hold(name):
    schema = OF_COMMANDS[name]
    register(f"{name}_schema", schema)
    root = Path(conf_dir())
    conf = root if (root / f"{name}.yaml").exists() else root / "tools"
    shared = {"evaluate": SHARED, "adapt": ["loss"]}.get(name, [])
    with offered(shared):
        told = help_of(name, conf, schema, [], [], purpose="what for.").splitlines()
        assert told[1:3] == ["what for.", ""]
        examples = [line for line in told if line.startswith(f"  pujax {name} ")]
        assert len(examples) >= 3
        with initialize_config_dir(str(conf), version_base="1.3"):
            for example in examples:
                words = shlex.split(example.partition(" <")[0], comments=True)[2:]
                words = [word for word in words if word != "-m"]
                swept = ["seed=0,1,2", "loss=grpo,dpo"]
                words = [word.split(",")[0] if word in swept else word for word in words]
                overrides = in_hydra_words(words, schema, groups_of(name, conf))
                from_hydra(schema, compose(name, overrides=overrides))


def nodes(value):
    """Every function's node in settings, those in lists too."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        yield from nodes(part)


NAMED = ("loss", "labels", "scorer", "eval", "teacher", "tools/suite")


@pytest.mark.parametrize("group", NAMED)
def test_every_setting_of_a_function_that_conf_names_has_a_meaning(group):
    found = 0
    for file in sorted(Path(conf_dir(), group).rglob("*.yaml")):
        for node in nodes(yaml.safe_load(file.read_text(encoding="utf-8"))):
            purpose, told = said_of(node["_target_"])
            assert purpose, (file, node)
            assert node.keys() - {"_target_", "_partial_", "defaults"} <= told.keys(), (file, node)
            found += 1
    assert found


@pytest.mark.parametrize(
    "target",
    [
        *(
            "pujax.method.pair_losses.dpo",
            "pujax.method.losses.grpo",
            "pujax.method.scoring.reward",
        ),
        *("pujax.method.labels.softmax_labels", "pujax.rewards.length", "pujax.rewards.regex"),
    ],
)
def test_a_functions_meanings_are_of_all_its_keywords_and_of_nothing_else(target):
    module, _, name = target.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    keywords = {key for key, each in parameters.items() if each.kind is each.KEYWORD_ONLY}
    assert said_of(target)[1].keys() == keywords


def test_no_key_that_train_shows_lacks_its_meaning():
    register("train_schema", TrainConfig)
    told = help_of("train", Path(conf_dir()), TrainConfig, [], ["+experiment=smoke"])
    _, _, settings = told.partition("Settings, with the values that they have:\n")
    lines = settings.splitlines()
    keys = [place for place, line in enumerate(lines) if re.match(r" *\w+:", line)]
    assert any("beta:" in lines[place] for place in keys)
    for place in keys:
        assert "# " in lines[place] or lines[place + 1].lstrip().startswith("# "), lines[place]


def test_a_functions_former_name_has_its_meanings_too():
    purpose, told = said_of("pujax.method.losses.dpo")
    assert purpose.startswith("-log sigmoid")
    assert (purpose, told) == said_of("pujax.method.pair_losses.dpo")


def test_a_function_from_elsewhere_is_not_looked_for():
    assert said_of("mine.loss") == said_of("pujax.method.losses.none") == ("", {})
