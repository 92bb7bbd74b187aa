"""Which files of a directory an export wrote: no others are written over or removed.

    .pujax-export.json   each file's name with the SHA-256 that it has, or while an export takes its
                         place may have

An export of a pujax that kept no such record goes by its files' names, cards and index.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pujax.errors import ConfigError, WeightsError
from pujax.files import safetensors
from pujax.files.card import is_card, is_edited, tokenizer_files
from pujax.files.durable import write_whole

ADAPTER = "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

CHAT_FILES = ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json")
"""What a tokenizer's files may hold or not: one that is not written again would still count."""

RECORD = ".pujax-export.json"

CARD = "README.md"

_FIXED = {
    "adapter_config.json": (CARD, *ADAPTER_FILES),
    "config.json": (
        *(CARD, "config.json", "generation_config.json", safetensors.INDEX, safetensors.WHOLE),
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
    return safetensors.SHARD.fullmatch(name) is not None


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
    if is_shard(name) or name == safetensors.WHOLE:
        return path not in safetensors.weight_files(directory)
    listed = tokenizer_files(directory / CARD) if name in CHAT_FILES else None
    return listed is not None and name not in listed
