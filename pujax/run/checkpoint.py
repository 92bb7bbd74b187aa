"""A run's state on disk, by Orbax: whole or not there at all, and refused where it doesn't fit.

    RUN/checkpoints/<n>/   the newest few training states with their stage and step
    RUN/reference/         what alignment started from: parameters, or an adapter, after SFT

n counts the steps of both stages. Orbax writes beside the final name and renames, so a crash or a
full disk in the middle of a save leaves the checkpoints before it as they were.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pujax.errors import CheckpointError
from pujax.types import Params, TrainState


@dataclass(frozen=True)
class Place:
    """How far a run has come: `step` steps of `stage` are done."""

    stage: str
    step: int


class Checkpoints:
    """The checkpoints of the run in `directory`; keeps the newest `keep`.

    `model` describes the student. It is stored beside every state, and a stored one that differs
    is refused before anything is read.
    """

    def __init__(self, directory: Path, *, keep: int, model: Mapping[str, Any]) -> None:
        self._directory = directory.resolve()
        self._model = json.loads(json.dumps(model))
        self._manager = ocp.CheckpointManager(
            self._directory / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
            ),
        )

    def latest(self) -> Place | None:
        """Where the newest checkpoint stands, or None without one.

        Raises `CheckpointError` when it is of another model.
        """
        number = self._manager.latest_step()
        if number is None:
            return None
        meta = self._restore(number, meta=ocp.args.JsonRestore())["meta"]
        if meta["model"] != self._model:
            raise CheckpointError(
                f"{self._directory}/checkpoints/{number} is of another model ("
                f"{_differences(meta['model'], self._model)}): set resume=never or another run.dir"
            )
        return Place(meta["stage"], meta["step"])

    def save(self, number: int, place: Place, state: TrainState) -> None:
        """Save `state` as checkpoint `number`, unless it is there already.

        Raises `CheckpointError` when it can't be written; the checkpoints before it stay.
        """
        if number in self._manager.all_steps():
            return
        meta = {"stage": place.stage, "step": place.step, "model": self._model}
        self._room_for(state)
        try:
            self._manager.save(
                number,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
            )
        except Exception as error:
            kept = self._manager.latest_step()
            for leftover in (self._directory / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {number} could not be written to {self._directory}/checkpoints "
                f"({str(error).splitlines()[0]}); the last good one is {kept}: make room and start "
                "the same command again"
            ) from error

    def restore(self, state: TrainState) -> TrainState:
        """The newest state, laid out and typed as `state` is (whose values are not read).

        Raises `CheckpointError` when it is damaged or shaped otherwise.
        """
        number = self._manager.latest_step()
        assert number is not None, "restore() follows latest()"
        return self._restore(number, state=ocp.args.StandardRestore(_abstract(state)))["state"]

    def save_reference(self, params: Params) -> None:
        """Keep what alignment starts from; once a run. Raises `CheckpointError` if it can't."""
        path = self._directory / "reference"
        if path.exists():
            return
        self._room_for(params)
        try:
            with ocp.StandardCheckpointer() as saver:
                saver.save(path, params)
        except Exception as error:
            raise CheckpointError(
                f"{path} could not be written ({str(error).splitlines()[0]}): make room and start "
                "the same command again"
            ) from error

    def restore_reference(self, params: Params) -> Params:
        """What alignment started from, laid out as `params` is.

        Raises `CheckpointError` when it is missing or damaged.
        """
        path = self._directory / "reference"
        try:
            with ocp.StandardCheckpointer() as saver:
                return saver.restore(path, _abstract(params))
        except Exception as error:
            raise CheckpointError(
                f"{path} can't be read ({str(error).splitlines()[0]}): set resume=never"
            ) from error

    def close(self) -> None:
        """Release what Orbax holds."""
        self._manager.close()

    def _restore(self, number: int, **items: Any) -> Any:
        try:
            return self._manager.restore(number, args=ocp.args.Composite(**items))
        except Exception as error:
            raise CheckpointError(
                f"{self._directory}/checkpoints/{number} can't be read "
                f"({str(error).splitlines()[0]}): remove that folder to go on from the one before, "
                "or set resume=never"
            ) from error

    def _room_for(self, tree: Any) -> None:
        """Refuse to begin a save that the disk can't hold."""
        need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self._directory).free
        if free < need:
            raise CheckpointError(
                f"{self._directory}: a checkpoint takes {need / 2**20:.0f} MiB and "
                f"{free / 2**20:.0f} MiB are free; the last good one is "
                f"{self._manager.latest_step()}: make room and start the same command again"
            )


def _abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree, without its values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The settings in which two descriptions differ, on one line."""
    names = sorted(set(stored) | set(given))
    parts = [
        f"{name} {stored.get(name)!r} there, {given.get(name)!r} here"
        for name in names
        if stored.get(name) != given.get(name)
    ]
    return "; ".join(parts)
