"""A run's time is its work at the rate of the machine, and then at its own."""

import dataclasses

import pytest
from recipes import dataset, recipe

from pujax.config.settings import (
    AlignConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    SftConfig,
    TrainConfig,
)
from pujax.run import forecast as module
from pujax.run.forecast import Forecast, forecast

CONFIG = TrainConfig(
    data=DataConfig(prompts="p", heldout="h", anchors="nowhere.jsonl"),
    loss={"_target_": "pujax.method.losses.grpo"},
    sft=SftConfig(steps=6, batch=2),
    align=AlignConfig(steps=3, prompts=2),
)
# 3 layers: kernels q o of 32 x 32, k v of 32 x 16, gate up down of 32 x 64; a key costs 128.
LAYER = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
# Prompts of 10 tokens; answers of 4, of which 3 pass the layers and 4 meet the 96 tokens, or of 5.
PROMPT = 3 * 10 * (LAYER + 128 * 5)
ANCHOR = 3 * 3 * (LAYER + 128 * 12) + 4 * 2 * 32 * 96
DRAWN = 3 * 4 * (LAYER + 128 * 12.5) + 5 * 2 * 32 * 96


def found(model, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return forecast(config, model, recipe(), dataset(8), dataset(3).examples)


def test_the_work_of_a_run_is_that_of_its_passes(model):
    work = found(model)
    assert work.step["sft"] == pytest.approx(3 * 2 * (PROMPT + ANCHOR))  # forward and backward
    # Learnt, by the reference and by the score; four drawn to the full length, after their prompts.
    group = 2 * (PROMPT + 5 * ANCHOR)
    assert work.step["align"] == pytest.approx((3 + 1 + 1) * group + 2 * 4 * DRAWN)
    assert work.evaluation == pytest.approx(3 * (PROMPT + ANCHOR + DRAWN))
    assert work.evaluations == {"sft": 1, "align": 1}
    steps = 6 * work.step["sft"] + 3 * work.step["align"]
    assert work.whole == pytest.approx(steps + 3 * work.evaluation)


def test_every_evaluation_and_every_sample_counts(model):
    measured = EvalConfig(every=2, samples=4)
    work = found(model, eval=measured, checkpoint=CheckpointConfig(best="rouge_l"))
    assert work.evaluation == pytest.approx(3 * (PROMPT + ANCHOR + 5 * DRAWN))
    # After steps 2 and 4 of 6, after 2 of 3; after the last, and of the best.
    assert work.evaluations == {"sft": 4, "align": 3}
    work = found(model, eval=measured, sft=SftConfig(steps=0), align=AlignConfig(steps=0))
    assert work.whole == pytest.approx(work.evaluation)  # the base's


WORK = Forecast({"sft": 2.0, "align": 10.0}, {"sft": 5, "align": 3}, 6.0, {"sft": 1, "align": 2})


def test_a_guess_is_the_work_at_half_a_products_rate(monkeypatch):
    assert WORK.whole == 5 * 2 + 3 * 10 + 4 * 6
    monkeypatch.setattr(module, "_rate", lambda dtype: {"float32": 32.0}[dtype])
    assert WORK.seconds("float32") == pytest.approx(4.0)
    monkeypatch.setattr(module.jax, "default_backend", lambda: "gpu")
    assert WORK.seconds("float32") is None


def test_what_comes_after_a_stage_goes_at_the_pace_of_its_steps():
    # A step of 2 in 4 seconds: 3 steps of 10 take 60, and three evaluations of 6 take 36.
    assert WORK.after("sft", 4.0) == pytest.approx(60 + 36)
    assert WORK.after("sft", 4.0, evaluation=1.0) == pytest.approx(60 + 3)
    assert WORK.after("align", 5.0) == pytest.approx(3.0)
