"""Which files of a directory an export wrote: no others are written over or removed.

    .pujax-export.json   each file's name with the SHA-256 that it has, or while an export takes its
                         place may have

An export of a pujax that kept no such record goes by its files' names, cards and index.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pujax.errors import ConfigError, WeightsError
from pujax.files.card import is_card, is_edited, tokenizer_files
from pujax.files.durable import begun_for, write_whole
from pujax.files.weight_files import INDEX, SHARD, WHOLE, require_gguf, weight_files

ADAPTER = "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

CHAT_FILES = ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json")
"""What a tokenizer's files may hold or not: one that is not written again would still count."""

RECORD = ".pujax-export.json"

CARD = "README.md"

STAGE = ".pujax-export"
"""Where in a directory an export is written before it takes its place."""

_FIXED = {
    "adapter_config.json": (CARD, *ADAPTER_FILES),
    "config.json": (
        *(CARD, "config.json", "generation_config.json", INDEX, WHOLE),
        *("tokenizer.json", "tokenizer_config.json", *CHAT_FILES),
        *(ADAPTER, *(f"{ADAPTER}/{name}" for name in (CARD, *ADAPTER_FILES))),
    ),
}


def touched(directory: Path, last: str) -> set[str]:
    """The names that an export may write or remove there; `last` is the file that makes it whole.

    A tokenizer may have others, which show when it is written.
    """
    shards = {path.name for path in directory.glob("model-*") if is_shard(path.name)}
    return {*_FIXED[last], *(shards if last == "config.json" else ())}


def is_shard(name: str) -> bool:
    """Whether the name is of one file of several that hold a model."""
    return SHARD.fullmatch(name) is not None


def digests(directory: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """The SHA-256 of each file of those that are there, as `record` keeps it."""
    found = {}
    for name in sorted(names):
        if (directory / name).is_file():
            with (directory / name).open("rb") as file:
                found[name] = [hashlib.file_digest(file, "sha256").hexdigest()]
    return found


def record(directory: Path, *written: Mapping[str, Sequence[str]]) -> None:
    """Keep which files are an export's, each with every digest given. Raises `DiskError`."""
    names = sorted({name for part in written for name in part})
    kept = {name: sorted({d for part in written for d in part.get(name, ())}) for name in names}
    write_whole(directory / RECORD, (json.dumps(kept, indent=2) + "\n").encode())


def recorded(directory: Path) -> dict[str, list[str]] | None:
    """What `record` kept: nothing where that is damaged, None where there is no record."""
    try:
        told = json.loads((directory / RECORD).read_bytes())
        return {name: [str(digest) for digest in found] for name, found in told.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}


def refuse_changed(directory: Path, names: Iterable[str]) -> None:
    """Raise `WeightsError` where one of `names` is not as the export wrote it, by its record.

    Where there is no record, or it tells nothing of a name, nothing is read. Else all of the file
    is: 1.3 GB a second on one core of 2026, so 0.4 s for half a gigabyte and 12 s for 16 GB.
    """
    kept = recorded(directory)
    if kept == {}:  # an export always has files
        raise WeightsError(
            f"{directory / RECORD}: damaged, so nothing says whether the weights beside it are as "
            "pujax wrote them: put back a copy of it, or remove it where you know that they are"
        )
    known = kept or {}
    for name in sorted(names):
        path = directory / name
        try:
            if not known.get(name) or digests(directory, [name])[name][0] in known[name]:
                continue
        except OSError as error:
            raise WeightsError(f"{path}: {error.strerror}: see to its disk") from error
        raise WeightsError(
            f"{path}: not what pujax wrote, by the SHA-256 in {RECORD}: put back a copy, or, in a "
            "run with its checkpoints, remove its `done` and `export` and start its command again "
            f"(if you changed the file yourself, remove {RECORD})"
        )


def refuse_theirs(directory: Path, names: Iterable[str]) -> None:
    """Raise `ConfigError` where something at one of `names` is not what an export left there."""
    kept = recorded(directory)
    for name in sorted(names):
        if _is_theirs(directory, name, kept):
            raise ConfigError(
                f"out={directory}: the export there did not write {name} as it is now: move it "
                "away, or choose an empty or a new directory"
            )


def _is_theirs(directory: Path, name: str, kept: Mapping[str, Sequence[str]] | None) -> bool:
    path = directory / name
    if path.is_symlink():
        return True
    if name == ADAPTER:
        return path.exists() and not path.is_dir()
    if not path.exists():
        return False
    if not path.is_file():
        return True
    if path.name == CARD:  # which people add to
        return not is_card(path) or is_edited(path)
    if kept is not None:
        return digests(directory, [name])[name][0] not in kept.get(name, ())
    if path.parent.name == ADAPTER and path.parent != directory:
        return not is_card(path.with_name(CARD))
    if is_shard(name) or name == WHOLE:
        return path not in weight_files(directory)
    listed = tokenizer_files(directory / CARD) if name in CHAT_FILES else None
    return listed is not None and name not in listed


def refuse_foreign_directory(directory: Path, last: str = "config.json") -> None:
    """Raise `ConfigError` unless `directory` is free or an export of the same form has it.

    `last` is the file that makes it whole. What others put beside an export is no matter, unless
    an export would write over it or remove it.
    """
    if directory.suffix == ".gguf":
        raise ConfigError(f"out={directory}: names a GGUF file: choose format=gguf, or a directory")
    _refuse_dangling(directory)
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ConfigError(f"out={directory}: is a file: choose an empty or a new directory")
    named = (path.name for path in directory.iterdir() if path.name not in (STAGE, RECORD))
    held = sorted(name for name in named if begun_for(name) != RECORD)  # of a kill in the first
    # A card that was moved away, to keep what was added to it, leaves the record.
    ours = is_card(directory / CARD) or (
        not os.path.lexists(directory / CARD) and last in (recorded(directory) or ())
    )
    other = {"config.json": "adapter_config.json", "adapter_config.json": "config.json"}[last]
    if held and (other in held or not ours):
        more = f" and {len(held) - 1} more" if held[1:] else ""
        raise ConfigError(
            f"out={directory}: holds files that no such export wrote ({held[0]}{more}): move them "
            "away, or choose an empty or a new directory"
        )
    refuse_theirs(directory, touched(directory, last))


def refuse_foreign_file(path: Path) -> None:
    """Raise `ConfigError` unless the name is free or an export's GGUF file has it."""
    if path.is_dir():
        raise ConfigError(f"out={path}: is a directory: choose a file's name, or move it away")
    _refuse_dangling(path.parent)
    _refuse_dangling(path)
    if path.is_symlink():
        raise ConfigError(
            f"out={path}: is a symbolic link to {path.readlink()}: name that, or choose another "
            "name"
        )
    if not path.exists():
        return
    if not _is_our_gguf(path):
        raise ConfigError(
            f"out={path}: a file that this export did not write: move it away, or choose another "
            "name"
        )


def _refuse_dangling(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise ConfigError(
            f"out={path}: is a symbolic link to {path.readlink()}, which is not there: make that, "
            "or remove the link"
        )


def _is_our_gguf(path: Path) -> bool:
    try:
        require_gguf(path)
        from pujax.files import gguf  # jax with it, for what is a GGUF file alone

        return gguf.MADE_BY in gguf.read(path).metadata
    except WeightsError:
        return False
