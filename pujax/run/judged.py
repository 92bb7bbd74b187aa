"""What can be said of a teacher's answers before anything is learnt from them. No jax, no numpy."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pujax.evaluation import text
from pujax.records import Anchor, Example, Prompt, messages_key
from pujax.run.gate import near_duplicates, refuses
from pujax.teacher.settings import TeacherConfig
from pujax.teacher.store import anchor_of, read_records, said
from pujax.text import counted, printable

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


def describe_answers(store: Path, prompts: Sequence[Prompt]) -> Iterable[str]:
    """How good the answers are that a store has to these prompts, as far as that can be told."""
    asked = {messages_key(prompt.messages): prompt for prompt in prompts}
    anchors: dict[str, Anchor] = {}
    for _, record in read_records(store):
        key, anchor = messages_key(record["messages"]), anchor_of(record)
        if key in asked and anchor is not None:
            anchors[key] = anchor
    told = {"answered": f"{len(anchors):,} of {counted(len(asked), 'prompt')}"}
    told |= kept(store, prompts, TeacherConfig())
    told |= judged([(asked[key], anchor.response) for key, anchor in anchors.items()])
    yield "of data.prompts:"
    yield from (f"  {name:<14} {words}" for name, words in told.items())


LEARNT = {
    "strip": "left out of what is learnt",
    "keep": "learnt with it",
    "fail": "a failure, and not used",
}
"""What becomes of a thought that leads an answer, by `teacher.thoughts`."""


def kept(store: Path, prompts: Iterable[Prompt], teacher: TeacherConfig) -> dict[str, str]:
    """What else a store has to these prompts: several answers to one, and thoughts.

    In words, as `judged`, with what is used of it: nothing about what there is none of. Raises
    `StoreError`.
    """
    asked = {messages_key(prompt.messages) for prompt in prompts}
    answers, thoughts = Counter(), 0
    for _, record in read_records(store):
        key = messages_key(record["messages"])
        if key not in asked:
            continue
        bare = said(record["response"], "strip")
        answers[key] += bare is not None or teacher.thoughts == "keep"
        thoughts += bare != record["response"]
    told = {}
    if several := sum(count > 1 for count in answers.values()):
        used = "that to these settings" if teacher.asks else "of one model's the newest"
        told["several"] = (
            f"{counted(several, 'prompt')} with answers by several models or settings: {used} is "
            "used"
        )
    if thoughts:
        told["with thoughts"] = (
            f"{counted(thoughts, 'answer')}: the thought is {LEARNT[teacher.thoughts]} "
            f"(teacher.thoughts={teacher.thoughts})"
        )
    return told


def _quoted(answer: str) -> str:
    return f"“{printable(answer, 40)}”"
