import platform
import resource
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.monitoring
import pytest

from pujax.run import compilation
from pujax.run.compilation import COMPILED, give_back, keep_compiled, release_compiler_memory


@pytest.fixture
def trims(monkeypatch):
    """The calls of libc's malloc_trim that the listener makes, in place of libc."""
    calls = []
    libc = SimpleNamespace(malloc_trim=calls.append)
    monkeypatch.setattr(compilation.ctypes, "CDLL", lambda name: libc)
    release_compiler_memory.cache_clear()
    release_compiler_memory()
    release_compiler_memory()
    yield calls
    release_compiler_memory.cache_clear()


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
