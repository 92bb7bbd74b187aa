import os
import platform
import resource
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.monitoring
import pytest

from pujax import chat, evaluate, export, generate, train
from pujax.chat import ChatConfig
from pujax.config.settings import TrainConfig
from pujax.evaluate import EvaluateConfig
from pujax.export import ExportConfig
from pujax.generate import GenerateConfig
from pujax.inference import suites
from pujax.inference.local_teacher import LocalTeacher
from pujax.run import compilation
from pujax.run.compilation import (
    COMPILED,
    drop_torn,
    give_back,
    keep_compiled,
    release_compiler_memory,
)
from pujax.teacher.settings import CollectConfig, TeacherConfig


@pytest.fixture
def trims(monkeypatch):
    """The calls of libc's malloc_trim that the listener makes, in place of libc."""
    calls = []
    libc = SimpleNamespace(malloc_trim=calls.append)
    monkeypatch.setattr(compilation.ctypes, "CDLL", lambda name: libc)
    release_compiler_memory()  # a command that an earlier test called may have done so
    release_compiler_memory()
    return calls


def test_a_long_compilation_is_followed_by_a_trim_and_a_short_one_is_not(trims):
    jax.monitoring.record_event_duration_secs(COMPILED, 0.3)
    jax.monitoring.record_event_duration_secs("/jax/something/else", 30.0)
    assert trims == []
    jax.monitoring.record_event_duration_secs(COMPILED, 3.0)
    assert trims == [0]


def test_jax_tells_of_a_compilation_under_that_name():
    heard = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: heard.append(event)
    )
    jax.jit(lambda x: x * 3.5 - 1)(2.0)
    assert COMPILED in heard


def test_where_libc_can_not_trim_nothing_is_given_back(monkeypatch):
    monkeypatch.setattr(compilation.ctypes, "CDLL", lambda name: SimpleNamespace())
    give_back()
    monkeypatch.setattr(compilation.os, "name", "nt")
    monkeypatch.delattr(compilation.ctypes, "CDLL")
    give_back()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory")
def test_freed_memory_is_given_back():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    # Too small to be mapped apart, and the last one pins the end of the heap.
    held = [bytes([1]) * 2**16 for _ in range(3000)]
    del held[:-1]
    before = resident()
    give_back()
    assert resident() < before - 100 * 2**20


def test_programs_are_kept_in_the_users_cache_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    keep_compiled()
    assert compilation.os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "pujax" / "xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    keep_compiled()
    assert compilation.os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"


def test_a_torn_program_is_removed_so_that_it_is_kept_anew_and_nothing_is_said(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    torn = [tmp_path / f"jit__read-{key}-cache" for key in ("12ab", "34cd")]
    other = tmp_path / "jit_train_step-12ab-cache"
    for path in (*torn, other):
        path.write_bytes(b"torn")
    monkeypatch.setattr(warnings, "showwarning", lambda *_, **__: print("shown"))
    drop_torn.cache_clear()
    drop_torn()
    # As jax words it; that it does is held by the next test.
    said = "Error reading persistent compilation cache entry for 'jit__read': ValueError: torn"
    warnings.showwarning(UserWarning(said), UserWarning, "compiler.py", 1)
    assert [path.exists() for path in (*torn, other)] == [False, False, True]
    assert capsys.readouterr().out == ""
    warnings.showwarning(UserWarning("another"), UserWarning, "x.py", 1)
    assert capsys.readouterr().out == "shown\n"
    drop_torn.cache_clear()


@pytest.mark.slow
def test_a_process_after_a_torn_program_finds_it_whole_again(tmp_path):
    code = (
        "from pujax.run.compilation import compile_once; compile_once()\n"
        "import jax; jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\n"
        "jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)\n"
        "print(jax.jit(lambda x: x * 3.0 + 1.0)(2.0))"
    )
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "XLA_FLAGS": ""}

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stderr

    run()
    entries = list(tmp_path.glob("*-cache"))
    assert entries
    whole = {path: path.stat().st_size for path in entries}
    for path in entries:
        path.write_bytes(path.read_bytes()[:40])
    assert run() == ""
    assert {path: path.stat().st_size for path in entries} == whole


class Called(Exception):
    """In place of what would compile."""


@pytest.mark.parametrize(
    ("place", "act"),
    [
        ("pujax.evaluate", lambda: evaluate.run(EvaluateConfig(run="r", model="m", name="n"))),
        ("pujax.inference.suites", lambda: suites.offered_subject(TrainConfig(), "m")),
        ("pujax.inference.suites", lambda: suites.offered_reference(Path("r"), TrainConfig())),
        ("pujax.generate", lambda: generate.run(GenerateConfig(model="m", prompt="p"))),
        ("pujax.chat", lambda: chat.run(ChatConfig(model="m"))),
        ("pujax.inference.finished", lambda: export.run(ExportConfig(model="m", out="o"))),
        ("pujax.train", lambda: train.run(TrainConfig())),
        (
            "pujax.inference.local_teacher",
            lambda: LocalTeacher(TeacherConfig(max_tokens=1), CollectConfig()),
        ),
    ],
)
def test_every_command_that_compiles_keeps_what_it_compiled(monkeypatch, place, act):
    def compile_once():
        raise Called

    monkeypatch.setattr(f"{place}.compile_once", compile_once)
    monkeypatch.setattr("pujax.train.run_directory", lambda *_: nullcontext("r"))
    monkeypatch.setattr("pujax.inference.finished.require_model", lambda path: None)
    for command in ("chat", "generate"):
        monkeypatch.setattr(f"pujax.{command}.source_of", lambda *_: ("m", None))
    monkeypatch.setattr("pujax.evaluate.newest_runs", lambda runs: runs)
    for command in (
        "evaluate._require_sources",
        "train.require_sources",
        "train.refuse_unanswered",
        "train.traces",
    ):
        monkeypatch.setattr(f"pujax.{command}", lambda *_, **__: None)
    with pytest.raises(Called):
        act()


def test_who_has_no_home_keeps_no_programs(monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    keep_compiled()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    monkeypatch.setenv("HOME", "/h")
    keep_compiled()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/h/.cache/pujax/xla"
