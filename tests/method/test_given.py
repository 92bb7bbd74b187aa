"""Given candidates with several ratings, and what a batch of them says of the KL."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from recipes import recipe

from pujax.method import labels
from pujax.method.needs import Needs
from pujax.method.step import rollout
from pujax.models.logps import response_logps
from pujax.types import Completions

ABSENT = -np.inf


def given_to(batch):
    """Two candidates each, of the last prompt one alone."""
    rng = np.random.default_rng(4)
    lengths = jnp.asarray(rng.integers(1, 6, (8, 2))).at[7, 1].set(0)
    mask = jnp.arange(5)[None, None] < lengths[..., None]
    members = rng.normal(size=(8, 2, 2)).astype("f4")
    members[7, :, 1] = ABSENT
    scores = members.mean(axis=1)
    made = Completions(
        tokens=jnp.where(mask, jnp.asarray(rng.integers(6, 96, (8, 2, 5))), 0),
        mask=mask,
        finished=mask.any(axis=-1),
        logps=None,
        scores=jnp.asarray(scores),
        members=jnp.asarray(members),
    )
    return dataclasses.replace(batch, given=made), members


def test_a_batchs_kl_is_the_mean_delta_of_the_next_prompts_responses_and_never_negative(
    model, params, batch
):
    batch, _ = given_to(batch)
    other = jax.tree.map(lambda x: 0.7 * x, params)
    choices = recipe(needs=Needs(anchor=False, reference=False, kl=True))
    make = jax.jit(partial(rollout, model, choices))
    read = jax.jit(partial(response_logps, model))
    found = []
    for policy, ref in ((params, other), (other, params)):
        with labels.absent_candidates():
            group, _ = make(policy, ref, batch, jax.random.key(0))
        deltas = []
        for row in range(8):  # each prompt with the next one's responses, alone
            one = jax.tree.map(lambda x, row=row: x[row : row + 1], batch.prompts)
            at = jnp.array([(row + 1) % 8])
            tokens, mask = batch.given.tokens[at], batch.given.mask[at]
            ratio = read(policy, one, tokens, mask) - read(ref, one, tokens, mask)
            deltas += np.asarray(ratio.sum(axis=-1))[np.asarray(mask.any(axis=-1))].tolist()
        assert len(deltas) == 15
        np.testing.assert_allclose(group.kl, np.full(8, max(0, np.mean(deltas))), atol=1e-4)
        found.append(np.mean(deltas))
    assert found[0] < -0.1  # and so counted as 0
    assert found[1] > 0.1
    filled = jax.tree.map(lambda x: jnp.concatenate([x, x[-1:], x[-1:]]), batch)
    with labels.absent_candidates():
        padded, _ = jax.jit(partial(rollout, model, choices))(
            other, params, dataclasses.replace(filled, padding=2), jax.random.key(0)
        )
    np.testing.assert_allclose(padded.kl, group.kl, atol=1e-4)


def test_ratings_are_members_and_make_mixed_labels(model, params, batch):
    batch, members = given_to(batch)
    rule = partial(labels.mixed_labels, weights=[1.0, 3.0])
    choices = recipe(labels=rule, needs=Needs(anchor=False, reference=False))
    with labels.absent_candidates():
        group, _ = jax.jit(partial(rollout, model, choices))(
            params, params, batch, jax.random.key(0)
        )
    np.testing.assert_array_equal(group.members[:, :, 1:], members)
    np.testing.assert_array_equal(group.members[:, :, 0], members.max(axis=-1))
    q = np.exp(members) / np.exp(members).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        group.labels[:, 1:], 0.25 * q[:, 0] + 0.75 * q[:, 1], rtol=1e-5, atol=1e-7
    )
    assert group.kl is None
    assert group.valid[7].tolist() == [False, True, False]
