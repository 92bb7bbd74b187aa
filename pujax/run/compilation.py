"""How programs are compiled: once a user, and without keeping the memory that it takes."""

import contextlib
import ctypes
import functools
import os
import re
import warnings
from pathlib import Path
from typing import Any

from pujax.errors import ConfigError
from pujax.files.locate import cache_folder

TORN = r"Error reading persistent compilation cache entry for '([\w.]+)'"  # jax's warning

COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's name for the event


def compile_once() -> None:
    """What every command that compiles calls before jax is imported: see the functions it calls."""
    keep_compiled()
    drop_torn()
    release_compiler_memory()


def keep_compiled() -> None:
    """Keep compiled programs in a per-user folder, unless the user has chosen one or has no home.

    To be called before jax is imported.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(ConfigError):
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_folder() / "pujax" / "xla")


@functools.cache
def drop_torn() -> None:
    """From now on, remove what is kept of a program and can't be read, so that it is kept anew.

    jax itself warns and compiles again in every process for ever: it never writes over an entry.
    """
    shown = warnings.showwarning

    def show(message: Any, *arguments: Any, **named: Any) -> None:
        torn = re.match(TORN, str(message))
        if torn is None:
            shown(message, *arguments, **named)
            return
        for entry in Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob(f"{torn[1]}-*-cache"):
            entry.unlink(missing_ok=True)

    warnings.showwarning = show


def give_back() -> None:
    """Give the system the memory that was freed, where libc can.

    glibc keeps what is freed in small pieces, and a training step, whose buffers are big, can't
    use it: 0.6 GiB after compiling one on a CPU.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


@functools.cache  # a sweep calls this once a run, in one process
def release_compiler_memory() -> None:
    """From now on, give back what a long compilation took."""
    import jax.monitoring

    def release(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED and duration_secs > 1.0:  # trimming takes about 0.1 s
            give_back()

    jax.monitoring.register_event_duration_secs_listener(release)
