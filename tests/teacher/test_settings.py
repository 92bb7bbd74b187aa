from typing import Any

import pytest
from omegaconf import OmegaConf

from pujax.errors import ConfigError
from pujax.teacher.settings import MOST_AT_ONCE, CollectConfig, TeacherConfig

SECRET = "sk-secret-4242-of-mine"
FAKE = "sk-fake-4242-0123456789"


def at(**settings):
    given: dict[str, Any] = {"base_url": "http://h/v1", "model": "m"} | settings
    return TeacherConfig(**given)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", SECRET)
    monkeypatch.setenv("MY_LONG_TOKEN", "hush-hush-9")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"headers": {"x-api-key": SECRET}}, r"headers\.x-api-key: put the value into an environ"),
        ({"headers": {"x-anything": "hush-hush-9"}}, r"headers\.x-anything: put the value"),
        ({"headers": {"x-title": "hush-hush-9"}}, r"headers\.x-title: put the value"),
        ({"headers": {"user-agent": f"Bearer {SECRET}"}}, r"headers\.user-agent: put"),
        ({"extra_body": {"api_key": "short"}}, r"extra_body\.api_key looks secret"),
        ({"extra_body": {"a": [{"b": "x hush-hush-9"}]}}, r"extra_body\.a\.b looks secret"),
        ({"system": "say hush-hush-9"}, r"teacher\.system holds an environment's secret"),
        ({"api_key": SECRET}, r"teacher\.api_key: a key is never a setting"),
        ({"api_key_env": SECRET}, r"never the key itself"),
        ({"base_url": f"http://h/v1?key={SECRET}"}, r"base_url holds a secret \(key\)"),
        ({"base_url": f"http://h/v1?a=b&api-key={SECRET}"}, r"base_url holds a secret \(api-key\)"),
        ({"base_url": f"http://h/v1?sig={SECRET}"}, r"base_url holds a secret \(sig\)"),
        ({"base_url": "http://h/hush-hush-9/v1"}, r"base_url holds a secret \(from the env"),
        ({"base_url": f"http://h/{FAKE}/v1"}, r"base_url holds a secret \(in its path\)"),
        ({"base_url": f"http://h/v1?x={FAKE}"}, r"base_url holds a secret \(x\)"),
        ({"base_url": "http://h/v1?code=4242"}, r"base_url holds a secret \(code\)"),
        ({"headers": {"x-key": f"env:{FAKE}"}}, r"headers\.x-key: after env: comes an env"),
        ({"model": FAKE}, r"teacher\.model holds what looks like a key"),
        ({"model": "m-hush-hush-9"}, r"teacher\.model holds an environment's secret"),
        ({"system": FAKE}, r"teacher\.system holds what looks like a key"),
        ({"extra_body": {"user": FAKE}}, r"extra_body\.user looks secret"),
        ({"base_url": f"http://u:{SECRET}@h/v1"}, r"base_url holds a password"),
        ({"base_url": f"http://u:{SECRET}/x@h/v1"}, r"base_url holds a password"),
        ({"base_url": f"http://h/v1#token={SECRET}"}, r"base_url has a part after #"),
        ({"base_url": "http://[::1"}, r"base_url is not an address"),
    ],
)
def test_a_secret_is_refused_unseen(settings, said):
    with pytest.raises(ConfigError, match=said) as caught:
        at(**settings)
    assert "4242" not in str(caught.value)
    assert "hush" not in str(caught.value)


def test_what_interpolation_takes_from_the_environment_is_refused():
    node = OmegaConf.create({"x-key": "${oc.env:MY_API_KEY}"})
    with pytest.raises(ConfigError, match="x-key: put the value") as caught:
        at(headers=OmegaConf.to_container(node, resolve=True))
    assert "4242" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"headers": {"x-key": "env:MY_API_KEY", "X-Title": "mine", "HTTP-Referer": "http://me"}},
        {"base_url": "https://h/openai/deployments/d?api-version=2024-10-21"},
        {"extra_body": {"max_completion_tokens": 9, "stop": ["Basic words"], "key": 1}},
        {"system": "Basic instructions"},
        {"api_key_env": "MY_API_KEY"},
        {"extra_body": {"stream": False, "n": 1}},
        {"extra_body": {"stream": None, "n": None}},
    ],
)
def test_what_is_harmless_passes(settings):
    at(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"headers": {"x-title": "é"}}, "printable ASCII"),
        ({"headers": {"x-key": "env:A\nB"}}, "printable ASCII"),
        ({"headers": {"x\nkey": "env:A"}}, "letters, digits"),
        ({"temperature": float("nan")}, "teacher.temperature"),
        ({"temperature": float("inf")}, "teacher.temperature"),
        ({"thoughts": "drop"}, "teacher.thoughts='drop': choose strip, keep or fail"),
        ({"extra_body": {"max_completion_tokens": "many"}}, "must be a positive number"),
        ({"extra_body": {"max_completion_tokens": True}}, "must be a positive number"),
        ({"extra_body": {"stream": True}}, r"extra_body\.stream=True: answers are read whole"),
        ({"extra_body": {"stream": 1}}, r"extra_body\.stream=1: answers are read whole"),
        ({"extra_body": {"n": True}}, r"extra_body\.n=True: one answer a prompt"),
        ({"extra_body": {"n": 2}}, r"extra_body\.n=2: one answer a prompt"),
        ({"base_url": None, "path": "some/model"}, "needs teacher=local"),
    ],
)
def test_a_value_that_can_not_be_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        at(**settings)


def test_more_requests_in_flight_than_a_process_has_files_are_refused():
    CollectConfig(concurrency=MOST_AT_ONCE)
    with pytest.raises(ConfigError, match=r"collect\.concurrency=4097: at most 4096, since each"):
        CollectConfig(concurrency=MOST_AT_ONCE + 1)
