"""Several processes that do one run: joined by jax, decided by the first, ended together.

Each does the same steps in the same order on its own devices, as jax wants it. What one alone may
do, to read and write the run's files, ask a teacher, call rewards and speak, the first does and the
others are `told`, so that all take the same branches; of the disk they need the model's files
alone. One process pays nothing for this: jax isn't even imported here.
"""

import atexit
import importlib.util
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pujax.config.settings import DistributedConfig
from pujax.errors import ConfigError, ProcessError, StopRequested, require
from pujax.files.settings import within

T = TypeVar("T")

HEARTBEAT = 40  # seconds without a sign of life after which jax takes a process for dead

LEAVING = 10  # seconds that a process which is done waits for the others to be

ANY_TIME = 7 * 24 * 3600 * 1000  # milliseconds: a teacher may take days, and the dead are noticed

PIECE = 2**22  # bytes that jax's coordination service is given at once: much more would end it

GONE = (
    "{who} of this run has ended, and so does this one: see what it said (nothing, if it was "
    "killed), and start the same command again, in all of them"
)
"""What the others say, of `who`: process N, or another process where nobody knows which."""

ALONE = (
    "pujax: not all processes of this run came together at {address} within five minutes: start "
    "the same command in each, where that is the first one's HOST:PORT and can be reached"
)
"""What is said where jax ends this process before the others are there."""

_JOINED = "pujax: joined"
"""A line for what reads standard error: from now on an end is that of another process."""

_APART = (
    *("distributed", "run", "log", "resume", "teacher", "collect", "model.path"),
    *(f"data.{name}" for name in ("prompts", "heldout", "anchors", "preferences")),
)
"""Settings that may differ between processes: where files lie, and what the first alone does."""

_LOST = re.compile(r"gloo|nccl|rccl|coordination|UNAVAILABLE|Connection|another task", re.I)
"""What jax's errors have in them where another process went away."""


@dataclass
class _Group:
    """The `count` processes that do the run, as this one, number `index`, sees them.

    `client` is jax's coordination service, which Orbax waits by too: unlike a collective it has no
    time limit of its own, and needs no device. `turns` counts what was told, `agreed` is the error
    that ends all, and `broken` says that this process failed by itself, and the others don't know.
    """

    client: Any
    index: int
    count: int
    turns: int = 0
    agreed: BaseException | None = None
    broken: bool = False


_group: _Group | None = None


def several() -> bool:
    """Whether other processes do this run too."""
    return _group is not None


def first() -> bool:
    """Whether this is the process that writes and speaks."""
    return _group is None or _group.index == 0


@contextmanager
def together(settings: DistributedConfig) -> Iterator[None]:
    """Join the other processes, where there are any, for what the block does.

    To be entered before a device is touched. A process that fails by itself ends at once, so that
    the others notice. Raises `ConfigError` where they don't find each other, and `ProcessError`
    where one of them went away.
    """
    _join(settings)
    group = _group
    if group is None:
        yield
        return
    try:
        yield
    except StopRequested:
        raise
    except BaseException as error:
        if error is group.agreed:
            raise
        group.broken = True
        if type(error).__name__ == "JaxRuntimeError" and _LOST.search(str(error)):
            raise ProcessError(_gone(group, str(error))) from error
        with suppress(Exception):  # the first may be gone too
            group.client.key_value_set(f"pujax/gone/{group.index}", "")
        raise


def told(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; each has to ask for it.

    What `make` raises there ends all: raises it, and `ProcessError` in the others. It must not ask
    in turn.
    """
    group = _group
    if group is None:
        return make()
    group.turns += 1
    key = f"pujax/told/{group.turns}"
    made: Any = None
    if group.index == 0:
        try:
            made = make()
            _tell(group.client, key, pickle.dumps((True, made)))
        except BaseException as error:
            group.agreed = error
            _tell(group.client, key, pickle.dumps((False, None)))
    else:
        well, made = pickle.loads(_heard(group.client, key))
        if not well:
            group.agreed = ProcessError(
                f"process {group.index} ends with the first, which says why"
            )
    group.client.wait_at_barrier(key, ANY_TIME)
    if group.index == 0:
        group.client.key_value_delete(key)  # and what lies below it
    if group.agreed is not None:
        raise group.agreed
    return made


def require_same(settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` in all where one was told otherwise than the first, by dotted keys.

    Where files lie, and what the first alone does, may differ: no number depends on it.
    """
    group = _group
    if group is None:
        return
    mine = {key: repr(value) for key, value in settings.items() if not within(key, _APART)}
    firsts = told(lambda: mine)
    group.turns += 1
    turn = f"pujax/differs/{group.turns}"
    differing = [key for key in {**firsts, **mine} if firsts.get(key) != mine.get(key)]
    if differing:
        key = differing[0]
        here, there = mine.get(key, "not set"), firsts.get(key, "not set")
        line = f"{key} is {here} in process {group.index} and {there} in the first"
        group.client.key_value_set(f"{turn}/{group.index}", line)
    group.client.wait_at_barrier(turn, ANY_TIME)
    told(lambda: _refuse_differing(group.client, f"{turn}/"))


def _refuse_differing(client: Any, turn: str) -> None:
    if found := client.key_value_dir_get(turn):
        raise ConfigError(f"{found[0][1]}: start the same command in all processes")


def _tell(client: Any, key: str, data: bytes) -> None:
    """Give out `data` in pieces, the first one with their number before it."""
    count = -(-len(data) // PIECE)
    for at in range(1, count):
        piece = data[at * PIECE : (at + 1) * PIECE]
        client.key_value_set_bytes(f"{key}/{at}", piece)
    client.key_value_set_bytes(key, count.to_bytes(4) + data[:PIECE])


def _heard(client: Any, key: str) -> bytes:
    """What `_tell` gave out."""
    begun = client.blocking_key_value_get_bytes(key, ANY_TIME)
    rest = range(1, int.from_bytes(begun[:4]))
    pieces = [client.blocking_key_value_get_bytes(f"{key}/{at}", ANY_TIME) for at in rest]
    return b"".join([begun[4:], *pieces])


@contextmanager
def opened(make: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
    """What the first process enters, told to all; it leaves it when its block ends."""
    with ExitStack() as stack:
        yield told(lambda: stack.enter_context(make()))


def wish(own: Callable[[], int]) -> Callable[[], int]:
    """The signal that asks to stop, whichever process got it; each has to ask, and then knows."""

    def of_any() -> int:
        group = _group
        if group is None:
            return own()
        if own():
            group.client.key_value_set(f"pujax/stop/{group.index}", str(own()), True)
        return told(lambda: _asked(group))

    return of_any


def _asked(group: _Group) -> int:
    numbers = group.client.key_value_dir_get("pujax/stop/")
    for key, _ in numbers:  # granted, and no wish of a sweep's next job
        group.client.key_value_delete(key)
    return max((int(number) for _, number in numbers), default=0)


def to_first(tree: Any) -> Any:
    """The arrays of a tree as they are; of several processes the first gets them on its host.

    What the others get is of no use. One leaf after the other, for the devices' memory.
    """
    if _group is None:
        return tree
    import jax

    from pujax.models.sharding import fetched

    def whole(leaf: Any) -> Any:
        value = fetched(leaf)
        return value if first() else None

    return jax.tree.map(whole, tree)


def from_first(tree: Any, like: Any) -> Any:
    """A tree's arrays as they are; of several processes all get those that `tree` is in the first.

    They are laid out as the leaves of `like` say.
    """
    if _group is None:
        return tree
    import jax
    import numpy as np
    from jax.experimental.multihost_utils import broadcast_one_to_all

    from pujax.models.sharding import put

    wanted, form = jax.tree.flatten(like)
    given = jax.tree.leaves(tree) if first() else wanted

    def shared(value: Any, leaf: Any) -> Any:
        bits = np.dtype(f"u{leaf.dtype.itemsize}")  # which add up to themselves, as -0.0 does not
        sent = np.asarray(value).view(bits) if first() else np.zeros(leaf.shape, bits)
        return put(broadcast_one_to_all(sent).view(leaf.dtype), leaf.sharding)

    return form.unflatten([shared(*each) for each in zip(given, wanted, strict=True)])


def _join(settings: DistributedConfig) -> None:
    """Make this process one of the group, where there is one; once."""
    global _group
    if _group is not None:
        _group.agreed = None  # of a sweep's job before
        if _group.broken:
            sys.exit(1)
        return
    record = given(settings, os.environ)
    if record is None:
        return
    from pujax.run.compilation import compile_once

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors are raised too, and said once
    compile_once()
    import jax
    import rich
    from jax._src.distributed import global_state

    _shorten_the_end(str(record.get("coordinator_address", "the launcher's address")))
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM away from us
    try:
        with _ended_by_signals():
            jax.distributed.initialize(
                **record,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=LEAVING,
            )
            jax.devices()  # which needs all of them: here, and not where the first would wait
        os.write(2, f"{_JOINED}\n".encode())
    except (ValueError, RuntimeError) as error:
        told_by = record.get("coordinator_address", "the launcher")
        raise ConfigError(
            f"distributed: can't join the other processes by {told_by} "
            f"({str(error).splitlines()[0][:300]}): set distributed.coordinator, processes and "
            "process in each, or distributed=off"
        ) from error
    if jax.process_count() == 1:
        return
    _group = _Group(global_state.client, jax.process_index(), jax.process_count())
    rich.reconfigure(quiet=not first())
    atexit.register(_leave)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Signals end this process at once: Python would hear of them when jax has come back."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_FILTER = """
import os, re, sys
alone, joined = sys.argv[2].encode(), sys.argv[3].encode()
before, after = (part.encode() for part in sys.argv[1].split("{who}"))
ours = re.compile(rb"pujax|Traceback|.*" + re.escape(after))
theirs = re.compile(rb"[EF][0-9]{4} [0-9:.]+ .*(coordination_service|Terminating process)")
last = b"Terminating process because the JAX distributed service"
number = re.compile(rb"sending heartbeats[)]:\\s+([0-9]+)\\n")
said = hidden = ending = False
heard = rest = b""
while chunk := os.read(0, 65536):
    heard = (heard + chunk)[-65536:]
    *lines, rest = (rest + chunk).split(b"\\n")
    for line in lines:
        if line.endswith(joined):
            alone, line = b"", line[: -len(joined)]
            if not line:
                continue
        noise = theirs.search(line)
        kept = line[: noise.start()] if noise else line
        hidden = hidden and not ours.match(kept)
        if not hidden and not ending and (kept or not noise):
            os.write(2, kept + b"\\n")
            said |= after in kept
        hidden = hidden or bool(noise)
    ending |= last in heard
    if ending and alone and not said:
        os.write(2, alone + b"\\n")
        said = True
    if ending and not said:
        found = number.search(heard)
        who = b"process 0" if b"leader task" in heard else found and b"process " + found[1]
        if who or b"Check failure stack trace" in heard:
            os.write(2, before + (who or b"another process") + after + b"\\n")
            said = True
if ending and not said:
    os.write(2, before + b"another process" + after + b"\\n")
elif not hidden and not ending:
    os.write(2, rest)
"""
"""Line by line, as what is written at once may be read in pieces, and the other way round; and
Python ends its lines by themselves, so that jax's may come between."""


def _gone(group: _Group, said: str) -> str:
    """What to say where jax `said` that another process is gone: which one, if that comes out.

    Of two it is the other one, and who failed by itself has left word. Of more, jax's heartbeats
    find the one that was killed, and mostly end this process in the middle of this.
    """
    found = re.search(r"Task (\d+) heartbeat", said)
    if found or group.count == 2:
        return GONE.format(who=f"process {found[1] if found else 1 - group.index}")
    for _ in range(HEARTBEAT + LEAVING):
        try:
            left = group.client.key_value_dir_get("pujax/gone/")
        except Exception:
            return GONE.format(who="process 0")  # which keeps them
        if left:
            return GONE.format(who=f"process {left[0][0].rpartition('/')[2]}")
        time.sleep(1)
    return GONE.format(who="another process")


def _shorten_the_end(address: str) -> None:
    """From now on, say in one line that another process died, or did not come to `address`.

    Where a collective doesn't notice, jax's heartbeats do, and end this process from C++, with a
    page about it and no word of Python's. So a small process, which outlives this one, reads what
    goes to standard error.
    """
    reader, writer = os.pipe()
    subprocess.Popen(
        [sys.executable, "-IS", "-c", _FILTER, GONE, ALONE.format(address=address), _JOINED],
        stdin=reader,
        start_new_session=True,  # a Ctrl-C is not for it
    )
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)


def _leave() -> None:
    """At the end of a process that failed by itself: the others wait for it, it not for them."""
    if _group is not None and _group.broken:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


_WHOLE = {"coordinator_address", "num_processes", "process_id"}


def given(settings: DistributedConfig, env: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be told; None where this process is alone.

    What the settings leave open, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID may
    say, then what of the launcher jax doesn't read, and else jax finds it out. Raises `ConfigError`
    for several processes without an address, and for a number that none of them has.
    """
    address, count, index = settings.coordinator, settings.processes, settings.process
    if settings.detect:
        address = address or env.get("JAX_COORDINATOR_ADDRESS") or None
        count = _number(env, "JAX_NUM_PROCESSES") if count is None else count
        index = _number(env, "JAX_PROCESS_ID") if index is None else index
    require(count is None or count > 0, "distributed.processes", count, "must be positive")
    require(
        index is None or index < (count or index + 1),
        "distributed.process",
        index,
        f"must lie in [0, {count}), the number of processes",
    )
    if address is None and not (settings.detect and _launched(env)):
        require(
            (count or 1) == 1 and not index,
            "distributed.coordinator",
            address,
            f"process {index} of {count} has to know where the first one is: set HOST:PORT",
        )
        return None
    found = {"coordinator_address": address, "num_processes": count, "process_id": index}
    found = {name: value for name, value in found.items() if value is not None}
    if not settings.detect:
        return found | {"cluster_detection_method": "deactivate"}
    by_mpi = _by_open_mpi(env, address)
    found = _by_index(env, address) | by_mpi | found
    in_pod = "KUBERNETES_SERVICE_HOST" in env  # where jax asks a server that it may not reach
    if (by_mpi or in_pod) and found.keys() >= _WHOLE:
        found["cluster_detection_method"] = "deactivate"
    return found


def _by_open_mpi(env: Mapping[str, str], address: str | None) -> dict[str, Any]:
    """What Open MPI tells each process since its version 5, where jax finds nothing by itself.

    It tells all but where the first one is (its documentation, "Environment variables set for MPI
    applications"), which on one machine is no question. Of several processes on a machine each
    takes the GPU of its number, as jax has it with version 4.
    """
    count = _number(env, "OMPI_COMM_WORLD_SIZE") or 1
    if count == 1 or "OMPI_MCA_orte_hnp_uri" in env:
        return {}
    here = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1
    require(
        address is not None or here == count,
        "distributed.coordinator",
        address,
        "Open MPI 5 doesn't say where its first process is: set it to that machine's HOST:PORT",
    )
    port = 61440 + zlib.crc32(env.get("PMIX_NAMESPACE", "").encode()) % 4096
    found = {
        "coordinator_address": f"127.0.0.1:{port}",
        "num_processes": count,
        "process_id": _number(env, "OMPI_COMM_WORLD_RANK"),
    }
    if here > 1 and "JAX_LOCAL_DEVICE_IDS" not in env:
        found["local_device_ids"] = _number(env, "OMPI_COMM_WORLD_LOCAL_RANK")
    return {name: value for name, value in found.items() if value is not None}


def _by_index(env: Mapping[str, str], address: str | None) -> dict[str, Any]:
    """Which process of an indexed job of Kubernetes this is, where the address is known."""
    index = None if address is None else _number(env, "JOB_COMPLETION_INDEX")
    return {} if index is None else {"process_id": index}


def _launched(env: Mapping[str, str]) -> bool:
    """Whether a launcher that jax knows has started several processes, and this is one of them."""
    slurm = "SLURM_STEP_NODELIST" in env and (_number(env, "SLURM_NTASKS") or 1) > 1
    mpi = (_number(env, "OMPI_COMM_WORLD_SIZE") or 1) > 1
    indexed = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    kubernetes = indexed and importlib.util.find_spec("kubernetes") is not None
    return slurm or mpi or kubernetes


def _number(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name)
    if value is None:
        return None
    require(value.isdecimal(), name, value, "must be a number")
    return int(value)
