"""What every command is: settings composed and checked, one function called, errors in one line."""

import argparse
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from shlex import join
from typing import Any, TypeVar

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from pujax import __version__
from pujax.config.compose import conf_dir, from_hydra, offered, register, taken, wary
from pujax.config.endings import ending, of_hydra
from pujax.config.help import help_of
from pujax.config.overrides import in_hydra_words, with_files_read, with_paths_home
from pujax.config.streams import escape, hold
from pujax.config.sweeps import (
    beside_others,
    comparing,
    hold_begun,
    hold_failures,
    note_begun,
    note_failure,
    overrides_apart,
    sweep_folder,
    sweeping,
    title,
)
from pujax.errors import ConfigError, StopRequested, require, stops
from pujax.text import hide, mask, secrets_in

T = TypeVar("T")

# Hydra's options that have a value as their next word.
VALUED = frozenset(
    {
        "--cfg",
        "-c",
        "--package",
        "-p",
        "--config-path",
        "-cp",
        "--config-name",
        "-cn",
        "--config-dir",
        "-cd",
        "--experimental-rerun",
    }
)

SHOWING = frozenset({"--cfg", "-c", "--info", "-i"})
"""Hydra's options with which it prints settings and does nothing."""


class _Ended(BaseException):
    """What a command raised, carried past Hydra, which would print all that it was given."""


def command(
    name: str,
    schema: type[T],
    act: Callable[[T], int | None],
    *,
    folder: str = "",
    shared: Sequence[str] = (),
) -> Callable[[], None]:
    """The `main` of `pujax NAME`: compose conf/[FOLDER/]NAME.yaml, check it, and `act` on it.

    A command of a FOLDER has the groups in that, and the `shared` ones of conf/ itself.

    The exit status is what `act` returns (0 for None), 2 for an unknown option, 128 + the signal's
    number after `StopRequested`, and 1 with one line on standard error for a `PujaxError`, an
    OSError, and settings that don't compose. Anything else is a fault of ours and keeps its
    traceback; so does all under HYDRA_FULL_ERROR=1.

    In a sweep (`-m`) a job that fails says why, the others are done all the same, and the status is
    1. A wish to stop ends the sweep, or the one job where a launcher gave it a process of its own.
    """
    register(f"{name}_schema", schema)

    def main() -> None:
        hold(f"pujax.{name}")
        escape()
        try:
            os.getcwd()
        except FileNotFoundError:
            sys.exit(f"pujax.{name}: the working directory is gone: cd to one that is there")
        _exit_on_signals()
        taken.clear()  # what another command in this process took
        if "--version" in sys.argv[1:]:
            print(f"pujax {__version__}")
            return
        # An experiment is no group of the defaults list, so Hydra wants a plus before it.
        typed = [re.sub(r"^(?=experiment=)", "+", given) for given in sys.argv[1:]]
        options, typed = _in_order(name, typed)
        whole = os.environ.get("HYDRA_FULL_ERROR") == "1"
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and what is said is said here
        overrides: list[str] = []
        argv = [sys.argv[0]]

        def job(composed: DictConfig) -> None:
            """What went wrong in a job of a sweep is told here, whichever process this may be."""
            sys.argv = argv  # a launcher's process has words of its own
            note_begun()
            try:
                with_files_read(composed, typed)
                with_paths_home(composed)
                status = act(from_hydra(schema, composed))
            except SystemExit as error:
                if isinstance(error.__context__, BrokenPipeError):  # rich's, which says nothing
                    raise _Ended from error.__context__
                raise
            except Exception as error:
                stop = isinstance(error, StopRequested) and not beside_others()
                if whole or stop or not sweeping():
                    raise _Ended from error
                _, line = ending(error, typed, schema)
                if line is None:
                    traceback.print_exception(error)
                    line = "ended by a fault of pujax"
            else:
                if not status:
                    return
                if not sweeping():
                    sys.exit(status)
                line = f"ended with status {status}"
            called, line = title(swept()), _sayable(line, argv)
            if not line.startswith(f"{called}: "):  # the setting that is wrong has said it
                line = f"{called}: {line}"
            print(f"pujax.{name}: {line}", file=sys.stderr, flush=True)
            note_failure(called)

        job.__module__ = f"pujax.{name}"  # Hydra names the application after it
        try:
            where = Path(conf_dir(), folder)
            groups = groups_of(name, where)
            if any(given.lstrip("+~").startswith("hydra.mode") for given in typed):
                raise ConfigError("hydra.mode: add -m for a sweep, and leave it out for one run")
            if name != "train" and any(given.startswith("+experiment=") for given in typed):
                raise ConfigError("experiment: train alone takes one: name what it sets by itself")
            sweep = not {"-m", "--multirun"}.isdisjoint(options)
            overrides = in_hydra_words(typed, schema, groups, sweep=sweep)
            beside = sweep_folder(typed) if sweep else nullcontext()
            with offered(shared), wary(), beside as aside:
                if options and set(options) <= {"--help", "-h"}:
                    purpose = _purpose(act)
                    told = help_of(name, where, schema, groups, overrides, purpose=purpose)
                    print(_sayable(told, [*typed, *overrides]))
                    return
                put_aside = [f"hydra.sweep.dir='{aside}'", "hydra.sweep.subdir=."] if aside else []
                sys.argv = argv = [*argv, *options, *overrides, *put_aside]
                main = hydra.main(config_path=str(where), config_name=name, version_base="1.3")(job)
                if not SHOWING.isdisjoint(options):
                    with redirect_stdout(StringIO()) as shown:
                        main()
                    print(_sayable(shown.getvalue(), [*typed, *overrides]), end="")
                    return
                main()
                if aside:
                    hold_begun(aside, typed)
                    if table := comparing(aside):
                        print(f"{table}  compares the runs that are done", flush=True)
                    hold_failures(aside)
        except (KeyboardInterrupt, Exception, _Ended) as error:
            cause = error.__cause__ if isinstance(error, _Ended) else error
            assert cause is not None
            if isinstance(error, RecursionError):  # of composing: an action's comes as _Ended
                cause = ConfigError("a setting is nested too deep: take some of its brackets out")
            status, line = ending(cause, typed, schema)
            if line is None and cause is error:
                line = of_hydra(error, [*typed, *overrides])
            if whole or line is None:
                raise cause from cause.__cause__
            print(f"pujax.{name}: {_sayable(line, [*typed, *overrides])}", file=sys.stderr)
            sys.exit(status)
        finally:
            if not whole:
                del os.environ["HYDRA_FULL_ERROR"]

    return main


def _purpose(act: Callable[..., Any]) -> str:
    """What the docstring of a command's module says that it is for."""
    first, _, _ = (sys.modules[act.__module__].__doc__ or "").partition("\n")
    return first.partition("`: ")[2] or first


def _exit_on_signals() -> None:
    """What asks to stop becomes a SystemExit, so that what is temporary is removed on the way."""
    by_default = [n for n in stops() if signal.getsignal(n) is signal.SIG_DFL]
    if not by_default:
        return
    for one in by_default:
        signal.signal(one, lambda number, _: sys.exit(128 + number))
    shown = sys.unraisablehook

    def swallowed(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, SystemExit):
            shown(unraisable)
            return
        # It came in a callback or a __del__, as imports have many, where Python drops what is
        # raised: once more in a moment.
        status = unraisable.exc_value.code
        signal.signal(signal.SIGALRM, lambda *_: sys.exit(status))
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    sys.unraisablehook = swallowed


def swept() -> dict[str, str]:
    """What sets this job of a sweep apart, by key, without secrets; nothing outside of a sweep."""
    return {key: secrets_hidden(value, sys.argv[1:]) for key, value in overrides_apart().items()}


def _in_order(name: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options with their values, and the overrides: Hydra's parser takes no other order.

    Raises SystemExit with status 2 and one line for an option that it does not know.
    """
    parser = get_args_parser()
    parser.exit_on_error, parser.allow_abbrev = False, False  # --experiment is none of Hydra's
    options, overrides, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        options.append(word)
        if word in ("--info", "-i"):  # without a word of its own it would take an override
            options.append(rest.pop(0) if rest and re.fullmatch(r"[a-z-]+", rest[0]) else "all")
        elif rest and word in VALUED:
            options.append(rest.pop(0))
    try:
        known, unknown = parser.parse_known_args(options)
        if known.experimental_rerun is not None:  # it reads a pickle, which runs what it names
            unknown = ["--experimental-rerun"]
        does = {"--run": known.run, "--multirun": known.multirun, "--cfg": known.cfg}
        does = [option for option, on in (does | {"--info": known.info}).items() if on]
    except argparse.ArgumentError as error:
        unknown, said = [], str(error)
    else:
        said = f"no option {' '.join(unknown)}" if unknown else ""
        key, sign, value = unknown[0].lstrip("-").partition("=") if unknown else ("", "", "")
        if unknown and unknown[0].startswith("--") and not key.startswith("experimental"):
            value = value if sign else next(iter(overrides), "VALUE")
            said += f": a setting is written {key.replace('-', '_')}={value}"
        if len(does) > 1:
            said = said or f"{' and '.join(does)}: one at a time"
    if said:
        print(
            f"pujax.{name}: {secrets_hidden(said, words)}: --hydra-help tells of all",
            file=sys.stderr,
        )
        sys.exit(2)
    return options, overrides


def groups_of(name: str, conf: Path) -> list[str]:
    """The groups that a command takes: those of its defaults list, and train's experiments."""
    defaults = yaml.safe_load((conf / f"{name}.yaml").read_text(encoding="utf-8"))["defaults"]
    keys = [key for entry in defaults if isinstance(entry, dict) for key in entry]
    keys = [key for key in keys if not key.startswith("override ")]
    return [*keys, "experiment"] if name == "train" else keys


def in_new_words(name: str) -> None:
    """Refuse `pujax NAME DIRECTORY --model PATH`, the form of old, with the command that does it.

    Raises SystemExit.
    """
    words, rest = [], iter(sys.argv[1:])
    for word in rest:
        if word in ("--model", "--name"):
            words.append(f"{word[2:]}={next(rest, '...')}")
        elif word in VALUED:
            words += [word, *([following] if (following := next(rest, "")) else [])]
        elif "=" in word or word.startswith(("-", "~")):
            words.append(word)
        else:
            words.append(f"run={word}")
    if words != sys.argv[1:]:
        told = join(secrets_hidden(word, sys.argv[1:]) for word in words)
        sys.exit(f"pujax.{name}: write it as: python -m pujax.{name} {told}")


def one_source(run: str | None, model: str | None) -> None:
    """Refuse both a run and a model, and neither. Raises `ConfigError`."""
    if (run is None) == (model is None):
        found = f"both run={run!r} and model={model!r} are set"
        if run is None:
            found = "neither run nor model is set"
        raise ConfigError(f"{found}: set either run=DIRECTORY or model=PATH")
    key, value = ("model", model) if run is None else ("run", run)
    require(str(value).strip() != "", key, value, "name a directory")


def listed(key: str, value: Any) -> list[str]:
    """A setting that is a text or a list of texts, as a list. Raises `ConfigError`."""
    values = [] if value is None else list(value) if isinstance(value, list) else [value]
    whole = all(isinstance(each, str) and each for each in values)
    require(whole, key, value, f"write {key}=A for one, {key}=[A,B] for several")
    return values


def secrets_hidden(text: str, overrides: Iterable[str]) -> str:
    """`text` with three stars for what is secret of `overrides` and of the environment."""
    before = ""
    for given in overrides:
        key, sign, value = given.lstrip("+~-").partition("=")
        # Who writes `api_key VALUE` has written no override, and a secret all the same.
        for secret in secrets_in(key, value) if sign else secrets_in(before, given):
            text = hide(text, secret)
        before = "" if sign else key
    return mask(text)


def _sayable(text: str, overrides: Iterable[str]) -> str:
    """The same, without what settings took of the environment, a file's as well as these."""
    whole = [*filter(None, map(str.strip, taken.values()))]
    for secret in [*whole, *(part for value in whole for part in _parts(value))]:
        in_yaml = yaml.safe_dump(secret, allow_unicode=True, width=sys.maxsize)
        text = hide(hide(text, secret), in_yaml.removesuffix("...\n").strip("'\"\n"))
    return secrets_hidden(text, overrides)


def _parts(value: str) -> Iterator[str]:
    """The words of a list or mapping that `${oc.decode:...}` makes of a variable's value.

    Of those as short as a number or a switch any could be another word of the text.
    """
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        return
    if not isinstance(read, list | dict):
        return
    left: list[Any] = [read]
    seen: set[int] = set()  # an alias of YAML's stands for one more often than once
    while left:
        one = left.pop()
        if isinstance(one, list | dict):
            inner = one.values() if isinstance(one, dict) else one
            left += inner if id(one) not in seen else ()
            seen.add(id(one))
        elif len(str(one)) >= 8:
            yield str(one)
