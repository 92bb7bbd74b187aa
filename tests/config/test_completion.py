"""What bash completes, as bash itself says."""

import importlib
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from pujax.__main__ import COMMANDS
from pujax.config.completion import WORDS, script
from pujax.config.overrides import kinds_of
from pujax.config.settings import TrainConfig
from pujax.errors import ConfigError
from pujax.export import ExportConfig
from pujax.serve import ServeConfig

BASH = shutil.which("bash")


@pytest.fixture(scope="module")
def made():
    """The script as the command prints it."""
    words = [sys.executable, "-m", "pujax", "--completion", "bash"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def completed(made, *lines, breaks="\"'><=;|&(:", folder=None):
    """What bash proposes at the end of each of the lines."""
    asked = [
        f"COMP_LINE='{line}' COMP_POINT={len(line)} COMP_CWORD={len(line.split(' ')) - 1}; "
        f"COMP_WORDS=({line}); _pujax; printf '%s\\n' \"${{COMPREPLY[@]}}\" ---"
        for line in lines
    ]
    done = subprocess.run(
        [str(BASH), "--norc", "-u"],
        input="\n".join([made, f"COMP_WORDBREAKS=$'{breaks}'".replace("\"'", "\"\\'"), *asked]),
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    assert not done.stderr
    return [part.strip("\n").split("\n") for part in done.stdout.split("---\n")[:-1]]


@pytest.mark.skipif(BASH is None, reason="bash, which is asked, is not installed")
def test_bash_completes_commands_settings_and_choices(made):
    commands, named, keys, choices, sweep, booleans, inside, tools, nothing = completed(
        made,
        "pujax ",
        "pujax tr",
        "pujax train sft.",
        "pujax train seed=1 loss=d",
        "pujax train -m loss=dpo,ip",
        "pujax train checkpoint.clean=",
        "pujax train loss.b",
        "pujax evaluate suite=",
        "pujax train run.name=",
    )
    assert [f"{command} " for command in COMMANDS] == commands[: len(COMMANDS)]
    assert named == ["train "]
    assert keys == ["sft.steps=", "sft.batch=", "sft.lr="]
    assert {"dpo ", "dapo ", "distill "} <= set(choices)
    assert all(choice.startswith("d") for choice in choices)
    assert sweep == ["dpo,ipo "]
    assert booleans == ["true ", "false "]
    assert "loss.beta=" in inside
    assert {"costs ", "signal "} <= set(tools)
    assert nothing == [""]


@pytest.mark.skipif(BASH is None, reason="bash, which is asked, is not installed")
def test_where_bash_does_not_break_words_at_the_sign_the_key_stays(made):
    (choices, sweep) = completed(
        made, "pujax train +loss=ip", "pujax train loss=dpo,ip", breaks=" "
    )
    assert choices == ["+loss=ipo "]
    assert sweep == ["loss=dpo,ipo "]


@pytest.mark.skipif(BASH is None, reason="bash, which is asked, is not installed")
def test_bash_completes_added_keys_and_what_stands_in_lists_and_after_an_at_sign(made, tmp_path):
    (tmp_path / "runs" / "long").mkdir(parents=True)
    for name in ("heldout.csv", "question.txt", "two words.csv"):
        (tmp_path / name).touch()
    added, twice, files, spaced, folders, chosen, quoted, options, secret = completed(
        made,
        "pujax train +exp",
        "pujax train ++sft.l",
        "pujax train data.prompts=[mine.csv,held",
        "pujax train data.prompts=[mine.csv,two",
        "pujax evaluate run=[runs/lo",
        "pujax evaluate eval=[exact,con",
        "pujax generate prompt=@q",
        "pujax train --h",
        "pujax collect teacher.api",
        folder=tmp_path,
    )
    assert added == ["+experiment="]
    assert twice == ["++sft.lr="]
    assert files == ["[mine.csv,heldout.csv"]
    assert spaced == [r"[mine.csv,two\ words.csv"]
    assert folders == ["[runs/long/"]
    assert chosen == ["[exact,contains"]
    assert quoted == ["@question.txt"]
    assert options == ["--help", "--hydra-help"]
    assert secret == ["teacher.api_key_env="]  # a key is never typed as a setting
    whole = completed(made, "pujax train data.prompts=held", breaks=" ", folder=tmp_path)
    assert whole == [["data.prompts=heldout.csv"]]


def test_the_words_to_complete_are_those_that_the_settings_take():
    known: dict[tuple[str, str], Any] = {
        (key, name): kind
        for schema in (TrainConfig, ExportConfig, ServeConfig)
        for prefix, kind in [("", schema), *kinds_of(schema)]
        if is_dataclass(kind)
        for key in WORDS
        if key.rpartition(".")[0] == prefix
        for name in [key.rpartition(".")[2]]
        if name in {field.name for field in fields(kind)}
    }
    assert {key for key, _ in known} == set(WORDS)
    for (key, name), kind in known.items():
        if key == "resume":
            continue  # which takes a run's directory too
        needed: dict[str, Any] = {} if "." in key else {"run": "x"}
        for word in WORDS[key]:
            kind(**needed | {name: word})
        with pytest.raises(ConfigError) as refused:
            kind(**needed | {name: "nonsense"})
        assert all(word in str(refused.value) for word in WORDS[key])


def test_zsh_gets_a_script_of_its_own_and_no_other_shell_does():
    words = [sys.executable, "-m", "pujax", "--completion", "fish"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "pujax: --completion='fish': choose bash or zsh\n",
    )
    for command in COMMANDS:
        importlib.import_module(f"pujax.{command}")
    made = script("zsh", COMMANDS)
    assert made.startswith("#compdef pujax\n")
    if shutil.which("zsh") is not None:  # one that has not begun to complete yet
        of = f"{made}\nprint $_comps[pujax]"
        done = subprocess.run(["zsh", "-f", "-c", of], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("_pujax\n", "")
