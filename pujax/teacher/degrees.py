"""Answers of known preference degree: an answer with more and more of its key words removed.

Of SPO (arXiv 2409.17791) second-hand: key content is removed from an answer in graded amounts,
which gives answers whose degree is known without a judge; there by RAKE. Ours: by whole words, the
same share of them more at each degree, the most telling ones first, as YAKE ranks them.
"""

import importlib
import re
from collections.abc import Callable, Sequence

from pujax.errors import ConfigError

KeyWords = Callable[[str], Sequence[str]]
"""A text to its key words, the most telling one first."""


def graded(text: str, degrees: int, key_words: KeyWords) -> list[tuple[str, float]]:
    """The text, and what is left of it at each degree, with the share of key words that it keeps.

    At degree m of `degrees` the first m / degrees of its key words are gone, to a whole word. A
    degree that leaves what another has left, or nothing, is left out: a text without key words is
    alone.
    """
    words = list(dict.fromkeys(word.casefold() for word in key_words(text)))
    made = {text: 1.0}
    for m in range(1, degrees + 1):
        gone = round(len(words) * m / degrees)
        left = without(text, words[:gone])
        if left:
            made.setdefault(left, 1 - gone / max(1, len(words)))
    return list(made.items())


def without(text: str, words: Sequence[str]) -> str:
    """The text without those words, in whatever case, and without the gaps that they leave."""
    if not words:
        return text
    any_of = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    left = re.sub(rf"(?<!\w)(?:{any_of})(?!\w)", "", text, flags=re.IGNORECASE)
    left = re.sub(r"[^\S\n]+(?=[\s.,;:!?)\]]|$)", "", left)
    return left.strip()


def yake_words() -> KeyWords:
    """Single English words by YAKE (Campos et al., 2020): statistics of the one text, no model.

    Raises `ConfigError` where it isn't installed.
    """
    try:
        yake = importlib.import_module("yake")
    except ImportError as error:
        raise ConfigError(
            f"data.degrees: the key words of an answer are found by yake, and it can't be "
            f"imported ({error}): pip install 'pujax[spo]'"
        ) from error
    extractor = yake.KeywordExtractor(lan="en", n=1, top=1000)

    def found(text: str) -> list[str]:
        ranked = sorted(extractor.extract_keywords(text), key=lambda each: (each[1], each[0]))
        return [word for word, _ in ranked]

    return found
