from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from pujax.errors import ConfigError
from pujax.files.locate import package_file
from pujax.method import losses, scoring
from pujax.records import Sampling
from pujax.run.compose import build, conf_dir, from_hydra, register
from pujax.run.settings import AlignConfig, DataConfig, ModelConfig, TrainConfig

register("train_schema", TrainConfig)
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


@pytest.mark.parametrize(
    ("record", "values", "message"),
    [
        (Sampling, {"temperature": 0.0}, "sampling.temperature=0.0"),
        (Sampling, {"candidates": 1}, "sampling.candidates=1"),
        (Sampling, {"top_p": 1.5}, "sampling.top_p=1.5"),
        (AlignConfig, {"prompts": 4, "microbatch": 3}, "align.microbatch=3.*align.prompts=4"),
        (DataConfig, {"on_too_long": "cut"}, "data.on_too_long='cut'.*error, drop or truncate"),
        (ModelConfig, {"dtype": "fp8"}, "model.dtype='fp8'"),
    ],
)
def test_a_setting_out_of_range_names_itself_and_the_remedy(record, values, message):
    with pytest.raises(ConfigError, match=message):
        record(**values)


def node(target, **values):
    return {"_target_": f"pujax.method.{target}", "_partial_": True, **values}


def test_build_binds_the_keywords_and_builds_what_is_inside():
    loss = build(node("losses.dpo", pairs=node("labels.anchor_vs_all"), beta=0.3), "loss")
    assert isinstance(loss, partial)
    assert loss.func is losses.dpo
    assert loss.keywords["beta"] == 0.3
    blend = build(
        node("scoring.blend", scores=[node("scoring.rouge")], weights=[1.0]), "scorer.score"
    )
    assert blend.keywords["scores"][0].func is scoring.rouge


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (node("losses.dpo", betta=1), r"loss: dpo has no \['betta'\]; it takes .*'beta'"),
        (node("losses.nothing"), "loss: cannot build 'pujax.method.losses.nothing'"),
        (
            node("losses.dpo", pairs=node("labels.best_vs_worst", x=1)),
            r"loss\.pairs: best_vs_worst",
        ),
        (node("scoring.blend", scores=[]), r"loss: blend also needs \['weights'\]"),
    ],
)
def test_build_refuses_unknown_functions_and_keywords(bad, message):
    with pytest.raises(ConfigError, match=message):
        build(bad, "loss")


def test_frozen_settings_compose():
    @dataclass(frozen=True)
    class Inner:
        x: int = 1

    register("inner_schema", Inner)
    assert OmegaConf.structured(Inner).x == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package://no_such_package/a.gguf", "'no_such_package' is not installed"),
        ("package://pujax/none.gguf", "no file 'none.gguf'"),
    ],
)
def test_a_package_file_that_is_missing_is_named(path, message):
    with pytest.raises(ConfigError, match=message):
        package_file(path)
