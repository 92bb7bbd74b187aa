import asyncio
import json

import pytest

from pujax.errors import ConfigError, PromptError, TeacherError
from pujax.teacher.recorded import Recorded
from pujax.teacher.settings import CollectConfig, TeacherConfig


def recorded(path, **settings):
    return Recorded(TeacherConfig(Recorded, path=path, model="ann"), CollectConfig(), **settings)


def said(teacher, *turns):
    messages = [{"role": role, "content": text} for role, text in turns]
    return asyncio.run(teacher.ask(messages))


def written(tmp_path, *rows):
    path = tmp_path / "replies.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_an_answer_is_found_by_the_whole_conversation(tmp_path):
    table = tmp_path / "replies.csv"
    table.write_text('prompt,system,response\nHi,,"Hello, ""you"""\nHi,Be rude.,What?\nLater,,\n')
    teacher = recorded(str(table))
    found = said(teacher, ("user", "Hi"))
    assert (found.text, found.finish_reason, found.model) == ('Hello, "you"', "stop", "ann")
    assert not found.timed  # so that no latency of it is shown
    assert said(teacher, ("system", "Be rude."), ("user", "Hi")).text == "What?"
    for missing in ("Bye", "Later"):  # the second has a row, whose cell is empty
        with pytest.raises(TeacherError, match=rf"replies\.csv: has no answer to .*'{missing}'"):
            said(teacher, ("user", missing))


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add.", "input": "", "output": "3"},
        {"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}]},
        {
            "messages": [
                {"role": "user", "content": "Add."},
                {"role": "assistant", "content": "3"},
            ]
        },
        {"prompt": "Add.", "answer": "true", "response": "3"},
        {"prompt": "Add.", "response": "3", "finish_reason": "length"},
    ],
)
def test_the_forms_of_prompts_that_bring_an_answer_have_one(tmp_path, row):
    found = said(recorded(written(tmp_path, row)), ("user", "Add."))
    assert found.text == "3"
    assert found.finish_reason == row.get("finish_reason", "stop")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": "Hi"}], r"has \['prompt'\] and no answer in 'response'.*\.column=COLUMN"),
        ([{"prompt": "Hi", "answer": "true"}], r"no answer in 'response'"),
        ([{"prompt": "Hi", "response": 4}], r":1: `response` must be a text"),
        ([{"prompt": "Hi", "response": "a\0"}], r":1: `response` has a NUL character"),
        (
            [{"prompt": "Hi", "response": "a"}] * 2 + [{"prompt": "Hi", "response": "b"}],
            r":3: 'b' is a second answer to a prompt that has 'a': leave one out",
        ),
        ([{"response": "a"}], r"needs `prompt` or `messages`"),
    ],
)
def test_a_file_that_does_not_say_what_was_answered_is_refused(tmp_path, rows, told):
    with pytest.raises(PromptError, match=told):
        recorded(written(tmp_path, *rows))


def test_a_file_that_is_not_there_is_said_of_its_setting(tmp_path):
    with pytest.raises(PromptError, match=r"No such file .*teacher\.path"):
        recorded(str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match=r"teacher\.path=None: name the file of answers"):
        recorded(None)


def test_the_same_answer_twice_is_one(tmp_path):
    rows = [{"prompt": "Hi", "response": "a"}, {"prompt": "Hi", "response": "a "}]
    assert said(recorded(written(tmp_path, *rows)), ("user", "Hi")).text == "a"
