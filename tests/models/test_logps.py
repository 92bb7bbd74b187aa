import jax
import jax.numpy as jnp
import numpy as np

from pujax.models import tiles
from pujax.models.logps import mean_logps, response_logps
from pujax.types import Tokens


def test_the_mean_is_over_real_tokens_and_0_of_none():
    rows = jnp.array([[[-1.0, -3.0, 9.0], [7.0, 7.0, 7.0]]])
    mask = jnp.array([[[True, True, False], [False, False, False]]])
    np.testing.assert_array_equal(mean_logps(rows, mask), [[-2.0, 0.0]])


def test_log_probs_are_those_of_the_plain_forward_whatever_the_chunk(
    model, params, prompts, monkeypatch
):
    """The real tokens of a response are anywhere in it, and padding is 0."""
    ids, lengths = prompts
    rng = np.random.default_rng(3)
    tokens = jnp.asarray(rng.integers(6, 96, (4, 2, 3)), jnp.int32)
    mask = jnp.asarray(rng.random((4, 2, 3)) < 0.7).at[:, 0, 0].set(True)
    expected = np.zeros(mask.shape)
    forward = jax.jit(model.forward)
    for b, g in np.ndindex(4, 2):
        whole = np.zeros((1, 10), np.int32)
        text = [*ids[b, : lengths[b]], *np.asarray(tokens[b, g])]
        whole[0, : len(text)] = text
        logits = forward(params, whole)[0]
        rows = jax.nn.log_softmax(logits, axis=-1)[lengths[b] - 1 :]
        expected[b, g] = [float(rows[t, tokens[b, g, t]]) for t in range(3)]
    expected = np.where(mask, expected, 0)
    after = Tokens(jnp.asarray(ids), jnp.asarray(lengths))
    for chunk in (8, 512):
        monkeypatch.setattr(tiles, "TOKENS", chunk)
        found = jax.jit(lambda *given: response_logps(model, *given))(params, after, tokens, mask)
        np.testing.assert_allclose(found, expected, atol=1e-4)
