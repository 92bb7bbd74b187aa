from typing import Any

import jax
import pytest
from tiny_families import TINY, tiny

from pujax.models.parameters import AXES, FSDP, KERNELS, TENSOR, mesh_axes, param_shapes


@pytest.mark.parametrize("name", TINY)
def test_every_dimension_of_a_parameter_has_one_axis_or_none(name):
    config, params = tiny(name)
    shapes: Any = param_shapes(config)
    flat = shapes | shapes["layers"]
    assert jax.tree.map(lambda x: x.shape, params) == shapes
    for inner in flat.keys() - {"layers"}:
        axes = mesh_axes(inner)
        assert axes is not None
        assert len(axes) in (0, len(flat[inner])), inner
        split = [axis for axis in axes if axis is not None]
        assert set(split) <= set(AXES)
        assert len(set(split)) == len(split)


def test_a_low_rank_factor_is_split_as_its_kernel_and_its_rank_is_not():
    assert mesh_axes("q") == (None, FSDP, TENSOR)
    assert mesh_axes("q_lora_a") == (None, FSDP, None)
    assert mesh_axes("q_lora_b") == (None, None, TENSOR)
    assert mesh_axes("down_lora_a") == (None, TENSOR, None)
    assert all(mesh_axes(f"{name}_lora_a") for name in KERNELS)
    assert mesh_axes("router") is None
