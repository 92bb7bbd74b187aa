"""Real tokens in a row of their own, and back; `test_step` holds the packed update to the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pujax.models.logps import response_logps
from pujax.models.packing import Grid, TokenBudget, places, through_last
from pujax.types import Tokens

MASK = jnp.array([[True, False, True], [True, False, False], [True, True, True], [False] * 3])
X = jnp.arange(1.0, 13.0).reshape(4, 3)


def test_a_budget_is_the_sum_of_a_batch_or_of_each_of_its_parts():
    lengths, mask = jnp.array([3, 1, 2, 2]), MASK[:, None]
    # The gap in the first row counts, since what comes after it is read with it.
    assert TokenBudget(8, 7).fits(lengths, mask)
    assert not TokenBudget(7, 7).fits(lengths, mask)
    assert not TokenBudget(8, 6).fits(lengths, mask)
    assert TokenBudget(4, 4, ways=2).fits(lengths, mask)
    assert not TokenBudget(4, 3, ways=2).fits(lengths, mask)
    assert TokenBudget(8, 7, both=15).fits(lengths, mask)
    assert not TokenBudget(8, 7, both=14).fits(lengths, mask)
    assert TokenBudget(8, 7, ways=2, both=8).fits(lengths, mask)
    assert not TokenBudget(8, 7, ways=2, both=7).fits(lengths, mask)  # 4 and 4, 4 and 3 tokens
    assert TokenBudget(10, 7).share(1, 3) == TokenBudget(4, 3, both=6)
    assert TokenBudget(10, 7, ways=2, both=15).share(2, 6) == TokenBudget(4, 3, ways=2, both=5)


@pytest.mark.parametrize(
    ("budget", "ways", "packed"),
    [
        (6, 1, [1.0, 3.0, 4.0, 7.0, 8.0, 9.0]),
        (7, 1, [1.0, 3.0, 4.0, 7.0, 8.0, 9.0, 0.0]),
        (4, 2, [[1.0, 3.0, 4.0, 0.0], [7.0, 8.0, 9.0, 0.0]]),
    ],
)
def test_the_marked_tokens_come_out_in_order_and_go_back_to_their_places(budget, ways, packed):
    grid = Grid((4, 3), places(MASK, budget, ways))
    np.testing.assert_array_equal(grid.taken(X), packed)
    np.testing.assert_array_equal(grid.spread(grid.taken(X)), jnp.where(MASK, X, 0))


def test_what_is_read_ends_with_the_last_marked_token():
    read = [[True] * 3, [True, False, False], [True] * 3, [False] * 3]
    np.testing.assert_array_equal(through_last(MASK), read)
    np.testing.assert_array_equal(through_last(MASK[:, None]), np.array(read)[:, None])


def test_a_gap_in_a_mask_is_read_packed_or_not(model, params, prompts):
    after = Tokens(*map(jnp.asarray, prompts))
    tokens = jnp.arange(4 * 2 * 6).reshape(4, 2, 6) % 90 + 6
    mask = jnp.array([[True, False, True, True, False, False], [True] * 3 + [False] * 3])
    mask = jnp.broadcast_to(mask[None], (4, 2, 6))
    read = jax.jit(response_logps, static_argnums=0)
    whole = read(model, params, after, tokens, mask)
    tight = model.clone(budget=TokenBudget(16, 4 * 7))
    assert tight.budget.fits(after.lengths, mask)
    packed = read(tight, params, after, tokens, mask)
    np.testing.assert_allclose(packed, whole, atol=1e-5)
    assert np.abs(whole).max() > 1


def test_without_a_pack_nothing_moves():
    grid = Grid((4, 3), None)
    assert grid.taken(X) is X
    assert grid.spread(X) is X
