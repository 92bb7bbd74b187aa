"""A training step of a tiny student, to be taken on several meshes.

`python tests/split_step.py OUT`, by two processes at once, takes it with every matrix split over
both, leaves a checkpoint in OUT with what it told, and ends with the first process killed.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from recipes import recipe

from pujax.config.settings import DistributedConfig
from pujax.errors import ProcessError
from pujax.method import losses
from pujax.method.step import make_train_step
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.models.sharding import fetched, make_mesh, put, put_batch, tree_shardings
from pujax.run.checkpoint import Checkpoints, Place
from pujax.run.processes import first, together, told
from pujax.types import Batch, Tokens, TrainState

ROWS = 4
OPTIMIZER = optax.adam(1e-3, eps=1e-2)  # where a gradient is nothing, no digit of it decides
MODEL = LanguageModel(
    DecoderConfig(
        family="llama",
        vocab=96,
        width=32,
        layers=2,
        heads=4,
        kv_heads=4,
        head_width=8,
        mlp_width=64,
        norm_eps=1e-5,
        rope_base=10_000.0,
        tied=True,
        eos_ids=(2, 5),
    )
)


def begun() -> TrainState:
    """The state before the first step, on the host."""
    random = MODEL.init_params(jax.random.key(0))
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, random)  # far from flat
    zero = jnp.zeros((), jnp.int32)
    return jax.device_get(TrainState(zero, params, OPTIMIZER.init(params), zero))


def laid(mesh: Mesh, state: TrainState) -> TrainState:
    """The state on the mesh."""
    return put(state, tree_shardings(mesh, state))


def batch_of(step: int) -> Batch:
    """The prompts of a step."""
    rng = np.random.default_rng(step)

    def rows(size: int) -> Tokens:
        ids = rng.integers(6, 96, (ROWS, size)).astype(np.int32)
        lengths = rng.integers(1, size + 1, ROWS).astype(np.int32)
        kept = np.where(np.arange(size) < lengths[:, None], ids, 0)
        return Tokens(jnp.asarray(kept), jnp.asarray(lengths))

    return Batch(rows(6), rows(5), jnp.ones(ROWS, bool), rows(7))


def steps(mesh: Mesh, state: TrainState, numbers: range) -> tuple[TrainState, list[dict]]:
    """The state after these steps from one on the mesh, and what each of them told, on the host."""
    shardings = tree_shardings(mesh, state)
    model = MODEL.clone(mesh=mesh if mesh.size > 1 else None)
    loss = partial(losses.ldl_grpo, kl_coef=0.1)
    step = make_train_step(model, recipe(), loss, OPTIMIZER, shardings)
    start, told_of = begun().params, []
    reference = put(start, tree_shardings(mesh, start))
    for number in numbers:
        batch = put_batch(mesh, batch_of(number), ROWS)
        state, group, metrics = step(state, reference, None, batch, jax.random.key(5))
        told_of.append(fetched({"tokens": group.tokens, "loss": metrics["loss"]}))
    return state, told_of


def main(out: Path) -> None:
    """What the script does."""
    with together(DistributedConfig()):
        made = told(os.getpid)
        print("the first is", made, flush=True)
        mesh = make_mesh(1, 1, 4)
        assert {device.process_index for device in mesh.devices.flat} == {0, 1}
        state, (line,) = steps(mesh, laid(mesh, begun()), range(1))
        checkpoints = Checkpoints(out, keep=1, model={})
        checkpoints.save(1, Place("align", 1), state)
        if first():
            np.savez(out / "step.npz", **line)
            os.kill(made, signal.SIGKILL)
        told(os.getpid)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except ProcessError as error:
        sys.exit(str(error))
