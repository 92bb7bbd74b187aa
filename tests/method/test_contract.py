"""What a loss's author can rely on, and the examples in the docstrings."""

import doctest
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from groups import random_group
from omegaconf import OmegaConf

from pujax.config.compose import conf_dir
from pujax.config.functions import build_loss
from pujax.method import labels, losses, pair_losses
from pujax.types import Group, LossAndMetrics


def function_of(path: Path) -> Callable:
    loss, _ = build_loss(OmegaConf.load(path))
    assert isinstance(loss, partial)
    return loss.func


CONFS = Path(conf_dir(), "loss").glob("*.yaml")
LOSSES = sorted(set(map(function_of, CONFS)), key=lambda loss: loss.__name__)
"""The function of every conf/loss/*.yaml: a new one is held to the contract by its YAML."""


@pytest.mark.parametrize("module", [labels, losses, pair_losses])
def test_the_examples_in_docstrings_hold(module):
    failed, tried = doctest.testmod(module)
    assert (failed, tried > 4) == (0, True)


def test_a_group_holds_what_a_loss_may_read():
    assert list(Group.__dataclass_fields__) == [
        "prompts",
        "tokens",
        "mask",
        "finished",
        "old_logps",
        "ref_logps",
        "scores",
        "labels",
        "valid",
        "has_old_logps",
        "members",
        "kl",
    ]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_takes_logps_and_a_group_and_its_settings_are_keywords_with_defaults(loss):
    logps, group, *settings = inspect.signature(loss).parameters.values()
    assert (logps.name, group.name, group.annotation) == ("logps", "group", Group)
    assert inspect.signature(loss).return_annotation == LossAndMetrics
    for setting in settings:
        assert setting.kind is inspect.Parameter.KEYWORD_ONLY
        assert setting.default is not inspect.Parameter.empty


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_gives_one_float32_a_prompt_and_metrics_that_are_numbers(loss: Callable):
    loss_B, metrics = jax.eval_shape(loss, *random_group(0, B=3))
    assert (loss_B.shape, loss_B.dtype) == ((3,), jnp.float32)
    assert all(value.shape == () for value in metrics.values())
