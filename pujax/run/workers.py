"""Calls of a Python function in processes of their own, each with a time limit.

No pool of `concurrent.futures` does this: it can't end a call, and when a worker dies it can't say
which call it died of. Here a worker has one call at a time and its own pipe. It is a fresh Python
that loads the function's module and what that imports, so no jax unless the function wants it. What
a function prints goes to standard error.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from pujax.errors import ConfigError, PujaxError, in_code
from pujax.records import LARGEST
from pujax.text import printable

STARTING = 120.0  # seconds that a worker may take to load the function's module

BOOT = (
    "import json, sys; descriptor, parent, sys.path = json.loads(sys.argv[1]); "
    "from pujax.run.workers import work; work(descriptor, parent)"
)


@dataclass(frozen=True)
class Outcome:
    """A call's number or, where `failure` says in a line why there is none, NaN.

    None is an answer too: the function has no number for what it was given. `ours` says that the
    failure lies in the function, or in the prompt's line, and not in the response.
    """

    value: float | None
    failure: str | None = None
    ours: bool = False


class PromptLine(dict[str, Any]):
    """A prompt's line as a reward gets it: a column that it lacks is a `NoColumn`."""

    def __missing__(self, column: str) -> Any:
        raise NoColumn(f"the prompt's line has no {column!r}, but {', '.join(map(str, self))}")


class NoColumn(KeyError):
    """A column that a prompt's line lacks."""

    def __str__(self) -> str:
        """The message: that of a `KeyError` stands in quotes."""
        return str(self.args[0])


FAILED = float("nan")


class Workers:
    """Up to `count` processes that call `function`; close it, or use it in a `with`.

    A call that takes more than `seconds` is ended, with all that it started. `batched` says that a
    call gets lists of arguments and returns a list of numbers. Raises `ConfigError` for a function
    that can't be sent to another process.
    """

    def __init__(
        self, function: Callable[..., Any], *, count: int, seconds: float, batched: bool = False
    ) -> None:
        try:
            self._function = pickle.dumps((function, batched))
        except Exception as error:
            raise ConfigError(
                f"scorer.score.function={function!r}: can't be sent to another process ({error}): "
                "write it at the top level of a module"
            ) from error
        self._count, self._seconds, self._batched = count, seconds, batched
        self._idle: list[_Worker] = []
        self._started: list[_Worker] = []
        self.cpu_s = 0.0

    def call(self, calls: Sequence[Mapping[str, Any]]) -> list[list[Outcome]]:
        """The outcomes of each set of keyword arguments, one outcome unless they are lists.

        `cpu_s` adds up the processor seconds of what came back. Raises `ConfigError` when the
        function's module can't be loaded, and for a `PujaxError` of the function itself, which
        tells of a wrong setting and not of a response.
        """
        made: dict[int, list[Outcome]] = {}
        todo, busy = deque(enumerate(calls)), dict[_Worker, tuple[int, float]]()
        self._ready(min(self._count, len(todo)))
        while todo or busy:
            while todo and len(busy) < self._count:
                self._ready(1)
                worker = self._idle.pop()
                try:
                    worker.connection.send_bytes(_packed(todo[0][1]))
                except OSError:  # it died while it had nothing to do
                    self._end(worker)
                    continue
                busy[worker] = todo.popleft()[0], time.monotonic() + self._seconds
            until = min(deadline for _, deadline in busy.values()) - time.monotonic()
            came = wait([worker.connection for worker in busy], max(until, 0.0))
            for worker, (index, deadline) in list(busy.items()):
                if worker.connection in came:
                    outcomes = self._received(worker)
                elif time.monotonic() >= deadline:
                    outcomes = f"took more than {self._seconds:g} s"
                else:
                    continue
                del busy[worker]
                if isinstance(outcomes, str):
                    self._end(worker)
                    outcomes = [Outcome(FAILED, outcomes)] * self._size(calls[index])
                else:
                    self._idle.append(worker)
                made[index] = outcomes
        return [made[index] for index in range(len(calls))]

    def close(self) -> None:
        """End every worker."""
        for worker in list(self._started):
            self._end(worker)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ready(self, count: int) -> None:
        """Have at least `count` workers that wait for a call."""
        fresh = [_Worker(self._function) for _ in range(count - len(self._idle))]
        self._started += fresh
        for worker in fresh:  # which load the module side by side
            problem = worker.problem()
            if problem is not None:
                self.close()
                raise ConfigError(f"scorer.score.function: can't be loaded: {problem}")
            self._idle.append(worker)

    def _received(self, worker: "_Worker") -> list[Outcome] | str:
        """The outcomes that a worker sent, or what it died of."""
        try:
            outcomes, cpu_s, setting = worker.connection.recv()
        except (EOFError, OSError):
            return worker.ended()
        if setting is not None:
            self.close()
            raise ConfigError(setting)
        self.cpu_s += cpu_s
        return [Outcome(*outcome) for outcome in outcomes]

    def _size(self, call: Mapping[str, Any]) -> int:
        return len(next(iter(call.values()))) if self._batched else 1

    def _end(self, worker: "_Worker") -> None:
        self._started.remove(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        worker.end()


def _packed(call: Mapping[str, Any]) -> bytes:
    try:
        return pickle.dumps(call)
    except Exception as error:
        raise ConfigError(
            f"scorer.score.function: a prompt's line can't be sent to another process ({error}): "
            "leave out the column that is no text or number"
        ) from error


class _Worker:
    """One process, and this side of its pipe."""

    def __init__(self, function: bytes) -> None:
        self.connection, other = Pipe()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", BOOT),
                json.dumps([other.fileno(), os.getpid(), [*map(str, sys.path)]]),
            ],
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,  # Ctrl-C is for the run, and what it starts ends with it
        )
        other.close()
        with suppress(OSError):  # `problem` tells
            self.connection.send_bytes(function)

    def problem(self) -> str | None:
        """Why it can't serve, once it knows; None when it can."""
        try:
            if not self.connection.poll(STARTING):
                return f"its module takes more than {STARTING:g} s"
            return self.connection.recv()
        except (EOFError, OSError):
            return self.ended()

    def ended(self) -> str:
        """How it ended, once its pipe is closed."""
        with suppress(subprocess.TimeoutExpired):  # it may have closed the pipe and gone on
            return f"its process ended with status {self.process.wait(5.0)}"
        return "its process closed the pipe to the run"

    def end(self) -> None:
        """Kill it with all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


# ---------------------------------------------------------------------- in the worker's own process


def work(descriptor: int, parent: int) -> None:
    """Load the function that comes first, then answer calls until the pipe is closed.

    Ends with the process `parent`, which may be gone already: so it is told, and not asked for.
    """
    connection = Connection(descriptor)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        function, batched = pickle.loads(connection.recv_bytes())
    except EOFError:
        return
    except BaseException as error:
        connection.send(_told(error))
        return
    connection.send(None)
    own = os.getpid()
    with suppress(EOFError, OSError):
        while True:
            found = answer(function, batched, connection.recv())
            if os.getpid() != own:  # what the function forked came back here: its parent answers
                os._exit(1)
            connection.send(found)


def answer(
    function: Callable[..., Any], batched: bool, call: Mapping[str, Any]
) -> tuple[list[tuple[Any, ...]], float, str | None]:
    """The outcomes of a call, its processor seconds, and the error of a wrong setting if it is one.

    >>> answer(lambda x: x / 2, False, {"x": 3})[0]
    [(1.5, None)]
    >>> answer(lambda x: [x[0], "2"], True, {"x": [1, 2]})[0]
    [(1.0, None), (nan, "returned '2', not a number")]
    """
    begun, count = time.process_time(), len(next(iter(call.values()))) if batched else 1

    def all_failed(why: str, *ours: bool) -> list[tuple[Any, ...]]:
        return [(FAILED, why, *ours)] * count

    setting, outcomes = None, list[tuple[Any, ...]]()
    try:
        value = function(**call)
        values = list(value) if batched else [value]
        outcomes += [_number(value) for value in values]
        if len(values) != count:
            outcomes = all_failed(f"returned {len(values)} numbers for {count} responses")
    except PujaxError as error:
        setting = str(error)
    except BaseException as error:  # SystemExit too: a function of the user's may raise anything
        given = call.values()
        if batched:
            given = [*given, *(one for column in given for one in column)]
        ours = isinstance(error, NoColumn) or in_code(error, *given)
        outcomes = all_failed(_told(error), ours)
    return outcomes, time.process_time() - begun, setting


def _number(value: Any) -> tuple[float | None, str | None]:
    """A value as a number, or why it is none; whatever has a float of its own is one."""
    if value is None:
        return None, None
    if not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return FAILED, f"returned {value!r:.60}, not a number"
    number = float(value)
    if number - number != 0:  # infinite, or not a number
        return FAILED, f"returned {number}"
    if abs(number) > LARGEST:
        return FAILED, f"returned {number:g}, more than {LARGEST:g}: scale it down"
    return number, None


def _told(error: BaseException) -> str:
    try:
        said = str(error).strip() or "no message"
    except Exception:  # its own __str__ failed
        said = "no message"
    return f"{type(error).__name__}: {printable(said.splitlines()[0], 200)}"


def _end_with(parent: int) -> None:
    """End this process and what it started when its parent is gone, killed before it could."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)
