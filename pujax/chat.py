"""`pujax chat`: a conversation with a run's model, or any other, as it writes."""

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pujax.config.commands import command
from pujax.config.typed import Answering, lines
from pujax.errors import PujaxError
from pujax.files.locate import soft_prompt_file
from pujax.inference.finished import source_of
from pujax.run.compilation import compile_once

if TYPE_CHECKING:
    from pujax.inference.generator import Generator

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C ends an answer"


@dataclass(frozen=True)
class ChatConfig(Answering):
    """Everything `python -m pujax.chat` is told; what to answer comes from standard input.

    Attributes:
        max_tokens: the longest answer, in tokens: more than `generate`'s, since Ctrl-C ends it.
    """

    max_tokens: int = 512


def run(settings: ChatConfig) -> None:
    """Answer each line of standard input, with those before it in view, until it ends."""
    source, of_run = source_of(settings.run, settings.model)
    if settings.soft_prompt is not None:
        soft_prompt_file(settings.soft_prompt)
    system = of_run if settings.system is None else settings.system
    compile_once()
    from pujax.inference.generator import Generator  # jax with it: --help does not need that

    typed = sys.stdin.isatty()
    generator = Generator.load(source, settings.soft_prompt)
    if typed:
        print(f"{source}: {HELP}", file=sys.stderr)
    converse(generator, _typed() if typed else lines(), settings, system, forgiving=typed)


def converse(
    generator: "Generator",
    said: Iterable[str],
    settings: ChatConfig,
    system: str | None,
    *,
    forgiving: bool = False,
) -> None:
    """Answer each line of `said` on standard output, with what was said before it in view.

    Raises what answering raises, unless it is `forgiving`: then a line that can't be answered is
    forgotten, and the reason told.
    """
    from pujax.inference.streaming import answer_aloud

    start = [] if system is None else [{"role": "system", "content": system}]
    turns = list(start)
    for number, line in enumerate(said):
        if line == "/quit":
            return
        if line == "/reset":
            turns = list(start)
        if line == "/reset" or not line.strip():
            continue
        pieces: list[str] = []

        def show(piece: str, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            print(piece, end="", flush=True)

        ending = ""
        try:
            reply = answer_aloud(
                generator,
                [*turns, {"role": "user", "content": line}],
                show,
                **settings.drawing(number),
            )
            if not reply.finished:
                ending = f"[cut at max_tokens={settings.max_tokens}]"
        except KeyboardInterrupt:
            ending = "[stopped]"
        except PujaxError as error:
            if not forgiving:
                raise
            print(f"{error}, or /reset", file=sys.stderr)
            continue
        print(flush=True)
        if ending:
            print(ending, file=sys.stderr)
        answer = {"role": "assistant", "content": "".join(pieces)}
        turns += [{"role": "user", "content": line}, answer]


def _typed() -> Iterator[str]:
    """What a person types, a line at a time, until Ctrl-D."""
    with suppress(ImportError):
        importlib.import_module("readline")  # arrow keys, and lines typed before
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print(f"\n{HELP}", file=sys.stderr)
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            print(f"not UTF-8 ({error.reason})", file=sys.stderr)


main = command("chat", ChatConfig, run, folder="tools")

if __name__ == "__main__":
    main()
