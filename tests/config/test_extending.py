"""What docs/extending.md shows is taken as it stands, from outside the package."""

import importlib
import re
from pathlib import Path

import pytest

from pujax import train

DOCS = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def outside(tmp_path):
    """A folder with the page's functions and YAML files, each block copied whole."""
    page = DOCS.read_text(encoding="utf-8")
    block = r"```(?:python|yaml)\n((?:# @package \S+\n)?# (mine\.py|my-conf/\S+)\n.*?)```"
    blocks = re.findall(block, page, re.DOTALL)
    assert len(blocks) == 7
    for text, name in blocks:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text() if path.exists() else ""
        path.write_text(f"{before}{text}\n")
    return tmp_path


def test_the_pages_loss_scorer_and_metric_are_tried_and_taken(outside, monkeypatch, capsys):
    """All are tried before prompts are read: that these are missed says that they were taken."""
    (outside / "nowhere.jsonl").touch()
    words = ["+experiment=smoke", "loss=hinge", "loss.margin=2", "scorer=close_in_length"]
    words += ["+eval=shouting", "trusted=[mine]", "data.prompts=nowhere.jsonl"]
    monkeypatch.chdir(outside)
    monkeypatch.syspath_prepend(outside)
    monkeypatch.setattr("sys.argv", ["pujax train", "--config-dir", "my-conf", *words])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("pujax.train: nowhere.jsonl: ")
    assert not (outside / "runs").exists()


def test_the_pages_reward_is_a_function_of_plain_python(outside, monkeypatch):
    monkeypatch.syspath_prepend(outside)
    mine = importlib.import_module("mine")
    assert mine.mentions_price("It costs 7 €.", {"price": 7}) == 1.0
    assert mine.mentions_price("No idea.", {"price": 7}) == 0.0
