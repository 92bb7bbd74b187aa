from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from pujax.errors import EvaluationError
from pujax.evaluation import statistics
from pujax.evaluation.results import Evaluation, Row
from pujax.evaluation.statistics import (
    compare,
    compare_runs,
    interval_of_mean,
    interval_over_runs,
)


def evaluation(values, ids=None):
    ids = ids or [f"p{i}" for i in range(len(values))]
    rows = [
        Row(i, None, "?", None, "a", "r", {"rouge_l": value, "exact": None})
        for i, value in zip(ids, values, strict=True)
    ]
    return Evaluation("m", tuple(rows))


def exact_means(values):
    """The mean of each of the n^n equally likely resamples of n values."""
    return np.array([np.mean(draw) for draw in product(values, repeat=len(values))])


def test_resampled_means_of_three_values_are_as_frequent_as_in_all_27_resamples():
    values = np.array([0.0, 1.0, 5.0])
    exact = exact_means(values)
    assert len(exact) == 27
    found = statistics._resampled_means(values, seed=0)
    for mean in np.unique(exact):
        share = np.mean(np.isclose(exact, mean))
        error = np.sqrt(share * (1 - share) / len(found))
        assert abs(np.mean(np.isclose(found, mean)) - share) < 4 * error, mean


def test_the_interval_of_three_values_is_that_of_all_27_resamples():
    # All three the same has probability 1/27 > 2.5 %: the ends are the least and the greatest.
    values = [0.0, 1.0, 5.0]
    low, high = np.percentile(exact_means(values), [2.5, 97.5], method="inverted_cdf")
    assert (low, high) == (0.0, 5.0)
    found = compare(evaluation([0.0] * 3), evaluation(values))["rouge_l"]
    assert (found.low, found.mean, found.high) == (low, 2.0, high)


def test_runs_that_differ_by_seed_alone_have_the_interval_of_their_means():
    # One prompt, two runs a side, of which only the second side differs: 0, 1/2, 1/2 or 1.
    found = compare_runs([evaluation([0.0])] * 2, [evaluation([0.0]), evaluation([1.0])])
    assert list(found) == ["rouge_l"]
    assert (found["rouge_l"].mean, found["rouge_l"].low, found["rouge_l"].high) == (0.5, 0.0, 1.0)


def test_crossed_resamples_of_two_seeds_and_two_prompts_are_as_frequent_as_in_all_16():
    values = np.array([[0.0, 1.0], [3.0, 9.0]])
    exact = np.array(
        [
            values[np.ix_(seeds, prompts)].mean()
            for seeds in product(range(2), repeat=2)
            for prompts in product(range(2), repeat=2)
        ]
    )
    found = statistics._crossed_means(values, seed=0, arm=0)
    for mean in np.unique(exact):
        share = np.mean(np.isclose(exact, mean))
        error = np.sqrt(share * (1 - share) / len(found))
        assert abs(np.mean(np.isclose(found, mean)) - share) < 4 * error, mean


def test_prompts_are_drawn_for_both_arms_together():
    # The arms differ by .1 on every prompt, however much the prompts differ.
    rng = np.random.default_rng(0)
    values = rng.random(50)
    found = compare_runs(
        [evaluation(values.tolist())] * 3, [evaluation((values + 0.1).tolist())] * 2
    )["rouge_l"]
    np.testing.assert_allclose([found.low, found.mean, found.high], 0.1, rtol=1e-9)


def test_what_is_made_of_each_of_several_models_is_compared_with_that_model():
    # Two models lie far apart, and 0.1 and 0.3 are gained on them: a resample gains 0.1, 0.2, 0.3.
    start = [evaluation([0.0, 0.5]), evaluation([5.0, 5.5])]
    ended = [evaluation([0.1, 0.6]), evaluation([5.3, 5.8])]
    crossed, matched = (compare_runs(start, ended, matched=way)["rouge_l"] for way in (False, True))
    assert crossed.mean == pytest.approx(matched.mean) == pytest.approx(0.2)
    np.testing.assert_allclose([matched.low, matched.high], [0.1, 0.3])
    assert crossed.high > 5


def test_one_run_an_arm_has_nearly_the_interval_of_two_models():
    rng = np.random.default_rng(0)
    first, second = evaluation(rng.random(60).tolist()), evaluation(rng.random(60).tolist())
    one, other = compare(first, second)["rouge_l"], compare_runs([first], [second])["rouge_l"]
    np.testing.assert_allclose([one.low, one.high], [other.low, other.high], atol=0.006)
    assert one.mean == pytest.approx(other.mean)


def test_more_spread_between_seeds_is_a_wider_interval():
    prompts = np.linspace(0, 1, 40)
    still = [evaluation(prompts.tolist())] * 4
    moved = [evaluation((prompts + shift).tolist()) for shift in (-0.3, -0.1, 0.1, 0.3)]
    narrow, wide = (compare_runs(still, runs)["rouge_l"] for runs in (still, moved))
    assert narrow.high - narrow.low < 1e-9
    assert wide.high - wide.low > 0.3


def test_a_skewed_mean_has_an_interval_that_leans_as_bca_does():
    values = [0.0] * 18 + [10.0, 20.0]
    found = interval_of_mean(values)
    percentile = np.percentile(statistics._resampled_means(np.array(values), 0), [2.5, 97.5])
    assert found.low > percentile[0] + 0.05 or found.low == percentile[0] == 0.0
    assert found.high > percentile[1] + 0.5


def test_where_bca_is_not_defined_the_interval_is_of_percentiles():
    same = interval_of_mean([2.0, 2.0, 2.0])
    assert (same.low, same.mean, same.high) == (2.0, 2.0, 2.0)
    nearly = interval_of_mean([0.1, 0.1 + 2e-17, 0.1 + 3e-17, 0.1 - 2e-17])
    np.testing.assert_allclose([nearly.low, nearly.mean, nearly.high], 0.1)
    two = interval_of_mean([0.0, 1.0])
    assert (two.low, two.mean, two.high) == (0.0, 0.5, 1.0)


def test_a_difference_of_infinities_is_no_number_and_drops_no_prompt():
    one = evaluation([float("inf")] + [0.0] * 39)
    found = compare(one, one)["rouge_l"]
    assert (np.isnan(found.mean), found.prompts, found.clear) == (True, 40, False)


@pytest.mark.parametrize("field", ["prompt", "answer", "anchor", "kind"])
def test_the_same_ids_of_other_prompts_are_not_compared(field):
    first = evaluation([0.1])
    row = replace(first.rows[0], **{field: "other"})
    with pytest.raises(EvaluationError, match=r"different prompts \(the first is p0\)"):
        compare(first, Evaluation("m", (row,)))


@pytest.mark.parametrize(
    ("values", "interval"),
    [
        ([[0.0, 1.0], [0.0, 1.0]], (0.5, 0.0, 1.0)),  # other prompts would change all
        ([[0.0, 0.0], [1.0, 1.0]], (0.5, 0.0, 1.0)),  # and here other seeds
        ([[0.25, 0.25], [0.25, 0.25]], (0.25, 0.25, 0.25)),
    ],
)
def test_an_interval_over_runs_is_over_seeds_and_prompts_at_once(values, interval):
    found = interval_over_runs(values)
    assert (found.mean, found.low, found.high, found.prompts) == (*interval, 2)
