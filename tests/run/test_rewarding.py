import doctest
import importlib
import sys
from functools import partial

import numpy as np
import pytest

from pujax.errors import ConfigError
from pujax.method import scoring
from pujax.records import Example, Prompt
from pujax.run import rewarding
from pujax.run.rewarding import Rewards

CHECKS = """
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
