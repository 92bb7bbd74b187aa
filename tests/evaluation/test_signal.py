import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pujax.evaluation.signal import Control, control_of, failing, kendall, pair_accuracy, signal_of

UNIFORM = [0.25] * 4


def test_an_oracle_ranks_as_itself():
    found = signal_of([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0])
    assert (found.tau, found.top, found.pairs, found.near) == (1.0, 1.0, 1.0, 1.0)
    assert found.entropy == 0.0


def test_the_reverse_of_an_oracle_is_wrong_throughout():
    found = signal_of([4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 0.0])
    assert (found.tau, found.top, found.pairs, found.near) == (-1.0, 0.0, 0.0, 0.0)


def test_one_swap_of_three_is_one_pair_of_three():
    found = signal_of([2.0, 1.0, 3.0], [1.0, 2.0, 3.0], [0.2, 0.3, 0.5])
    # Two pairs agree and one does not.
    assert found.tau == pytest.approx(1 / 3)
    assert found.pairs == pytest.approx(2 / 3)
    assert found.top == 1.0


def test_ties_are_corrected_for_as_tau_b_does():
    # Oracle 0 0 1 1, scores 1 2 2 3: of 4 ordered pairs 3 agree, 1 is tied in the scores.
    found = signal_of([1.0, 2.0, 2.0, 3.0], [0.0, 0.0, 1.0, 1.0], UNIFORM)
    assert found.tau == pytest.approx(3 / np.sqrt(5 * 4))
    assert found.pairs == pytest.approx(3.5 / 4)
    assert found.near == 0.5
    assert found.entropy == pytest.approx(np.log(4))


def test_a_score_that_ties_everything_ranks_nothing():
    found = signal_of([1.0] * 4, [0.0, 0.0, 0.0, 1.0], UNIFORM)
    assert (found.tau, found.top, found.pairs, found.near) == (0.0, 0.25, 0.5, 0.25)


def test_equally_good_candidates_have_no_order_to_find():
    found = signal_of([1.0, 2.0], [1.0, 1.0], [0.5, 0.5])
    assert (found.tau, found.top, found.pairs) == (None, None, None)
    assert found.near == 1.0


def test_near_takes_what_is_within_the_margin():
    values = ([1.0, 2.0, 3.0], [0.5, 0.9, 1.0], [0.2, 0.3, 0.5])
    assert signal_of(*values, margin=0.1).near == pytest.approx(0.8)
    assert signal_of(*values, margin=0.05).near == 0.5


VALUES = st.lists(st.integers(0, 4), min_size=6, max_size=6)


@settings(max_examples=50, deadline=None)
@given(VALUES, VALUES)
def test_tau_b_is_its_formula(scores, oracle):
    agree = tied_s = tied_r = 0
    for i in range(6):
        for j in range(i):
            a, b = np.sign(scores[i] - scores[j]), np.sign(oracle[i] - oracle[j])
            agree += a * b
            tied_s += a == 0
            tied_r += b == 0
    found = kendall(scores, oracle)
    if tied_r == 15:
        assert found is None
    elif tied_s == 15:
        assert found == 0.0
    else:
        assert found == pytest.approx(agree / np.sqrt((15 - tied_s) * (15 - tied_r)))


def test_a_control_is_the_mean_over_groups_and_warns_once_there_are_enough():
    steps = [Control(20, 0.8, 0.5), Control(), Control(10, 0.5, 0.65)]
    found = control_of([{"loss": 1.0}, *(each.metrics for each in steps)])
    assert found.groups == 30
    assert (found.pairs, found.shuffled) == pytest.approx((0.7, 0.55))
    assert found.warning is None
    assert Control(29, 0.5, 0.5).warning is None
    assert Control(30, 0.56, 0.5).warning is None
    warning = Control(30, 0.54, 0.5).warning
    assert warning is not None
    assert warning.startswith(
        "the score ranks candidates no better than its control: 0.54 of the pairs in 30 groups are "
        "in the order of the true answers (or of likeness to the anchor), and 0.50 with another "
    )


@pytest.mark.parametrize(
    "line",
    [
        {"signal/groups": 8.0},
        {"signal/groups": 8.0, "signal/pairs": None, "signal/pairs_shuffled": 0.5},
        {"signal/groups": -8.0, "signal/pairs": 1.0, "signal/pairs_shuffled": 0.5},
    ],
)
def test_a_step_that_does_not_say_how_its_score_ranked_adds_nothing(line):
    assert Control(8, 0.8, 0.5).and_of(line) == Control(8, 0.8, 0.5)


def test_pairs_are_counted_by_hand():
    # Oracle 3 > 2 > 1: of three pairs one is tied, two are wrong.
    assert pair_accuracy(np.array([1.0, 1.0, 2.0]), np.array([3.0, 2.0, 1.0])) == 0.5 / 3


def test_a_reward_that_fails_is_said_however_few_the_steps():
    told = failing([1.0, 1.0])
    assert told is not None
    assert "failed on 100% of the responses of 2 alignment steps" in told
    assert failing([0.0, 0.3]) is not None
    assert failing([0.0, 0.1]) is None
    assert failing([]) is None
