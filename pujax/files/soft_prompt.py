"""Soft prompts on disk: a safetensors file of kilobytes, with what it was fitted to beside it."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from pujax.errors import ConfigError, WeightsError
from pujax.files.durable import name_beside, on_disk
from pujax.files.safetensors import write_tensors
from pujax.models.parameters import DecoderConfig

TENSOR, ABOUT = "soft_prompt", "pujax"


def save_soft_prompt(
    path: Path, vectors: Float[np.ndarray, "N D"], about: Mapping[str, Any]
) -> None:
    """Write N virtual tokens of width D, and what is told `about` them. Raises `DiskError`."""
    values = np.ascontiguousarray(vectors, np.float32)
    told = json.dumps({**about, "sha256": _digest(values)})
    write_tensors(path, {TENSOR: values}, {ABOUT: told})


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
    if not path.is_file():
        raise WeightsError(f"{path}: no such file: `pujax adapt` makes one")
    try:
        with safe_open(path, "np") as file:
            names, told = list(file.keys()), (file.metadata() or {}).get(ABOUT, "{}")
            kind = file.get_slice(TENSOR).get_dtype() if names == [TENSOR] else ""
            vectors = file.get_tensor(TENSOR) if kind == "F32" else None
        about = json.loads(told)
    except (SafetensorError, OSError, ValueError, RecursionError, TypeError) as error:
        raise WeightsError(f"{path}: {error}: the file is damaged: fit it again") from error
    if kind not in ("", "F32"):
        raise WeightsError(f"{path}: values stored as {kind} are no soft prompt: fit it again")
    if vectors is None or not isinstance(about, dict):
        raise WeightsError(
            f"{path}: holds {', '.join(names[:4]) or 'nothing'}, not one {TENSOR} alone: give a "
            "file that `pujax adapt` made"
        )
    if vectors.ndim != 2 or not vectors.size:
        raise WeightsError(f"{path}: values {vectors.shape} are no soft prompt: fit it again")
    if not np.isfinite(vectors).all():
        raise WeightsError(f"{path}: holds values that are not finite: fit it again")
    if about.get("sha256", _digest(vectors)) != _digest(vectors):
        raise WeightsError(f"{path}: its checksum differs: the file is damaged: fit it again")
    return vectors, about


def require_fit(
    path: object,
    vectors: Float[np.ndarray, "N D"],
    about: Mapping[str, Any],
    model: DecoderConfig,
) -> None:
    """Raise `WeightsError` for a soft prompt of another width or vocabulary than the model's."""
    for what, fitted, own in (
        ("values a token", vectors.shape[1], model.width),
        ("tokens in the vocabulary", about.get("vocab", model.vocab), model.vocab),
    ):
        if fitted != own:
            raise WeightsError(
                f"{path}: was fitted to another model, with {fitted} {what} where this one has "
                f"{own}: fit one to this"
            )


def _digest(vectors: Float[np.ndarray, "N D"]) -> str:
    return hashlib.sha256(vectors.astype("<f4").tobytes()).hexdigest()
