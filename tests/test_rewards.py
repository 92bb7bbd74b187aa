import doctest

import pytest

from pujax import rewards
from pujax.errors import ConfigError
from pujax.evaluation import text
from pujax.records import Prompt


def test_the_examples_in_docstrings_hold():
    failed, tried = doctest.testmod(rewards)
    assert (failed, tried > 5) == (0, True)


@pytest.mark.parametrize("kind", [None, "copy"])
@pytest.mark.parametrize("response", ["paris", "**Paris.**", "It is Paris, I think.", "Parisian"])
def test_exact_and_contains_are_those_of_the_evaluation(response, kind):
    prompt = Prompt("p", (), "Paris", kind)
    row = {"kind": kind}
    assert rewards.exact(response, "Paris", row) == text.exact(prompt, response)
    assert rewards.contains(response, "Paris", row) == text.contains(prompt, response)
    both = text.exact(prompt, response) + text.contains(prompt, response)
    assert rewards.correct(response, "Paris", row) == both / 2


def test_a_prompt_without_an_answer_has_no_number():
    assert rewards.exact("x", None, {}) is None
    assert rewards.contains("x", None, {}) is None
    assert rewards.correct("x", None, {}) is None
    assert rewards.number("1", None) is None


@pytest.mark.parametrize(
    ("words", "last"),
    [
        ("-3.5 degrees", -3.5),
        ("10-3", 3),  # a minus, not a sign
        ("\u22127", -7),
        ("$1,234,567.89.", 1234567.89),
        ("1,2,3", 3),
        (".5e-1", 0.05),
        ("#### 42", 42),
        ("1,2345", 1.2345),  # a decimal comma, which no three digits follow
        ("Das macht 13,7 km.", 13.7),
        ("1.250,5", 1250.5),
        ("0,125", 0.125),
        ("1,250", 1250),
        ("2024, 2025", 2025),
        ("9" * 400, int("9" * 400)),  # as floats they would be infinite, and alike
        ("1e999", "1e999"),
    ],
)
def test_the_last_number_of_a_text(words, last):
    assert rewards.number(words, str(last)) == 1.0
    assert rewards.number(words, f"2{last}".replace("2-", "-2")) == 0.0


def test_numbers_are_equal_within_the_tolerance():
    assert rewards.number("101", "100", tolerance=0.01) == 1.0
    assert rewards.number("102", "100", tolerance=0.01) == 0.0


def test_a_setting_that_means_nothing_is_named():
    with pytest.raises(ConfigError, match=r"pattern='\(': no regular expression"):
        rewards.regex("x", pattern="(")
    with pytest.raises(ConfigError, match=r"required\.age='int': choose string, number"):
        rewards.json_object("{}", required={"age": "int"})
    with pytest.raises(ConfigError, match=r"least=3: must lie in \[0, 2\]"):
        rewards.length("x", least=3, most=2)


@pytest.mark.parametrize("response", ["", "[1]", "{", '{"a": 1} ok', "[" * 100_000, "null"])
def test_what_is_no_json_object_scores_nothing(response):
    assert rewards.json_object(response, required={}) == 0.0
