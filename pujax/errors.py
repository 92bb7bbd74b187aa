"""The errors of every room, and the checks that raise them."""

import errno
import inspect
import os
import signal
import sys
import termios
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any


class PujaxError(Exception):
    """Something from outside is wrong; the message names it, its place and the remedy.

    It is one line, whatever it quotes: what can't be printed stands in it as an escape.
    """

    def __str__(self) -> str:
        """The message."""
        return "".join(
            one if one.isprintable() else one.encode("unicode_escape").decode()
            for one in super().__str__()
        )


class ConfigError(PujaxError, ValueError):
    """A setting is wrong; the message names its key, its value and the remedy."""


class InUse(ConfigError):
    """Another process does this run; the message says what to do."""


class WeightsError(ConfigError):
    """A model's files are wrong; the message names the file, the tensor or key, and the remedy."""


class ChatError(ConfigError):
    """A tokenizer, a template or a conversation is wrong; the message names the remedy."""


class DiskError(PujaxError, OSError):
    """A file or folder can't be written; the message names it, the reason and the remedy."""


class RecordError(PujaxError, ValueError):
    """A line of a run's own records can't be read; the message names file, line and remedy."""


class PromptError(PujaxError, ValueError):
    """A prompt can't be read; the message names where it stands and the remedy."""


class DataError(PujaxError, ValueError):
    """Prompts or anchors can't be used; the message names which and the remedy."""


class EvaluationError(PujaxError, ValueError):
    """What a run left behind can't be read or compared; the message names it and the remedy."""


class TeacherError(PujaxError, RuntimeError):
    """The teacher can't be used as it is set: asking again would not help."""


class Rejected(TeacherError):
    """The server refused this request; `certain` when it says that the prompt is why."""

    def __init__(self, said: str, *, certain: bool) -> None:
        super().__init__(said)
        self.certain = certain


class Unread(TeacherError):
    """A function of the user's own made no `Answer` of a reply, which may have been charged."""


class StoreError(PujaxError, RuntimeError):
    """The anchor store can't be read or written; the message names the file and the remedy."""


class CheckpointError(PujaxError, RuntimeError):
    """A checkpoint can't be saved or used; the message names it and the remedy."""


class ProcessError(PujaxError, RuntimeError):
    """Another process of the same run has ended; the message says what to do."""


class NonFiniteError(PujaxError, RuntimeError):
    """Losses or gradients stayed non-finite; the message says where the batches were saved."""


class DivergedError(PujaxError, RuntimeError):
    """A stage went astray; the message says since when, what was good last, and the remedy."""


class StopRequested(Exception):
    """Signal `number` asked to stop, and the state is saved; the message says where it stands."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def stops() -> list[signal.Signals]:
    """The signals that ask to stop: Ctrl-C, SIGTERM, and SIGHUP when a terminal is closed.

    Where SIGHUP is ignored, as under nohup, whoever started this wants it to go on.
    """
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hangs_up else [])]


def forget_closed_terminal() -> None:
    """Write from now on to nowhere what would go to a terminal that has been closed.

    For who hears SIGHUP and goes on for a while: each print there is an OSError.
    """
    for number in (0, 1, 2):
        try:
            termios.tcgetattr(number)
        except termios.error as error:
            if error.args[0] == errno.EIO:  # ENOTTY is a file or a pipe
                os.dup2(os.open(os.devnull, os.O_RDWR), number)


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise `ConfigError` naming `key` and `value` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}={value!r}: {remedy}")


def one_of(key: str, value: object, choices: Iterable[object]) -> None:
    """Raise `ConfigError` naming `key`, `value` and the choices unless `value` is one of them."""
    choices = tuple(choices)
    require(value in choices, key, value, f"choose {_listed(choices)}")


def _listed(choices: tuple[object, ...]) -> str:
    *most, last = map(str, choices)
    return f"{', '.join(most)} or {last}" if most else last


def name_of(function: Callable[..., Any]) -> str:
    """The module and name of a function, whatever of its settings is bound."""
    plain = inspect.unwrap(getattr(function, "func", function))
    return f"{plain.__module__}.{plain.__qualname__}"


def raised_in(function: Callable[..., Any], error: Exception) -> str:
    """What a function of the user's own raised, and in which line of whose file."""
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    at = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__")).partition(".")[0]
        if module not in PASSED_THROUGH and module not in sys.stdlib_module_names:
            at = f" ({Path(frame.f_code.co_filename).name}, line {line})"
    return f"{name_of(function)} raised {type(error).__name__}: {said[:300]}{at}"


def in_code(error: BaseException, *given: object) -> bool:
    """Whether what a function of the user's own raised can't lie in the values it was `given`.

    A name or a module that there is not; an attribute that a module or one of `given`, records and
    texts that are always of one type, has not. Others may lie in what was said.
    """
    if isinstance(error, AttributeError):
        known = error.obj is not None and any(error.obj is one for one in given)
        return known or isinstance(error.obj, ModuleType)
    return isinstance(error, NameError | ImportError) and not isinstance(error, UnboundLocalError)


PASSED_THROUGH = frozenset({"beartype", "jax", "jaxlib", "jaxtyping", "numpy", "pujax"})
"""Packages between a user's function and whoever calls it, whose lines tell him nothing."""
