"""The newcomer's whole way: every command of it in order, on the smoke student."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from quick import XLA_FLAGS

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "journey.py"
CACHE = ROOT / ".pytest_cache" / "xla"  # the tests' own: see conftest.py


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """The page that the script writes."""
    page = tmp_path_factory.mktemp("journey") / "page.md"
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "XLA_FLAGS": XLA_FLAGS,
    }
    words = [sys.executable, str(SCRIPT), str(page)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return page.read_text(encoding="utf-8")


def of(page, command):
    """What `pujax COMMAND` said on the page, each time."""
    return re.findall(rf"\$ .*pujax {command}\b.*\n([^`]*)```", page)


@pytest.mark.slow
def test_a_newcomer_comes_from_a_table_to_an_answer(journey):
    plan, collected, stats = of(journey, "collect")
    assert "to ask              24" in plan
    assert "24 prompts: had 0, asked 24: 24 answered, 0 failed" in collected
    assert re.search(r"right +exact \d+, contains \d+ of 24 with a true answer", stats)
    assert re.search(r"finish_reason +(stop|length) \d+", stats)
    (train,) = of(journey, "train")
    heads = ("run: runs/mine/", "student: random", "device: ", "anchors: ", "time: about ")
    for head in (*heads, "evaluating base: 8", "align: compiling", "next: pujax chat run="):
        assert f"\n{head}" in f"\n{train}", head
    assert of(journey, "report")[0].endswith("/report.html\n")
    assert of(journey, "chat")[0].strip()
    (exported,) = of(journey, "export")
    assert re.search(r"[0-8] of 8 greedy answers to held-out prompts are the run's own", exported)
    if find_spec("xllamacpp") is None:
        assert "llama.cpp is not here" in journey
        return
    assert "the run's own, by llama.cpp\n" in exported
    served = json.loads(re.findall(r"^\{.*\}$", journey, re.MULTILINE)[-1])
    assert served["message"]["role"] == "assistant"
    assert 0 < served["usage"]["completion_tokens"] <= 8


def test_the_page_in_docs_is_the_scripts():
    script, page = SCRIPT.read_text(encoding="utf-8"), (ROOT / "docs" / "journey.md").read_text()
    for heading in re.findall(r'^    "\w+": "(.+)",$', script, re.MULTILINE):
        assert f"\n## {heading}\n" in page
