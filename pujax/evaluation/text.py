"""Texts compared in any script: their words, and whether an answer is or stands in a response."""

import unicodedata
from bisect import bisect_right
from functools import lru_cache
from typing import Any

from pujax.records import Prompt

CASED = ("copy", "format")  # kinds of prompts where upper and lower case is part of the answer

PUNCTUATION = frozenset(".,;:!?。，；：！？")

QUOTES = frozenset("\"'`*\u2018\u2019\u201c\u201d")

# Scripts written without spaces between words, as ranges of code points: Thai and Lao, Myanmar,
# Khmer, kana and Bopomofo, Han with its extensions, halfwidth kana.
UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3005, 0x3007),
    (0x3031, 0x3035),
    (0x3040, 0x312F),
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x1AFF0, 0x1B16F),
    (0x20000, 0x3FFFF),
)

_STARTS = [first for first, _ in UNSPACED]


def words(text: str) -> list[str]:
    """The text's words in lower case: runs of letters, digits and the marks on them.

    Of a script that puts no spaces between words each letter, with its marks, is a word. In ASCII
    these are the words of `rouge_score`'s own tokenizer, which knows no others.
    """
    found: list[str] = []
    inside = False  # whether the last letter was of a word that the next one may go on with
    after = False  # whether it was a letter at all, which a mark can stand on
    for letter in unicodedata.normalize("NFKC", text).lower():
        if unicodedata.category(letter) == "Cf":
            continue  # joiners and direction marks, which nobody sees
        if _is_mark(letter):
            if after:
                found[-1] += letter
            continue
        after = letter.isalnum()
        alone = _is_unspaced(letter)
        if after and inside and not alone:
            found[-1] += letter
        elif after:
            found.append(letter)
        inside = after and not alone
    return found


def rouge_l(anchor: str, response: str) -> float:
    """ROUGE-L F1 (Lin, 2004) over `words`; 1 for equal texts, be they of marks alone."""
    if anchor == response and anchor.strip():
        return 1.0
    return _rouge().score(anchor, response)["rougeL"].fmeasure


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # takes a second: only who evaluates pays

    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """`words`, in the shape that RougeScorer asks for."""

    tokenize = staticmethod(words)


def exact(prompt: Prompt, response: str) -> bool:
    """Whether the response is the true answer and nothing else.

    Space, quotes, backticks and asterisks around it and a full stop or the like after it don't
    count, unless the answer itself has them; nor does case, unless the prompt's kind is in CASED.
    """
    assert prompt.answer is not None
    return _peels_to(_cased(prompt, prompt.answer.strip()), _cased(prompt, response))


def contains(prompt: Prompt, response: str) -> bool:
    """Whether the true answer stands in the response as a whole word, phrase or number.

    Where a script puts no spaces between words, anywhere between its letters will do. A response
    that lists several answers passes as well: read it beside `exact` and the length. A blank answer
    stands nowhere.
    """
    assert prompt.answer is not None
    answer, response = _cased(prompt, prompt.answer.strip()), _cased(prompt, response)
    at = response.find(answer) if answer else -1
    while at >= 0:
        end = at + len(answer)  # two letters on each side tell, however long the response is
        if _stands_alone(answer, response[max(0, at - 2) : at], response[end : end + 2]):
            return True
        at = response.find(answer, at + 1)
    return False


def _stands_alone(answer: str, before: str, after: str) -> bool:
    """Whether neither a word nor a number goes on from the answer into the text around it."""
    if before and _joined(before[-1], answer[0]):
        return False
    if len(before) > 1 and before[-1] in ".," and before[-2].isdecimal():
        return False
    if before.endswith("-") and answer[0].isdigit():
        return False
    if after and (_is_mark(after[0]) or _joined(answer[-1], after[0], outer=1)):
        return False
    return not (len(after) > 1 and after[0] in ".," and after[1].isdecimal())


def _joined(left: str, right: str, *, outer: int = 0) -> bool:
    """Whether the `outer` one of two letters is part of a word, and neither script is unspaced."""
    other = (left, right)[outer]
    in_word = other.isalnum() or other == "_" or _is_mark(other)
    return in_word and not (_is_unspaced(left) or _is_unspaced(right))


def _is_mark(letter: str) -> bool:
    return letter > "\u02ff" and unicodedata.category(letter)[0] == "M"


def _is_unspaced(letter: str) -> bool:
    at = bisect_right(_STARTS, ord(letter)) - 1
    return at >= 0 and ord(letter) <= UNSPACED[at][1]


def _cased(prompt: Prompt, text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    return text if prompt.kind in CASED else text.casefold()


def _peels_to(answer: str, text: str) -> bool:
    """Whether `text` is `answer` once some of the marks around or after it are off, one by one.

    By places, since answers of marks alone would be copied once a mark.
    """
    start, end = 0, len(text)
    while True:
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        if end - start <= len(answer):
            return text[start:end] == answer
        first, last = text[start], text[end - 1]
        if last in PUNCTUATION:
            end -= 1
        elif {first, last} & QUOTES:
            start, end = start + (first in QUOTES), end - (last in QUOTES)
        else:
            return False


def shown(prompt: Prompt) -> str:
    """The user's words; with several turns each under its role's name."""
    turns = [turn for turn in prompt.messages if turn["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
