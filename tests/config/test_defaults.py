"""A default is written in two places, in code and in a YAML that shows it: they agree."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pujax.chat import ChatConfig
from pujax.collect import CollectRun
from pujax.config.compose import conf_dir, from_hydra, offered, register, structured
from pujax.config.functions import build_metrics
from pujax.config.model_settings import ModelConfig
from pujax.config.settings import (
    DataConfig,
    DistributedConfig,
    MeshConfig,
    ScorerConfig,
    TrainConfig,
)
from pujax.config.tool_settings import AdaptConfig, BenchmarkConfig
from pujax.evaluate import GROUPS, EvaluateConfig
from pujax.evaluation.metrics import METRICS, PAIRS, Shown
from pujax.export import ExportConfig
from pujax.generate import GenerateConfig
from pujax.report import ReportConfig
from pujax.serve import ServeConfig
from pujax.teacher.settings import TeacherConfig


def flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def composed(command, folder="", groups=(), overrides=()):
    with offered(groups), initialize_config_dir(conf_dir() + folder, version_base="1.3"):
        return compose(command, overrides=list(overrides))


def read(path) -> dict[str, Any]:
    """A choice's YAML as it stands, without the list of what it is made of."""
    values: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    values.pop("defaults", None)
    return values


def choices(*groups):
    root = Path(conf_dir())
    paths = [path for group in groups for path in sorted((root / group).glob("*.yaml"))]
    return [(str(path.relative_to(root).with_suffix("")), path) for path in paths]


@pytest.mark.parametrize(
    ("name", "folder", "schema", "given"),
    [
        ("train", "", TrainConfig, ()),
        ("benchmark", "", BenchmarkConfig, ()),
        ("collect", "", CollectRun, ()),
        ("evaluate", "/tools", EvaluateConfig, ()),
        ("report", "/tools", ReportConfig, ("run=r",)),
        ("generate", "/tools", GenerateConfig, ("model=m",)),
        ("chat", "/tools", ChatConfig, ("model=m",)),
        ("serve", "/tools", ServeConfig, ("model=m",)),
        ("export", "/tools", ExportConfig, ("model=m",)),
        ("adapt", "/tools", AdaptConfig, ("model=m", "preferences=p", "out=o")),
    ],
)
def test_a_default_that_a_yaml_states_is_the_records(name, folder, schema, given):
    register(f"{name}_schema", schema)
    groups = {"evaluate": GROUPS, "adapt": ("loss",)}.get(name, ())
    stated = OmegaConf.to_container(composed(name, folder, groups, given), resolve=False)
    assert isinstance(stated, dict)
    defaults = dict(flat(OmegaConf.to_container(structured(schema))))
    for key, value in flat(stated):
        # The student is a choice, and so are functions, of which the tests below speak.
        chosen = key == "model.path" or key.startswith(("scorer.score.", "labels.", "loss."))
        if not chosen and not key.startswith("eval.metrics.") and f"{key}={value}" not in given:
            assert value == defaults[key] or value == "???", key


# What a choice sets otherwise than its record's default; all else in its YAML agrees with that.
RECORDS = {"data": DataConfig, "mesh": MeshConfig, "distributed": DistributedConfig}
OTHERWISE = {
    "data/preferences": {"prompts": None, "anchors": None, "preferences": ""},
    "mesh/fsdp": {"fsdp": -1},
    "mesh/single": {"data": 1},
    "mesh/tensor": {"tensor": -1},
    "distributed/off": {"detect": False},
}


def set_otherwise(schema, values):
    defaults = dict(flat(OmegaConf.to_container(structured(schema))))
    stated = {key: value for key, value in flat(values) if value != "???"}
    return {key: value for key, value in stated.items() if value != defaults.get(key)}


@pytest.mark.parametrize(("name", "path"), choices(*RECORDS))
def test_a_choice_of_settings_differs_from_the_record_where_it_says_so_alone(name, path):
    schema = RECORDS[name.split("/")[0]]
    assert set_otherwise(schema, read(path)) == OTHERWISE.get(name, {})


@pytest.mark.parametrize(("name", "path"), choices("model"))
def test_a_student_is_its_path(name, path):
    assert set(set_otherwise(ModelConfig, read(path))) == {"path"}, name


@pytest.mark.parametrize(("name", "path"), choices("teacher"))
def test_who_is_asked_answers_greedily_in_256_tokens_whoever_it_is(name, path):
    told = set_otherwise(TeacherConfig, read(path))
    its_own = ("base_url", "path", "api_key_env", "headers.", "protocol.", "price.")
    shared = {key: value for key, value in told.items() if not key.startswith(its_own)}
    asks_nobody = name in ("teacher/replay", "teacher/recorded")
    assert shared == ({} if asks_nobody else {"temperature": 0.0, "max_tokens": 256})
    assert all(value == 0 for key, value in told.items() if key.startswith("price."))


# ---------------------------------------------------------------------- functions by `_target_`

# What a choice sets otherwise than its functions' defaults: what its name stands for.
APART = {
    "loss/cdpo": {"label_smoothing": 0.1},
    "loss/cispo": {
        "aggregate": "token_mean",
        "clip": "weight_clip",
        "clip_low": 1.0,
        "clip_high": 4.0,
        "kl_coef": 0.0,
    },
    "loss/dapo": {
        "aggregate": "token_mean",
        "clip_high": 0.28,
        "kl_coef": 0.0,
        "mask_unfinished": True,
    },
    "loss/dpo_anchor": {
        "pairs": "anchor_vs_worst",
        "beta": 2.0,
        "length_normalized": True,
        "nll_weight": 1.0,
    },
    "loss/dr_grpo": {"advantage": "mean", "kl_coef": 0.0},
    "loss/gspo": {
        "aggregate": "sequence_mean",
        "clip": "sequence_clip",
        "clip_low": 0.0003,
        "clip_high": 0.0004,
        "kl_coef": 0.0,
    },
    "loss/ldl_grpo_anchor": {"loss": "ldl_grpo"},
    "loss/pessimistic": {"pessimism": 0.1},
    "teacher/protocol/anthropic": {
        "request": "anthropic_request",
        "answer": "anthropic_answer",
    },
    "tools/suite/ranking": {"otherwise": "rouge_l"},
    "tools/suite/signal": {"otherwise": "rouge_l"},
}


FUNCTIONS = choices("loss", "labels", "scorer", "teacher/protocol", "tools/suite")


def named(target):
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def set_apart(node, prefix=""):
    """What a function's node sets otherwise than its default, and the nodes in it likewise."""
    parameters = inspect.signature(named(node["_target_"])).parameters
    for name, value in node.items():
        key, nodes = f"{prefix}{name}", value if isinstance(value, list) else [value]
        nodes = [each for each in nodes if isinstance(each, dict) and "_target_" in each]
        for each in nodes:
            yield from set_apart(each, f"{key}.")
        if name in ("_target_", "_partial_") or parameters[name].default is inspect.Parameter.empty:
            continue
        default = parameters[name].default
        if nodes and named(nodes[0]["_target_"]) is not default:
            yield key, nodes[0]["_target_"].rpartition(".")[2]
        elif not nodes and value != default:
            yield key, value


@pytest.mark.parametrize(("name", "path"), FUNCTIONS)
def test_a_functions_keywords_are_its_defaults_but_for_what_its_name_stands_for(name, path):
    values = read(path)
    if name.startswith("scorer/"):
        assert set_otherwise(ScorerConfig, {"by": values["by"]}) == {}
        values = values["score"]
    assert dict(set_apart(values)) == APART.get(name, {})


@pytest.mark.parametrize(("name", "path"), [each for each in choices("eval") if read(each[1])])
def test_a_metric_is_measured_and_shown_by_default_as_its_yaml_says(name, path):
    values = read(path)
    assert dict(set_apart(values.pop("function"))) == {}
    known = {**METRICS, **PAIRS}.get(name.removeprefix("eval/"))
    if known is not None:
        assert Shown(**values) == known.shown


def test_a_run_without_named_metrics_has_the_first_of_those_that_train_names():
    register("train_schema", TrainConfig)
    config = from_hydra(TrainConfig, composed("train", overrides=["+experiment=smoke"]))
    made = build_metrics(config.eval)
    assert list(made)[: len(METRICS)] == list(METRICS)
    for name, metric in METRICS.items():
        assert made[name].shown == metric.shown
        assert getattr(made[name].function, "func", None) is metric.function
