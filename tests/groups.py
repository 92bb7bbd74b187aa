"""Groups for the tests of labels and losses, and what is done with them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pujax.method import labels
from pujax.types import Group, Tokens


def make_group(ref_logps, *, mask=None, old_logps=None, scores=None, q=None, valid=None):
    """A group around [B G T] reference log-probs; what is left out is plain."""
    ref_logps = jnp.asarray(ref_logps, jnp.float32)
    B, G, T = ref_logps.shape
    valid = jnp.ones((B, G), bool) if valid is None else jnp.asarray(valid)
    uniform = valid / valid.sum(axis=-1, keepdims=True)
    return Group(
        prompts=Tokens(jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32)),
        tokens=jnp.zeros((B, G, T), jnp.int32),
        mask=jnp.ones((B, G, T), bool) if mask is None else jnp.asarray(mask),
        finished=jnp.ones((B, G), bool),
        old_logps=ref_logps if old_logps is None else jnp.asarray(old_logps, jnp.float32),
        ref_logps=ref_logps,
        scores=jnp.zeros((B, G)) if scores is None else jnp.asarray(scores, jnp.float32),
        labels=uniform if q is None else jnp.asarray(q, jnp.float32),
        valid=valid,
    )


def random_group(seed, B=2, G=4, T=3, anchor_mass=0.2):
    """(logps, group): lengths 1 to T, an old policy off the reference, a policy off both."""
    keys = jax.random.split(jax.random.key(seed), 5)
    mask = jnp.arange(T)[None, None, :] < jax.random.randint(keys[0], (B, G, 1), 1, T + 1)
    ref, old, new = (-jnp.abs(jax.random.normal(key, (B, G, T))) for key in keys[1:4])
    scores = jax.random.normal(keys[4], (B, G))
    q, valid = labels.softmax_labels(scores, anchor_mass=anchor_mass)
    return new, make_group(ref, mask=mask, old_logps=old, scores=scores, q=q, valid=valid)


def gradient(loss, logps, group):
    return jax.grad(lambda logps: loss(logps, group)[0].sum())(logps)


# Values worked out by hand, for an anchor and two candidates of lengths 2, 2 and 1:
# Delta = (1, 2, -1), or (1/2, 1, -1) a token; the best candidate is 1, the worst 2.

LOGPS = jnp.asarray([[[-1.0, -1.0], [-1.0, -2.0], [-3.0, jnp.nan]]])
GROUP = make_group(
    [[[-2.0, -1.0], [-2.0, -3.0], [-2.0, jnp.nan]]],
    mask=[[[True, True], [True, True], [True, False]]],
    scores=[[9.0, 1.0, 0.0]],
    q=[[0.2, 0.6, 0.2]],
)
# The same with an old policy that makes the ratios (1, 1), (1.5, 1), (1.5).
STALE = replace(
    GROUP, old_logps=LOGPS - jnp.log(jnp.asarray([[[1.0, 1.0], [1.5, 1.0], [1.5, 1.0]]]))
)


# Optima on a one-token bandit of four words. The group holds the anchor and some words.

REFERENCE = jnp.log(jnp.asarray([0.1, 0.2, 0.3, 0.4]))
ALL_WORDS = np.asarray([[2, 0, 1, 2, 3]])  # the anchor says word 2


def optimize(loss, group, words, *, steps=3000, rate=0.05, weights=None):
    """Log-probs of the four words after training with each step's policy as the old policy."""

    def objective(logits):
        table = jax.nn.log_softmax(logits)
        logps = table[words][:, :, None]
        loss_B, _ = loss(logps, replace(group, old_logps=jax.lax.stop_gradient(logps)))
        return jnp.sum(loss_B * (1 if weights is None else weights(jax.lax.stop_gradient(table))))

    optimizer = optax.adam(optax.exponential_decay(rate, steps, 0.01))

    def step(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(objective)(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    @jax.jit
    def run(logits):
        return jax.lax.scan(step, (logits, optimizer.init(logits)), None, length=steps)[0][0]

    return jax.nn.log_softmax(run(REFERENCE))


def bandit(words, **fields):
    return make_group(REFERENCE[words][:, :, None], **fields)
