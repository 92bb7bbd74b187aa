"""`pujax generate`: answers from a run, a Hugging Face directory or a GGUF file."""

import sys
from dataclasses import dataclass
from itertools import chain, islice

from pujax.config.commands import command
from pujax.config.typed import Answering, lines
from pujax.errors import ConfigError, require
from pujax.files.locate import soft_prompt_file
from pujax.inference.finished import source_of
from pujax.run.compilation import compile_once
from pujax.text import blank

BATCH = 8  # prompts of standard input that are answered at once


@dataclass(frozen=True)
class GenerateConfig(Answering):
    """Everything `python -m pujax.generate` is told.

    Attributes:
        prompt: what to answer, or @FILE, a file that holds it (@@ begins a text with @); null
            answers standard input, a prompt a line.
    """

    prompt: str | None = None


def run(settings: GenerateConfig) -> None:
    """Print an answer to `prompt`, or one to each line of standard input, in their order."""
    source, of_run = source_of(settings.run, settings.model)
    if settings.soft_prompt is not None:
        soft_prompt_file(settings.soft_prompt)
    system = of_run if settings.system is None else settings.system
    if (prompt := settings.prompt) is not None:
        require(not blank(prompt), "prompt", prompt[:9], "is empty: write what to answer")
        prompts, size = iter([prompt]), 1
    else:
        # Who types waits for the answer; a file is answered by the batch.
        prompts, size = lines(), 1 if sys.stdin.isatty() else BATCH
    first = list(islice(prompts, size))
    if not first:
        raise ConfigError("standard input is empty: set prompt=TEXT, or give one prompt a line")
    compile_once()
    # jax comes with it, and what is refused does not need that.
    from pujax.inference.generator import Generator

    generator = Generator.load(source, settings.soft_prompt)
    batches = chain([first], iter(lambda: list(islice(prompts, size)), []))
    turns = [] if system is None else [{"role": "system", "content": system}]
    for number, batch in enumerate(batches):
        full = batch + batch[:1] * (size - len(batch))  # batches of one size compile once
        replies = generator.answer(
            [[*turns, {"role": "user", "content": prompt}] for prompt in full],
            **settings.drawing(number),
        )
        for reply in replies[: len(batch)]:
            print(reply.text, flush=True)
            if not reply.finished:
                print(f"[cut at max_tokens={settings.max_tokens}]", file=sys.stderr)


main = command("generate", GenerateConfig, run, folder="tools")

if __name__ == "__main__":
    main()
