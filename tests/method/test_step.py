import dataclasses
import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes import recipe

from experiments.paper.together import at_once
from pujax.config.model_settings import LoraConfig
from pujax.method import labels, losses, pair_losses, scoring
from pujax.method import step as step_module
from pujax.method.needs import Needs, needs_of
from pujax.method.optimizer import apply, apply_in_place, make_optimizer, on_one_cpu
from pujax.method.step import (
    anchor_group,
    assemble,
    make_sampler,
    make_sft_step,
    make_train_step,
    rollout,
    update,
)
from pujax.models.logps import mean_logps, response_logps
from pujax.models.lora import init_adapter
from pujax.models.packing import TokenBudget
from pujax.models.sharding import (
    make_mesh,
    put_batch,
    tree_shardings,
)
from pujax.run.collectives import traffic
from pujax.types import Completions, TrainState

ALONE = partial(labels.softmax_labels)
SHARED = partial(labels.softmax_labels, anchor_mass=0.2)


def state_of(params, optimizer):
    params = jax.tree.map(jnp.array, params)
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, params, optimizer.init(params), skipped)


def step_and_arguments(sizes, model, params, batch, loss, **choices):
    """The jitted training step for a mesh over 8 devices, and what to give it."""
    mesh = make_mesh(*sizes)
    optimizer = optax.adam(1e-2)
    state = state_of(params, optimizer)
    shardings = tree_shardings(mesh, state)
    step = make_train_step(model.clone(mesh=mesh), recipe(**choices), loss, optimizer, shardings)
    reference = jax.device_put(params, tree_shardings(mesh, params))
    state = jax.device_put(state, shardings)
    return step, (state, reference, None, put_batch(mesh, batch, 8), jax.random.key(5))


def step_on(*given, **choices):
    """One training step on a mesh over 8 devices: the new state, the group and the metrics."""
    step, arguments = step_and_arguments(*given, **choices)
    return jax.device_get(step(*arguments))


@pytest.fixture(scope="module")
def on_one(model, params, batch):
    optimizer = optax.adam(1e-2)
    state = state_of(params, optimizer)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: one, state)
    step = make_train_step(
        model, recipe(), partial(losses.ldl_grpo, kl_coef=0.1), optimizer, shardings
    )
    return jax.device_get(step(state, params, None, batch, jax.random.key(5)))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_mesh_samples_the_same_tokens_and_makes_the_same_update_as_one_device(
    sizes, model, params, batch, on_one
):
    loss = partial(losses.ldl_grpo, kl_coef=0.1)
    state, group, metrics = step_on(sizes, model, params, batch, loss)
    one_state, one_group, one_metrics = on_one
    np.testing.assert_array_equal(group.tokens, one_group.tokens)
    np.testing.assert_allclose(metrics["loss"], one_metrics["loss"], rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(one_state.opt_state), strict=True
    ):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * scale)


def test_a_mesh_gathers_parameters_once_a_pass_and_adds_up_the_gradient_once(model, params, batch):
    """Left to itself XLA splits what a layer sums over: it moved 31 times the parameters, not 7.

    They are gathered for the prompts, for sampling, for the reference and its scores, for the
    policy and for its backward pass; the table for the words' log-probs in three of these. Of the
    groups the ids of tokens alone are told, for the rows of the table that other devices hold.
    """
    loss = partial(losses.ldl_grpo, kl_coef=0.1)
    step, arguments = step_and_arguments((1, 8, 1), model, params, batch, loss)
    text = step.lower(*arguments).compile().as_text()
    told = traffic(text, trips=recipe().response_size - 1)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    kernels = sum(leaf.nbytes for leaf in params["layers"].values() if leaf.ndim == 3)
    table = params["embed"]
    # Prompts; prompts with candidates; twice, with the backward pass, references with candidates.
    looked_up = sum((6, 6 + 4 * 5, 7 + 3 * 5, 7 + 3 * 5))
    assert told["all-gather"].bytes == 5 * kernels + 3 * table.nbytes + 8 * looked_up * 4
    assert told["all-to-all"].bytes == looked_up * table[0].nbytes  # a device's own prompt's
    assert 0 <= told["all-reduce"].bytes - 2 * size < 1000  # which counts twice: see `traffic`
    assert set(told) <= {"all-gather", "all-reduce", "all-to-all"}


def test_a_mesh_of_prompts_tells_the_gradient_alone_and_no_group(model, params, batch):
    loss = partial(losses.ldl_grpo, kl_coef=0.1)
    step, arguments = step_and_arguments((8, 1, 1), model, params, batch, loss)
    told = traffic(step.lower(*arguments).compile().as_text(), trips=recipe().response_size - 1)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert set(told) == {"all-reduce"}
    # Of the table both what was looked up in it and what it made log-probs of; then a few numbers.
    assert 0 <= told["all-reduce"].bytes - 2 * (size + params["embed"].nbytes) < 1000


@pytest.fixture(scope="module")
def six_on_one(model, params, batch):
    """The step on the first six prompts, on one device, with a reference of its own."""
    optimizer = optax.adam(1e-2)
    state = state_of(params, optimizer)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step = make_train_step(model, recipe(), FULL, optimizer, jax.tree.map(lambda _: one, state))
    six = jax.tree.map(lambda x: x[:6], batch)
    return jax.device_get(step(state, other_than(params), None, six, jax.random.key(5)))


FULL = partial(losses.ldl_grpo, kl_coef=0.1)


def other_than(params):
    return jax.tree.map(lambda x: x * 1.1, params)


@pytest.mark.parametrize(("sizes", "microbatch"), [((8, 1, 1), None), ((2, 2, 2), 3)])
def test_neither_filling_up_nor_microbatches_on_a_mesh_change_the_step(
    sizes, microbatch, model, params, batch, six_on_one
):
    """Six prompts on eight devices, and two times three of them on four times two."""
    mesh, optimizer = make_mesh(*sizes), optax.adam(1e-2)
    state = state_of(params, optimizer)
    shardings = tree_shardings(mesh, state)
    model = model.clone(mesh=mesh)
    step = make_train_step(model, recipe(), FULL, optimizer, shardings, microbatch=microbatch)
    reference = jax.device_put(other_than(params), tree_shardings(mesh, params))
    six = put_batch(mesh, jax.tree.map(lambda x: x[:6], batch), 6)
    made = step(jax.device_put(state, shardings), reference, None, six, jax.random.key(5))
    state, group, metrics = jax.device_get(made)
    one_state, one_group, one_metrics = six_on_one
    np.testing.assert_array_equal(group.tokens, one_group.tokens)
    assert metrics.keys() == one_metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(
            metrics[name], one_metrics[name], rtol=1e-5, atol=1e-5, err_msg=name
        )
    for ours, theirs in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(one_state.opt_state), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_weights_packed_microbatches_and_the_largest_gap_are_the_same_on_a_mesh(
    model, params, group, batch
):
    """The gap is of a prompt in the second of three microbatches, each packed device by device."""
    mesh, optimizer = make_mesh(4, 1, 2), optax.sgd(1.0)
    state = state_of(params, optimizer)
    shardings = tree_shardings(mesh, state)
    six = jax.tree.map(lambda x: x[:6], group)
    wrong = six.replace(old_logps=six.old_logps.at[2:, 1, 0].add(jnp.array([0.5, 0, 0, 0.25])))
    most = int(six.mask.sum(axis=(1, 2)).max())
    # For two prompts a device.
    lean = model.clone(budget=TokenBudget(2 * 6, 2 * most, ways=4), mesh=mesh)
    learn = jax.jit(partial(update, lean, losses.grpo, optimizer, microbatch=2))
    learnt, metrics = learn(state, None, wrong)
    assert metrics["samples/packed"] == 1
    np.testing.assert_allclose(metrics["sampler/logp_gap"], 0.5, atol=1e-4)
    whole, _ = jax.jit(partial(update, model, losses.grpo, optimizer))(state, None, wrong)
    for ours, theirs, start in zip(
        *map(jax.tree.leaves, (learnt.params, whole.params, params)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 + 1e-5 * np.abs(theirs - start).max())

    weights = jnp.array([1.0, 0.25, 0.0, 1.0, 0.5, 1.0])
    weighed = dataclasses.replace(jax.tree.map(lambda x: x[:6], batch), anchor_weights=weights)
    on_one = make_sft_step(model, losses.sft, optimizer, None)(state, None, weighed)
    step = make_sft_step(model.clone(mesh=mesh), losses.sft, optimizer, shardings)
    state = jax.device_put(state_of(params, optimizer), shardings)
    on_mesh = step(state, None, put_batch(mesh, weighed, 6))
    for ours, theirs in zip(*map(jax.tree.leaves, (on_mesh, on_one)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_two_halves_of_a_step_with_a_reward_are_the_whole_step(model, params, batch, on_one):
    """The sampler's candidates are the step's own, and a reward's scores come through to labels."""
    _, whole, _ = on_one
    optimizer = optax.adam(1e-2)
    state = state_of(params, optimizer)
    root = jax.random.key(5)
    made = make_sampler(model, recipe())(state, None, batch, root)
    np.testing.assert_array_equal(made.tokens, whole.tokens[:, 1:])
    np.testing.assert_array_equal(made.mask, whole.mask[:, 1:])
    assert made.logps is not None
    np.testing.assert_allclose(made.logps, whole.old_logps[:, 1:], atol=1e-5)
    scores = jnp.arange(32.0).reshape(8, 4) ** 2
    reward = partial(scoring.reward, function=print)
    given = dataclasses.replace(batch, given=made, rewards=(scores,))
    make = jax.jit(partial(rollout, model, recipe(scorer=reward)))
    group, metrics = make(params, params, given, jax.random.fold_in(root, 0))
    np.testing.assert_array_equal(group.tokens, whole.tokens)
    np.testing.assert_array_equal(group.scores, scores)
    np.testing.assert_allclose(group.labels, SHARED(scores)[0], atol=1e-6)
    np.testing.assert_allclose(metrics["score/mean"], scores[:, 1:].mean(), rtol=1e-6)


def test_a_family_of_scores_reaches_the_loss_one_by_one(model, params, batch):
    scorer = partial(scoring.family, scores=[scoring.token_f1, scoring.length, scoring.rouge])
    make = partial(rollout, model, recipe(scorer=scorer))
    group, _ = jax.eval_shape(make, params, params, batch, jax.random.key(0))
    assert group.members is not None
    assert group.members.shape == (8, 3, 4)
    plain, _ = jax.eval_shape(
        partial(rollout, model, recipe()), params, params, batch, jax.random.key(0)
    )
    assert plain.members is None


@pytest.fixture(scope="module")
def group(model, params, batch):
    # A group to be learnt from twice: its anchors' old log-probs are known too.
    return rolled_out(model, 2, params, batch, jax.random.key(9))[0]


SGD = optax.sgd(1.0)


@partial(jax.jit, static_argnums=(0, 1))
def rolled_out(model, inner_epochs, params, batch, key):
    """The group, ranked by the policy's own start, and its metrics."""
    return rollout(model, recipe(inner_epochs=inner_epochs), params, params, batch, key)


@partial(jax.jit, static_argnums=(0, 1), static_argnames=("microbatch", "on_policy"))
def learnt_by(model, loss, params, group, microbatch=None, on_policy=False):
    """The state after one step of SGD, and its metrics; one program for all tests that take it."""
    state = state_of(params, SGD)
    return update(model, loss, SGD, state, None, group, microbatch=microbatch, on_policy=on_policy)


def read_again(model, params, group):
    return response_logps(model, params, group.prompts, group.tokens, group.mask)


def test_old_log_probs_are_the_policys_and_the_anchors_are_its_own_reading(model, params, group):
    logps = jax.jit(partial(read_again, model))(params, group)
    np.testing.assert_allclose(logps, group.old_logps, atol=1e-4)
    np.testing.assert_allclose(logps, group.ref_logps, atol=1e-4)


def test_index_zero_is_the_anchor_and_labels_sum_to_one(batch, group):
    np.testing.assert_array_equal(group.tokens[:, 0], batch.anchors.ids)
    np.testing.assert_array_equal(group.mask[:, 0].sum(axis=-1), batch.anchors.lengths)
    np.testing.assert_array_equal(group.finished[:, 0], batch.anchor_finished)
    np.testing.assert_allclose(group.labels.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(group.labels[:, 0], 0.2, rtol=1e-6)


def test_the_policy_ranks_when_it_is_told_to(model, params, batch):
    other = jax.tree.map(lambda x: x * 1.3, params)
    choices = recipe(by_policy=True, scorer=scoring.self_likelihood, inner_epochs=2)
    make = partial(rollout, model, choices)
    group, _ = jax.jit(make)(params, other, batch, jax.random.key(9))
    np.testing.assert_allclose(group.scores, mean_logps(group.old_logps, group.mask), atol=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        losses.sft,
        pair_losses.dpo,
        pytest.param(pair_losses.ipo, marks=pytest.mark.long),  # as dpo
        pytest.param(losses.listwise, marks=pytest.mark.long),  # as ldl_grpo
        losses.grpo,
        losses.ldl_grpo,
        losses.nnpu,
    ],
)
def test_microbatches_of_one_make_the_update_of_the_whole_batch(model, params, group, loss):
    whole, whole_metrics = learnt_by(model, loss, params, group)
    parts, parts_metrics = learnt_by(model, loss, params, group, microbatch=1)
    for name in whole_metrics:
        # A sign, which rounding decides at the reference; the gap is rounding alone.
        if name not in ("sampler/logp_gap", "reward/accuracy"):
            np.testing.assert_allclose(
                parts_metrics[name], whole_metrics[name], rtol=2e-4, atol=1e-6
            )
    for ours, theirs, start in zip(
        *map(jax.tree.leaves, (parts.params, whole.params, params)), strict=True
    ):
        scale = np.abs(theirs - start).max()
        np.testing.assert_allclose(ours, theirs, atol=1e-6 + 1e-4 * scale)


def test_the_largest_gap_of_microbatches_is_the_largest_of_all(model, params, group):
    b, k = (int(i[0]) for i in np.nonzero(group.mask[:, 1:, 0]))
    wrong = group.replace(old_logps=group.old_logps.at[b, 1 + k, 0].add(0.5))
    _, metrics = learnt_by(model, losses.grpo, params, wrong, microbatch=1)
    np.testing.assert_allclose(metrics["sampler/logp_gap"], 0.5, atol=1e-4)


def test_given_candidates_make_the_group_that_sampled_ones_do(model, params, batch):
    """The second door: with log-probs nothing differs; without, the policy's own are taken."""
    make = partial(rolled_out, model, 1, params)
    sampled, metrics = make(batch, jax.random.key(9))
    known = Completions(
        tokens=sampled.tokens[:, 1:],
        mask=sampled.mask[:, 1:],
        finished=sampled.finished[:, 1:],
        logps=sampled.old_logps[:, 1:],
    )
    same, same_metrics = make(dataclasses.replace(batch, given=known), jax.random.key(9))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same, sampled)
    assert set(same_metrics) == set(metrics)

    unread = dataclasses.replace(known, logps=None)
    bare, _ = make(dataclasses.replace(batch, given=unread), jax.random.key(9))
    assert (same.has_old_logps, bare.has_old_logps) == (True, False)
    np.testing.assert_array_equal(bare.labels, same.labels)
    one, other = (
        learnt_by(model, losses.ldl_grpo, params, group, on_policy=True)[0]
        for group in (same, bare)
    )
    for a, b, start in zip(*map(jax.tree.leaves, (one.params, other.params, params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 + 1e-4 * np.abs(b - start).max())


def test_given_scores_and_reference_log_probs_are_taken_as_they_are(model, params, batch, group):
    """What a batch brings is not computed, and a candidate that is absent teaches nothing."""

    def scorer(context):
        raise AssertionError("scored")

    def learnt(candidates, scores):
        given = Completions(
            tokens=group.tokens[:, 1:],
            mask=group.mask[:, 1:] & candidates[None, :, None],
            finished=group.finished[:, 1:],
            logps=None,
            scores=jnp.asarray(scores, jnp.float32),
        )
        known = dataclasses.replace(batch, given=given, ref_logps=group.ref_logps)
        make = jax.jit(partial(rollout, model, recipe(scorer=scorer, labels=ALONE)))
        made, metrics = make(params, params, known, jax.random.key(9))
        np.testing.assert_array_equal(made.ref_logps, group.ref_logps)
        np.testing.assert_array_equal(made.scores[:, 1:], given.scores)
        np.testing.assert_array_equal(made.valid[:, 1:], np.asarray(scores) > -np.inf)
        assert all(np.isfinite(value) for value in metrics.values())
        optimizer = optax.sgd(1.0)
        loss = partial(pair_losses.dpo, beta=1.0)
        learn = jax.jit(partial(update, model, loss, optimizer, on_policy=True))
        return learn(state_of(params, optimizer), None, made)

    with labels.absent_candidates():
        two, metrics = learnt(np.array([True, True, False]), np.tile([1.0, 0.0, -np.inf], (8, 1)))
    assert all(np.isfinite(value) for value in metrics.values())
    tied, _ = learnt(np.array([True, True, True]), np.tile([2.0, 1.0, 1.5], (8, 1)))
    for a, b in zip(jax.tree.leaves(two.params), jax.tree.leaves(tied.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)  # the pair is the same: 1 over 2


def test_sft_weighs_anchors_as_the_batch_says(model, params, batch):
    optimizer = optax.sgd(1.0)
    step = make_sft_step(model, losses.sft, optimizer, None)
    weights = jnp.array([1.0, 0.25, 0.0, 1.0, 0.5, 1.0, 1.0, 0.0])
    moved = []
    for given in (weights, 1 - weights, None):
        known = dataclasses.replace(batch, anchor_weights=given)
        moved.append(step(state_of(params, optimizer), None, known)[0].params)
    # Both parts' steps add up to the whole's.
    for a, b, both, start in zip(*map(jax.tree.leaves, (*moved, params)), strict=True):
        np.testing.assert_allclose(a + b - start, both, atol=1e-5)
        assert not np.allclose(a, start) or np.allclose(both, start)


def test_leaving_padding_out_changes_neither_gradient_nor_scores(model, params, batch, group):
    budget = TokenBudget(int(batch.prompts.lengths.sum()), int(group.mask.sum()) + 3)
    lean = model.clone(budget=budget)
    full, full_metrics = learnt_by(model, losses.ldl_grpo, params, group)
    packed, metrics = learnt_by(lean, losses.ldl_grpo, params, group)
    assert metrics["samples/packed"] == 1
    assert "samples/packed" not in full_metrics
    np.testing.assert_allclose(metrics["loss"], full_metrics["loss"], rtol=1e-5)
    for ours, theirs, start in zip(
        *map(jax.tree.leaves, (packed.params, full.params, params)), strict=True
    ):
        scale = np.abs(theirs - start).max()
        np.testing.assert_allclose(ours, theirs, atol=1e-6 + 1e-5 * scale)
    again, _ = jax.jit(partial(rollout, lean, recipe()))(params, params, batch, jax.random.key(9))
    np.testing.assert_allclose(again.scores, group.scores, atol=1e-4)
    np.testing.assert_allclose(again.ref_logps, group.ref_logps, atol=1e-4)


def test_a_batch_that_does_not_fit_the_budget_is_computed_whole(model, params, group):
    full, _ = learnt_by(model, losses.ldl_grpo, params, group)
    for small in (TokenBudget(4, 400), TokenBudget(400, 4)):
        same, metrics = learnt_by(model.clone(budget=small), losses.ldl_grpo, params, group)
        assert metrics["samples/packed"] == 0
        for ours, theirs in zip(
            jax.tree.leaves(same.params), jax.tree.leaves(full.params), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_microbatches_have_their_share_of_the_budget(model, params, group):
    """Of two halves the one that fits is packed; the update is that of the whole batch."""
    group = group.replace(mask=group.mask.at[7, 0, 3].set(False))
    halves = [int(group.mask[part].sum()) for part in (slice(0, 4), slice(4, 8))]
    assert halves[0] > halves[1]
    lean = model.clone(budget=TokenBudget(400, 2 * halves[1]))
    full, _ = learnt_by(model, losses.ldl_grpo, params, group)
    parts, metrics = learnt_by(lean, losses.ldl_grpo, params, group, microbatch=4)
    assert metrics["samples/packed"] == 0.5
    for ours, theirs, start in zip(
        *map(jax.tree.leaves, (parts.params, full.params, params)), strict=True
    ):
        scale = np.abs(theirs - start).max()
        np.testing.assert_allclose(ours, theirs, atol=1e-6 + 1e-4 * scale)


def test_a_non_finite_loss_leaves_the_state_and_is_counted(model, params, group):
    optimizer = optax.adam(1e-2)
    run = jax.jit(partial(update, model, pair_losses.dpo, optimizer))
    state = state_of(params, optimizer)
    broken = group.replace(ref_logps=group.ref_logps.at[0, 1, 0].set(jnp.nan))
    broken = broken.replace(
        mask=broken.mask.at[0, 1, 0].set(True), scores=group.scores.at[0, 1].set(9.0)
    )
    after, metrics = run(state, None, broken)
    assert metrics["skipped"] == 1
    for ours, theirs in zip(
        jax.tree.leaves((after.params, after.opt_state)),
        jax.tree.leaves((state.params, state.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    after, _ = run(after, None, broken)
    assert after.skipped == 2
    after, _ = run(after, None, group)
    assert (after.skipped, after.step) == (0, 3)


@partial(jax.jit, static_argnums=(0, 1))
def sft_update(model, in_place, lr, state, group):
    """Compiled once for every rate."""
    return update(model, losses.sft, optax.adamw(lr), state, None, group, in_place=in_place)


@pytest.mark.parametrize("lr", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_update_that_is_not_finite_does_not_pass(model, params, batch, lr, in_place):
    """Loss and gradient are finite; the new parameters would not be."""
    state = state_of(params, optax.adamw(lr))
    after, metrics = sft_update(model, in_place, lr, state, anchor_group(batch))
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert metrics["skipped"] == after.skipped == 1
    for ours, theirs in zip(
        jax.tree.leaves((after.params, after.opt_state)),
        jax.tree.leaves((state.params, state.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_one_value_that_would_not_stay_finite_is_kept_in_place():
    """The first values, which go ahead, are sound."""
    grads = {"w": jnp.array([1.0, jnp.finfo(jnp.float32).max])}
    optimizer = optax.sgd(2.0)
    start = {"w": jnp.ones(2)}
    after, _, finite = apply_in_place(optimizer, grads, state_of(start, optimizer), jnp.bool_(True))
    np.testing.assert_array_equal(after["w"], [-1.0, 1.0])
    assert finite


def test_in_place_makes_the_same_update(model, params, batch):
    state = state_of(params, optax.adamw(1e-2))
    moved = []
    for in_place in (False, True):
        after, metrics = sft_update(model, in_place, 1e-2, state, anchor_group(batch))
        assert metrics["skipped"] == 0
        moved.append((after.params, after.opt_state))
    for ours, theirs in zip(*map(jax.tree.leaves, moved), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def gathered(function, *arguments):
    """The shapes that the compiled program gathers from the devices, and how often each."""
    text = function.lower(*arguments).compile().as_text()
    shapes = re.findall(r" = \(?\w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    return Counter(tuple(map(int, shape.split(","))) for shape in shapes)


def test_one_cpu_device_is_told_from_several():
    one, other = map(jax.sharding.SingleDeviceSharding, jax.devices()[:2])
    assert on_one_cpu({"w": one, "b": one})
    assert not on_one_cpu({"w": one, "b": other})
    assert not on_one_cpu(tree_shardings(make_mesh(1, 4, 2), {"q": jnp.zeros((1, 4, 4))}))
    # Of a mesh of one device there is nothing to gather.
    assert on_one_cpu(tree_shardings(make_mesh(1, 1, 1), {"q": jnp.zeros((1, 4, 4))}))
    assert not on_one_cpu(None)


def test_the_optimizer_gathers_no_weight_on_a_mesh(model, params, batch, monkeypatch):
    mesh, optimizer = make_mesh(1, 4, 2), optax.adamw(1e-2)
    state = state_of(params, optimizer)
    shardings = tree_shardings(mesh, state)
    state = jax.device_put(state, shardings)
    alone = jax.jit(lambda grads, state: apply(optimizer, grads, state, jnp.bool_(True))[:2])
    assert not gathered(alone, state.params, state)

    def whole_step():
        step = make_sft_step(model.clone(mesh=mesh), losses.sft, optimizer, shardings)
        return gathered(step, state, None, put_batch(mesh, batch, 8))

    def never(*_):
        raise AssertionError("in place, a mesh gathers what it overwrites")

    monkeypatch.setattr(step_module, "apply_in_place", never)
    whole = whole_step()
    monkeypatch.setattr(
        step_module, "apply", lambda optimizer, grads, state, ok: (grads, state.opt_state, ok)
    )
    without = whole_step()
    # XLA may update a norm's scale, which every device has, in parts; but no matrix is gathered.
    assert without
    for shape in whole - without:
        assert np.prod(shape) <= params["layers"]["attn_norm"].size, shape


def test_a_step_needs_little_more_memory_than_its_gradient(model, batch):
    """Adam's new moments overwrite the old, and the gradient's room is not filled while sampling.

    Scratch is 2.0 times the parameters; without the one 3.3 times, without the other 2.4.
    """
    settings = dataclasses.replace(model.config, width=128, mlp_width=512, layers=8)
    model = dataclasses.replace(model, config=settings, remat="dots")
    state = jax.eval_shape(
        lambda: state_of(model.init_params(jax.random.key(0)), optax.adamw(1e-3))
    )
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step = make_train_step(
        model, recipe(), losses.grpo, optax.adamw(1e-3), jax.tree.map(lambda _: one, state)
    )
    few = jax.tree.map(lambda x: x[:2], batch)
    compiled = step.lower(state, state.params, None, few, jax.random.key(5)).compile()
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(state.params))
    assert compiled.memory_analysis().temp_size_in_bytes < 2.2 * size


def test_inner_epochs_learn_from_the_same_group_again(model, params, batch):
    loss = partial(losses.grpo, kl_coef=0.0)
    one = (1, 1, 1)
    once, group, _ = step_on(one, model, params, batch, loss)
    twice, same, metrics = step_on(one, model, params, batch, loss, inner_epochs=2)
    np.testing.assert_array_equal(group.tokens, same.tokens)
    optimizer = optax.adam(1e-2)
    again, _ = jax.jit(partial(update, model, loss, optimizer))(
        jax.tree.map(jnp.array, once), None, jax.tree.map(jnp.array, group)
    )
    for ours, theirs in zip(
        jax.tree.leaves(twice.params), jax.tree.leaves(again.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert twice.step == 1
    assert metrics["sampler/logp_gap"] < 1e-4


def test_each_step_samples_anew_and_compiles_once(model, params, batch):
    optimizer = make_optimizer(
        1e-3,
        4,
        b1=0.9,
        b2=0.99,
        weight_decay=0.0,
        clip_norm=1.0,
        warmup=0.25,
        schedule="cosine",
    )
    mesh = make_mesh()
    state = state_of(params, optimizer)
    shardings = tree_shardings(mesh, state)
    state = jax.device_put(state, shardings)
    step = make_train_step(model, recipe(), losses.ldl_grpo, optimizer, shardings)
    sft = make_sft_step(model, losses.sft, optimizer, shardings)
    placed = put_batch(mesh, batch, 8)
    reference = jax.device_put(params, tree_shardings(mesh, params))
    tokens = []
    for _ in range(3):
        state, group, _ = step(state, reference, None, placed, jax.random.key(0))
        state, _ = sft(state, None, placed)
        tokens.append(np.asarray(group.tokens))
    assert (tokens[0] != tokens[1]).any()
    assert step._cache_size() == sft._cache_size() == 1


def test_steps_of_two_runs_in_one_program_are_those_of_each_alone(model, params, batch):
    model = model.clone(budget=TokenBudget(prompts=128, responses=256))
    optimizer, loss = optax.adam(1e-2), partial(losses.ldl_grpo, kl_coef=0.1)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def arguments(params, seed):
        return (state_of(params, optimizer), params, None, batch, jax.random.key(seed))

    runs = [arguments(params, 5), arguments(jax.tree.map(lambda x: 1.01 * x, params), 6)]
    shardings = jax.tree.map(lambda _: one, runs[0][0])
    step = make_train_step(model, recipe(), loss, optimizer, shardings)
    made = jax.device_get(at_once(step)(*runs))
    for run, (state, group, metrics) in zip(runs, made, strict=True):
        alone, alone_group, alone_metrics = jax.device_get(step(*run))
        np.testing.assert_array_equal(group.tokens, alone_group.tokens)
        for name in ("loss", "grad_norm", "score/mean", "kl/ref"):
            np.testing.assert_allclose(metrics[name], alone_metrics[name], rtol=1e-4, atol=1e-5)
        assert metrics["samples/packed"] == 1
        leaves = map(jax.tree.leaves, (state.params, alone.params))
        for changed, expected in zip(*leaves, strict=True):
            np.testing.assert_allclose(changed, expected, atol=2e-4)


def test_supervised_training_makes_the_anchors_the_likeliest_answers(model, params, batch):
    optimizer = optax.adam(1e-2)
    state = state_of(params, optimizer)
    run = jax.jit(partial(update, model, losses.sft, optimizer))
    for _ in range(80):
        state, metrics = run(state, None, anchor_group(batch))
    assert metrics["loss"] < 0.05


def test_with_lora_only_the_adapter_trains_and_the_reference_is_the_base(model, params, batch):
    lora = LoraConfig(rank=2, alpha=4.0, targets="q|down")
    tuned = dataclasses.replace(
        model, config=dataclasses.replace(model.config, lora_scale=lora.alpha / lora.rank)
    )
    adapter = init_adapter(jax.random.key(2), params, rank=lora.rank, targets=lora.targets)
    assert set(adapter["layers"]) == {"q_lora_a", "q_lora_b", "down_lora_a", "down_lora_b"}
    np.testing.assert_array_equal(
        tuned.forward(assemble(params, adapter), batch.prompts.ids),
        tuned.forward(params, batch.prompts.ids),
    )
    optimizer = optax.adam(1e-2)
    run = jax.jit(partial(update, tuned, losses.sft, optimizer))
    state = state_of(adapter, optimizer)
    seen = []
    for _ in range(40):
        state, metrics = run(state, params, anchor_group(batch))
        seen.append(float(metrics["loss"]))
    assert seen[-1] < 0.7 * seen[0]
    assert len(jax.tree.leaves(state.opt_state)) == 1 + 2 * 4


# ---------------------------------------------------------------------- what a loss needs


@pytest.mark.parametrize(
    "loss", [pair_losses.dpo, partial(losses.grpo, kl_coef=0.1), partial(losses.grpo, kl_coef=0.0)]
)
def test_leaving_out_what_a_loss_does_not_need_leaves_its_gradient(
    model,
    params,
    batch,
    loss,
):
    plain = recipe(labels=ALONE)
    needs = needs_of(loss, ALONE, 3)
    assert not needs.anchor
    optimizer = optax.sgd(1.0)
    moved = []
    for wanted in (Needs(), needs):
        choices = recipe(labels=ALONE, needs=wanted)
        make = jax.jit(partial(rollout, model, choices))
        group, _ = make(params, params, batch, jax.random.key(3))
        learn = jax.jit(partial(update, model, loss, optimizer, needs=wanted, on_policy=True))
        state, metrics = learn(state_of(params, optimizer), None, group)
        assert ("logps/anchor" in metrics) == wanted.anchor
        assert any(name.startswith("kl/") for name in metrics) == wanted.reference
        moved.append(state.params)
    assert plain.needs == Needs()
    for lean, full, start in zip(*map(jax.tree.leaves, (moved[1], moved[0], params)), strict=True):
        scale = np.abs(full - start).max()
        np.testing.assert_allclose(lean, full, atol=1e-7 + 1e-5 * scale)


def test_on_policy_the_anchors_old_log_probs_are_the_updates_own(model, params, batch):
    """A group learnt from once skips the pass that reads the anchor; the update is the same."""
    loss = partial(losses.ldl_grpo, kl_coef=0.1)
    moved = []
    for inner_epochs in (1, 2):
        group, _ = rolled_out(model, inner_epochs, params, batch, jax.random.key(3))
        if inner_epochs == 2:
            own = jax.jit(partial(read_again, model))(params, group)[:, 0]
            np.testing.assert_allclose(group.old_logps[:, 0], own, atol=1e-5)
            assert jnp.abs(own).max() > 1
        learnt, _ = learnt_by(model, loss, params, group, on_policy=inner_epochs == 1)
        moved.append(learnt.params)
    for once, twice, start in zip(*map(jax.tree.leaves, (*moved, params)), strict=True):
        scale = np.abs(twice - start).max()
        np.testing.assert_allclose(once, twice, atol=1e-6 + 1e-4 * scale)
