"""pujax: align a small language model you own from a black box you rent, one query a prompt.

What a program of one's own needs stands here by name (`__init__.pyi` has the list);
`experiments/loop.py` uses most of it:

    chat = pujax.Chat.load(path)
    settings, params = pujax.weights.load(path)
    model = pujax.LanguageModel(settings)
    group, metrics = pujax.rollout(model, recipe, params, ref_params, batch, key)
    state, metrics = pujax.update(model, pujax.pair_losses.dpo, optimizer, state, None, group)

A name is imported when it is first used: `import pujax` itself loads nothing.

The method follows Kou et al., Positive-Unlabeled Reinforcement Learning Distillation for On-Premise
Small Models, ICML 2026 (PMLR 306:60447-60479, arXiv 2601.20687), of which only the abstract was
known to us: modules and functions say which formulas are ours.
"""

import functools
import importlib
import os
from typing import Any

__version__ = "0.1.0"

# transformers serves as tokenizer library here: that torch is missing is no news to a user.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


@functools.cache
def _homes() -> dict[str, str]:
    """The module that each name is imported from, as `__init__.pyi` says."""
    import ast
    from pathlib import Path

    tree = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_homes())
    home = None if name.startswith("_") else _homes().get(name)
    if home is None:
        raise AttributeError(f"module 'pujax' has no attribute {name!r}")
    module = importlib.import_module(home)
    # A module's name, or one in it.
    found = getattr(module, name, None) or importlib.import_module(f"{home}.{name}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(_homes())
