"""llama.cpp's server as a process of its own, for tests that compare with it."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

_SERVE = """
import os, sys, threading
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.port = 0
settings.n_parallel = 1
settings.n_ctx = 512
settings.cpuparams.n_threads = 1  # more of them would spin where cores are shared
server = xllamacpp.Server(settings)
print(f"\\nlistening {server.listening_address}", flush=True)
sys.stdin.read()
os._exit(0)
"""


@contextmanager
def serve(path: Path) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """A function that posts JSON to an endpoint of a server for the GGUF file at `path`."""
    command = [sys.executable, "-c", _SERVE, str(path)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = (line for line in process.stdout if line.startswith("listening "))
        address = next(lines, "").removeprefix("listening ").strip()
        assert address, f"llama.cpp could not serve {path}"
        try:
            with httpx.Client(base_url=address, timeout=600) as client:
                yield lambda endpoint, body: client.post(endpoint, json=body).json()
        finally:
            process.kill()
