import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pujax.errors import ConfigError
from pujax.models.sharding import check_heads, make_mesh, put_batch, sharding_of


def test_a_parameter_without_a_sharding_rule_is_refused():
    with pytest.raises(ConfigError, match=r"layers/router.*PARAMETERS"):
        sharding_of(make_mesh(), "layers/router", (3, 4))


def test_a_mesh_must_multiply_to_the_number_of_devices():
    with pytest.raises(ConfigError, match="not the number of devices, 8"):
        make_mesh(data=3)


def test_an_axis_of_minus_one_takes_what_the_others_leave():
    for sizes, found in {
        (-1, 1, 1): (8, 1, 1),
        (-1, -1, 1): (1, 8, 1),
        (-1, 4, 1): (2, 4, 1),
        (-1, 1, -1): (1, 1, 8),
        (1, 1, 1): (1, 1, 1),
    }.items():
        assert tuple(make_mesh(*sizes).shape.values()) == found
    with pytest.raises(ConfigError, match=r"mesh\.fsdp=3 .* devices, 8: choose from 1, 2, 4, 8 so"):
        make_mesh(-1, 3)


def test_a_mesh_must_not_split_a_head(model):
    check_heads(make_mesh(2, 2, 2), model.config)
    with pytest.raises(
        ConfigError, match=r"mesh\.tensor=4: .* 4 query heads and 2 .* choose 1, 2,"
    ):
        check_heads(make_mesh(2, 1, 4), model.config)


def test_a_batch_that_does_not_divide_is_filled_up_with_copies_that_do_not_count(batch):
    six = jax.tree.map(lambda x: x[:6], batch)
    placed = put_batch(make_mesh(4, 1, 2), six, 6)
    assert placed.padding == 2
    np.testing.assert_array_equal(
        placed.prompts.ids[5:], jnp.repeat(batch.prompts.ids[5:6], 3, axis=0)
    )
    jax.tree.map(np.testing.assert_array_equal, placed.counted, six)
    assert put_batch(make_mesh(), batch, 8).padding == 0
