import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes import FRAMES, recipe

from pujax.errors import ConfigError
from pujax.method import labels, losses, scoring
from pujax.method.discriminator import bradley_terry, discriminator, learn, new_head, scores_of
from pujax.method.scoring import ScoringContext
from pujax.method.step import make_train_step, rollout
from pujax.models.sharding import make_mesh, put_batch, tree_shardings
from pujax.run.checkpoint import Checkpoints, Place
from pujax.run.student import like_state, new_state
from pujax.types import Batch, Tokens, right_padded

SCORER = partial(discriminator, lr=0.1)
# Of a prompt's anchor and two candidates, with root mean square 1.
STATES = jnp.array([[[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]]])


def head_of(*values):
    return {"discriminator": jnp.array(values)}


def test_loss_and_gradient_by_hand():
    """D is (3, 1, -1) at w = (2, 1), so the margins are 2 and 4, of differences (0, 2), (2, 0)."""
    value, grads = jax.value_and_grad(bradley_terry)(head_of(2.0, 1.0), STATES)
    np.testing.assert_allclose(scores_of(head_of(2.0, 1.0), STATES), [[3.0, 1.0, -1.0]])
    np.testing.assert_allclose(value, (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(-4.0))) / 2)
    first, second = (1 / (1 + np.exp(margin)) for margin in (2.0, 4.0))
    np.testing.assert_allclose(grads["discriminator"], [-second, -first], rtol=1e-6)


def test_neither_the_scale_of_states_nor_an_empty_response_makes_a_difference():
    head = head_of(2.0, 1.0)
    np.testing.assert_allclose(scores_of(head, 1e3 * STATES), scores_of(head, STATES), rtol=1e-6)
    empty = STATES.at[:, 2].set(0.0)
    grads = jax.grad(bradley_terry, argnums=(0, 1))(head, empty)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_it_learns_to_put_anchors_above_candidates_where_a_plane_parts_them():
    rng = np.random.default_rng(0)
    states = jnp.array(rng.normal(size=(16, 4, 6)), jnp.float32)
    states = states.at[:, 0, 2].add(4.0).at[:, 1:, 2].add(-4.0)
    head = new_head(SCORER, 6)
    assert head is not None
    _, before = learn(SCORER, head, states)
    np.testing.assert_allclose(before["discriminator/loss"], np.log(2), rtol=1e-6)
    assert before["discriminator/accuracy"] == 0  # equal scores are no opinion
    step = jax.jit(partial(learn, SCORER))
    for _ in range(40):
        head, after = step(head, states)
    assert after["discriminator/accuracy"] == 1
    assert after["discriminator/loss"] < 0.05


def test_states_that_are_not_finite_leave_the_head_as_it_was():
    head = new_head(SCORER, 2)
    assert head is not None
    head, _ = learn(SCORER, head, STATES)
    assert optax.tree.get(head.opt_state, "count") == 1
    same, metrics = learn(SCORER, head, STATES.at[0, 0].set(jnp.nan))
    assert jnp.isnan(metrics["discriminator/loss"])
    jax.tree.map(np.testing.assert_array_equal, same, head)


def test_new_parameters_that_are_not_finite_leave_the_head_as_it_was(monkeypatch):
    head = new_head(SCORER, 2)
    assert head is not None
    endless = optax.GradientTransformation(
        lambda params: head.opt_state,
        lambda updates, state, params=None: (jax.tree.map(lambda x: x + jnp.inf, updates), state),
    )
    monkeypatch.setattr("pujax.method.discriminator._optimizer", lambda scorer: endless)
    same, metrics = learn(SCORER, head, STATES)
    assert jnp.isfinite(metrics["discriminator/loss"])
    jax.tree.map(np.testing.assert_array_equal, same, head)


def test_its_settings_are_those_of_the_heads_own_optimizer():
    first, second = (
        learn(scorer, head, STATES)[0].params["discriminator"]
        for scorer in (partial(discriminator, lr=0.01), partial(discriminator, lr=0.02))
        if (head := new_head(scorer, 2))
    )
    np.testing.assert_allclose(second, 2 * first)
    still = new_head(partial(discriminator, lr=0.5, weight_decay=0.5), 2)
    assert still is not None
    still = dataclasses.replace(still, params=head_of(1.0, 1.0))
    # Equal states have no gradient, so that the decay is all that moves it.
    equal = jnp.repeat(STATES[:, :1], 3, axis=1)
    decayed, _ = learn(partial(discriminator, lr=0.5, weight_decay=0.5), still, equal)
    np.testing.assert_allclose(decayed.params["discriminator"], 0.75)


def test_two_in_one_scorer_are_refused():
    twice = partial(scoring.blend, scores=[SCORER, SCORER], weights=[1.0, 1.0])
    with pytest.raises(ConfigError, match="2 discriminators"):
        new_head(twice, 2)


def test_a_scorer_without_one_has_no_head_and_one_within_a_blend_has():
    assert new_head(scoring.token_f1, 2) is None
    assert new_head(partial(scoring.blend, scores=[scoring.length], weights=[1.0]), 2) is None
    inner = partial(scoring.blend, scores=[scoring.length, SCORER], weights=[1.0, 1.0])
    assert new_head(partial(scoring.shuffled, score=inner), 2) is not None


# ---------------------------------------------------------------------- in a step


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)

    def rows(size, lengths):
        ids = np.zeros((len(lengths), size), np.int32)
        for row, length in zip(ids, lengths, strict=True):
            row[:length] = rng.integers(6, 96, length)
        return Tokens(jnp.array(ids), jnp.array(lengths, jnp.int32))

    return Batch(
        prompts=rows(4, [3, 4]),
        anchors=rows(5, [4, 2]),
        anchor_finished=jnp.array([True, True]),
        references=rows(4, [4, 4]),
    )


def test_it_reads_the_last_tokens_final_state_and_shares_the_pass_of_the_log_probs(
    model, params, batch
):
    lengths = jnp.array([[4, 1], [2, 5]])
    tokens = Tokens(jnp.repeat(batch.anchors.ids[:, None], 2, axis=1), lengths)
    context = ScoringContext(
        reader=model,
        params=params,
        frames=FRAMES,
        batch=batch,
        after=batch.prompts,
        tokens=tokens.ids,
        mask=tokens.mask,
        key=jax.random.key(0),
    )

    @jax.jit
    def read(params):
        """Asked for after the log-probs' pass, in it, and after a pass that drops another layer."""
        first, second, third = (context.fresh(params=params) for _ in range(3))
        logps = second.last_states(), second.logps()
        third.hidden(2)
        assert second._logps is not None  # without another pass
        assert third._final is not None
        return (first.logps(), first.last_states()), logps, (third.logps(), third.last_states())

    (apart, found), (shared, logps), (tapped, dropped) = read(params)
    np.testing.assert_allclose(logps, apart, atol=1e-5)
    np.testing.assert_allclose(tapped, apart, atol=1e-5)
    np.testing.assert_allclose(shared, found, atol=1e-5)
    np.testing.assert_allclose(dropped, found, atol=1e-5)
    rows = [
        [*batch.prompts.ids[b, : batch.prompts.lengths[b]], *tokens.ids[b, g, : lengths[b, g]]]
        for b in range(2)
        for g in range(2)
    ]
    alone = jax.jit(model.prefill)(params, right_padded([list(map(int, row)) for row in rows], 9))
    np.testing.assert_allclose(alone.last.reshape(2, 2, -1), found, atol=1e-5)


def test_without_training_it_says_so(model, params, batch):
    with pytest.raises(ConfigError, match="nothing trains it here"):
        jax.eval_shape(
            partial(rollout, model, recipe(scorer=SCORER)), params, params, batch, jax.random.key(0)
        )


@pytest.fixture(scope="module")
def started(model, params):
    """The step on a mesh of two data and two fsdp devices, and what makes its first state."""
    mesh = make_mesh(2, 2, 2)
    optimizer = optax.adam(1e-2)

    def first():
        copied = jax.device_put(params, tree_shardings(mesh, params))
        copied = jax.tree.map(jnp.copy, copied)
        return new_state(copied, optimizer, mesh, new_head(SCORER, model.config.width))

    choices = recipe(scorer=SCORER, labels=labels.softmax_labels)
    loss = partial(losses.grpo, kl_coef=0.0)
    shardings = tree_shardings(mesh, first())
    step = make_train_step(model.clone(mesh=mesh), choices, loss, optimizer, shardings)
    place = partial(put_batch, mesh, size=2)
    return (
        step,
        first,
        place,
        like_state(params, optimizer, mesh, new_head(SCORER, model.config.width)),
    )


def test_it_is_trained_beside_the_student_and_a_resumed_run_equals_an_uninterrupted_one(
    started, params, batch, tmp_path
):
    step, first, place, like = started
    batch = place(batch)  # of two prompts that fill a mesh of four
    reference, root = params, jax.random.key(5)
    whole, group, metrics = step(first(), reference, None, batch, root)
    # It began with no opinion, so that the student learnt nothing yet; and then it has one.
    np.testing.assert_array_equal(group.scores, 0)
    np.testing.assert_allclose(metrics["discriminator/loss"], np.log(2), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, whole.params, params)
    assert jnp.any(whole.head.params["discriminator"] != 0)
    checkpoints = Checkpoints(tmp_path, keep=1, model={})
    checkpoints.save(1, Place("align", 1), whole)
    whole, group, metrics = step(whole, reference, None, batch, root)
    assert np.ptp(group.scores, axis=1).all()
    found = checkpoints.newest(like)
    checkpoints.close()
    assert found is not None
    resumed, *_ = step(found[1], reference, None, batch, root)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    vector = whole.head.params["discriminator"]
    assert vector.sharding.is_fully_replicated
