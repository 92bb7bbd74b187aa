"""Groups for the tests of labels and losses."""

import jax
import jax.numpy as jnp

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
