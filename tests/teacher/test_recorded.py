import asyncio
import json

import pytest

from pujax.errors import PromptError, Rejected
from pujax.teacher.recorded import Recorded
from pujax.teacher.settings import CollectConfig, TeacherConfig


def recorded(path, **settings):
    teacher = TeacherConfig(Recorded, path=str(path), model="ann")
    return Recorded(teacher, CollectConfig(), **settings)


def said(teacher, *turns):
    messages = [{"role": role, "content": text} for role, text in turns]
    return asyncio.run(teacher.ask(messages))


def test_an_answer_is_found_by_the_whole_conversation_in_any_form_of_prompts(tmp_path):
    table = tmp_path / "replies.csv"
    table.write_text('prompt,system,response\nHi,,"Hello, ""you"""\nHi,Be rude.,What?\n')
    teacher = recorded(table)
    found = said(teacher, ("user", "Hi"))
    assert (found.text, found.finish_reason, found.model) == ('Hello, "you"', "stop", "ann")
    assert not found.timed  # so that no latency of it is shown
    assert said(teacher, ("system", "Be rude."), ("user", "Hi")).text == "What?"
    with pytest.raises(Rejected, match=r"replies\.csv has no answer to 'Bye'") as told:
        said(teacher, ("user", "Bye"))
    assert told.value.certain
    alpaca = tmp_path / "alpaca.json"
    alpaca.write_text(json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3"}]))
    of_alpaca = recorded(alpaca, column="output")
    assert list(of_alpaca._answers.values()) == ["3"]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([{"prompt": "Hi"}], r"replies\.jsonl:1: has \['prompt'\] and no text in 'response'"),
        ([{"prompt": "Hi", "response": 4}], r"\.column=COLUMN"),
        (
            [{"prompt": "Hi", "response": "a"}] * 2 + [{"prompt": "Hi", "response": "b"}],
            r":3: 'b' is a second answer to a prompt that has 'a': leave one out",
        ),
        ([{"response": "a"}], r"needs `prompt` or `messages`"),
    ],
)
def test_a_file_that_does_not_say_what_was_answered_is_refused_with_the_line(tmp_path, lines, told):
    path = tmp_path / "replies.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(PromptError, match=told):
        recorded(path)
