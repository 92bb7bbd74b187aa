import json
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import pujax

LOOP = Path(__file__).parents[1] / "experiments" / "loop.py"


def test_the_loop_by_hand_learns_from_prompts_and_anchors():
    said = []
    align = runpy.run_path(str(LOOP))["align"]
    reference, aligned = align(sft_steps=3, steps=2, say=said.append)
    losses = [float(re.findall(r"loss ([\d.]+)", line)[0]) for line in said]
    assert [line.split(":")[0] for line in said] == [
        "sft 1",
        "sft 2",
        "sft 3",
        "align 1",
        "align 2",
    ]
    assert losses[2] < losses[0]
    assert losses[3] == pytest.approx(np.log(2), abs=1e-3)  # DPO where policy and reference agree
    moved = [
        np.abs(a - b).max()
        for a, b in zip(*map(jax.tree.leaves, (reference, aligned)), strict=True)
    ]
    assert 0 < max(moved) < 0.1


def test_the_notebook_of_docs_runs_from_its_first_cell_to_its_last(capsys):
    notebook = json.loads((LOOP.parents[1] / "docs" / "python.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert capsys.readouterr().out.count("->") == 4
    assert names["group"].tokens.shape == (4, 5, 16)
    assert float(names["metrics"]["loss"]) == pytest.approx(np.log(2), abs=1e-3)


def test_every_name_of_the_front_door_opens():
    for name in pujax.__all__:
        assert getattr(pujax, name).__name__.rsplit(".", 1)[-1] == name
    with pytest.raises(AttributeError, match="no attribute 'train_everything'"):
        vars(pujax)["__getattr__"]("train_everything")
