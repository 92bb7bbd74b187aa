"""pujax: align a small language model you own from a black box you rent, one query a prompt.

What a program of one's own needs stands here by name; `experiments/loop.py` uses most of it:

    chat = pujax.Chat.load(path)
    settings, params = pujax.weights.load(path)
    model = pujax.LanguageModel(settings)
    group, metrics = pujax.rollout(model, recipe, params, ref_params, batch, key)
    state, metrics = pujax.update(model, pujax.losses.dpo, optimizer, state, None, group)

A name is imported when it is first used: `import pujax` itself loads nothing.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pujax.files import weights as weights
    from pujax.files.chat import Chat as Chat
    from pujax.method import labels as labels
    from pujax.method import losses as losses
    from pujax.method import scoring as scoring
    from pujax.method.needs import needs_of as needs_of
    from pujax.method.sampling import greedy as greedy
    from pujax.method.sampling import sample as sample
    from pujax.method.step import Recipe as Recipe
    from pujax.method.step import anchor_group as anchor_group
    from pujax.method.step import rollout as rollout
    from pujax.method.step import update as update
    from pujax.models.decoder import DecoderConfig as DecoderConfig
    from pujax.models.decoder import LanguageModel as LanguageModel
    from pujax.records import Sampling as Sampling
    from pujax.records import messages_key as messages_key
    from pujax.teacher.prompts import load_prompts as load_prompts
    from pujax.teacher.store import read_anchors as read_anchors
    from pujax.types import Batch as Batch
    from pujax.types import Tokens as Tokens
    from pujax.types import TrainState as TrainState

__version__ = "0.1.0"

# transformers serves as tokenizer library here: that torch is missing is no news to a user.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__all__ = [
    "Batch",
    "Chat",
    "DecoderConfig",
    "LanguageModel",
    "Recipe",
    "Sampling",
    "Tokens",
    "TrainState",
    "anchor_group",
    "greedy",
    "labels",
    "load_prompts",
    "losses",
    "messages_key",
    "needs_of",
    "read_anchors",
    "rollout",
    "sample",
    "scoring",
    "update",
    "weights",
]

_MODULES = {"labels": "method", "losses": "method", "scoring": "method", "weights": "files"}
_HOMES = {
    "files.chat": ("Chat",),
    "method.needs": ("needs_of",),
    "method.sampling": ("greedy", "sample"),
    "method.step": ("Recipe", "anchor_group", "rollout", "update"),
    "models.decoder": ("DecoderConfig", "LanguageModel"),
    "records": ("Sampling", "messages_key"),
    "teacher.prompts": ("load_prompts",),
    "teacher.store": ("read_anchors",),
    "types": ("Batch", "Tokens", "TrainState"),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"pujax.{_MODULES[name]}.{name}")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"pujax.{home}"), name)
    raise AttributeError(f"module 'pujax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
