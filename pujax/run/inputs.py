"""What a run was given from elsewhere, as digests: a run goes on only with what it began with."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from pujax.config.settings import TrainConfig
from pujax.errors import DataError
from pujax.files.chat import Chat
from pujax.files.durable import write_whole
from pujax.records import Example, canonical
from pujax.run.data import Dataset
from pujax.run.directory import elsewhere

FILE = "inputs.json"

HELD_OUT_GIVEN = "data.heldout candidates"  # whose digest it is


def hold_inputs(
    directory: Path,
    config: TrainConfig,
    chat: Chat,
    parts: Mapping[str, Dataset],
    params: Mapping[str, int],
    *,
    begun: bool,
    rows: bool = False,
    say: Callable[[str], None],
) -> str | None:
    """Keep the digests of a run's inputs, or hold them against those that it began with.

    Returns the mark that all states of this run have and no other's do, by chance; None of a run
    whose first digests are lost, or that a pujax without marks began.

    `parts` are its datasets by the setting that names their prompts, `params` the checksums of
    every parameter of the student before training; `rows` says that a reward may read all of a
    prompt's line. A run that is `begun` without digests, by a pujax that kept none, takes its
    inputs as they are now, and says so. Raises `DataError` naming each setting behind which
    something else lies now.
    """
    now = {name: digest for key, part in parts.items() for name, digest in _of(key, part)}
    if rows:  # a run without rewards reads none of that, and has no digest of it
        now |= {f"{key} rows": _digest_rows(part) for key, part in parts.items()}
    tokenizer = [chat.tokenizer.backend_tokenizer.to_str(), chat.tokenizer.chat_template]
    now["tokenizer"] = _digest([*tokenizer, list(chat.eos_ids)])
    now["model"] = _digest(params)
    path = directory / FILE
    if not path.exists():
        if begun:
            say(f"{directory} has no {FILE}: its inputs are taken to be what they were")
        mark = None if begun else uuid4().hex
        marked = now if mark is None else now | {"mark": mark}
        write_whole(path, (json.dumps(marked, indent=2) + "\n").encode())
        return mark
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        # An earlier pujax did not look at the given responses of held-out prompts.
        before.setdefault(HELD_OUT_GIVEN, now.get(HELD_OUT_GIVEN))
        differing = [name for name in now if before.get(name) != now[name]]
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: can't be read ({error}): {elsewhere(config)}") from error
    behind = {
        "tokenizer": f"model.path={config.model.path}, its tokenizer or chat template",
        "model": f"model.path={config.model.path}, its weights",
        **{
            f"{key} anchors": f"data.anchors={config.data.anchors}"
            for key, part in parts.items()
            if config.data.anchors is not None and not part.candidates
        },
        **{f"{key} rows": f"{key}, in columns that a reward may read" for key in parts},
    }
    # Equal text, template and vocabulary in other tokens: the template has a clock in it.
    clock = [f"{key} tokens" for key in parts]
    if differing and set(differing) <= set(clock):
        say(
            "the chat template renders the same prompts otherwise than when this run began (does "
            "it write the date?): going on with today's"
        )
        return before.get("mark")

    def setting(name: str) -> str:
        key = name.partition(" ")[0]
        return f"{key}={getattr(config.data, key.partition('.')[2], '')}"

    for key in parts:  # anchors and rows are in the prompts' order: where that differs, they do too
        if key in differing and f"{key} anchors" in differing and f"{key} anchors" in behind:
            behind[key] = f"{setting(key)}, or which of its prompts have an answer in data.anchors"
    blamed = [
        name for name in differing if " " not in name or name.partition(" ")[0] not in differing
    ]
    named = [behind.get(name, setting(name)) for name in blamed if name not in clock]
    if named:
        raise DataError(
            f"{directory} began with other inputs ({'; '.join(dict.fromkeys(named))}): put back "
            f"what was there, or {elsewhere(config)}"
        )
    return before.get("mark")


def other_given(directory: Path, heldout: Dataset) -> bool:
    """Whether the held-out responses that someone rated are others than those the run had.

    Both as tokens of the run's own tokenizer. False where the run has kept no digest of them.
    """
    try:
        before = json.loads((directory / FILE).read_text(encoding="utf-8")).get(HELD_OUT_GIVEN)
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
    return before not in (None, dict(_of("data.heldout", heldout)).get(HELD_OUT_GIVEN))


def _of(key: str, part: Dataset) -> Iterable[tuple[str, str]]:
    """The digests of one dataset: the prompts' texts, their tokens, and the anchors used."""

    def text(e: Example) -> list[Any]:
        return [e.prompt.id, list(e.prompt.messages), e.prompt.answer, e.prompt.kind]

    yield key, _digest([text(e) for e in part.examples])
    yield f"{key} tokens", _digest([[e.prompt_ids, e.reference_ids] for e in part.examples])
    anchors = [[e.anchor, e.anchor_ids, e.anchor_finished] for e in part.examples]
    yield f"{key} anchors", _digest(anchors)
    if part.candidates:
        several = len(part.dimensions) > 1
        given = [
            [[r.ids, r.score, *(r.ratings if several else ())] for r in e.given]
            for e in part.examples
        ]
        yield f"{key} candidates", _digest(given)


def _digest_rows(part: Dataset) -> str:
    """Of all that prompts' lines hold, whatever types a table gave it."""
    rows = [dict(e.prompt.rest) for e in part.examples]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=_type).encode()).hexdigest()


def _type(value: Any) -> str:
    return type(value).__name__  # of an image, say: its repr has an address in it


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()
