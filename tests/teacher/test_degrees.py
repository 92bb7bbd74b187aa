"""Answers of known preference degree, and prompts that state a weighting."""

import doctest
import importlib.util
import math
import sys

import pytest

from pujax.errors import ConfigError, PromptError
from pujax.records import Preference, Prompt, Rated
from pujax.teacher import weighting
from pujax.teacher.degrees import graded, without, yake_words
from pujax.teacher.weighting import weighed

TEXT = "Paris, the capital of France, lies on the Seine."


def ranked(text):
    return ["Paris", "capital", "France", "Seine"]


def test_each_degree_has_an_equal_share_of_the_key_words_less():
    assert graded(TEXT, 2, ranked) == [
        (TEXT, 1.0),
        (", the of France, lies on the Seine.", 0.5),
        (", the of, lies on the.", 0.0),
    ]
    assert [score for _, score in graded(TEXT, 4, ranked)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_degrees_that_leave_the_same_or_nothing_are_one_less():
    assert graded("Yes", 3, lambda text: []) == [("Yes", 1.0)]
    assert graded("Paris", 3, lambda text: ["paris"]) == [("Paris", 1.0)]
    two = graded("Paris it is", 4, lambda text: ["Paris", "is"])
    assert two == [("Paris it is", 1.0), ("it is", 0.5), ("it", 0.0)]


def test_words_go_whole_in_any_case_and_lines_stay():
    assert without("Cat, cats\nand a CAT.", ["cat"]) == ", cats\nand a."
    assert without("C++ is (C++) fast", ["c++"]) == "is () fast"


def test_without_yake_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "yake", None)
    with pytest.raises(ConfigError, match=r"^data\.degrees: .*pip install 'pujax\[spo\]'"):
        yake_words()


@pytest.mark.skipif(
    importlib.util.find_spec("yake") is None, reason="yake, of the extra spo, is not installed"
)
def test_yakes_words_are_those_that_tell():
    found = [word.casefold() for word in yake_words()(TEXT)]
    assert {"paris", "capital", "france", "seine"} <= set(found)
    assert not {"the", "of", "on"} & set(found)


# Weightings.

USER = {"role": "user", "content": "Hi"}
ROW = Preference(
    Prompt("1", (USER,)),
    (Rated("a", 2.0, (4.0, 0.0)), Rated("b", 2.0, (1.0, 3.0))),
    "p.jsonl:1",
    ("helpful", "honest"),
)


def stop(error):
    raise error


def test_the_example_in_the_docstring_holds():
    assert doctest.testmod(weighting).failed == 0


def test_a_row_stands_once_for_each_weighting_which_its_system_message_states():
    made = list(weighed([ROW], [[1, 0], [1, 3]], "Be brief.", stop))
    assert [mix for _, mix in made] == [(1.0, 0.0), (0.25, 0.75)]
    assert [[each.score for each in row.responses] for row, _ in made] == [[4, 1], [1, 2.5]]
    lead = {"role": "system", "content": "Be brief.\nWeigh helpful 0.25, honest 0.75."}
    assert made[1][0].prompt.messages == (lead, USER)
    assert len({row.prompt.id for row, _ in made}) == 2
    again = next(weighed([made[1][0]], [[0, 1]], None, stop))[0].prompt.messages
    assert again[0]["content"].endswith("0.75.\nWeigh helpful 0, honest 1.")
    assert list(weighed([ROW], [], "Be brief.", stop)) == [(ROW, ())]


def test_what_can_not_be_weighed_is_named():
    with pytest.raises(ConfigError, match=r"data\.weightings=\[1\]: .* helpful, honest"):
        list(weighed([ROW], [[1]], None, stop))
    for endless in ([math.inf, 1], [1e308, 1e308], [math.nan, 1], [10**400, 1]):
        with pytest.raises(ConfigError, match=r"data\.weightings=.* with a finite sum"):
            list(weighed([ROW], [endless], None, stop))
    for alike in ([[1, 2], [1, 2.01]], [[1, 1], [0, 1], [2, 2]], [[1, 1], [1, 1]]):
        with pytest.raises(ConfigError, match=r"data\.weightings=.* states both alike"):
            list(weighed([ROW], alike, None, stop))
    pair = Preference(ROW.prompt, ROW.responses, "p.jsonl:7")
    with pytest.raises(PromptError, match=r"p\.jsonl:7: has no ratings for data\.weightings"):
        list(weighed([pair], [[1, 0]], None, stop))
