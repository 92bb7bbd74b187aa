import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pujax.evaluation import ranking

NUMBER = st.floats(-50, 50)


def test_accuracy_counts_pairs_whose_chosen_is_at_least_as_likely():
    chosen, rejected = np.array([-1.0, -2.0, -3.0, -9.0]), np.array([-2.0, -2.0, -1.0, -8.0])
    assert ranking.accuracy(chosen, rejected) == 0.5


def test_a_long_response_is_not_wrong_for_its_length_alone():
    # -9 over 9 tokens is -1 a token, -4 over 2 is -2 a token.
    chosen, rejected = np.array([-9.0]), np.array([-4.0])
    assert ranking.accuracy(chosen, rejected) == 0.0
    assert ranking.normalized_accuracy(chosen, rejected, np.array([9.0]), np.array([2.0])) == 1.0


def test_the_optimum_of_dpo_turns_a_pair_that_the_references_odds_allow():
    # At α = .9 and β = .5 the odds gain log(9) / .5 = 4.394 nats.
    ref_chosen = np.array([-5.0, -5.0])
    ref_rejected = np.array([-0.7, -0.5])  # behind by 4.3, and by 4.5
    found = ranking.idealized_accuracy(ref_chosen, ref_rejected, beta=0.5, preference=0.9)
    assert found == 0.5


@settings(max_examples=200)
@given(NUMBER, NUMBER, NUMBER, NUMBER, st.sampled_from([0.05, 0.1, 0.5, 1.0]))
def test_a_pair_is_ranked_rightly_just_when_dpos_loss_is_within_its_bound(cw, cl, rw, rl, beta):
    """Theorem 4.1 of Chen et al."""
    margin = beta * ((cw - cl) - (rw - rl))
    loss = np.logaddexp(0.0, -margin)
    bound = ranking.dpo_loss_bound(np.array([rw]), np.array([rl]), beta=beta)[0]
    if abs(cw - cl) > 1e-6:
        right = ranking.accuracy(np.array([cw]), np.array([cl])) == 1.0
        if abs(loss - bound) > 1e-12:
            assert (loss <= bound) == right


def test_the_bound_of_an_indifferent_reference_is_log_two():
    zero = np.zeros(1)
    assert ranking.dpo_loss_bound(zero, zero, beta=0.1)[0] == pytest.approx(np.log(2))
