"""What a loss's author can rely on, and the examples in the docstrings."""

import doctest
import inspect
from collections.abc import Callable

import jax.numpy as jnp
import pytest
from groups import random_group

from pujax.method import labels, losses
from pujax.types import Group, LossAndMetrics

LOSSES = [losses.sft, losses.dpo, losses.ipo, losses.nnpu, losses.listwise, losses.grpo]
LOSSES += [losses.ldl_grpo, losses.weighted_sft, losses.beside_anchor]
LOSSES += [losses.raft, losses.slic, losses.simpo, losses.orpo]
LOSSES += [losses.gamma_dpo, losses.kto, losses.distill]


@pytest.mark.parametrize("module", [labels, losses])
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
    loss_B, metrics = loss(*random_group(0, B=3))
    assert (loss_B.shape, loss_B.dtype) == ((3,), jnp.float32)
    assert all(jnp.shape(value) == () for value in metrics.values())
