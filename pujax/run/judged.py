"""What can be said of a teacher's answers before anything is learnt from them. No jax, no numpy."""

from collections import Counter
from collections.abc import Sequence

from pujax.evaluation import text
from pujax.records import Example, Prompt
from pujax.run.gate import near_duplicates, refuses
from pujax.text import printable

ALIKE = 0.8
"""The share of word triples from which answers are told as near copies."""


def judged(pairs: Sequence[tuple[Prompt, str]]) -> dict[str, str]:
    """Of prompts with their answers: how many are right, refused, copies, and the most frequent.

    In words, by what they are about; nothing about what none of the prompts has.
    """
    told = {}
    known = [pair for pair in pairs if pair[0].answer is not None]
    if known:
        exact, contains = (sum(right(*p) for p in known) for right in (text.exact, text.contains))
        told["right"] = f"exact {exact}, contains {contains} of {len(known)} with a true answer"
    said = Counter(answer.strip() for _, answer in pairs)
    often = [(answer, count) for answer, count in said.most_common(3) if count > 1]
    if often:
        told["most frequent"] = ", ".join(f"{count} × {_quoted(a)}" for a, count in often)
    if refused := sum(refuses(answer) for _, answer in pairs):
        told["refusals"] = f"{refused} of {len(pairs)}"
    examples = [Example(prompt, (), (), answer, (), True) for prompt, answer in pairs]
    if copies := len(near_duplicates(examples, ALIKE)):
        told["near copies"] = f"{copies} of {len(pairs)}"
    return told


def _quoted(answer: str) -> str:
    return f"“{printable(answer, 40)}”"
