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
def test_constants_that_python_reads_and_json_has_not_score_nothing(constant):
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
        ("{", "no JSON: Expecting property name"),
        ('{"minimum": NaN}', "no JSON: NaN is no JSON"),
        ("true", "write a JSON object, not true"),
        ('{"type": "strin"}', r"no JSON Schema: \$\.type: 'strin' is not valid"),
        ('{"pattern": "("}', r"no JSON Schema: \$\.pattern: '\(' is not a 'regex'"),
        ('{"pattern": "a{99999999999}"}', "no schema that can be followed"),
        ('{"$schema": "mine"}', "jsonschema knows no draft 'mine': the latest is https://json-"),
        ('{"$schema": 5}', "jsonschema knows no draft 5"),
        (b"\xff", "is not UTF-8"),
        ("[" * 100_000, "no JSON: nested too deeply"),
        ('{"items": ' * 400 + "{}" + "}" * 400, "no schema that can be followed"),
        ('{"$ref": "#/$defs/none"}', r"a \$ref leads nowhere \(#/\$defs/none\)"),
        ('{"properties": {"a": {"$ref": "#/$defs/x"}}}', r"a \$ref leads nowhere \(#/\$defs/x\)"),
        (
            '{"items": {"$ref": "http://127.0.0.1:9/x.json"}}',
            r"a \$ref leads nowhere .*nothing is fetched",
        ),
        ('{"$ref": "#/allOf/x", "allOf": [{}]}', r"a \$ref leads nowhere \(#/allOf/x\)"),
        ('{"$ref": "#/$defs/a/type", "$defs": {"a": {"type": "object"}}}', r"a \$ref leads now"),
        ('{"$ref": "#"}', "no schema that can be followed"),
        ('{"allOf": [{"$ref": "#"}]}', "no schema that can be followed"),
        ('{"properties": {"a": {"$ref": "#/properties/a"}}}', "no schema that can be followed"),
        (
            '{"x": {"$ref": "#/nope"}, "properties": {"q": {"$ref": "#/x"}}}',
            r"a \$ref leads nowhere \(#/nope\)",
        ),
    ],
)
def test_a_schema_that_is_none_is_refused(written, said, tmp_path):
    pytest.importorskip("jsonschema", reason="jsonschema, of the extra json, is not installed")
    file = tmp_path / "order.json"
    file.write_bytes(written if isinstance(written, bytes) else written.encode())
    place = r"^scorer\.score\.function\.schema=.*order\.json: "
    with pytest.raises(ConfigError, match=place + said):
        rewards.json_schema("{}", schema=str(file))


@pytest.mark.parametrize("wrong", [{"enum": {1, 2}}, {"minimum": float("nan")}, b"{}"])
def test_a_value_that_no_schema_has_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"^scorer\.score\.function\.schema: no JSON"):
        rewards.json_schema("{}", schema=wrong)


def scored(schema, response):
    pytest.importorskip("jsonschema", reason="jsonschema, of the extra json, is not installed")
    return rewards.json_schema(response, schema=schema)


def test_decimals_are_multiples_as_decimals():
    assert scored({"multipleOf": 0.01}, "19.99") == 1.0  # which floats say it isn't
    assert scored({"multipleOf": 0.01}, "19.995") == 0.0
    assert scored({"multipleOf": 0.1}, "0.3") == 1.0
    assert scored({"multipleOf": 2}, "1" + "0" * 400) == 1.0
    assert scored({"multipleOf": 0.1}, "1e999") == 0.0
    assert scored({"multipleOf": 3}, '"no number"') == 1.0
    draft_3 = {"$schema": "http://json-schema.org/draft-03/schema#", "multipleOf": 2}
    assert scored(draft_3, "3") == 1.0  # which had not this keyword yet


def test_a_schema_that_refers_to_itself_is_followed_as_deep_as_the_response_goes():
    nested = {"items": {"$ref": "#"}, "type": "array"}
    assert scored(nested, "[" * 90 + "]" * 90) == 1.0
    assert scored(nested, "[" * 89 + "1" + "]" * 89) == 0.0
    assert scored(nested, "[" * 900 + "]" * 900) == 0.0  # deeper than Python goes


def test_the_draft_that_a_schema_names_decides():
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "type": "integer"}
    assert scored(old, "2.0") == 0.0
    assert scored({"type": "integer"}, "2.0") == 1.0


def test_a_reference_leads_within_the_schema_and_one_that_is_data_nowhere():
    assert scored({"$id": "urn:x", "$defs": {"y": {"$id": "urn:y"}}, "$ref": "urn:y"}, "1") == 1.0
    assert scored({"properties": {"$ref": {"type": "string"}}}, '{"$ref": "a"}') == 1.0
    assert scored({"const": {"$ref": "#/nowhere"}}, '{"$ref": "#/nowhere"}') == 1.0


def test_a_process_reads_a_schemas_file_once(tmp_path):
    file = tmp_path / "once.json"
    file.write_text('{"type": "string"}')
    assert scored(str(file), '"a"') == 1.0
    file.write_text("changed")
    assert scored(str(file), "1") == 0.0


def test_a_schemas_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"schema=.*none\.json: can't be read: No such file"):
        rewards.json_schema("{}", schema=str(tmp_path / "none.json"))


def test_without_jsonschema_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ConfigError, match=r"pip install 'pujax\[json\]'"):
        rewards.json_schema("{}", schema={"title": "not cached"})
