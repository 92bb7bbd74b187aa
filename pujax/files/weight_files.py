"""Which files of a directory hold a model's weights, as Hugging Face lays them out."""

import json
import os
import re
from pathlib import Path
from typing import Any

from pujax.errors import WeightsError
from pujax.files.locate import here

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
"""The names that a model's weights have."""


VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "*.tiktoken")
"""The files, one at least, of which transformers makes a tokenizer."""


def require_model_files(path: str | os.PathLike[str]) -> None:
    """Raise `WeightsError` where nothing lies at `path` (as `here` finds it), or what is no model.

    The hub is not asked.
    """
    local = here(path)
    require_gguf(local)
    if local is None or not local.is_dir():
        return
    require_config(local)
    if not any(file for name in VOCABULARIES for file in local.glob(name)):
        raise WeightsError(
            f"{local}: no tokenizer.json in it: copy the tokenizer's files into it, of the model "
            "that it was made from"
        )


def require_config(directory: Path) -> Path:
    """The config.json of a directory. Raises `WeightsError` where it has none."""
    path = directory / "config.json"
    if path.is_file():
        return path
    why = "not a model, or one that was never fully written"
    found = sorted([*directory.glob("export/config.json"), *directory.glob("*/export/config.json")])
    if found:  # the newest, since runs are named by the time
        why = f"a run, or a folder of runs: its model is {found[-1].parent}"
    raise WeightsError(f"{directory}: no config.json in it: {why}")


def require_gguf(path: Path | None) -> None:
    """Raise `WeightsError` for a file that does not begin as GGUF files do.

    A directory is not looked into, nor the hub, which is None.
    """
    if path is None or path.is_dir():
        return
    try:
        with path.open("rb") as file:
            begins = file.read(4)
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror})") from error
    if begins == b"GGUF":
        return
    if b"GGUF".startswith(begins):
        raise WeightsError(f"{path}: the file is truncated: fetch it again")
    remedy = "give one, or a model's directory"
    if path.suffix in (".safetensors", ".json"):
        remedy = f"give the directory that it is in, {path.parent}"
    raise WeightsError(f"{path}: not a GGUF file, it starts with {begins!r}: {remedy}")


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the model: other safetensors files may lie beside them.

    Raises `WeightsError` where there are none, or the index is damaged.
    """
    index = directory / INDEX
    if index.is_file():
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise WeightsError(f"{index}: weight_map={placed!r} names no files: fetch it again")
        for key, name in placed.items():
            if not isinstance(name, str) or Path(name).name != name:
                raise WeightsError(f"{index}: {name!r} for {key} is no file's name: fetch it again")
            if not (directory / name).is_file():
                raise WeightsError(
                    f"{directory / name}: named by {INDEX} but missing: fetch it again"
                )
        return sorted({directory / name for name in placed.values()})
    if (directory / WHOLE).is_file():
        return [directory / WHOLE]
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise WeightsError(
            f"{directory}: no *.safetensors in it: convert the checkpoint with transformers' "
            "save_pretrained, or give a GGUF file's own path"
        )
    return [path for path in found if SHARD.fullmatch(path.name)] or found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `WeightsError` naming the file for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise WeightsError(f"{path}: not JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: not a JSON object: fetch it again")
    return value
