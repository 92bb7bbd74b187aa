"""What a collection will take, before anything is asked."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pujax.records import Messages, Prompt, messages_key
from pujax.teacher.protocols import asked_turns
from pujax.teacher.settings import BudgetConfig, PriceConfig, TeacherConfig
from pujax.teacher.store import Contents, digest

CHARS_PER_TOKEN = 4  # to estimate what a black box's tokenizer will count

UNKNOWN_LENGTH = 1024  # tokens to expect of an answer that max_tokens doesn't bound


@dataclass(frozen=True, slots=True)
class Plan:
    """What a collection has to do. Tokens are estimates; completion tokens and cost a maximum.

    `otherwise` of those to ask have answers in the store already, under other settings: `differing`
    names which.
    """

    prompts: int = 0
    cached: int = 0
    failed: int = 0
    duplicates: int = 0
    to_ask: int = 0
    otherwise: int = 0
    differing: tuple[str, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None

    @property
    def again(self) -> str | None:
        """What to say where answers are there under other settings."""
        if not self.otherwise:
            return None
        settings = ", ".join(f"teacher.{name}" for name in self.differing)
        return (
            f"{self.otherwise:,} of these have answers under other settings ({settings}), and are "
            "asked again: set these as they were to keep the answers"
        )


class Spend(NamedTuple):
    """What requests take: of a collection's budget, or one of them."""

    requests: float = 0.0
    tokens: float = 0.0
    money: float = 0.0

    def plus(self, other: "Spend", sign: int = 1) -> "Spend":
        """Both together; with `sign=-1`, what is left without `other`."""
        return Spend(*(a + sign * b for a, b in zip(self, other, strict=True)))

    def within(self, budget: BudgetConfig) -> bool:
        """Whether `budget` covers it."""
        limits = (budget.requests, budget.tokens, budget.money)
        return all(
            limit is None or spent <= limit * (1 + 1e-9)  # sums of money round
            for limit, spent in zip(limits, self, strict=True)
        )


def make_plan(
    prompts: Iterable[Prompt], teacher: TeacherConfig, store: Contents, *, retry_failed: bool
) -> Plan:
    """What asking `teacher` for the anchors that `store` lacks takes; reads every prompt once."""
    count = dict.fromkeys(("prompts", "cached", "failed", "duplicates", "to_ask"), 0)
    asked = teacher.asked
    planned, otherwise, differing = set[bytes](), 0, set[str]()
    prompt_tokens = completion_tokens = 0
    for prompt in prompts:
        count["prompts"] += 1
        key = digest(messages_key(prompt.messages, asked))
        if key in store.answered:
            count["cached"] += 1
        elif key in store.failed and not retry_failed:
            count["failed"] += 1
        elif key in planned:
            count["duplicates"] += 1
        else:
            count["to_ask"] += 1
            planned.add(key)
            if store.otherwise and (
                names := store.otherwise.get(digest(messages_key(prompt.messages)))
            ):
                otherwise += 1
                differing |= names
            taken, longest = estimate_tokens(teacher, prompt.messages)
            prompt_tokens += taken
            completion_tokens += longest
    return Plan(
        **count,
        otherwise=otherwise,
        differing=tuple(sorted(differing)),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost=cost(teacher.price, prompt_tokens, completion_tokens),
    )


def estimate_tokens(teacher: TeacherConfig, messages: Messages) -> tuple[int, int]:
    """About how many tokens a request has, and how many its answer has at most."""
    turns = asked_turns(teacher.system, messages)
    prompt = sum(len(turn["content"]) // CHARS_PER_TOKEN + 5 for turn in turns)
    longest = teacher.max_tokens or teacher.extra_body.get("max_completion_tokens")
    return prompt, int(longest or UNKNOWN_LENGTH)


def cost(price: PriceConfig, prompt_tokens: float, completion_tokens: float) -> float | None:
    """What these tokens cost; None when a price is unknown."""
    if price.input is None or price.output is None:
        return None
    return (prompt_tokens * price.input + completion_tokens * price.output) / 1e6
