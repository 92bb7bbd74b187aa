"""What a training step takes on a mesh of devices that need not be here, without a weight read.

The step that `pujax.train` runs is compiled from shapes alone for as many virtual CPU devices as
the mesh has. XLA says what each of them holds and what they tell each other; how fast a named chip
could do it at best follows from its data sheet (a roofline: Williams et al., 2009). The compiler is
a CPU's, so an accelerator's own may fuse, schedule and scatter better.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, log2, prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pujax.config.settings import MeshConfig
from pujax.config.tool_settings import BenchmarkConfig, WorkConfig
from pujax.errors import ConfigError, require
from pujax.files.chat import Chat
from pujax.method.discriminator import new_head
from pujax.method.step import Recipe, make_train_step
from pujax.models.decoder import LanguageModel
from pujax.models.parameters import AXES, FSDP, TENSOR
from pujax.models.sharding import batch_sharding, make_mesh, padding_of, ways
from pujax.run.collectives import Traffic, total, traffic
from pujax.run.compilation import give_back
from pujax.run.measure import flops, reference_tokens, step_of
from pujax.run.student import (
    Student,
    abstract_student,
    compute_dtype,
    held,
    like_state,
    memory_of,
    shape_of,
)
from pujax.types import Batch, Completions, Tokens

GIB = 2**30
MOST_DEVICES = 1024  # virtual ones of this process
_ROOM = 0.9


@dataclass(frozen=True)
class Chip:
    """What a maker's data sheet says of a device; rates a second, of dense bfloat16 products.

    `link_bytes` is what it takes in from its neighbours: NVLink's one direction, or half of a
    TPU's interconnect, whose links count both.
    """

    memory_bytes: float
    flops: float
    memory_rate: float
    link_bytes: float


CHIPS = {
    "H100 SXM": Chip(80e9, 989e12, 3.35e12, 450e9),
    "H200 SXM": Chip(141e9, 989e12, 4.8e12, 450e9),
    "TPU v5e": Chip(16 * GIB, 197e12, 819e9, 100e9),
    "TPU v5p": Chip(95 * GIB, 459e12, 2765e9, 300e9),
}


@dataclass(frozen=True)
class StepPlan:
    """What each device of a mesh holds, does and is told in one step.

    `mesh` has the sizes of its `AXES`. Bytes: `parameters` of the policy, `reference` of what it
    started from and of a LoRA's frozen base, `optimizer` of its state, `caches` of the keys and
    values of what is sampled, `scratch` of all that comes and goes, caches included, and `peak` of
    everything at once; `here` is the peak of a process on this CPU with one device, its libraries
    and programs included, 0 for a mesh. `flops` are those of a device, `read` the bytes of weights
    and caches that sampling reads, `collectives` by kind.
    """

    mesh: tuple[int, ...]
    dtype: str
    parameters: int
    reference: int
    optimizer: int
    caches: int
    scratch: int
    peak: int
    here: int
    flops: float
    read: float
    collectives: dict[str, Traffic]

    @property
    def devices(self) -> int:
        """How many."""
        return prod(self.mesh)

    @property
    def lasting(self) -> int:
        """What lies there between steps."""
        return self.parameters + self.reference + self.optimizer

    def fits(self, chip: Chip) -> bool:
        """Whether the peak leaves a tenth of the chip for its runtime and for gaps (ours)."""
        return self.peak <= _ROOM * chip.memory_bytes

    def remedy(self, chip: Chip) -> str:
        """What to change where it doesn't fit."""
        fsdp = self.mesh[AXES.index(FSDP)]
        return remedy(self.lasting, self.scratch, _ROOM * chip.memory_bytes, fsdp)

    def seconds(self, chip: Chip) -> float:
        """The shortest a step can be: products, then sampling's reads, beside what is told."""
        alone = self.flops / chip.flops + self.read / chip.memory_rate
        return max(alone, total(self.collectives) / chip.link_bytes)


LESS = "fewer prompts or candidates a device, align.microbatch=1"


def remedy(lasting: float, scratch: float, room: float, fsdp: int, less: str = LESS) -> str:
    """What to change where a step doesn't fit into `room` bytes of each device.

    `lasting` bytes lie there between steps, `scratch` come and go, of which a stage has `less` by
    that; the mesh has `fsdp` along its axis.
    """
    if lasting > room / 2:
        times = 2 ** ceil(log2(lasting / (room / 2)))
        return (
            f"weights and optimizer alone take {lasting / GIB:.1f} GiB a device: "
            f"mesh.fsdp={fsdp * times}, or model.lora.rank=16"
        )
    return (
        f"what comes and goes takes {scratch / GIB:.1f} GiB a device: {less}, or model.remat=full"
    )


def fitting(name: str, step: Any, mesh: Mesh) -> Callable[..., Any]:
    """A stage's jitted `step`, whose first call raises `ConfigError` where the step can't fit.

    It is compiled for what it is given, which the call itself then takes over. On a CPU what this
    process holds already counts too.
    """
    known = False

    def call(*arguments: Any) -> Any:
        nonlocal known
        if not known:
            memory = step.lower(*arguments).compile().memory_analysis()
            refuse_unfit(name, memory, mesh)
            known = True
        return step(*arguments)

    return call


def refuse_unfit(name: str, memory: Any, mesh: Mesh) -> None:
    """Raise `ConfigError` where XLA's `memory` of a stage's step is more than a device has."""
    room = memory_of(mesh)
    if memory is None or room is None:
        return
    there = memory.argument_size_in_bytes
    new = memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    local = len(mesh.local_devices)
    on_cpu = mesh.local_devices[0].platform == "cpu"
    less = LESS if name == "align" else "a smaller sft.batch"
    peak = max(there, resident() / local if on_cpu else 0) + new
    if peak > room:
        raise ConfigError(
            f"{name}: a step takes {peak / GIB:.1f} GiB a device, which has {room / GIB:.1f}; "
            + remedy(there, new, room, mesh.shape[FSDP], less)
        )


def have_devices(config: MeshConfig) -> None:
    """Give this process as many virtual CPU devices as the mesh has, before JAX has any.

    A size of -1 is one. Raises `ConfigError` where JAX has begun with another number, and for more
    than it can make: each has threads of its own.
    """
    count = prod(max(1, size) for size in vars(config).values())
    require(
        count <= MOST_DEVICES,
        "mesh",
        count,
        f"a plan is compiled for up to {MOST_DEVICES} devices: what a device takes changes little "
        "with more of mesh.data",
    )
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise ConfigError(f"plan=true: JAX has begun with other devices ({error})") from error


def plan_step(run: BenchmarkConfig) -> StepPlan:
    """Compile the step of `run` for its mesh, and read what it takes.

    Raises `ConfigError` where the mesh doesn't fit the model or the batch.
    """
    mesh = make_mesh(**vars(run.mesh))
    shape, chat = run.benchmark, Chat.load(run.model.path)
    dtype = planned_dtype(run.model.dtype, mesh)
    settings = shape_of(run.model, chat, tensors=False)
    student = abstract_student(run.model, settings, mesh, dtype)
    # No token ends a response, so that every one has its full length.
    model = student.model.clone(config=replace(student.model.config, eos_ids=()))
    loss, recipe_of = step_of(run, chat)
    recipe = recipe_of(shape)
    optimizer = optax.adamw(1e-6)
    head = new_head(recipe.scorer, settings.width)
    state = like_state(student.trainable, optimizer, mesh, head)
    step = make_train_step(
        model, recipe, loss, optimizer, jax.tree.map(lambda x: x.sharding, state)
    )
    batch = _batch(mesh, shape, reference_tokens(chat, shape.prompt_tokens))
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = step.lower(state, student.trainable, student.base, batch, key).compile()
    memory: Any = compiled.memory_analysis()
    caches = 0 if shape.offline else _caches(model, recipe, shape, mesh)
    read = 0.0 if shape.offline else _read_by_sampling(student, shape, caches, mesh)
    trained, rest = flops(model.config, shape, recipe)
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    give_back()
    return StepPlan(
        mesh=tuple(mesh.shape.values()),
        dtype=jnp.dtype(dtype).name,
        parameters=held(state.params),
        reference=held(student.trainable) + held(student.base),
        optimizer=held(state.opt_state),
        caches=caches,
        scratch=memory.temp_size_in_bytes,
        peak=peak,
        here=peak + resident() if mesh.size == 1 else 0,
        flops=(trained + rest) / mesh.size,
        read=read,
        collectives=traffic(compiled.as_text(), trips=max(1, shape.response_tokens - 1)),
    )


def resident() -> int:
    """The bytes of this process that are in memory; 0 where the system doesn't say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def planned_dtype(name: str, mesh: Mesh) -> Any:
    """`model.dtype`, where `auto` takes one device for this CPU and several for accelerators."""
    return compute_dtype("bfloat16" if name == "auto" and mesh.size > 1 else name)


def _batch(mesh: Mesh, shape: WorkConfig, reference_size: int) -> Batch:
    """A step's batch as shapes, types and places."""
    K, T, padding = shape.candidates, shape.response_tokens, padding_of(mesh, shape.prompts)

    def made(*size: int, dtype: Any = jnp.int32) -> Any:
        rows = shape.prompts + padding
        return jax.ShapeDtypeStruct((rows, *size), dtype, sharding=batch_sharding(mesh))

    def tokens(size: int) -> Tokens:
        return Tokens(made(size), made())

    given = None
    if shape.offline:
        given = Completions(
            tokens=made(K, T),
            mask=made(K, T, dtype=bool),
            finished=made(K, dtype=bool),
            logps=None,
        )
    return Batch(
        prompts=tokens(shape.prompt_tokens),
        anchors=tokens(T),
        anchor_finished=made(dtype=bool),
        references=tokens(reference_size),
        given=given,
        padding=padding,
    )


def _caches(model: LanguageModel, recipe: Recipe, shape: WorkConfig, mesh: Mesh) -> int:
    """The bytes of keys and values on a device while it samples: of its prompts and responses."""
    prompts = -(-shape.prompts // ways(mesh))
    cache = jax.eval_shape(
        lambda: model.empty_cache(prompts, recipe.sampling.candidates, shape.response_tokens)
    )
    config, width = model.config, model.between.itemsize
    before = prompts * shape.prompt_tokens * config.layers * config.kv_heads * config.head_width
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) + 2 * before * width


def _read_by_sampling(student: Student, shape: WorkConfig, caches: int, mesh: Mesh) -> float:
    """Bytes that sampling reads on a device: for each token all weights, and the caches so far."""
    params = student.trainable if student.base is None else student.base
    count = sum(prod(leaf.shape) for leaf in jax.tree.leaves(params))
    weights = count * jnp.dtype(student.model.dtype).itemsize / mesh.shape[TENSOR]
    return shape.response_tokens * (weights + caches / 2)
