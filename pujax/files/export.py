"""A model in the forms that transformers, vLLM, PEFT and llama.cpp load.

What is written goes to a folder or file of its own first and takes its place once it is whole, so
that a full disk or a kill leaves what was there. Nothing is written over or removed but what an
export wrote: a directory is known by its model card and each file in it by its digest, a GGUF file
by a key in it.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from pujax.errors import ConfigError, WeightsError
from pujax.files import gguf, safetensors
from pujax.files.card import is_card, model_card, student
from pujax.files.chat import Chat
from pujax.files.durable import flush, on_disk, write_whole
from pujax.files.exported import (
    ADAPTER,
    ADAPTER_FILES,
    CHAT_FILES,
    INDEX,
    STAGE,
    digests,
    record,
    recorded,
    refuse_changed,
    refuse_foreign_directory,
    refuse_foreign_file,
    refuse_theirs,
    touched,
)
from pujax.models import lora
from pujax.models.decoder import DecoderConfig
from pujax.models.families import FAMILIES
from pujax.types import Params


def export_hf(
    config: DecoderConfig,
    params: Params,
    chat: Chat,
    directory: str | os.PathLike[str],
    card: Mapping[str, Any],
    *,
    dtype: Any = np.float32,
) -> None:
    """Write what transformers and vLLM load, with a model card made of `card` (see `model_card`).

    An adapter in `params` is merged, and lies by itself in adapter/ as PEFT loads it. config.json
    comes last: without it the directory is no model. Raises `ConfigError` for a directory that
    holds anything but an earlier export, `DiskError` where it can't be written.
    """
    directory = Path(directory)
    # Over the model that it was read from only weights change.
    itself = directory.is_dir() and directory.resolve() == Path(chat.source).resolve()
    with _staged(directory, "config.json", itself=itself) as fresh:
        if lora.split(params)[1]["layers"]:
            _write_adapter(config, params, fresh / ADAPTER, card)
        chat.save(fresh)
        listed = [name for name in CHAT_FILES if (fresh / name).is_file()]
        told = model_card(config, card, tokenizer_files=listed)
        write_whole(fresh / "README.md", told.encode())
        safetensors.save(fresh, config, _merged(config, params), dtype=dtype)


def export_gguf(
    config: DecoderConfig,
    params: Params,
    chat: Chat,
    path: str | os.PathLike[str],
    *,
    kind: str = "F16",
) -> None:
    """Write what llama.cpp loads: one file, its tokenizer inside; `kind` as for `gguf.write`.

    An adapter in `params` is merged. Raises `WeightsError` for traits that GGUF can't say,
    `ConfigError` for a file there that no export wrote, `DiskError` where it can't be written.
    """
    path = Path(path)
    refuse_foreign_file(path)
    keys = chat.to_gguf()
    with on_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    gguf.write(path, config, _merged(config, params), keys, kind=kind)


def export_peft(
    config: DecoderConfig,
    params: Params,
    directory: str | os.PathLike[str],
    card: Mapping[str, Any],
) -> None:
    """Write a LoRA adapter as PEFT loads it onto the model that `card` names.

    Raises `WeightsError` when `params` has no adapter, and as `export_hf` does.
    """
    with _staged(Path(directory), "adapter_config.json") as fresh:
        _write_adapter(config, params, fresh, card)


def copy_adapter(exported: Path, directory: Path) -> None:
    """Copy the adapter of an export, with its card. Raises as `export_peft` does."""
    source = exported / ADAPTER
    if not (source / "adapter_config.json").is_file():
        raise WeightsError(
            f"{exported}: no adapter in it, the run trained the whole model (model.lora.rank=0): "
            "choose format=hf or format=gguf"
        )
    refuse_changed(exported, [f"{ADAPTER}/{name}" for name in ADAPTER_FILES])
    with _staged(directory, "adapter_config.json") as fresh, on_disk(directory):
        for name in ADAPTER_FILES:
            shutil.copy(source / name, fresh / name)
        # An older export's adapter has no card of its own.
        card = source if (source / "README.md").is_file() else exported
        shutil.copy(card / "README.md", fresh / "README.md")


def _write_adapter(
    config: DecoderConfig, params: Params, directory: Path, card: Mapping[str, Any]
) -> None:
    _, adapter = lora.split(params)
    stacks = {name: np.asarray(stack, np.float32) for name, stack in adapter["layers"].items()}
    if not stacks:
        raise WeightsError("this model has no adapter: export format=hf or format=gguf")
    names = FAMILIES[config.family].names
    tensors: dict[str, np.ndarray] = {}
    targets = []
    for stack_name, stack in stacks.items():
        kernel, part = stack_name[:-2].removesuffix("_lora"), stack_name[-1].upper()
        module = names[f"layers/{kernel}"].hf.removesuffix(".weight")
        targets.append(module.rpartition(".")[2])
        for layer, matrix in enumerate(stack):
            key = f"base_model.model.{module.format(layer)}.lora_{part}.weight"
            tensors[key] = np.ascontiguousarray(matrix.T)
    rank = next(stack.shape[2] for name, stack in stacks.items() if name.endswith("_a"))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": student(card),
        "r": rank,
        "lora_alpha": config.lora_scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(set(targets)),
        "bias": "none",
        "inference_mode": True,
    }
    with on_disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "README.md", model_card(config, card, library="peft").encode())
    safetensors.write_tensors(directory / "adapter_model.safetensors", tensors)
    safetensors.write_json(directory / "adapter_config.json", settings)


def _merged(config: DecoderConfig, params: Params) -> Params:
    base, adapter = lora.split(params)
    return lora.merge(base, adapter, config.lora_scale) if adapter["layers"] else base


# ---------------------------------------------------------------------- taking a place


@contextmanager
def _staged(directory: Path, last: str, *, itself: bool = False) -> Iterator[Path]:
    """A folder inside `directory` whose files take their places there when the block ends.

    `last` is the file that makes the directory whole; it goes first and comes last, unless the
    directory gets `itself` back. Where the block fails nothing has changed.
    """
    refuse_foreign_directory(directory, last)
    fresh, existed = directory / STAGE, directory.exists()
    with on_disk(directory), _alone(directory):
        try:
            shutil.rmtree(fresh, ignore_errors=True)  # of an export that was killed
            fresh.mkdir(parents=True)
            yield fresh
            _place(fresh, directory, last, itself)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            if not existed:
                with suppress(OSError):
                    directory.rmdir()  # if it is empty


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Make `directory`, in which no other process exports until the block ends.

    Raises `ConfigError` where one does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(
            f"out={directory}: another process exports into it: wait for that, or choose another "
            "directory"
        ) from error
    except OSError:  # NFS locks files alone
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _place(fresh: Path, directory: Path, last: str, itself: bool) -> None:
    """Move the files of `fresh` to where they belong, and remove what the export before left.

    The order is such that with `itself` there is a model to load at each moment.
    """
    names = [path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()]
    stale = [directory / name for name in CHAT_FILES if last == "config.json"]
    stale = [path for path in stale if path.exists() and Path(path.name) not in names]
    written, known = digests(fresh, map(str, names)), touched(directory, last)
    refuse_theirs(directory, written.keys() - known)
    before = recorded(directory)
    if before is None:
        before = digests(directory, known | written.keys())
    for name in names:
        flush(fresh / name)
    record(directory, before, written)  # whatever a kill leaves of the two is an export's
    if not itself:
        (directory / last).unlink(missing_ok=True)
    for path in stale:
        path.unlink()
    # The card first, by which the directory is known; the index after what it names.
    ranks = {"README.md": 0, INDEX: 3, last: 4}
    for name in sorted(names, key=lambda name: ranks.get(str(name), 1 + _is_weights(name))):
        if str(name) == last == "config.json":
            safetensors.remove_stale(directory, kept={str(name) for name in names})
            if not any(name.parts[0] == ADAPTER for name in names):
                _remove_adapter(directory / ADAPTER)
        (directory / name).parent.mkdir(exist_ok=True)
        (fresh / name).replace(directory / name)
    flush(directory)
    record(directory, written)


def _is_weights(name: Path) -> bool:
    return name.suffix == ".safetensors"


def _remove_adapter(directory: Path) -> None:
    """Remove an export's adapter, and its folder if nothing else is in it."""
    if not (directory / "adapter_config.json").is_file():
        return
    for name in ADAPTER_FILES:
        (directory / name).unlink(missing_ok=True)
    if is_card(directory / "README.md"):
        (directory / "README.md").unlink()
    with suppress(OSError):
        directory.rmdir()
