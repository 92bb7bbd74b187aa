"""Soft prompts on disk: a safetensors file of kilobytes, with what it was fitted to beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from pujax.errors import WeightsError
from pujax.files.safetensors import write_tensors
from pujax.models.parameters import DecoderConfig

TENSOR, ABOUT = "soft_prompt", "pujax"


def save_soft_prompt(
    path: Path, vectors: Float[np.ndarray, "N D"], about: Mapping[str, Any]
) -> None:
    """Write N virtual tokens of width D, and what is told `about` them. Raises `DiskError`."""
    tensors = {TENSOR: np.asarray(vectors, np.float32)}
    write_tensors(path, tensors, {ABOUT: json.dumps(dict(about))})


def load_soft_prompt(path: Path) -> tuple[Float[np.ndarray, "N D"], dict[str, Any]]:
    """The virtual tokens that `save_soft_prompt` wrote, and what was told about them.

    Raises `WeightsError` for a file that is missing, damaged, or holds anything else.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file: `pujax adapt` makes one")
    try:
        with safe_open(path, "np") as file:
            names, told = list(file.keys()), (file.metadata() or {}).get(ABOUT, "{}")
            vectors = file.get_tensor(TENSOR) if names == [TENSOR] else None
        about = json.loads(told)
    except (SafetensorError, OSError, ValueError, RecursionError, TypeError) as error:
        raise WeightsError(f"{path}: {error}: the file is damaged: fit it again") from error
    if vectors is None or not isinstance(about, dict):
        raise WeightsError(
            f"{path}: holds {', '.join(names[:4]) or 'nothing'}, not one {TENSOR} alone: give a "
            "file that `pujax adapt` made"
        )
    if vectors.ndim != 2 or not vectors.size or vectors.dtype != np.float32:
        raise WeightsError(
            f"{path}: {vectors.dtype} {vectors.shape} is no soft prompt: fit it again"
        )
    if not np.isfinite(vectors).all():
        raise WeightsError(f"{path}: holds values that are not finite: fit it again")
    return vectors, about


def require_fit(path: object, vectors: Float[np.ndarray, "N D"], model: DecoderConfig) -> None:
    """Raise `WeightsError` for a soft prompt of another width than the model's."""
    if vectors.shape[1] != model.width:
        raise WeightsError(
            f"{path}: its virtual tokens have {vectors.shape[1]} values and the model's "
            f"{model.width}: it was fitted to another model"
        )
