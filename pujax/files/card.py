"""Model cards: the README.md of an export, by which it is known again."""

import hashlib
import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pujax.errors import ConfigError
from pujax.files.settings import only_preferred
from pujax.text import mask

if TYPE_CHECKING:  # jax with it: what is at a place is asked without
    from pujax.models.decoder import DecoderConfig

_TAG = "tags: [pujax]"

_TOKENIZER_FILES = "pujax_tokenizer_files: "

_DIGEST = "pujax_digest: "  # of the card's other lines, by which an edited one is known

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_LIMITS = (
    "## Limits\n\nWhat is measured above is all that was: prompts like those it was trained on, "
    "each answered once, with the likeliest token each time. Nobody looked at prompts of another "
    "kind, longer conversations, other languages, bias or safety. It learned to answer like {whose}"
    ", and so the mistakes and refusals there too."
)

_SHOWN = re.compile(
    r"(seed|(sampling|scorer|labels|loss|sft|align|optim|model\.(dtype|lora))(\..+)?"
    r"|data\.(max_prompt_tokens|max_response_tokens|on_too_long))"
)
"""The settings that made the model. The teacher's stay with the run, and so do paths."""

_PRIVATE = re.compile(r"key|secret|password|authorization|header|url|path", re.I)
"""What a setting among them could be called that holds a place on a disk or a secret."""


def model_card(
    config: "DecoderConfig",
    card: Mapping[str, Any],
    *,
    library: str = "transformers",
    tokenizer_files: Iterable[str] = (),
) -> str:
    """A README.md with the front matter of the model hub, and in it the `tokenizer_files`.

    `card` has the run's settings, or for a model without a run `student`, where it came from; with
    it what `pujax.run.provenance` found, `results`, `answers_by` and `licence`; and the names of
    the `soft_prompts` in the model. What made the model is listed; the teacher's settings, paths
    and headers are not.
    """
    origin = student(card)
    front = ["---", f"library_name: {library}", "pipeline_tag: text-generation", _TAG]
    if _HUB_ID.fullmatch(origin) and not Path(origin).exists():
        front.append(f"base_model: {origin}")
    licence = card.get("licence")
    if licence is not None and re.fullmatch(r"[\w.-]+", str(licence)):
        front.append(f"license: {licence}")
    if library == "transformers":
        front.append(f"{_TOKENIZER_FILES}[{', '.join(tokenizer_files)}]")
    parts = [
        "\n".join([*front, "---"]),
        f"A {config.family} model of {config.layers} layers, written by pujax. The licence of the "
        f"model that it was trained from applies{'' if licence is None else f': {licence}'}.",
    ]
    if origin.startswith("package://") or _HUB_ID.fullmatch(origin):
        begun = _section(_section(card, "model"), "shape").get("layers")
        what = "of random weights, with the tokenizer of" if begun else "from"
        parts.append(f"It was made {what} {_plain(origin)}.")
    if "align" in card:
        parts.append(" ".join(_learnt(card)))
    if card.get("soft_prompts"):
        parts.append(_led(card["soft_prompts"]))
    if card.get("results"):
        parts.append(f"## Results\n\n{card['results']}")
        whose = "the better of those responses" if only_preferred(card) else "another model"
        parts.append(_LIMITS.format(whose=whose))
    system = _section(card, "data").get("system")
    if system is not None:
        quoted = "\n".join(f"> {_plain(line)}" for line in str(system).splitlines() or [""])
        parts.append(f"It was trained with this system message; give it the same:\n\n{quoted}")
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in _shown(card)]
    if rows:
        parts.append("\n".join(["| setting | value |", "|---|---|", *rows]))
    told = "\n\n".join(parts) + "\n"
    return told.replace(_TAG, f"{_TAG}\n{_DIGEST}{_digest(told)}", 1)


def _learnt(card: Mapping[str, Any]) -> Iterator[str]:
    """What a run of these settings learnt from, in sentences."""
    given = bool(_section(card, "data").get("preferences"))
    aligned = _section(card, "align").get("steps") != 0
    if not only_preferred(card):
        yield (
            "It was aligned with pujax: another model answered each prompt once; this one wrote "
            "several candidates, ranked them with that answer in view, and learned from the "
            "ranking."
            if aligned
            else "It was trained with pujax to answer as another model did, once a prompt (SFT)."
        )
        if given:
            yield "It learned from responses to other prompts that someone had rated, too."
        answers = f"the answers{_named(card.get('answers_by'))}"
        yield f"The terms of the model that gave {answers} may apply too."
    elif aligned:
        yield "It was aligned with pujax: it learned from responses that someone had rated."
    else:
        yield "It was trained with pujax on the best of responses that someone had rated (SFT)."


def _led(users: Sequence[str]) -> str:
    held = "Virtual tokens in its vocabulary, a soft prompt, were fitted to what a user prefers: "
    if len(users) == 1:
        return f"{held}the chat template begins each conversation with those of {users[0]}."
    return (
        f"{held}the chat template begins a conversation with those of {', '.join(users)}, as its "
        "variable `soft_prompt` names one, and with none where it is not given."
    )


def _named(names: Any) -> str:
    return f" ({_plain(', '.join(names))})" if names else ""


def is_card(path: Path) -> bool:
    """Whether the file is a model card that `model_card` made."""
    if not path.is_file():
        return False
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[:1] == ["---"] and "---" in lines[1:] and _TAG in lines[: lines.index("---", 1)]


def is_edited(path: Path) -> bool:
    """Whether a model card is no longer what `model_card` made; False for one of before it told."""
    text = path.read_text(encoding="utf-8", errors="replace")
    sealed = [line for line in text.splitlines() if line.startswith(_DIGEST)]
    return bool(sealed) and sealed != [_DIGEST + _digest(text)]


def _digest(card: str) -> str:
    """Of the lines, whichever way they end, but the one that holds it."""
    lines = [line for line in card.splitlines() if not line.startswith(_DIGEST)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def refuse_foreign_card(path: Path) -> None:
    """Raise `ConfigError` unless the name is free or an export's model card has it, unedited."""
    if path.is_dir() or (path.exists() and not is_card(path)):
        raise ConfigError(
            f"{path}: not a model card that an export wrote: move it away, or choose another out"
        )
    if path.exists() and is_edited(path):
        raise ConfigError(
            f"{path}: was edited since an export wrote it: move it away, or choose another out"
        )


def tokenizer_files(path: Path) -> list[str] | None:
    """The tokenizer's files that a card lists; None for a card of before there was such a list."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(_TOKENIZER_FILES):
            return re.findall(r"[\w.-]+", line.removeprefix(_TOKENIZER_FILES))
    return None


def student(card: Mapping[str, Any]) -> str:
    """Where the trained model came from: a card's own word, or the run's settings'."""
    return str(card.get("student") or _section(card, "model").get("path") or "")


def _section(card: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = card.get(name)
    return section if isinstance(section, Mapping) else {}


def _shown(card: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings to list, under dotted keys."""
    for key, value in _flat(card):
        if _SHOWN.fullmatch(key) and not _PRIVATE.search(key):
            yield key, value


def _flat(card: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A nested card's entries under dotted keys."""
    for key, value in card.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in _flat(value))
        else:
            yield str(key), value


def _cell(value: Any) -> str:
    """A value as it may stand in a table's cell."""
    return _plain(" ".join(str(value).split())).replace("|", "\\|")


def _plain(text: str) -> str:
    return html.escape(mask(text), quote=False)
