"""`--help` says what every setting means."""

import shlex
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
from hydra import compose, initialize_config_dir

from pujax.chat import ChatConfig
from pujax.collect import CollectRun
from pujax.config.compose import conf_dir, from_hydra, offered, register
from pujax.config.help import COLUMN, WIDTH, help_of, meanings
from pujax.config.overrides import in_hydra_words
from pujax.config.settings import TrainConfig
from pujax.config.tool_settings import BenchmarkConfig
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
}
PICKED = ("experiment", "teacher", "model", "loss", "suite")


@pytest.mark.parametrize("name", OF_COMMANDS)
def test_help_says_what_a_command_is_for_and_gives_examples_that_hold(name):
    schema = OF_COMMANDS[name]
    register(f"{name}_schema", schema)
    root = Path(conf_dir())
    conf = root if (root / f"{name}.yaml").exists() else root / "tools"
    shared = SHARED if name == "evaluate" else []
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
                overrides = in_hydra_words(words, schema, PICKED, sweep=False)
                from_hydra(schema, compose(name, overrides=overrides))
