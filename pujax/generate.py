"""`pujax generate`: answers from a run, a Hugging Face directory or a GGUF file."""

import sys
from dataclasses import dataclass
from itertools import chain, islice

from pujax.config.commands import command, one_source
from pujax.config.streams import escape
from pujax.config.typed import check_drawing, lines, text_or_file
from pujax.errors import ConfigError
from pujax.inference.finished import source_of
from pujax.run.compilation import compile_once

BATCH = 8  # prompts of standard input that are answered at once


@dataclass(frozen=True)
class GenerateConfig:
    """Everything `python -m pujax.generate` is told.

    Attributes:
        run: a run's directory, or a folder of runs: its newest finished one; or
        model: a hub id, a Hugging Face directory, a GGUF file, package://NAME/FILE.
        prompt: what to answer, or @FILE, a file that holds it (@@ begins a text with @); null
            answers standard input, a prompt a line.
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
    prompt: str | None = None
    system: str | None = None
    max_tokens: int = 128
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


def run(settings: GenerateConfig) -> None:
    """Print an answer to `prompt`, or one to each line of standard input, in their order."""
    escape()
    source, of_run = source_of(settings.run, settings.model)
    system = text_or_file("system", settings.system)
    prompt = text_or_file("prompt", settings.prompt)
    system = of_run if system is None else system
    compile_once()
    # jax comes with it, and what is refused does not need that.
    from pujax.inference.generator import Generator

    if prompt is not None:
        prompts, size = iter([prompt]), 1
    else:
        # Who types waits for the answer; a file is answered by the batch.
        prompts, size = lines(), 1 if sys.stdin.isatty() else BATCH
    first = list(islice(prompts, size))
    if not first:
        raise ConfigError("standard input is empty: set prompt=TEXT, or give one prompt a line")
    generator = Generator.load(source)
    batches = chain([first], iter(lambda: list(islice(prompts, size)), []))
    turns = [] if system is None else [{"role": "system", "content": system}]
    for number, batch in enumerate(batches):
        full = batch + batch[:1] * (size - len(batch))  # batches of one size compile once
        replies = generator.answer(
            [[*turns, {"role": "user", "content": prompt}] for prompt in full],
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed + number,
        )
        for reply in replies[: len(batch)]:
            print(reply.text, flush=True)
            if not reply.finished:
                print(f"[cut at max_tokens={settings.max_tokens}]", file=sys.stderr)


main = command("generate", GenerateConfig, run, folder="tools")

if __name__ == "__main__":
    main()
