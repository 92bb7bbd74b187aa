"""What a model card tells of a run beside its settings: results, whose answers, which licence."""

import re
from pathlib import Path
from typing import Any

from pujax.config.settings import TrainConfig
from pujax.errors import PujaxError
from pujax.files.durable import read_jsonl


def provenance(student: str, config: TrainConfig, results: str) -> dict[str, Any]:
    """What `model_card` shows of a run that began with the model at `student`.

    `results` is its held-out table in Markdown.
    """
    named, store = config.teacher.model, config.data.anchors
    # Without a store the answers are preference data, which doesn't say whose they are.
    stored = [] if store is None else teachers_in(Path(store))
    answers_by = [named] if named else stored
    return {"results": results, "answers_by": answers_by, "licence": licence_of(student)}


def teachers_in(store: Path) -> list[str]:
    """Which models a store has answers of, by name; none where it can't be read."""
    try:
        lines = read_jsonl(store)
    except (PujaxError, OSError):
        return []
    return sorted(
        {str(line["model"]) for line in lines if line.get("model") and "response" in line}
    )


def licence_of(model: str) -> str | None:
    """The licence that a model's own files name, a GGUF file's metadata or a card; else None."""
    from pujax.files import gguf
    from pujax.files.locate import locate

    try:
        local = locate(model)
        if local.is_file():
            told = gguf.read(local).metadata.get("general.license")
            return told if isinstance(told, str) else None
    except PujaxError:
        return None
    return carded_licence(local / "README.md")


def carded_licence(card: Path) -> str | None:
    """The licence in the front matter of a model card."""
    if not card.is_file():
        return None
    front = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    found = re.search(r"^license: *['\"]?([\w.-]+)", front, re.MULTILINE)
    return found[1] if front.startswith("---") and found else None
