import doctest
import importlib
import pickle
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from pujax.errors import ConfigError
from pujax.method import scoring
from pujax.records import Example, Prompt
from pujax.run import rewarding
from pujax.run.rewarding import Rewards, try_rewards
from pujax.run.workers import Outcome, Workers, answer

CHECKS = """
import json
import re

def graded(prompt, response, anchor, answer, row, *, bonus=0.0):
    if answer is None:
        return None
    if response == "bad":
        raise RuntimeError("broken")
    return float(response) + bonus + row["weight"] + (prompt == "Q1" and response == anchor)

def never(response):
    raise RuntimeError("down")

def unknown(text):
    return 1.0

def nothing(*, size=1):
    return 1.0

def priced(response, row):
    return float(str(row["price"]) in response)

def priced_in_json(response):
    return float(json.loads(response)["price"])

def found(response, answer):
    return float(re.search("[$]([0-9]+)", response).group(1))

def misnamed(response):
    return float(jsn.loads(response))

def mixed(prompt, response):
    if prompt == "Q1":
        raise RuntimeError("down")
    return float(jsn.loads(response))

def of_a_module(response):
    return float(re.serach("a", response) is not None)

def of_a_text(response, answer):
    return float(response.lowered() == answer)

def fussy(response, *, limit=0):
    return None if response == "" else 1.0
"""


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("user")
    (directory / "reward_checks.py").write_text(CHECKS)
    sys.path.insert(0, str(directory))
    yield importlib.import_module("reward_checks")
    sys.path.remove(str(directory))


def example(name, anchor, answer):
    prompt = Prompt(name, ({"role": "user", "content": name},), answer, rest={"weight": 0.5})
    return Example(prompt, (1,), (1,), anchor, (1,), True)


EXAMPLES = [example("Q1", "9", "yes"), example("Q2", "9", None), example("Q3", "bad", "yes")]


def test_the_examples_in_docstrings_hold():
    failed, tried = doctest.testmod(rewarding)
    assert (failed, tried) == (0, 3)


def test_rewards_of_anchors_and_candidates_by_hand(checks):
    """A failure has the worst of its group, a prompt without an answer equal scores."""
    first = partial(scoring.reward, function=partial(checks.graded, bonus=1.0), workers=2)
    second = partial(scoring.reward, function=checks.fussy, workers=1)
    blend = partial(scoring.blend, scores=[first, scoring.token_f1, second], weights=[1, 1, 1])
    with Rewards(blend) as rewards:
        found = rewards.of(EXAMPLES, [["1", "bad", "3"], ["1", "2", "3"], ["2", "", "bad"]])
    graded, fussy = found.scores
    np.testing.assert_array_equal(graded, [[11.5, 2.5, 2.5, 4.5], [0] * 4, [3.5, 3.5, 3.5, 3.5]])
    np.testing.assert_array_equal(fussy, np.ones((3, 4)))
    # 4 of 12 (`bad` is broken, and `` is no number) and 1 of 12; 1 prompt of 3 and none.
    assert found.metrics["score/failed"] == pytest.approx((4 / 12 + 1 / 12) / 2)
    assert found.metrics["score/none"] == pytest.approx(1 / 6)
    assert 0 < found.metrics["time/reward_cpu_s"] < found.metrics["time/reward_s"] * 3
    assert found.failures == (
        "graded failed on 4 of 12 responses: RuntimeError: broken, on 'bad' to prompt 'Q1'",
        "fussy failed on 1 of 12 responses: returned None here and not for all of the prompt's "
        "responses, on '' to prompt 'Q3'",
    )


def test_a_reward_that_never_works_ends_the_run(checks):
    reward = partial(scoring.reward, function=checks.never, workers=1)
    with Rewards(reward) as rewards:
        for _ in range(2):
            assert rewards.of(EXAMPLES, [["1"]] * 3).metrics["score/failed"] == 1
        with pytest.raises(ConfigError, match=r"never failed on 6 of 6 .*: down.*for 3 steps"):
            rewards.of(EXAMPLES, [["1"]] * 3)


@pytest.fixture
def in_this_process(monkeypatch):
    """What a worker would answer, without the second that it takes to start one."""

    def call(self, calls):
        function, batched = pickle.loads(self._function)
        return [[Outcome(*made) for made in answer(function, batched, call)[0]] for call in calls]

    monkeypatch.setattr(Workers, "call", call)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("priced", "NoColumn: the prompt's line has no 'price', but weight, id, messages, answer"),
        ("misnamed", "NameError: name 'jsn' is not defined"),
        ("of_a_module", "AttributeError: module 're' has no attribute 'serach'"),
        ("of_a_text", "AttributeError: 'str' object has no attribute 'lowered'"),
        ("priced_in_json", None),
        ("found", None),
        ("never", None),
    ],
)
def test_a_reward_is_refused_before_a_run_for_what_cannot_lie_in_a_response(
    checks, in_this_process, name, said
):
    scorer = partial(scoring.reward, function=getattr(checks, name))
    with pytest.raises(ConfigError, match=said) if said else nullcontext():
        try_rewards(scorer, EXAMPLES)


def test_a_reward_that_fails_on_every_anchor_that_is_tried_is_told_before_a_run(
    checks, in_this_process
):
    (told,) = try_rewards(partial(scoring.reward, function=checks.never), EXAMPLES)
    assert told == (
        "warning: scorer.score.function: never failed on RuntimeError: down, on the teacher's "
        "answer to prompt 'Q3', the last of 3 answers that it was tried on and failed on: if it "
        "fails on every sampled response of 3 steps too, the run ends"
    )
    assert try_rewards(partial(scoring.reward, function=checks.fussy), EXAMPLES) == []
    # One failure that may lie in the answer, and the run may begin.
    (told,) = try_rewards(partial(scoring.reward, function=checks.mixed), EXAMPLES)
    assert "mixed failed on NameError: name 'jsn' is not defined" in told


def test_a_line_that_lacks_a_column_is_refused_only_where_all_that_are_looked_at_lack_it(
    checks, in_this_process
):
    priced = [replace(one, prompt=replace(one.prompt, rest={"price": 9})) for one in EXAMPLES]
    scorer = partial(scoring.reward, function=checks.priced)
    try_rewards(scorer, [EXAMPLES[0], priced[1]])
    with pytest.raises(ConfigError, match=r"^scorer\.score\.function: priced failed on NoColumn"):
        try_rewards(scorer, EXAMPLES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", "unknown takes 'text': it may take prompt, response, anchor, answer, row"),
        ("nothing", "nothing takes none of prompt, response, anchor, answer, row"),
    ],
)
def test_a_function_that_takes_what_there_is_not_is_refused(checks, name, message):
    with pytest.raises(ConfigError, match=message):
        Rewards(partial(scoring.reward, function=getattr(checks, name)))


def test_rewards_are_found_in_their_order_and_not_where_anchors_are_shuffled(checks):
    one, two = (partial(scoring.reward, function=f) for f in (checks.graded, checks.fussy))
    inner = partial(scoring.blend, scores=[scoring.token_f1, two], weights=[1, 1])
    whole = partial(scoring.blend, scores=[one, inner], weights=[1, 1])
    assert scoring.rewards_of(whole) == (one, two)
    assert scoring.rewards_of(scoring.length) == ()
    with pytest.raises(ConfigError, match="shuffle another score"):
        scoring.rewards_of(partial(scoring.shuffled, score=inner))
