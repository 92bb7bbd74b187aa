import doctest

import pytest

from pujax import text
from pujax.text import (
    mask,
    printable,
    secret_name,
    secret_query,
    secret_value,
    surrogate_at,
    well_formed,
)


def test_the_examples_of_the_docstrings_hold():
    assert doctest.testmod(text).failed == 0


@pytest.mark.parametrize(
    "name",
    [
        *("OPENAI_API_KEY", "HF_TOKEN", "api-key", "Authorization", "pw_secret", "AUTHORIZATION"),
        *("Api_Key", "api.key", "apiKey", "subscriptionKey", "accessToken", "ACCESSTOKEN"),
    ],
)
def test_names_of_secrets(name):
    assert secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("api_key_env", "API_KEY_ENV", "max_tokens", "maxTokens", "tokens_per_minute"),
        *("tokenizer", "monkey", "MONKEY", "PATH"),
    ],
)
def test_names_that_are_none(name):
    assert not secret_name(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@h/v1?api-version=1&key=abc", "https://***@h/v1?api-version=1&key=***"),
        ("HTTP://h/v1?CODE=abc&Api_Key=abc&v=1", "HTTP://h/v1?CODE=***&Api_Key=***&v=1"),
        ("say hush-hush-9", "say ***"),
        ("say HUSH-HUSH-9", "say ***"),
        ("sk-0123456789abcdefgh", "***"),
        ("Bearer 0123-abcd", "***"),
        ("Basic arithmetic.", "Basic arithmetic."),
        ("MY_KEY", "MY_KEY"),
    ],
)
def test_what_is_secret_is_masked_however_it_is_written_and_nothing_else(monkeypatch, text, shown):
    monkeypatch.setenv("Their_Token", "Hush-Hush-9")
    assert mask(text) == shown


def test_what_is_secret_is_told_by_its_name(monkeypatch):
    monkeypatch.setenv("Their_Token", "Hush-Hush-9")
    assert secret_value("it is hush-hush-9") == "the value of the environment variable Their_Token"
    assert secret_query("http://h/v1?Code=abc") == "Code"


def test_half_a_character_is_found_and_replaced():
    assert surrogate_at("smile \ud83d end") == 6
    assert surrogate_at("smile 😀") is None
    assert well_formed("smile \udc00 end") == "smile \ufffd end"


def test_what_is_printed_is_one_line_of_printable_characters():
    said = printable("a\x1b[2J\x9b1m\u202e\x00\nb" + "x" * 1000)
    assert said.isprintable()
    assert said.startswith("a\\x1b[2J\\x9b1m\\u202e\\x00 bxxx")
    assert len(said) == 300
