import jax
import jax.numpy as jnp
import numpy as np

from pujax.method.prompt_diffusion import TIMES, alphas, learn_prompts, sample_prompt, within


def test_what_is_left_of_a_prompt_falls_from_almost_all_to_almost_nothing():
    left = alphas()
    assert left.shape == (TIMES,)
    assert (jnp.diff(left) < 0).all()
    assert left[0] > 0.999
    assert left[-1] < 1e-3


def test_the_prompt_sampled_for_a_task_is_one_like_those_that_were_fitted_to_it():
    """Two kinds of users: for a task between none, so nearer to its own kind by far."""
    rng = np.random.default_rng(0)
    tasks = np.repeat([[1.0, -1.0], [-1.0, 1.0]], 8, axis=0).astype(np.float32)
    centres = np.stack([np.full((3, 4), 2.0), np.full((3, 4), -2.0)])
    prompts = np.repeat(centres, 8, axis=0) + 0.1 * rng.normal(size=(16, 3, 4))
    learnt = learn_prompts(
        jax.random.key(0), jnp.asarray(prompts, jnp.float32), jnp.asarray(tasks), steps=400
    )
    for kind, task in enumerate(tasks[[0, 8]]):
        for seed in range(3):
            made = sample_prompt(jax.random.key(seed), learnt, jnp.asarray(task))
            assert np.abs(np.asarray(made) - centres[kind]).mean() < 0.5


def test_projected_is_the_nearest_in_the_ball():
    centre = jnp.array([[1.0, 0.0]])
    np.testing.assert_allclose(within(jnp.array([[4.0, 4.0]]), centre, 2.5), [[2.5, 2.0]])
    np.testing.assert_array_equal(within(jnp.array([[1.5, 0.0]]), centre, 2.5), [[1.5, 0.0]])
    np.testing.assert_array_equal(within(centre, centre, 2.5), centre)
