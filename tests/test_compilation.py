from types import SimpleNamespace

import jax
import jax.monitoring
import pytest

from pujax import compilation
from pujax.compilation import COMPILED, keep_compiled, release_compiler_memory


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


def test_where_libc_can_not_trim_nothing_listens(monkeypatch):
    listeners = []
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    monkeypatch.setattr(compilation.ctypes, "CDLL", lambda name: SimpleNamespace())
    release_compiler_memory.__wrapped__()
    assert listeners == []
    libc = SimpleNamespace(malloc_trim=print)
    monkeypatch.setattr(compilation.ctypes, "CDLL", lambda name: libc)
    release_compiler_memory.__wrapped__()
    assert len(listeners) == 1


def test_programs_are_kept_in_the_users_cache_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    keep_compiled()
    assert compilation.os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "pujax" / "xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    keep_compiled()
    assert compilation.os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"
