"""What needs no weights is quick: `--help`, and the errors of what is not there."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pujax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
HELP, ERROR = 0.6, 1.0  # processor seconds
SHARED = 1.6  # times as many where cores have other work too, which fills their caches


def told(words, limit, cwd):
    """The status and the words of a command, and by how many seconds it was within the limit.

    The best of three tries.
    """
    spare = float("-inf")
    for _ in range(3):
        shared = os.getloadavg()[0] > (os.cpu_count() or 1)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "pujax", *words],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        spare = max(spare, limit * (SHARED if shared else 1) - took)
        if spare > 0:
            break
    return done.returncode, done.stdout + done.stderr, spare


@pytest.mark.parametrize("command", COMMANDS)
def test_help_takes_a_moment(command, tmp_path):
    status, said, spare = told([command, "--help"], HELP, tmp_path)
    assert (status, f"pujax {command} KEY=VALUE" in said) == (0, True)
    assert spare > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train experiment=smoke data.prompts=none.jsonl", "none.jsonl: No such file"),
        ("export run=nowhere out=x", "run=nowhere: no run there"),
        ("export model=./nowhere out=x", "./nowhere: no such file"),
        ("evaluate run=nowhere", "run=nowhere: no run there"),
        ("evaluate run=nowhere model=x name=a", "run=nowhere: no run there"),
        ("report run=nowhere", "run=nowhere: no run there"),
        ("report sweep=nowhere", "nowhere: no runs below it"),
        ("benchmark model.path=./nowhere", "./nowhere: no such file"),
        ("generate model=./nowhere prompt=x", "./nowhere: no such file"),
    ],
)
def test_what_is_not_there_is_refused_in_a_moment(words, said, tmp_path):
    status, line, spare = told(words.split(), ERROR, tmp_path)
    assert (status, line.count("\n"), said in line) == (1, 1, True), line
    assert spare > 0
    assert not list(tmp_path.iterdir())
