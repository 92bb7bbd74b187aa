"""What generate and chat share of what is typed: how to draw, and the input."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pujax.config.commands import one_source
from pujax.errors import ConfigError, require
from pujax.records import check_temperature, check_top_p


@dataclass(frozen=True)
class Answering:
    """Whom `generate` and `chat` ask, and how answers are drawn.

    Attributes:
        run: a run's directory, or a folder of runs: its newest finished one; or
        model: a hub id, a Hugging Face directory, a GGUF file, package://NAME/FILE.
        system: the system message, or @FILE; null is the one that the run was trained with, or else
            the chat template's own.
        soft_prompt: a file of `pujax adapt`: answer as the one likes it whose preferences it has.
        max_tokens: the longest answer, in tokens.
        temperature: of sampling; 0 takes the likeliest token each time.
        top_k: sample from the k likeliest tokens; 0 is from all.
        top_p: sample from the likeliest tokens that make up this share; 1 is all.
        seed: of sampling.
    """

    run: str | None = None
    model: str | None = None
    system: str | None = None
    soft_prompt: str | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        one_source(self.run, self.model)
        require(
            self.soft_prompt is None or not self.soft_prompt.startswith("["),
            "soft_prompt",
            self.soft_prompt,
            "one alone leads here: give one file, as in soft_prompt=ann.safetensors",
        )
        require(self.max_tokens > 0, "max_tokens", self.max_tokens, "must be positive")
        check_temperature("temperature", self.temperature, greedy=True)
        require(self.top_k >= 0, "top_k", self.top_k, "must be 0 (off) or positive")
        check_top_p("top_p", self.top_p)
        require(0 <= self.seed < 2**32, "seed", self.seed, "must lie in [0, 2^32)")

    def drawing(self, number: int) -> dict[str, Any]:
        """How answer or batch `number` is drawn: keywords of `answer` and `answer_aloud`."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed + number,
        }


def lines() -> Iterator[str]:
    """The lines of standard input. Raises `ConfigError` naming one that is not UTF-8."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"standard input, line {number}: not UTF-8 ({error.reason} at byte "
                f"{error.start + 1}): convert it first, as with `iconv -f latin1 -t utf-8`"
            ) from error
        yield text.rstrip("\r\n")
