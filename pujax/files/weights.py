"""The model at a path as parameters, whichever kind of file holds it."""

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pujax.files import gguf, safetensors
from pujax.files.exported import refuse_changed
from pujax.files.locate import locate
from pujax.files.tensors import Checkpoint, Placer, read_params
from pujax.models.decoder import DecoderConfig
from pujax.types import Params


def load(
    path: str | os.PathLike[str], *, dtype: Any = np.float32, place: Placer | None = None
) -> tuple[DecoderConfig, Params]:
    """The model at `path`, its parameters [L, ...] stacked over layers, in `dtype`.

    `path` is a hub id, a Hugging Face directory, a GGUF file, OWNER/REPO/FILE.gguf on the hub or
    package://NAME/FILE. `place` puts each parameter on its sharding; without it they go to the
    default device. Raises `WeightsError` for an unknown architecture, a missing or an extra
    tensor, a wrong shape, a truncated file, or one that is not as an export wrote it.
    """
    local = locate(path)
    checkpoint = _open(local)
    if local.is_dir():
        refuse_changed(local, (file.name for file in safetensors.weight_files(local)))
    put = place or (lambda _, array: jnp.asarray(array))
    return checkpoint.config, read_params(checkpoint, dtype=dtype, place=put)


def open_model(path: str | os.PathLike[str]) -> Checkpoint:
    """The settings of the model at `path` (as in `load`), and where its tensors lie: none is read.

    Raises `WeightsError`.
    """
    return _open(locate(path))


def read_config(path: str | os.PathLike[str]) -> DecoderConfig:
    """The settings of the model at `path` (as in `load`), without its weights."""
    local = locate(path, tensors=False)
    return _open(local).config if local.is_file() else safetensors.read_config(local)


def _open(path: Path) -> Checkpoint:
    return gguf.open_model(path) if path.is_file() else safetensors.open_model(path)
