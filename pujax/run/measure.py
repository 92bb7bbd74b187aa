"""What a training step costs: seconds a phase, memory, and the share of the hardware's peak.

The whole step is the one that `pujax.train` runs; its phases are jitted apart to be timed apart.
Tokens are random and every prompt and response has its full length, so nothing depends on data.
"""

import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from pujax.config.functions import build, build_loss
from pujax.config.tool_settings import BenchmarkConfig, WorkConfig
from pujax.errors import require
from pujax.files.chat import Chat
from pujax.method.discriminator import new_head
from pujax.method.needs import needs_of
from pujax.method.optimizer import on_one_cpu
from pujax.method.scoring import rewards_of
from pujax.method.step import (
    Recipe,
    assemble,
    make_train_step,
    rollout_with,
    sample_candidates,
    update,
)
from pujax.models.parameters import DecoderConfig, param_shapes
from pujax.models.sharding import make_mesh, put_batch, tree_shardings
from pujax.records import Sampling
from pujax.run.compilation import give_back, release_compiler_memory
from pujax.run.student import Student, load_student, new_state
from pujax.run.trial import try_recipe
from pujax.types import Batch, Completions, LossFn, Params, Tokens, TrainState

PEAK_SIZE = 2048  # rows and columns of the matrices whose product is taken as the peak


@dataclass(frozen=True)
class Cost:
    """Medians over a benchmark's steps, the first left out; None for what was not done.

    `tokens` counts the prompt and response tokens of a step's groups, anchors included. `mfu` is
    the update's share of `matmul_gflops_per_s`, the rate of a large matrix product in the same
    process, recomputation not counted as work; `step_mfu` is that of the whole step. Memory is the
    peak when the steps had run: of the process on a CPU, else of the devices.
    """

    prompts: int
    candidates: int
    prompt_tokens: int
    response_tokens: int
    tokens: int
    step_s: float
    step_s_all: list[float]
    generate_s: float | None
    generate_tokens_per_s: float | None
    score_s: float
    update_s: float
    mfu: float
    step_mfu: float
    matmul_gflops_per_s: float
    peak_rss_gib: float | None
    peak_device_gib: float | None
    compile_cold_s: float
    compile_warm_s: float
    load_s: float


class Benchmark:
    """A loaded student with what is chosen once, to be measured at one shape or several."""

    def __init__(self, run: BenchmarkConfig) -> None:
        # An empty cache of compiled programs, so that a first compilation is a cold one.
        # It goes with this object, or with the process.
        self._cache = tempfile.TemporaryDirectory(prefix="pujax-xla-", ignore_cleanup_errors=True)
        jax.config.update("jax_compilation_cache_dir", self._cache.name)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        release_compiler_memory()
        self.run = run
        self.mesh: Mesh = make_mesh(**vars(run.mesh))
        self.chat = Chat.load(run.model.path)
        begun = time.monotonic()
        student = load_student(run.model, self.chat, self.mesh, run.seed)
        jax.block_until_ready((student.base, student.trainable))
        self.load_s = time.monotonic() - begun
        # No token ends a response, so that every one has its full length.
        settings = replace(student.model.config, eos_ids=())
        self.student = Student(
            replace(student.model, config=settings), student.base, student.trainable
        )
        self.loss, self.recipe = step_of(run, self.chat)

    def measure(self, shape: WorkConfig) -> Cost:
        """Time `shape.steps` steps of that shape, and each of their phases."""
        model, base = self.student.model, self.student.base
        recipe = self.recipe(shape)
        optimizer = optax.adamw(1e-6)
        reference = self.student.trainable
        head = new_head(recipe.scorer, model.config.width)
        state = new_state(jax.tree.map(jnp.copy, reference), optimizer, self.mesh, head)
        shardings = tree_shardings(self.mesh, state)
        batch, completions = self._work(shape)
        # Whoever gives the responses of an offline step gives no log-probs with them.
        step_batch = replace(batch, given=completions) if shape.offline else batch
        key = jax.random.key(self.run.seed)

        def make_step() -> Callable[..., Any]:
            return make_train_step(model, recipe, self.loss, optimizer, shardings)

        def grouped(params: Params, reference: Params, base: Params, batch: Batch, key: Array):
            whole = assemble(base, params), assemble(base, reference)
            untrained = new_head(recipe.scorer, model.config.width)
            return rollout_with(untrained, model, recipe, *whole, batch, key)[0]

        def updated(state: TrainState, base: Params, group):
            return update(
                model,
                self.loss,
                optimizer,
                state,
                base,
                group,
                needs=recipe.needs,
                on_policy=True,
                in_place=on_one_cpu(shardings),
            )

        arguments = (state, reference, base, step_batch, key)
        # A run compiles once: the first program isn't kept, and what it leaves is given back.
        cold = _compiled(make_step(), *arguments)[0]
        jax.clear_caches()
        give_back()
        warm, step = _compiled(make_step(), *arguments)
        steps, (state, *_) = _timed(
            lambda state: step(state, reference, base, step_batch, key), state, shape.steps
        )
        rss, device = _peak_memory()

        generate_s = None
        if not shape.offline:

            def sampled(params: Params, base: Params, batch: Batch, key: Array) -> Completions:
                whole = assemble(base, params)
                prefix = model.prefill(whole, batch.prompts)
                return sample_candidates(model, recipe, whole, prefix, key)

            generate = jax.jit(sampled)
            times, _ = _timed(
                lambda _: (generate(state.params, base, batch, key),), None, shape.steps
            )
            generate_s = statistics.median(times)
        score = jax.jit(grouped)
        given = replace(batch, given=completions)
        times, (group,) = _timed(
            lambda _: (score(state.params, reference, base, given, key),), None, shape.steps
        )
        score_s = statistics.median(times)
        learn = jax.jit(updated, donate_argnums=0, out_shardings=(shardings, None))
        times, _ = _timed(lambda state: learn(state, base, group), state, shape.steps)
        update_s = statistics.median(times)

        peak = matmul_rate(model.dtype)
        step_s = statistics.median(steps)
        trained, rest = flops(model.config, shape, recipe)
        new_tokens = shape.prompts * shape.candidates * shape.response_tokens
        return Cost(
            prompts=shape.prompts,
            candidates=shape.candidates,
            prompt_tokens=shape.prompt_tokens,
            response_tokens=shape.response_tokens,
            tokens=shape.prompts
            * (shape.prompt_tokens + (shape.candidates + 1) * shape.response_tokens),
            step_s=step_s,
            step_s_all=steps,
            generate_s=generate_s,
            generate_tokens_per_s=None if generate_s is None else new_tokens / generate_s,
            score_s=score_s,
            update_s=update_s,
            mfu=trained / update_s / peak,
            step_mfu=(trained + rest) / step_s / peak,
            matmul_gflops_per_s=peak / 1e9,
            peak_rss_gib=rss,
            peak_device_gib=device,
            compile_cold_s=cold,
            compile_warm_s=warm,
            load_s=self.load_s,
        )

    def _work(self, shape: WorkConfig) -> tuple[Batch, Completions]:
        """A batch of random tokens on the mesh, and candidates for where they are given."""
        B, K, P, T = shape.prompts, shape.candidates, shape.prompt_tokens, shape.response_tokens
        rng = np.random.default_rng(self.run.seed)
        vocab = self.student.model.config.vocab
        R = reference_tokens(self.chat, P)

        def ids(*size: int) -> Array:
            return jnp.asarray(rng.integers(0, vocab, size), jnp.int32)

        def full(size: int) -> Tokens:
            return Tokens(ids(B, size), jnp.full(B, size, jnp.int32))

        batch = Batch(
            prompts=full(P),
            anchors=full(T),
            anchor_finished=jnp.ones(B, bool),
            references=full(R),
        )
        completions = Completions(
            tokens=ids(B, K, T),
            mask=jnp.ones((B, K, T), bool),
            finished=jnp.ones((B, K), bool),
            logps=None if shape.offline else jnp.zeros((B, K, T)),
        )
        return put_batch(self.mesh, batch, B), put_batch(self.mesh, completions, B)


def step_of(run: BenchmarkConfig, chat: Chat) -> tuple[LossFn, Callable[[WorkConfig], Recipe]]:
    """The loss that `run` names, and the recipe of a step of any shape.

    Raises `ConfigError`, also for a scorer whose time is not the step's own.
    """
    labels = build(run.labels, "labels", run.trusted)
    loss, said = build_loss(run.loss, run.trusted)
    scorer = build(run.scorer.score, "scorer.score", run.trusted)
    require(
        not rewards_of(scorer),
        "scorer.score",
        run.scorer.score["_target_"],
        "what it takes depends on the reward, which runs on the host: choose another scorer",
    )
    most = max(2, run.benchmark.candidates)
    try_recipe(scorer, labels, loss, frames=chat.frames, candidates=most)

    def recipe(shape: WorkConfig) -> Recipe:
        return Recipe(
            # Given responses are never sampled, and one of them is enough.
            sampling=Sampling(candidates=max(2, shape.candidates), temperature=1.0),
            response_size=shape.response_tokens,
            scorer=scorer,
            by_policy=run.scorer.by == "policy",
            labels=labels,
            frames=chat.frames,
            needs=needs_of(loss, labels, shape.candidates, **said),
        )

    return loss, recipe


def reference_tokens(chat: Chat, prompt_tokens: int) -> int:
    """How long a prompt of that many tokens is with its anchor's frame around it."""
    question = [{"role": "user", "content": "?"}]
    shown = len(chat.reference_head(question)) - len(chat.render(question))
    return prompt_tokens + max(0, shown)


def matmul_rate(
    dtype: Any,
    repeats: int = 7,
    size: int = PEAK_SIZE,
    of: Callable[[list[float]], float] = statistics.median,
) -> float:
    """Floating-point operations a second of a large matrix product, by the median of `repeats`.

    `of` may take something else of their seconds.
    """
    one = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    times, _ = _timed(lambda _: (product(one, one),), None, repeats)
    return 2 * size**3 / of(times)


def flops(config: DecoderConfig, shape: WorkConfig, recipe: Recipe) -> tuple[float, float]:
    """The work in the update, and in the rest of the step, in floating-point operations.

    Matrix products and attention alone, each at what it takes at least: no padding, no
    recomputation, keys counted up to the query's own position. A backward pass is two forward.
    """
    K = shape.candidates
    read = sum(forward(config, shape, K + 1 if recipe.needs.anchor else K))
    rest = read if recipe.needs.reference else 0.0
    if not shape.offline:
        rest += sum(forward(config, shape, K))
    elif recipe.needs.kl:
        prompts, responses = forward(config, shape, K)
        rest += prompts + 2 * responses
    return 3 * read, rest


def forward(config: DecoderConfig, shape: WorkConfig, responses: int) -> tuple[float, float]:
    """The work of one pass over a step's prompts, and over so many responses to each of them."""
    B, P, T = shape.prompts, shape.prompt_tokens, shape.response_tokens
    kernels = sum(
        size[1] * size[2] for size in param_shapes(config)["layers"].values() if len(size) == 3
    )
    key = 4 * config.heads * config.head_width  # a query's work on one key, in one layer
    prompts = config.layers * B * P * (2 * kernels + key * P / 2)
    # The last token's state predicts nothing.
    layers = config.layers * (T - 1) * (2 * kernels + key * (P + T / 2))
    return prompts, B * responses * (layers + 2 * T * config.width * config.vocab)


def _compiled(function: Any, *arguments: Any) -> tuple[float, Callable[..., Any]]:
    """Seconds to trace, lower and compile, and the compiled function."""
    begun = time.monotonic()
    compiled = function.lower(*arguments).compile()
    return time.monotonic() - begun, compiled


def _timed(
    function: Callable[[Any], tuple[Any, ...]], state: Any, count: int
) -> tuple[list[float], tuple[Any, ...]]:
    """Seconds of `count` calls after a first one, each given the first thing the last returned."""
    made = jax.block_until_ready(function(state))
    times = []
    for _ in range(count):
        begun = time.monotonic()
        made = jax.block_until_ready(function(made[0]))
        times.append(time.monotonic() - begun)
    return times, made


def _peak_memory() -> tuple[float | None, float | None]:
    """GiB: the process's peak on a CPU, the most that one device held elsewhere."""
    if jax.default_backend() == "cpu":
        unit = 2**30 if platform.system() == "Darwin" else 2**20  # bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, None
    held = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.devices()]
    known = [size for size in held if size is not None]
    return None, max(known) / 2**30 if known else None
