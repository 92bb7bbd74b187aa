"""Soft prompts on disk: a safetensors file of kilobytes, with what it was fitted to beside it."""

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from pujax.errors import ConfigError, WeightsError
from pujax.files.durable import name_beside, on_disk
from pujax.files.locate import SOFT_PROMPT, at_home, here, soft_prompt_file

if TYPE_CHECKING:  # jax with it: what files are no soft prompts is said without
    from pujax.models.parameters import DecoderConfig

ABOUT = "pujax"


class Fitted(NamedTuple):
    """The file of a soft prompt, its virtual tokens, and what it says of itself: its task."""

    path: str
    vectors: Float[np.ndarray, "N D"]
    about: dict[str, Any]


def save_soft_prompt(
    path: Path, vectors: Float[np.ndarray, "N D"], about: Mapping[str, Any]
) -> None:
    """Write N virtual tokens of width D, and what is told `about` them. Raises `DiskError`."""
    from pujax.files.safetensors import write_tensors  # jax with it

    values = np.ascontiguousarray(vectors, np.float32)
    told = json.dumps({**about, "sha256": _digest(values)})
    write_tensors(path, {SOFT_PROMPT: values}, {ABOUT: told})


def require_place(path: Path) -> None:
    """Make the folder of a soft prompt that is not there yet, and see that it can be written.

    For who writes it once the work is done. Raises `DiskError`, and `ConfigError` where something
    else than an earlier soft prompt is at `path`.
    """
    if os.path.lexists(path):
        try:
            load_soft_prompt(path)
        except WeightsError as error:
            raise ConfigError(
                f"out={path}: something is there, and no soft prompt: choose another name"
            ) from error
    with on_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = name_beside(path)
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
        beside.unlink()


def load_soft_prompt(path: Path) -> tuple[Float[np.ndarray, "N D"], dict[str, Any]]:
    """The virtual tokens that `save_soft_prompt` wrote, and what was told about them.

    Raises `WeightsError` for a file that is missing, damaged, or holds anything else.
    """
    soft_prompt_file(path)
    try:
        with safe_open(path, "np") as file:
            told = (file.metadata() or {}).get(ABOUT, "{}")
            kind = file.get_slice(SOFT_PROMPT).get_dtype()
            vectors = file.get_tensor(SOFT_PROMPT) if kind == "F32" else None
        about = json.loads(told)
    except (SafetensorError, OSError, ValueError, RecursionError, TypeError) as error:
        raise WeightsError(f"{path}: {error}: the file is damaged: fit it again") from error
    if vectors is None:
        raise WeightsError(f"{path}: values stored as {kind} are no soft prompt: fit it again")
    if not isinstance(about, dict):
        raise WeightsError(f"{path}: says nothing of itself: give a file that `pujax adapt` made")
    if vectors.ndim != 2 or not vectors.size:
        raise WeightsError(f"{path}: values {vectors.shape} are no soft prompt: fit it again")
    if not np.isfinite(vectors).all():
        raise WeightsError(f"{path}: holds values that are not finite: fit it again")
    if about.get("sha256", _digest(vectors)) != _digest(vectors):
        raise WeightsError(f"{path}: its checksum differs: the file is damaged: fit it again")
    return vectors, about


def load_fitted(paths: Sequence[str]) -> list[Fitted]:
    """The soft prompts in these files. Raises `ConfigError` for what can't be learnt from."""
    others: list[Fitted] = []
    for path in paths:
        vectors, about = load_soft_prompt(at_home(path))
        task = about.get("task")
        if not isinstance(task, str) or not task.strip():
            raise ConfigError(f"fitted: {path} has no task: fit it with task=TEXT")
        if others and vectors.shape != others[0].vectors.shape:
            raise ConfigError(
                f"fitted: {path} has {_sizes(vectors)}, {others[0].path} has "
                f"{_sizes(others[0].vectors)}: take some that are alike"
            )
        alike = [each.path for each in others if np.array_equal(each.vectors, vectors)]
        if alike:
            raise ConfigError(
                f"fitted: {path} is the same soft prompt as {alike[0]}: take one of them out"
            )
        others.append(Fitted(path, vectors, about))
    return others


def require_fit(
    path: object,
    vectors: Float[np.ndarray, "N D"],
    about: Mapping[str, Any],
    model: "DecoderConfig",
    source: object,
) -> None:
    """Raise `WeightsError` for a soft prompt of another width or vocabulary than the model's.

    One model lies in several places, as a file and as a directory, so of a place other than
    `source` a warning is all.
    """
    for what, fitted, own in (
        ("values a token", vectors.shape[1], model.width),
        ("tokens in the vocabulary", about.get("vocab", model.vocab), model.vocab),
    ):
        if fitted != own:
            raise WeightsError(
                f"{path}: was fitted to another model, with {fitted} {what} where this one has "
                f"{own}: fit one to this"
            )
    before = about.get("model")
    if isinstance(before, str) and _place(before) != _place(str(source)):
        print(
            f"pujax: {path}: was fitted to {before}, and this is {source}: unless they are the "
            "same model it says nothing here: fit one to this",
            file=sys.stderr,
        )


def _place(model: str) -> Path | str:
    """Where a model lies on this disk, or its name on the hub."""
    try:
        local = here(model)
    except ConfigError:  # it has gone
        return model
    return model if local is None else local.resolve()


def _digest(vectors: Float[np.ndarray, "N D"]) -> str:
    return hashlib.sha256(vectors.astype("<f4").tobytes()).hexdigest()


def _sizes(vectors: Float[np.ndarray, "N D"]) -> str:
    return f"{vectors.shape[0]} virtual tokens of width {vectors.shape[1]}"
