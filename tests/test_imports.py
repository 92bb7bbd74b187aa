import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pujax

ROOT = Path(pujax.__file__).parent
# A module imports from earlier lines alone. Modules on one line don't import each other.
ORDER = [
    {"types", "config", "compilation", "models.attention", "models.unembed"},
    {"prompts", "models.decoder", "labels", "mesh", "logs", "checkpoint"},
    {"teacher", "models.families", "models.lora", "losses"},
    {"models.gguf"},
    {"models.weights"},
    {"chat"},
    {"data", "sampling", "scoring", "deploy", "student"},
    {"step", "held_out"},
    {"page", "generate"},
    {"collect"},
    {"fit"},
    {"train", "measure"},
    {"benchmark", "export", "evaluate", "report"},
]


def imported(path):
    """The pujax modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pujax"):
            base = (node.module or "").removeprefix("pujax").removeprefix(".")
            inside = [f"{base}.{alias.name}".removeprefix(".") for alias in node.names]
            files = [name for name in inside if (ROOT / f"{name.replace('.', '/')}.py").exists()]
            names.update(files or [base])
    return names


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_imports_go_one_way():
    rank = {name: i for i, names in enumerate(ORDER) for name in names}
    files = [path for path in ROOT.rglob("*.py") if path.name != "__init__.py"]
    assert {module(path) for path in files} == set(rank)
    for path in files:
        for name in imported(path):
            assert rank[name] < rank[module(path)] or name == "config", (
                f"{module(path)} imports {name}"
            )


def test_only_models_know_flax_modules():
    for path in ROOT.rglob("*.py"):
        if path.parent.name != "models":
            assert "flax.linen" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    "command", ["train", "collect", "generate", "benchmark", "export", "evaluate", "report"]
)
def test_help_needs_neither_jax_nor_transformers(command):
    code = (
        f"import sys; sys.argv = ['x']; import pujax.{command}; "
        "heavy = {'jax', 'transformers', 'torch', 'datasets', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
