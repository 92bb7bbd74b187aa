"""`pujax chat`: a conversation with a run's model, or any other, as it writes."""

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pujax.config.commands import command, one_source
from pujax.config.streams import escape
from pujax.config.typed import check_drawing, lines, text_or_file
from pujax.errors import PujaxError
from pujax.inference.finished import source_of
from pujax.run.compilation import compile_once

if TYPE_CHECKING:
    from pujax.inference.generator import Generator

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C ends an answer"


@dataclass(frozen=True)
class ChatConfig:
    """Everything `python -m pujax.chat` is told; what to answer comes from standard input.

    Attributes:
        run: a run's directory, or a folder of runs: its newest finished one; or
        model: a hub id, a Hugging Face directory, a GGUF file, package://NAME/FILE.
        system: the system message, or @FILE; null is the one that the run was trained with, or else
            the chat template's own.
        max_tokens: the longest answer, in tokens.
        temperature: of sampling; 0 takes the likeliest token each time.
        top_k: sample from the k likeliest tokens; 0 is from all.
        top_p: sample from the likeliest tokens that make up this share; 1 is all.
        seed: of sampling.
    """

    run: str | None = None
    model: str | None = None
    system: str | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        one_source(self.run, self.model)
        check_drawing(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
        )


def run(settings: ChatConfig) -> None:
    """Answer each line of standard input, with those before it in view, until it ends."""
    escape()
    source, system = source_of(settings.run, settings.model)
    compile_once()
    from pujax.inference.generator import Generator  # jax with it: --help does not need that

    given = text_or_file("system", settings.system)
    system = system if given is None else given
    typed = sys.stdin.isatty()
    generator = Generator.load(source)
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
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                seed=settings.seed + number,
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
