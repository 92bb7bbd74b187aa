"""A small diffusion model of soft prompts: from a task's description to a prompt for it.

After Prompt Diffuser (arXiv 2411.01168), which makes the prompts of a frozen policy so; that they
are a language model's soft prompts, the network and every number are ours. DDPM (Ho et al., 2020):
x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, and a network that tells e from x_t, t and the description.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from pujax.types import Params

TIMES = 100
"""Steps from a prompt to noise."""

WIDTH = 128
"""Of the network's hidden layer; of the times' embedding it is a quarter."""


class PromptDiffusion(NamedTuple):
    """The network's parameters, and where and how wide the prompts lie that it learnt from."""

    params: Params
    mean: Float[Array, "N D"]
    scale: Float[Array, ""]


def alphas() -> Float[Array, " times"]:
    """a_t, the share of a prompt that is left at each time: the cosine of Nichol et al., 2021."""
    at = (jnp.arange(TIMES) + 1) / TIMES
    return jnp.clip(jnp.cos((at + 0.008) / 1.008 * jnp.pi / 2) ** 2, 1e-4, 0.9999)


def learn_prompts(
    key: Array,
    prompts: Float[Array, "M N D"],
    tasks: Float[Array, "M C"],
    *,
    steps: int = 1000,
    lr: float = 2e-3,
    batch: int = 64,
) -> PromptDiffusion:
    """A diffusion model of `prompts`, each beside its task's description as a vector."""
    (_, count, width), (_, size) = prompts.shape, tasks.shape
    mean = prompts.mean(axis=0, keepdims=True)
    scale = jnp.maximum(jnp.std(prompts - mean), 1e-8)
    x0 = (prompts - mean) / scale
    start_key, key = jax.random.split(key)
    params = _start(start_key, count, width, size)
    optimizer = optax.adam(optax.cosine_decay_schedule(lr, steps))
    left = alphas()

    def loss(params: Params, key: Array) -> Array:
        which, at, noise = jax.random.split(key, 3)
        rows = jax.random.randint(which, (batch,), 0, len(prompts))
        t = jax.random.randint(at, (batch,), 0, TIMES)
        e = jax.random.normal(noise, (batch, count, width))
        a = left[t][:, None, None]
        told = _noise_in(params, jnp.sqrt(a) * x0[rows] + jnp.sqrt(1 - a) * e, t, tasks[rows])
        return jnp.mean(jnp.square(told - e))

    def step(carry, key):
        params, state = carry
        grads = jax.grad(loss)(params, key)
        changes, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, changes), state), None

    keys = jax.random.split(key, steps)
    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0])
    return PromptDiffusion(run(params), mean[0], scale)


def sample_prompt(
    key: Array, model: PromptDiffusion, task: Float[Array, " C"]
) -> Float[Array, "N D"]:
    """A soft prompt for the task of that description, by the ancestral sampler."""
    left = alphas()
    before = jnp.concatenate([jnp.ones(1), left[:-1]])

    def step(x, inputs):
        t, key = inputs
        e = _noise_in(model.params, x[None], t[None], task[None])[0]
        clean = jnp.clip((x - jnp.sqrt(1 - left[t]) * e) / jnp.sqrt(left[t]), -10.0, 10.0)
        kept = left[t] / before[t]
        # The mean and the spread of x at the time before, given x now and that prompt.
        mean = (jnp.sqrt(before[t]) * (1 - kept) * clean + jnp.sqrt(kept) * (1 - before[t]) * x) / (
            1 - left[t]
        )
        spread = jnp.sqrt((1 - kept) * (1 - before[t]) / (1 - left[t]))
        return mean + spread * jax.random.normal(key, x.shape), None

    start_key, key = jax.random.split(key)
    x = jax.random.normal(start_key, model.mean.shape)
    times = jnp.arange(TIMES - 1, -1, -1)
    x, _ = jax.lax.scan(step, x, (times, jax.random.split(key, TIMES)))
    return model.mean + model.scale * x


def within(
    prompt: Float[Array, "N D"], centre: Float[Array, "N D"], radius: float
) -> Float[Array, "N D"]:
    """The nearest prompt in the ball around `centre`: what projected gradients are projected to."""
    away = prompt - centre
    return centre + away * jnp.minimum(1.0, radius / jnp.maximum(jnp.linalg.norm(away), 1e-12))


def _start(key: Array, count: int, width: int, size: int) -> Params:
    def kernel(key: Array, rows: int, columns: int) -> Array:
        return jax.random.normal(key, (rows, columns)) * rows**-0.5

    keys = jax.random.split(key, 6)
    return {
        "in": kernel(keys[0], width, WIDTH),
        "place": kernel(keys[1], count, WIDTH),
        "time": kernel(keys[2], WIDTH // 4, WIDTH),
        "task": kernel(keys[3], size, WIDTH),
        "mix": kernel(keys[4], 2 * WIDTH, WIDTH),
        "out": kernel(keys[5], WIDTH, width) * 0.01,
    }


def _noise_in(
    params: Params,
    x: Float[Array, "B N D"],
    t: Int[Array, " B"],
    task: Float[Array, "B C"],
) -> Float[Array, "B N D"]:
    """The noise in prompts at time `t`: a layer on each virtual token, one that sees their mean."""
    frequency = jnp.exp(-jnp.arange(WIDTH // 8) * (jnp.log(1000.0) / (WIDTH // 8)))
    angle = t[:, None] * frequency[None]
    time = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    told = (time @ params["time"] + task @ params["task"])[:, None]
    h = jax.nn.silu(x @ params["in"] + params["place"][None] + told)
    both = jnp.concatenate([h, jnp.broadcast_to(h.mean(axis=1, keepdims=True), h.shape)], axis=-1)
    return jax.nn.silu(both @ params["mix"] + told) @ params["out"]
