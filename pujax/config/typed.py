"""What generate and chat share of what is typed: how to draw, a text or its file, the input."""

import sys
from collections.abc import Iterator

from pujax.errors import ConfigError, require
from pujax.files.locate import at_home


def check_drawing(
    *, max_tokens: int, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """Refuse what an answer can't be drawn by. Raises `ConfigError`."""
    require(max_tokens > 0, "max_tokens", max_tokens, "must be positive")
    finite = 0 <= temperature < float("inf")
    require(finite, "temperature", temperature, "0 is greedy, or positive and finite")
    require(top_k >= 0, "top_k", top_k, "must be 0 (off) or positive")
    require(0 < top_p <= 1, "top_p", top_p, "must lie in (0, 1]")
    require(0 <= seed < 2**32, "seed", seed, "must lie in [0, 2^32)")


def text_or_file(key: str, value: str | None) -> str | None:
    """A text, as it stands or from the file that `@FILE` names, without that one's last newline.

    Raises `ConfigError`.
    """
    if value is None or not value.startswith("@"):
        return value
    if value.startswith("@@"):
        return value[1:]
    file = at_home(value[1:])
    try:
        return file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"not UTF-8: {error}"
        raise ConfigError(
            f"{key}={value}: {reason}: name a file of text, or write @@ where a text begins with @"
        ) from error


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
