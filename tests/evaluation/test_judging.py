import re
import time
from dataclasses import replace

import numpy as np
import pytest

from pujax.errors import EvaluationError
from pujax.evaluation import judging
from pujax.evaluation.judging import first_is_better, winrate
from pujax.evaluation.results import Evaluation, Row


def evaluation(model, responses, prompts=None):
    prompts = prompts or [f"question {i}" for i in range(len(responses))]
    rows = [
        Row(f"p{i}", "letter" if i % 2 else "note", prompt, None, "anchor", response, {})
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    return Evaluation(model, tuple(rows))


def shown(question):
    """The two answers that a question shows."""
    text = question.messages[0]["content"]
    found = re.search(r"Answer A:\n(.*)\n\nAnswer B:\n(.*)\n\nThe better", text, re.DOTALL)
    assert found is not None
    return found.groups()


def judge_by(choose):
    """A judge that says what `choose` makes of the two answers; None says nothing."""

    def judge(questions):
        said = {question.id: choose(*shown(question)) for question in questions}
        assert len(said) == len(questions)
        return {name: text for name, text in said.items() if text is not None}

    return judge


def cells(answer):
    return dict(answer.rows)


PAIR = [evaluation("old", ["a", "b", "c", "d"]), evaluation("new", ["A1", "B1", "C1", "D1"])]


def test_a_judge_that_always_takes_the_first_gives_one_half_and_is_found_out():
    found = cells(winrate(PAIR, judge_by(lambda a, b: "A")))
    assert found["win rate"] == "0.500 [0.500, 0.500]"
    assert found["win rate at equal length"] == "0.500 [0.500, 0.500]"
    assert found["lean to the answer shown first"] == "+0.500"
    assert found["same verdict in both orders"] == "0.000"


def test_a_judge_that_always_takes_the_newer_gives_one_wherever_it_is_shown():
    found = winrate(PAIR, judge_by(lambda a, b: "A" if a[0].isupper() else "B"))
    assert found.header == ("judge", "new against old")
    assert cells(found)["win rate"] == "1.000 [1.000, 1.000]"
    assert cells(found)["lean to the answer shown first"] == "+0.000"
    assert cells(found)["same verdict in both orders"] == "1.000"
    turned = winrate(PAIR, judge_by(lambda a, b: "A" if a[0].isupper() else "B"), model="old")
    assert turned.header == ("judge", "old against new")
    assert cells(turned)["win rate"] == "0.000 [0.000, 0.000]"


@pytest.mark.parametrize(("forward", "backward"), [("0.5", "0.7"), ("0.3", "0.5"), ("0.7", "0.5")])
@pytest.mark.parametrize("model", ["old", "new"])
def test_a_tie_in_one_order_is_no_verdict_that_the_other_has(forward, backward, model):
    def judge(first, second):
        return f"A={forward if first[0].isupper() else backward}"

    found = cells(winrate(PAIR, judge_by(judge), model=model))
    assert found["same verdict in both orders"] == "0.000"


def test_ties_in_both_orders_are_one_verdict():
    found = cells(winrate(PAIR, judge_by(lambda a, b: "A=0.5")))
    assert found["same verdict in both orders"] == "1.000"


def test_shares_are_averaged_over_both_orders():
    # .9 for new when it is first, .6 against it when it is second: (.9 + .4) / 2.
    found = cells(winrate(PAIR, judge_by(lambda a, b: "A=0.9" if a[0].isupper() else "A=0.6")))
    assert found["win rate"] == "0.650 [0.650, 0.650]"
    assert found["lean to the answer shown first"] == "+0.250"


def test_a_verdict_that_failed_is_counted_and_left_out_with_its_pair():
    def choose(a, b):
        if {a, b} == {"a", "A1"}:
            return None if a == "a" else "A"
        if {a, b} == {"b", "B1"}:
            return "Both are fine."
        return "A" if a[0].isupper() else "B"

    found = winrate(PAIR, judge_by(choose))
    assert cells(found)["win rate"] == "1.000 [1.000, 1.000]"
    assert "2 pairs judged in both orders" in found.note
    assert "3 verdicts failed, their 2 pairs left out" in found.note
    assert found.records[0]["said"] == ["A", None]
    assert found.records[1]["first is better"] == [None, None]


def test_equal_answers_are_a_tie_that_nobody_is_asked_about():
    new = evaluation("new", ["a", "b", "C1", "D1"])

    def choose(a, b):
        assert a != b
        return "A" if a[0].isupper() else "B"

    found = winrate([PAIR[0], new], judge_by(choose))
    assert cells(found)["win rate"].startswith("0.750 ")
    assert "2 pairs judged in both orders and 2 of equal answers" in found.note


def test_prompts_of_some_kinds_alone_are_judged_and_no_more_than_wanted():
    asked = []

    def judge(questions):
        asked.extend(questions)
        return {question.id: "A" for question in questions}

    winrate(PAIR, judge, kinds=["letter"], prompts=1)
    assert [shown(question) for question in asked] == [("B1", "b"), ("b", "B1")]


def test_what_can_not_be_judged_is_named():
    with pytest.raises(EvaluationError, match="new against old: no pair was judged"):
        winrate(PAIR, judge_by(lambda a, b: None))
    with pytest.raises(EvaluationError, match=r"suite\.model='x': has no answers here: choose old"):
        winrate(PAIR, judge_by(lambda a, b: "A"), model="x")
    with pytest.raises(EvaluationError, match="old alone has answers here"):
        winrate(PAIR[:1], judge_by(lambda a, b: "A"))
    with pytest.raises(EvaluationError, match=r"suite\.kinds=.*: no prompt is of these: choose of"):
        winrate(PAIR, judge_by(lambda a, b: "A"), kinds=["x"])
    same = replace(PAIR[0], model="same")
    with pytest.raises(
        EvaluationError, match=r"same and old say the same to all of .*: choose two"
    ):
        winrate([PAIR[0], same], judge_by(lambda a, b: "A"))
    said = replace(same, model="said")
    with pytest.raises(
        EvaluationError, match=r"suite\.model='said': a record has this key already"
    ):
        winrate([PAIR[0], said], judge_by(lambda a, b: "A"))
    other = evaluation("other", ["a", "b"])
    with pytest.raises(EvaluationError, match="different prompts"):
        winrate([PAIR[0], other], judge_by(lambda a, b: "A"))


@pytest.mark.parametrize(
    ("said", "share"),
    [
        ("A", 1.0),
        ("b", 0.0),
        ("**B**", 0.0),
        (" A.\n", 1.0),
        ("Answer: B", 0.0),
        ("The better answer is A.", 1.0),
        ("... is A", 1.0),
        ("A=0.250000", 0.25),
        ("A=1.000000", 1.0),
        ("A=1.9", None),  # no share
        ("", None),
        ("Both", None),
        ("A or B", None),
        ("A good answer is B", None),
        ("C", None),
    ],
)
def test_a_verdict_is_a_share_or_one_letter_alone(said, share):
    assert first_is_better(said) == share


def test_a_verdict_of_marks_alone_is_read_in_linear_time():
    begun = time.process_time()
    assert first_is_better("!" * 20_000) is None
    assert first_is_better("!" * 20_000 + " is B" + "!" * 20_000) == 0.0
    assert time.process_time() - begun < 0.5


def test_what_stands_in_the_texts_is_not_filled_in():
    asked = judging.question("p", "What is {a}?", "{b}", "second")
    assert shown(asked) == ("{b}", "second")
    assert "Question:\nWhat is {a}?\n" in asked.messages[0]["content"]


def test_a_judge_who_takes_the_longer_gives_one_half_at_equal_length():
    # The longer answer is worth .9 throughout; in three of four it is the new one.
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 60, size=(40, 2))
    sizes[:30].sort(axis=1)
    sizes[30:, ::-1].sort(axis=1)
    old = evaluation("old", ["o" * n for n, _ in sizes])
    new = evaluation("new", ["n" * n for _, n in sizes])
    found = cells(
        winrate([old, new], judge_by(lambda a, b: f"A={0.9 if len(a) > len(b) else 0.1}"))
    )
    rate, controlled = (float(found[name].split()[0]) for name in list(found)[:2])
    assert rate > 0.65
    assert abs(controlled - 0.5) < 0.08
