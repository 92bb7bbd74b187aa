from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from pujax.method.sampling import greedy, sample, sample_token
from pujax.models.decoder import LanguageModel
from pujax.models.logps import response_logps
from pujax.models.packing import for_all
from pujax.types import Tokens


@partial(jax.jit, static_argnames=("model", "size", "candidates", "top_k", "top_p"))
def sampled(
    model, params, prompts, lengths, key, temperature=1.0, size=12, candidates=3, top_k=0, top_p=1.0
):
    prefix = model.prefill(params, Tokens(prompts, lengths))
    return sample(
        model,
        params,
        prefix,
        key,
        size=size,
        candidates=candidates,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )


forward = jax.jit(LanguageModel.forward, static_argnums=0)
prefill = jax.jit(LanguageModel.prefill, static_argnums=0)
greedily = jax.jit(greedy, static_argnums=0, static_argnames="size")


def logits_after(model, params, tokens):
    """Logits [24, V] of one sequence by the plain forward, its end padded with nonsense."""
    padded = np.full((1, 24), 77, np.int32)
    padded[0, : len(tokens)] = tokens
    return forward(model, params, padded)[0]


def test_sampled_log_probs_equal_a_whole_forward_of_the_same_tokens(model, params, prompts):
    made = sampled(model, params, *prompts, jax.random.key(1))
    for b, length in enumerate(prompts[1]):
        for k in range(3):
            n = int(made.mask[b, k].sum())
            whole = np.concatenate([prompts[0][b, :length], made.tokens[b, k, :n]])
            logps = jax.nn.log_softmax(logits_after(model, params, whole))
            expected = logps[length - 1 : length - 1 + n][np.arange(n), whole[length:]]
            np.testing.assert_allclose(made.logps[b, k, :n], expected, atol=1e-4)


def test_sampled_log_probs_equal_the_scorers(model, params, prompts):
    made = sampled(model, params, *prompts, jax.random.key(1))
    prefix = prefill(model, params, Tokens(*prompts))
    logps = jax.jit(response_logps, static_argnums=0)(model, params, prefix, made.tokens, made.mask)
    np.testing.assert_allclose(logps, made.logps, atol=1e-4)


def test_a_response_ends_with_the_first_of_any_eos_id_and_counts_it(model, params, prompts):
    made = sampled(model, params, *prompts, jax.random.key(3), candidates=64)
    tokens, mask, finished = map(np.asarray, (made.tokens, made.mask, made.finished))
    ended_by = set()
    for row, real, done in zip(
        tokens.reshape(-1, 12), mask.reshape(-1, 12), finished.ravel(), strict=True
    ):
        n = real.sum()
        assert real[:n].all()
        assert not np.isin(row[: n - 1], (2, 5)).any()
        assert done == (row[n - 1] in (2, 5))
        assert done or n == 12
        assert (row[n:] == 0).all()
        if done:
            ended_by.add(int(row[n - 1]))
    assert ended_by == {2, 5}


def test_what_pads_a_prompt_changes_nothing(model, params, prompts):
    tokens, lengths = prompts
    other = np.where(np.arange(9)[None] < lengths[:, None], np.pad(tokens, [(0, 0), (0, 2)]), 77)
    first = sampled(model, params, tokens, lengths, jax.random.key(4))
    second = sampled(model, params, other, lengths, jax.random.key(4))
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_allclose(first.logps, second.logps, atol=1e-5)


def test_greedy_is_the_argmax_of_a_whole_forward(model, params, prompts):
    tokens, lengths = prompts
    made = greedily(model, params, prefill(model, params, Tokens(tokens, lengths)), size=6)
    for b, length in enumerate(lengths):
        seen = list(tokens[b, :length])
        for t in range(int(made.mask[b, 0].sum())):
            seen.append(int(jnp.argmax(logits_after(model, params, seen)[len(seen) - 1])))
            assert seen[-1] == made.tokens[b, 0, t]


def test_decoding_stops_as_soon_as_every_response_has_ended(params, model, prompts, monkeypatch):
    steps = []
    decode = LanguageModel.decode

    def counted(self, params, prefix, cache, tokens, t):
        jax.debug.callback(lambda t: steps.append(int(t)), t)
        return decode(self, params, prefix, cache, tokens, t)

    monkeypatch.setattr(LanguageModel, "decode", counted)
    # An embedding in which EOS (5) outweighs every word makes it the greedy choice at once.
    loud = params | {"embed": params["embed"].at[5].set(100 * params["final_norm"])}
    prefix = model.prefill(params, Tokens(*prompts))
    prefix = prefix.replace(last=jnp.ones_like(prefix.last))
    made = greedy(model, loud, prefix, size=40)
    jax.effects_barrier()
    assert made.finished.all()
    assert len(steps) == int(made.mask.sum(axis=-1).max()) - 1


def loops(jaxpr):
    """The while loops in a jaxpr and in what it calls."""
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "while"]
    for eqn in jaxpr.eqns:
        found += [loop for part in jaxprs_in_params(eqn.params) for loop in loops(part)]
    return found


def test_runs_in_one_program_sample_what_each_samples_alone_and_share_its_loop(
    params, model, prompts
):
    loud = params | {"embed": params["embed"].at[5].set(100 * params["final_norm"])}  # ends at once
    both = jax.tree.map(lambda *each: jnp.stack(each), params, loud)
    keys = jax.random.split(jax.random.key(3))

    def run(params, key):
        return sampled(model, params, *prompts, key)

    made = jax.vmap(run)(both, keys)
    for i, alone in enumerate((params, loud)):
        one = run(alone, keys[i])
        np.testing.assert_array_equal(made.tokens[i], one.tokens)
        np.testing.assert_array_equal(made.mask[i], one.mask)
        np.testing.assert_allclose(made.logps[i], one.logps, atol=2e-5)
    # By a condition of each run's own, the loop would choose anew what it carries each time round.
    [loop] = loops(jax.make_jaxpr(jax.vmap(run))(both, keys).jaxpr)
    assert [aval.shape for aval in loop.params["cond_jaxpr"].out_avals] == [()]
    np.testing.assert_array_equal(jax.vmap(for_all)(jnp.array([True, False])), [False, False])


def test_token_frequencies_match_the_softmax():
    logits = jnp.array([0.0, 1.0, -2.0, 3.0, -jnp.inf, 0.5])
    draws = sample_token(jax.random.key(0), jnp.broadcast_to(logits, (40_000, 6)), temperature=0.7)
    expected = jax.nn.softmax(logits / 0.7)
    observed = np.bincount(draws, minlength=6) / 40_000
    # Five standard deviations of a binomial share.
    bound = 5 * np.sqrt(expected * (1 - expected) / 40_000) + 1e-9
    assert (np.abs(observed - expected) <= bound).all()


def test_frequencies_match_across_the_blocks_of_a_large_vocabulary():
    logits = jnp.linspace(0, 6, 1000)
    draws = sample_token(jax.random.key(1), jnp.broadcast_to(logits, (20_000, 1000)))
    observed = np.bincount(np.asarray(draws) // 100, minlength=10) / 20_000
    expected = jax.nn.softmax(logits).reshape(10, 100).sum(axis=1)
    assert (np.abs(observed - expected) <= 5 * np.sqrt(expected / 20_000)).all()


@pytest.mark.parametrize(
    ("choice", "allowed"),
    [
        ({"top_k": 2}, {3, 1}),
        ({"top_p": 0.75}, {3}),  # the masses of 3, 1, 5, 0 are .784, .106, .064, .039
        ({"top_p": 0.85}, {3, 1}),
        ({"top_k": 3, "top_p": 0.99}, {3, 1, 5}),
    ],
)
def test_top_k_and_top_p_keep_the_most_likely_words(choice, allowed):
    logits = jnp.array([0.0, 1.0, -2.0, 3.0, -3.0, 0.5])
    draws = sample_token(jax.random.key(0), jnp.broadcast_to(logits, (4000, 6)), **choice)
    assert set(np.unique(draws).tolist()) == allowed


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e3]), min_size=2, max_size=700),
    st.floats(0, 1, width=32),
)
def test_a_word_of_weight_zero_is_never_drawn(weights, uniform):
    from pujax.method.sampling import _inverse_cdf

    weights = np.array([*weights, 1.0], np.float32)
    index = int(_inverse_cdf(jnp.array(weights), jnp.float32(uniform)))
    assert weights[index] > 0
