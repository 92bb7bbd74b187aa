"""A model behind llama.cpp's server, OpenAI's API on this machine."""

import errno
import hashlib
import importlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pujax
from pujax.errors import ConfigError, stops
from pujax.files.durable import on_disk
from pujax.files.locate import at_home, cache_folder, locate
from pujax.inference.finished import finished_run


@dataclass(frozen=True)
class Served:
    """A GGUF file, what it is called, and the system message of who asks without one."""

    path: Path
    name: str
    system: str | None = None


def to_serve(
    run: str | None,
    model: str | None,
    *,
    kind: str,
    say: Callable[[str], None],
    users: Mapping[str, str] | None = None,
) -> Served:
    """The GGUF file of a run's model or of the one at `model`, exported unless that was done.

    What is exported is kept in the run's directory, and for a `model` in the user's cache, under
    the digest of the files that it was made of. A `model` that is a GGUF file is served as it is,
    unless soft prompts of `users` go into it (see `led_model`). Raises what finding, reading and
    exporting the model raises.
    """
    if run is not None:
        finished = finished_run(at_home(run))
        directory = finished.model.parent.resolve()
        served = Served(finished.model, directory.parent.name, finished.system)
        folder = directory / "gguf"
    else:
        served = Served(locate(str(model)), Path(str(model)).name)
        folder = cache_folder() / "pujax" / "gguf"
    if served.path.is_file() and not users:
        return served
    vectors = {}
    if users:
        from pujax.files import weights
        from pujax.files.led import load_users

        source = model or served.path
        vectors = load_users(users, weights.read_config(served.path), source)
    kept = folder / f"{content_of(served.path, users)[:16]}-{kind}.gguf"
    if not kept.exists():
        from pujax.files import weights
        from pujax.files.chat import Chat
        from pujax.files.export import export_gguf
        from pujax.files.led import led_model

        say(f"writing {kept}, which is kept")
        config, params = weights.load(served.path)
        chat = Chat.load(served.path)
        if vectors:
            config, params, chat = led_model(config, params, chat, vectors)
        export_gguf(config, params, chat, kept, kind=kind)
    return Served(kept, served.name, served.system)


def content_of(model: Path, users: Mapping[str, str] | None = None) -> str:
    """The digest of what an export makes of a model: its file or files, and our version."""
    whole = hashlib.sha256(pujax.__version__.encode())
    files = sorted(path for path in model.iterdir() if path.is_file()) if model.is_dir() else []
    read = (".json", ".safetensors", ".jinja", ".txt", ".model")
    files = [file for file in files if file.suffix in read] if files else [model]
    for file in (*files, *map(at_home, (users or {}).values())):
        with on_disk(file), file.open("rb") as content:
            whole.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return whole.hexdigest()


def template_with(template: str, system: str) -> str:
    """A chat template that puts `system` before a conversation that has no system message."""
    message = json.dumps({"role": "system", "content": system}, ensure_ascii=False)
    return (
        "{%- if not messages or messages[0]['role'] != 'system' %}"
        f"{{%- set messages = [{message}] + messages %}}"
        "{%- endif %}" + template
    )


def require_server() -> None:
    """Raise `ConfigError` where llama.cpp is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise ConfigError(
            "llama.cpp is not installed, which serves the model: pip install 'pujax[serve]'"
        )


def require_free(host: str, port: int) -> None:
    """Raise `ConfigError` unless a server may listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port={port}: in use on {host}: choose another, or port=0 for a free one"
                ) from error
            raise ConfigError(
                f"host={host!r} port={port}: {error.strerror}: choose an address of this machine"
            ) from error


@contextmanager
def served_at(path: Path, *, context: int) -> Iterator[str]:
    """The address, up to /v1, of a server of a GGUF file, in a process of its own meanwhile.

    It answers one request at a time, prompt and answer of at most `context` tokens. Raises
    `ConfigError` where it does not start; its reason then stands on standard error.
    """
    words = (f"model={path.absolute()}", "port=0", "parallel=1", f"context={context}")
    with subprocess.Popen(
        [sys.executable, "-m", "pujax.serve", *words], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            found = re.search(r"http://\S+/v1", server.stdout.readline())
            if found is None:
                raise ConfigError(f"{path}: llama.cpp can't serve it: its reason stands above")
            yield found[0]
        finally:
            server.terminate()


def serve(
    served: Served,
    *,
    host: str,
    port: int,
    parallel: int,
    context: int,
    threads: int | None,
    ready: Callable[[str], None],
) -> None:
    """Serve until a signal to stop, then end the process with status 0.

    `ready` is given the server's address. Raises `ConfigError` where the server does not start; its
    reason then stands on standard error.
    """
    from pujax.files import gguf

    xllamacpp: Any = importlib.import_module("xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(served.path)
    settings.model_alias = {served.name}  # what answers name: not the file's whole path
    settings.hostnames = [host]
    settings.port = port
    settings.n_parallel = parallel
    settings.n_ctx = context * parallel  # shared by the requests in flight
    settings.verbosity = 1  # errors alone
    settings.sampling.temp = 0.0  # for who asks for none: as generate and the evaluation answer
    if threads is not None:
        settings.cpuparams.n_threads = threads
    if served.system is not None:
        template = gguf.read(served.path).metadata.get("tokenizer.chat_template", "")
        settings.chat_template = template_with(template, served.system)
    # Any thread may get the signal, and of those of the library none runs Python's handlers: what
    # wakes this one is the byte that Python writes as soon as a signal comes.
    asleep, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    for number in stops():
        signal.signal(number, lambda *_: None)
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        raise ConfigError(
            f"{served.path}: llama.cpp can't serve it on {host}:{port}: its reason stands above"
        ) from error
    ready(server.listening_address)
    sys.stdout.flush()
    asleep.recv(1)
    os._exit(0)  # the library's own end waits for ever when a request is in flight
