import doctest
import json
import sys

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


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_python_reads_constants_that_are_no_json(constant):
    assert rewards.json_object(f'{{"a": {constant}}}', required={"a": "number"}) == 0.0


ORDER = {
    "type": "object",
    "required": ["item", "count"],
    "properties": {
        "item": {"enum": ["tea", "coffee"]},
        "count": {"type": "integer", "minimum": 1},
        "sizes": {"type": "array", "items": {"$ref": "#/$defs/size"}},
    },
    "additionalProperties": False,
    "$defs": {"size": {"type": "string", "pattern": "^[SML]$"}},
}


@pytest.mark.parametrize(
    ("response", "holds"),
    [
        ('{"item": "tea", "count": 2}', 1.0),
        (' {"item": "tea", "count": 2.0, "sizes": ["S", "L"]}\n', 1.0),
        ('{"item": "tea", "count": 0}', 0.0),
        ('{"item": "tea", "count": true}', 0.0),
        ('{"item": "water", "count": 1}', 0.0),
        ('{"item": "tea", "count": 1, "sizes": ["XL"]}', 0.0),
        ('{"item": "tea", "count": 1, "note": "hot"}', 0.0),
        ('{"item": "tea", "count": NaN}', 0.0),
        ('Here it is: {"item": "tea", "count": 2}', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_a_response_is_held_against_a_whole_schema(response, holds, tmp_path):
    pytest.importorskip("jsonschema", reason="jsonschema, of the extra json, is not installed")
    assert rewards.json_schema(response, schema=ORDER) == holds
    file = tmp_path / "order.json"
    file.write_text(json.dumps(ORDER))
    assert rewards.json_schema(response, schema=str(file)) == holds


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", r"order\.json: no JSON: Expecting property name"),
        ("true", r"order\.json: write a JSON object, not 'true'"),
        ('{"type": "strin"}', r"order\.json: no JSON Schema: \$\.type: 'strin' is not valid"),
        ('{"pattern": "("}', r"order\.json: no JSON Schema: \$\.pattern: '\(' is not a 'regex'"),
        ('{"$schema": "mine"}', r"order\.json: jsonschema knows no draft 'mine'"),
        (b"\xff", r"order\.json: can't be read: 'utf-8' codec"),
        ('{"$ref": "#/$defs/none"}', r": a \$ref leads nowhere"),
        ('{"$ref": "http://127.0.0.1:9/x.json"}', r"leads nowhere .*nothing is fetched"),
    ],
)
def test_a_schema_that_is_none_is_refused(written, said, tmp_path):
    pytest.importorskip("jsonschema", reason="jsonschema, of the extra json, is not installed")
    file = tmp_path / "order.json"
    file.write_bytes(written if isinstance(written, bytes) else written.encode())
    with pytest.raises(ConfigError, match=rf"^scorer\.score\.function\.schema.*{said}"):
        rewards.json_schema("{}", schema=str(file))


def test_a_schemas_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"schema=.*none\.json: can't be read"):
        rewards.json_schema("{}", schema=str(tmp_path / "none.json"))


def test_without_jsonschema_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ConfigError, match=r"pip install 'pujax\[json\]'"):
        rewards.json_schema("{}", schema={"title": "not cached"})
