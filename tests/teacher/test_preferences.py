import csv
import json
import subprocess
import sys
from decimal import Decimal

import pytest

from pujax.errors import PromptError
from pujax.records import Rated
from pujax.teacher.preferences import load_preferences


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def one(tmp_path, row, **settings):
    (preference,) = load_preferences(write(tmp_path / "p.jsonl", row), **settings)
    return preference.prompt.messages, [(r.text, r.score) for r in preference.responses]


NULLS = {"from": None, "value": None}
PAIR = ((user("Hi"),), [("Hello", 1.0), ("Go", -1.0)])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
        {"messages": [user("Hi")], "chosen": "Hello", "rejected": "Go"},
        {"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("Go")]},
        {
            "chosen": [user("Hi"), assistant("Hello")],
            "rejected": [user("Hi"), assistant("Go")],
        },
        {
            "prompt": "Hi",
            "chosen": [user("Hi"), assistant("Hello")],
            "rejected": [user("Hi"), assistant("Go")],
        },
        {"instruction": "Hi", "chosen": "Hello", "rejected": "Go"},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "Go"},
        },
        {  # as a table's cells have turns
            "prompt": json.dumps([user("Hi")]),
            "chosen": json.dumps([user("Hi"), assistant("Hello")]),
            "rejected": json.dumps([user("Hi"), assistant("Go")]),
        },
        {  # as Parquet fills up turns
            "conversations": [user("Hi") | NULLS, assistant("Hello") | NULLS],
            "chosen": assistant("Hello") | NULLS,
            "rejected": assistant("Go") | NULLS,
        },
    ],
    ids=["text", "messages", "turns", "whole", "both", "alpaca", "sharegpt", "cells", "nulls"],
)
def test_a_pair_is_read_from_every_shape(tmp_path, row):
    assert one(tmp_path, row) == PAIR


SYSTEM, Q, A, HI = {"role": "system", "content": "S"}, user("q"), assistant("a"), user("Hi")


@pytest.mark.parametrize(
    ("told", "before", "whole"),
    [
        ({"prompt": [SYSTEM]}, [HI], (SYSTEM, HI)),
        ({"prompt": [SYSTEM, HI]}, [HI], (SYSTEM, HI)),
        ({"prompt": [HI]}, [SYSTEM, HI], (SYSTEM, HI)),
        ({"prompt": "Hi"}, [SYSTEM], (SYSTEM, HI)),
        ({"prompt": "Hi", "system": "S"}, [HI], (SYSTEM, HI)),
        ({"prompt": [SYSTEM, Q]}, [Q, A, HI], (SYSTEM, Q, A, HI)),
        ({"prompt": [SYSTEM, Q]}, [A, HI], (SYSTEM, Q, A, HI)),
        ({"prompt": [Q, A]}, [HI], (Q, A, HI)),
        ({"prompt": "q"}, [Q, A, HI], (Q, A, HI)),
        ({"messages": [Q, A, HI]}, [HI], (Q, A, HI)),
        ({"messages": [HI, assistant("Hello")]}, [HI], (HI,)),
        ({"prompt": [HI], "messages": [HI, assistant("Hello")]}, [], (HI,)),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, [HI], (HI,)),
        ({"instruction": "Hi", "history": [["q", "a"]]}, [HI], (Q, A, HI)),
    ],
)
def test_a_pairs_own_prompt_is_joined_to_the_conversations(tmp_path, told, before, whole):
    """What it says again is there once; its system message and earlier turns stay."""
    chosen, rejected = [*before, assistant("Hello")], [*before, assistant("Go")]
    row = {**told, "chosen": chosen, "rejected": rejected}
    assert one(tmp_path, row) == (whole, PAIR[1])


@pytest.mark.parametrize(
    "told",
    [
        {"prompt": [SYSTEM | {"content": "T"}]},
        {"prompt": [Q]},
        {"messages": [Q]},
        {"messages": [HI, A, Q]},
        {"conversations": [{"from": "human", "value": "q"}]},
        {"instruction": "q"},
    ],
)
def test_a_pairs_own_prompt_that_contradicts_the_conversations_is_refused(tmp_path, told):
    before = [SYSTEM, HI]
    row = {**told, "chosen": [*before, assistant("x")], "rejected": [*before, assistant("y")]}
    said = rf"p\.jsonl:1: `{next(iter(told))}` is not what `chosen` answers"
    with pytest.raises(PromptError, match=said):
        one(tmp_path, row)


@pytest.mark.parametrize(
    "row",
    [
        {"responses": ["a", "b"], "ratings": [1, 3.5]},
        {"completions": [{"text": "a", "rating": 1}, {"text": "b", "rating": 3.5}]},
        {"candidates": [{"content": "a", "score": 1}, {"content": "b", "score": 3.5}]},
        {"completions": '["a", "b"]', "scores": "[1, 3.5]"},
        {"responses": ["a", "b"], "ratings": {"x": [1, 3.5], "y": None}},
        {"responses": ["a", "b"], "ratings": [{"x": 0, "y": 2}, {"x": 3, "y": 4}]},
        {"responses": ["a", "b"], "ratings": {"x": [0, 3], "y": [2, 4]}},
        {
            "responses": [
                {"text": "a", "ratings": {"x": 0, "y": 2}},
                {"text": "b", "ratings": {"x": 3, "y": 4}},
            ]
        },
    ],
)
def test_ratings_are_read_in_and_beside_a_list_and_several_are_averaged(tmp_path, row):
    assert one(tmp_path, {"prompt": "Hi", **row}) == ((user("Hi"),), [("a", 1.0), ("b", 3.5)])


def test_pairs_and_ratings_stand_in_one_file(tmp_path):
    rated = {"prompt": "Hi", "responses": ["a", "b"], "ratings": {"x": [0, 3], "y": [2, 4]}}
    source = write(tmp_path / "p.jsonl", {"prompt": "Hi", "chosen": "a", "rejected": "b"}, rated)
    assert [[r.score for r in p.responses] for p in load_preferences(source)] == [[1, -1], [1, 3.5]]


def test_one_id_is_of_one_prompt_however_many_rows_it_has(tmp_path):
    row = {"id": "a", "prompt": "Hi", "chosen": "Hello", "rejected": "Go"}
    again = row | {"rejected": "No"}
    assert len(list(load_preferences(write(tmp_path / "p.jsonl", row, again)))) == 2
    other = write(tmp_path / "q.jsonl", row, row | {"prompt": "Who?"})
    with pytest.raises(PromptError, match=r"q\.jsonl:2: id 'a' came before with another prompt"):
        list(load_preferences(other))


def test_a_row_that_is_left_out_does_not_say_which_dimensions_there_are(tmp_path):
    rated = {"prompt": "Hi", "responses": ["a", "b"]}
    bad, good = [{"y": 1}, {"x": 1}], [{"x": 1}, {"x": 2}]
    rows = [{**rated, "ratings": ratings} for ratings in (bad, good, good)]
    errors = []
    found = load_preferences(write(tmp_path / "p.jsonl", *rows), bad=errors.append)
    assert [each.dimensions for each in found] == [("x",), ("x",)]
    assert len(errors) == 1


def test_a_text_that_is_json_but_no_turns_stays_a_text(tmp_path):
    row = {"prompt": "Hi", "chosen": '[{"role": "user", "name": "Al"}]', "rejected": '{"value": 3}'}
    assert one(tmp_path, row)[1] == [(row["chosen"], 1.0), (row["rejected"], -1.0)]


def test_dimensions_have_weights(tmp_path):
    row = {
        "prompt": "Hi",
        "responses": ["a", "b"],
        "ratings": {"x": [0, 3], "y": [2, 4], "z": [9, 9]},
    }
    _, responses = one(tmp_path, row, weights={"x": 2.0, "y": -1.0})
    assert responses == [("a", -2.0), ("b", 2.0)]
    with pytest.raises(PromptError, match="response 1's ratings add up to inf: scale them down"):
        one(tmp_path, row, weights={"x": 1e308})


@pytest.mark.parametrize(
    ("row", "score"),
    [
        ({"prompt": "Hi", "completion": "a", "label": True}, 1.0),
        ({"prompt": "Hi", "completion": [assistant("a")], "label": False}, -1.0),
        ({"prompt": "Hi", "response": "a", "label": "bad"}, -1.0),
        ({"prompt": "Hi", "response": "a", "label": 1}, 1.0),
        ({"prompt": "Hi", "response": "a", "label": 0.0}, -1.0),
        ({"prompt": "Hi", "response": "a", "label": "0.0"}, -1.0),
        ({"instruction": "Hi", "output": "a", "kto_tag": True}, 1.0),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a"}],
                "kto_tag": False,
            },
            -1.0,
        ),
    ],
)
def test_a_flag_is_a_score_of_one_response(tmp_path, row, score):
    assert one(tmp_path, row) == ((user("Hi"),), [("a", score)])


def test_a_response_is_not_taken_for_the_true_answer(tmp_path):
    row = {"instruction": "Hi", "output": "a", "kto_tag": True}
    source = write(tmp_path / "p.jsonl", row, row | {"answer": "4"})
    assert [row.prompt.answer for row in load_preferences(source)] == [None, "4"]


def test_tables_and_datasets_are_read_alike(tmp_path):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    row = {"prompt": "Hi", "responses": ["a", "b"], "ratings": [{"x": 1.0}, {"x": 3.5}]}
    decimals = row | {"ratings": [{"x": Decimal("1.0")}, {"x": Decimal("3.5")}]}  # a database's
    parquet.write_table(pyarrow.Table.from_pylist([decimals]), tmp_path / "p.parquet")
    with (tmp_path / "p.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow({k: v if k == "prompt" else json.dumps(v) for k, v in row.items()})
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], ["Hi", "b", "a"]])
    expected = (Rated("a", 1.0), Rated("b", 3.5))
    for name in ("p.parquet", "p.csv"):
        (preference,) = load_preferences(str(tmp_path / name))
        assert preference.responses == expected
    (pair,) = load_preferences(str(tmp_path / "pairs.csv"))
    assert pair.responses == (Rated("b", 1.0), Rated("a", -1.0))
    assert pair.place == f"{tmp_path / 'pairs.csv'}:2"


GOOD = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
TWO = {"prompt": "Hi", "responses": ["a", "b"]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**GOOD, "rejected": "a"}, "`chosen` and `rejected` are the same text"),
        (
            {**GOOD, "chosen": None, "choosen": "a"},
            r"`chosen` is missing \(it has \['choosen', 'prompt', 'rejected'\]\)",
        ),
        ({**GOOD, "rejected": None}, "`rejected` is missing"),
        ({**GOOD, "chosen": " "}, "`chosen` must be a text that isn't empty"),
        ({**GOOD, "chosen": str([assistant("x")])}, "`chosen` has turns as Python prints them"),
        ({**GOOD, "chosen": 5}, "`chosen` must be a text or turns, found 5"),
        ({**GOOD, "chosen": [user("x")]}, "`chosen` must end with the assistant's turn"),
        (
            {
                "chosen": [user("x"), assistant("a")],
                "rejected": [user("y"), assistant("b")],
            },
            "answer different conversations",
        ),
        (
            {
                "prompt": "z",
                "chosen": [user("x"), assistant("a")],
                "rejected": [user("x"), assistant("b")],
            },
            "`prompt` is not what `chosen` answers",
        ),
        ({**TWO, "ratings": [1, "5"]}, r"responses\[1\]'s rating must be a number, found '5'"),
        ({**TWO, "ratings": [1, True]}, "must be a number, found True"),
        ({**TWO, "ratings": [1, float("nan")]}, "is nan: it must be finite"),
        ({**TWO, "ratings": [1, -1e39]}, r"is -1e\+39, more than 1e\+15: scale it down"),
        ({**TWO, "ratings": [1, 1e20]}, r"is 1e\+20, more than 1e\+15: scale it down"),
        ({**TWO, "ratings": [1]}, "`ratings` must be a list of 2"),
        ({**TWO, "ratings": {"x": [1]}}, r"`ratings\.x` must be a list of 2"),
        ({**TWO, "ratings": [1, None]}, r"responses\[1\]'s rating is missing"),
        ({**TWO, "ratings": [{"x": 1, "y": 1}, {"x": 1}]}, "response 1 has no rating 'y'"),
        ({**TWO, "ratings": [{"x": 1}, {"x": 1, "y": 1}]}, "response 1 has a rating 'y'"),
        ({"prompt": "Hi", "responses": ["a", "a"], "ratings": [1, 2]}, "same text as one before"),
        ({"prompt": "Hi", "responses": ["a"], "ratings": [1]}, "at least two responses"),
        (TWO, r"`responses\[0\]` has no `ratings`"),
        ({"prompt": "Hi", "completion": "a", "label": "maybe"}, "`label` must be true, false"),
        ({"prompt": "Hi", "label": True}, "needs a `completion`"),
        (
            {"chosen": "a", "rejected": "b"},
            r"needs `prompt` or `messages`, found neither \(it has \['chosen', 'rejected'\]\)",
        ),
        ({"prompt": "Hi", "answer": "a"}, "needs `chosen` and `rejected`, `responses`"),
        (
            {"prompt": "q", "responses": ["a", "b"], "ratings": [10**400, 2]},
            "is inf: it must be fi",
        ),
        (
            {"prompt": "q", "responses": ["a", "b"], "ratings": {"": [1, 2]}},
            "has a dimension without a name",
        ),
        (
            {
                "prompt": "q",
                **{
                    name: [{"role": "user", "content": 5}, {"role": "assistant", "content": name}]
                    for name in ("chosen", "rejected")
                },
            },
            r"`messages\[0\]\.content` must be a text",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_or_left_out_and_counted(tmp_path, row, said):
    source = write(tmp_path / "p.jsonl", GOOD, row, GOOD)
    with pytest.raises(PromptError, match=said) as caught:
        list(load_preferences(source))
    assert str(caught.value).startswith(f"{source}:2: ")
    errors = []
    assert len(list(load_preferences(source, bad=errors.append))) == 2
    assert len(errors) == 1


def test_reading_preferences_needs_no_jax():
    code = "import pujax.teacher.preferences, sys; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
