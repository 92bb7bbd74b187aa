"""Records without arrays that cross a room: prompts, answers, both as tokens, sampling. No jax."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pujax.errors import require


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its `messages` are chat turns, each with a `role` and a `content`.

    `answer` is what a checker compares with, `kind` the task's name, `rest` what else its line has;
    none of them reaches the teacher.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    answer: str | None = None
    kind: str | None = None
    rest: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


Messages = Sequence[Mapping[str, str]]


ENDED = frozenset(
    {
        "stop",
        "eos",
        "eos_token",
        "end",
        "end_turn",
        "stop_sequence",
        "complete",
        "completed",
        "finish",
        "finished",
    }
)
"""The words, in any case, with which servers say that an answer ended by itself."""

CUT = frozenset({"length", "max_tokens", "max_length", "model_length", "max_output_tokens"})
"""The words with which they say that it was cut off."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """A teacher's answer as training uses it.

    `within_limit` is for a `finish_reason` that says neither: whether the answer is known to have
    fewer tokens than it was allowed. `seconds`, `tokens` and `cost` are what it took, where that is
    known; two answers are the same whatever they took.
    """

    response: str
    finish_reason: str | None
    model: str | None
    within_limit: bool = False
    seconds: float | None = field(default=None, compare=False)
    tokens: float | None = field(default=None, compare=False)
    cost: float | None = field(default=None, compare=False)

    @property
    def told(self) -> bool:
        """Whether `finish_reason` says how the answer ended."""
        return (self.finish_reason or "").casefold() in ENDED | CUT

    @property
    def finished(self) -> bool:
        """Whether the answer ended by itself, and so is followed by an EOS."""
        word = (self.finish_reason or "").casefold()
        return word in ENDED or (word not in CUT and self.within_limit)


@dataclass(frozen=True, slots=True)
class Rated:
    """A response that someone gave, and its score: the higher, the better.

    `ratings` are those that the score is made of, one a dimension of its `Preference`.
    """

    text: str
    score: float
    ratings: tuple[float, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with the responses that someone rated; `place` is where its row stands.

    `dimensions` are the names of the ratings; a pair and a flagged response have none.
    """

    prompt: Prompt
    responses: tuple[Rated, ...]
    place: str
    dimensions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Given:
    """A rated response as tokens, EOS included; not `finished` where it was cut and has none.

    `text` is what it was, whichever tokenizer made these tokens of it.
    """

    ids: tuple[int, ...]
    score: float
    ratings: tuple[float, ...] = ()
    finished: bool = True
    text: str = ""


@dataclass(frozen=True)
class Example:
    """One prompt with its anchor, as tokens. `anchor_ids` ends with an EOS when it finished.

    With preference data the candidates are `given`, and the best of them is the anchor; where none
    is known to be good there is no anchor, and `anchor_ids` is empty. `weight` is the anchor's in
    SFT. `asked` is the anchor as the teacher gave it, where one was asked. `mix` is how the prompt
    says to weigh the ratings' dimensions, where it does.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    reference_ids: tuple[int, ...]
    anchor: str
    anchor_ids: tuple[int, ...]
    anchor_finished: bool
    given: tuple[Given, ...] = ()
    weight: float = 1.0
    asked: Anchor | None = None
    mix: tuple[float, ...] = ()


def messages_key(
    messages: Iterable[Mapping[str, str]], asked: Mapping[str, Any] | None = None
) -> str:
    """The sha256 of a question: the messages, and how they were asked where that is given.

    `asked` has the teacher's model and sampling parameters: with it the key names one answer in a
    store. Without it the key names the prompt, whoever answers: a run and a replay look up by it.
    """
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    question = plain if asked is None else {**asked, "messages": plain}
    return hashlib.sha256(canonical(question)).hexdigest()


def canonical(value: Any) -> bytes:
    """The one JSON form of `value` that keys are made from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


LEAST = 1e-6
"""Of a temperature and a top_p: what float32 logits and shares can tell apart.

Logits of the usual size lie as far apart as that, so that a lower temperature takes the likeliest
token, as greed does; and near 1e-38 float32 has nothing left of either number, and no token is any
likelier than another.
"""


def check_temperature(key: str, value: float, *, greedy: bool = False) -> None:
    """Raise `ConfigError` for a temperature that can't be sampled at; 0 only where it is `greedy`.

    At 0 nothing is sampled, and the likeliest token is taken.
    """
    fits = LEAST <= value < math.inf or (greedy and value == 0)
    least = "0, which is greedy, or" if greedy else "must be"
    require(fits, key, value, f"{least} positive and finite, {LEAST} at least")


def check_top_p(key: str, value: Any) -> None:
    """Raise `ConfigError` for a share of the likeliest tokens that is none."""
    fits = isinstance(value, int | float) and LEAST <= value <= 1
    require(fits, key, value, f"must lie in [{LEAST}, 1]: 1 is all tokens")


@dataclass(frozen=True)
class Sampling:
    """How the student samples its candidates.

    Attributes:
        candidates: responses to each prompt, at least 2.
        temperature: of the softmax, at least 1e-6.
        top_k: sample from the k likeliest tokens; 0 is from all.
        top_p: sample from the likeliest tokens that make up this share; 1 is all.
    """

    candidates: int = 4
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(self.candidates >= 2, "sampling.candidates", self.candidates, "needs at least 2")
        check_temperature("sampling.temperature", self.temperature)
        require(self.top_k >= 0, "sampling.top_k", self.top_k, "must be 0 (off) or positive")
        check_top_p("sampling.top_p", self.top_p)


LARGEST = 1e15
"""What a rating or a reward may be: groups of such can be standardised in float32, by squares."""

STAGES = ("sft", "align")
"""The stages of a run, in the order in which it goes through them."""
