"""The first words of a run are those of its settings, and its guesses those of arithmetic."""

import dataclasses
import json
from functools import partial

import jax.numpy as jnp
import pytest
from recipes import dataset, recipe

from pujax.config.model_settings import LoraConfig, ModelConfig
from pujax.config.settings import (
    AlignConfig,
    CheckpointConfig,
    DataConfig,
    SftConfig,
    TrainConfig,
)
from pujax.method import labels
from pujax.models.decoder import LanguageModel
from pujax.models.sharding import make_mesh
from pujax.records import Given
from pujax.run import beginning
from pujax.run.student import Student
from pujax.teacher.settings import TeacherConfig

GIVEN = Given((8,), 1.0, (1.0, 0.0))

CONFIG = TrainConfig(
    model=ModelConfig(path="mine"),
    data=DataConfig(prompts="p", heldout="h", anchors="nowhere.jsonl"),
    loss={"_target_": "pujax.method.losses.grpo"},
    sft=SftConfig(steps=6, batch=2),
    align=AlignConfig(steps=3, prompts=2),
)


@pytest.fixture
def student(model, params):
    return Student(model, None, params)


def test_a_run_says_where_what_and_on_what_it_trains(model, tmp_path, monkeypatch):
    monkeypatch.setattr(beginning, "fast_bfloat16", lambda: False)
    where, who, device = beginning.place(CONFIG, tmp_path, model.config, make_mesh())
    assert where == f"run: {tmp_path}"
    assert who == "student: mine, 3 layers, 0.0 M parameters, all trained"
    assert device == "device: 8 × cpu, mesh: data 8"
    lora = dataclasses.replace(CONFIG, model=ModelConfig(path="mine", lora=LoraConfig(rank=4)))
    _, who, device = beginning.place(lora, tmp_path, model.config, make_mesh(1, 1, 1))
    assert who.endswith("LoRA of rank 4")
    assert device == "device: 1 × cpu"
    monkeypatch.setattr(beginning, "fast_bfloat16", lambda: True)
    _, _, device = beginning.place(lora, tmp_path, model.config, make_mesh(1, 1, 1))
    assert device == "device: 1 × cpu; model.dtype=bfloat16 takes less time here"
    chosen = dataclasses.replace(lora, model=dataclasses.replace(lora.model, dtype="float32"))
    *_, device = beginning.place(chosen, tmp_path, model.config, make_mesh(1, 1, 1))
    assert device == "device: 1 × cpu"


def test_a_run_says_how_much_it_will_do(student):
    lines = beginning.work(CONFIG, student, recipe(), dataset(8), dataset(3))
    assert lines == [
        "anchors: nobody is named, in nowhere.jsonl; prompts to 16 tokens, responses to 5",
        "the teacher's answers: most frequent 8 × “!”",
        "sft: 6 steps of 2 prompts, 1.5 times through 8",
        "align: 3 steps of 2 prompts, 0.75 times through 8, 4 candidates each, grpo",
        "evaluation: 3 held-out prompts, of the base and after each stage",
        "time: about a minute or two, compiling included; disk: about 1 MiB",
    ]
    rest = dataclasses.replace(CONFIG, align=AlignConfig(steps=0))
    assert "align: none" in beginning.work(rest, student, recipe(), dataset(8), dataset(3))


@pytest.mark.parametrize(
    ("labelled", "dimensions", "said"),
    [
        ({"weights": [0.7, 0.3]}, {}, "helpful 0.7, brief 0.3, by labels.weights"),
        ({}, {}, "helpful, brief, alike"),
        (None, {"helpful": 1.0, "brief": 2.0}, "helpful 1, brief 2, by data.dimensions"),
        (None, {}, "helpful, brief, alike"),
    ],
)
def test_a_run_says_what_its_preferences_are_rated_by_and_take(student, labelled, dimensions, said):
    rated = dataclasses.replace(dataset(4), candidates=2, dimensions=("helpful", "brief"))
    data = DataConfig(preferences="q", heldout="h", prompts=None, anchors=None)
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(data, dimensions=dimensions))
    rule = labels.softmax_labels if labelled is None else labels.mixed_labels
    rules = recipe(labels=partial(rule, **labelled or {}))
    alone = dataclasses.replace(
        rated, examples=tuple(dataclasses.replace(e, given=(GIVEN,)) for e in rated.examples)
    )
    lines = beginning.work(config, student, rules, alone, dataset(3))
    assert f"ratings: {said}" in lines
    assert "the best responses: most frequent 4 × “!”" in lines
    assert (
        "align: 3 steps of 2 prompts, 1.5 times through 4, 2 candidates each, given with their "
        "scores, grpo"
    ) in lines
    mixed = dataclasses.replace(dataset(8), other=alone, share=0.4)
    lines = beginning.work(config, student, rules, mixed, dataset(3))
    assert f"ratings: {said}" in lines
    assert [line for line in lines if line.startswith(("sft", "align"))] == [
        "sft: 4 steps of 2 prompts, 1 times through 8 of data.prompts",
        "sft: 2 steps of 2 prompts, 1 times through 4 of data.preferences",
        "align: 2 steps of 2 prompts, 0.5 times through 8 of data.prompts, 4 candidates each, grpo",
        "align: 1 step of 2 prompts, 0.5 times through 4 of data.preferences, 2 candidates each, "
        "given with their scores, grpo",
    ]


def test_a_run_that_goes_through_few_prompts_many_times_says_which_steps_would_do(student):
    def told(steps):
        config = dataclasses.replace(CONFIG, sft=SftConfig(steps=steps, batch=2))
        return beginning.work(config, student, recipe(), dataset(8), dataset(3))

    assert not any("warning" in line for line in told(40))  # ten passes
    (line,) = [line for line in told(188) if "warning" in line]
    assert line.startswith("warning: 47 passes of SFT learn 8 prompts by heart: sft.steps=16 makes")


def test_a_rough_time_reads_as_one():
    assert beginning._span(20.0).startswith("about a minute or two")
    assert beginning._span(600.0).startswith("about 10 min as fast as the machine is now, and ")
    assert beginning._span(3 * 3600.0).startswith("about 3.0 hours ")


def test_the_disk_is_for_the_model_its_reference_and_the_states_that_are_kept(params, model):
    small = {"embed": jnp.zeros((5, 8))}  # 40 parameters, 160 bytes
    student = Student(LanguageModel(model.config), None, small)
    assert beginning.expected_bytes(CONFIG, student) == 160 * (1 + 1 + 3 * 2)
    clean = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(clean=True))
    assert beginning.expected_bytes(clean, student) == 160 * 2
    adapter = Student(student.model, small, {"a": jnp.zeros((2, 8))})
    assert beginning.expected_bytes(CONFIG, adapter) == 160 + 64 + 3 * 64 * 2


def test_the_first_steps_correct_the_guess():
    assert beginning.told_by_pace("sft", 600.0, 3420.0) == (
        "time: about 67 min left, 10:00 of it sft, by the first steps"
    )


def test_thoughts_and_several_answers_are_told_with_what_is_used(student, tmp_path):
    store = tmp_path / "anchors.jsonl"
    message = {"role": "user", "content": "?"}
    answers = (("m", "<think>Hm.</think>!"), ("m", "!"), ("n", "?"))
    record = {"format": 1, "id": "a", "finish_reason": "stop", "usage": None, "cost": None}
    record |= {"created": "2026-01-01", "sampling": {}, "key": "0" * 64}
    lines = [record | {"messages": [message], "model": m, "response": r} for m, r in answers]
    other = lines[0] | {"messages": [message | {"content": "another"}]}
    store.write_text("".join(json.dumps(line) + "\n" for line in [*lines, other]))

    def told(**teacher):
        config = dataclasses.replace(
            CONFIG,
            data=dataclasses.replace(CONFIG.data, anchors=str(store)),
            teacher=TeacherConfig(**teacher),
        )
        lines = beginning.work(config, student, recipe(), dataset(8), dataset(3))
        found = [line.removeprefix("the teacher's answers: ") for line in lines]
        return [line for line in found if line.startswith(("several", "with thoughts"))]

    assert told() == [
        "several 1 prompt with answers by several models or settings: of one model's the newest is "
        "used",
        "with thoughts 1 answer: the thought is left out of what is learnt "
        "(teacher.thoughts=strip)",
    ]
    asked, kept = told(base_url="http://127.0.0.1:1/v1", model="m", thoughts="keep")
    assert asked.endswith("settings: that to these settings is used")
    assert kept.endswith("the thought is learnt with it (teacher.thoughts=keep)")
    store.write_text(json.dumps(lines[1]) + "\n")
    assert told() == []
