import numpy as np
import pytest

from pujax.evaluation.winrate import length_controlled, win_rate

TEN = np.full(4, 10.0)


def test_a_judge_that_always_takes_the_first_gives_one_half():
    found = win_rate(np.ones(4), np.ones(4), TEN, TEN)
    assert (found.rate, found.controlled, found.bias) == (0.5, 0.5, 0.5)
    found = win_rate(np.zeros(4), np.zeros(4), TEN, TEN)
    assert (found.rate, found.bias) == (0.5, -0.5)


def test_a_judge_that_always_takes_a_gives_one():
    found = win_rate(np.ones(4), np.zeros(4), TEN, TEN)
    assert (found.rate, found.controlled, found.bias) == (1.0, 1.0, 0.0)


def test_both_orders_are_averaged_prompt_by_prompt():
    # A wins, a tie of places, an undecided one, and B wins weakly.
    found = win_rate(np.array([1.0, 1.0, 0.5, 0.2]), np.array([0.0, 1.0, 0.5, 0.6]), TEN, TEN)
    np.testing.assert_allclose(found.wins, [1.0, 0.5, 0.5, 0.3])
    assert found.rate == pytest.approx(0.575)
    assert found.bias == pytest.approx(2.4 / 4 - 0.5)


def test_a_judge_that_leans_more_than_it_sees_prefers_what_it_takes_more_surely():
    # It always takes the first, and A there more surely in two of four pairs, less in one.
    found = win_rate(np.array([0.7, 0.9, 0.6, 0.8]), np.array([0.6, 0.8, 0.65, 0.8]), TEN, TEN)
    np.testing.assert_array_equal(found.preferred, [1.0, 1.0, 0.0, 0.5])
    assert abs(found.rate - 0.5) < 0.03


def test_wins_that_length_has_nothing_to_do_with_stay_as_they_are():
    # At either length three of four wins.
    wins = np.array([1.0, 1.0, 1.0, 0.0] * 2)
    lengths = np.array([20.0] * 4 + [10.0] * 4)
    assert length_controlled(wins, lengths, lengths[::-1]) == pytest.approx(0.75, abs=1e-4)


def test_wins_that_are_of_length_alone_are_worth_one_half():
    # The longer answer wins nine times of ten; A's is the longer in most.
    shares = np.array([0.9] * 30 + [0.1] * 10)
    lengths_a = np.array([20.0] * 30 + [10.0] * 10)
    lengths_b = np.array([10.0] * 30 + [20.0] * 10)
    assert shares.mean() == pytest.approx(0.7)
    found = length_controlled(shares, lengths_a, lengths_b)
    # tanh keeps equal differences on both sides equal only about their mean: read off at zero.
    assert found == pytest.approx(0.5, abs=0.001)


def test_wins_that_length_separates_have_a_finite_fit():
    wins = np.array([1.0, 1.0, 0.0, 0.0])
    lengths = np.array([20.0, 21.0, 10.0, 9.0])
    assert 0.3 < length_controlled(wins, lengths, np.full(4, 15.0)) < 0.7
