"""Protocols: what is sent for a chat and how the answer is read, a pair of functions each.

A request function takes the teacher's settings and the messages and returns the path after
`base_url` and the JSON body. An answer function takes the body of the reply; whatever indexing
raises when it isn't an answer, the endpoint takes as one more try where the function is one of
these. One of the user's own is named with what it raised, and the prompt is not asked again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pujax.errors import ConfigError
from pujax.records import Messages
from pujax.teacher.settings import TeacherConfig
from pujax.text import blank

FILTERED = frozenset(
    {
        "blocklist",
        "content_filter",
        "content_filtered",
        "guardrail_intervened",
        "prohibited_content",
        "recitation",
        "safety",
        "sensitive",
        "spii",
    }
)
"""Finish reasons, in any case, of an answer that the provider took away."""

CALLS = frozenset({"function_call", "tool_calls", "tool_use"})
"""Finish reasons of an answer that calls a tool, which the prompt did not ask for."""

BROKEN = frozenset(
    {"abort", "aborted", "cancelled", "error", "insufficient_system_resource", "network_error"}
)
"""Finish reasons of an answer that broke off: worth another try."""

MOST_COUNTED = 1e12
"""Tokens or money of one answer; more is nonsense."""


class Retryable(RuntimeError):
    """This attempt failed, another may not, `after` as many seconds.

    `billed`: the teacher may have answered and charged. `busy`: it has too much to do.
    """

    def __init__(
        self, reason: str, *, after: float = 0.0, billed: bool = False, busy: bool = False
    ) -> None:
        super().__init__(reason)
        self.after = after
        self.billed = billed
        self.busy = busy


class Unreachable(Retryable):
    """No connection came about."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the teacher said. `usage` has prompt_tokens and completion_tokens, when it told them.

    `seconds` is how long the request took that it answered, which who asks fills in where it is
    `timed`: what somebody wrote down earlier took no time that would say anything.
    """

    text: str
    finish_reason: str | None = None
    model: str | None = None
    usage: Mapping[str, float] | None = None
    refusal: str | None = None
    calls_tools: bool = False
    holds_key: bool = False
    seconds: float | None = None
    timed: bool = True

    @property
    def failure(self) -> str | None:
        """Why this can't be an anchor: such as "refusal" or "empty"; None when it can."""
        word = (self.finish_reason or "").casefold()
        if self.holds_key:
            return "holds a key"
        if self.calls_tools or word in CALLS:
            return "tool_calls"
        if self.refusal or word == "refusal":
            return "refusal"
        if word in FILTERED:
            return "content_filter"
        return "empty" if blank(self.text) else None


class Teacher(Protocol):
    """Anything that answers a chat."""

    async def ask(self, messages: Messages) -> Answer:
        """The answer to `messages`. Raises `Retryable` or `TeacherError`."""
        ...


RequestFn = Callable[[TeacherConfig, Messages], tuple[str, dict[str, Any]]]
AnswerFn = Callable[[Any], Answer]


# --- OpenAI's chat completions, which most servers speak ------------------------------------------


def openai_request(teacher: TeacherConfig, messages: Messages) -> tuple[str, dict[str, Any]]:
    """A chat completion; settings that are null are left out."""
    body: dict[str, Any] = {
        "model": teacher.model,
        "messages": asked_turns(teacher.system, messages),
        **teacher.extra_body,
    }
    return "/chat/completions", body | _given(teacher)


def openai_answer(body: Any) -> Answer:
    """The first choice of a chat completion."""
    choice = body["choices"][0]
    message = choice["message"]
    if choice.get("error") or _word(choice.get("finish_reason")) in BROKEN:
        raise Retryable("the answer broke off", billed=True)
    return Answer(
        text=_plain(message.get("content")),
        finish_reason=_optional(choice.get("finish_reason")),
        model=_optional(body.get("model")),
        usage=_usage(body.get("usage"), "prompt_tokens", "completion_tokens"),
        refusal=_optional(message.get("refusal")),
        calls_tools=bool(message.get("tool_calls") or message.get("function_call")),
    )


# --- Anthropic's messages -------------------------------------------------------------------------


def anthropic_request(teacher: TeacherConfig, messages: Messages) -> tuple[str, dict[str, Any]]:
    """A message; the system's turn goes beside the others. Raises `ConfigError` without a limit."""
    if teacher.max_tokens is None:
        raise ConfigError("teacher.max_tokens=None: Anthropic's messages need a number")
    turns = asked_turns(teacher.system, messages)
    body: dict[str, Any] = {
        "model": teacher.model,
        "messages": [turn for turn in turns if turn["role"] != "system"],
        **teacher.extra_body,
    }
    system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
    if system:
        body["system"] = system
    return "/messages", body | _given(teacher)


def anthropic_answer(body: Any) -> Answer:
    """The text of a message; what the model thought in blocks of their own is left out."""
    return Answer(
        text=_plain(body["content"]),
        finish_reason=_optional(body.get("stop_reason")),
        model=_optional(body.get("model")),
        usage=_usage(body.get("usage"), "input_tokens", "output_tokens"),
    )


# --- what they share ------------------------------------------------------------------------------


def asked_turns(system: str | None, messages: Messages) -> list[dict[str, str]]:
    """The turns as sent, the teacher's system message before the prompt's own, in one message.

    Many servers allow one system message alone, and only at the start.
    """
    turns = [dict(turn) for turn in messages]
    if system is None:
        return turns
    if turns[0]["role"] == "system":
        return [{"role": "system", "content": f"{system}\n\n{turns[0]['content']}"}, *turns[1:]]
    return [{"role": "system", "content": system}, *turns]


def _given(teacher: TeacherConfig) -> dict[str, Any]:
    both = {"temperature": teacher.temperature, "max_tokens": teacher.max_tokens}
    return {name: value for name, value in both.items() if value is not None}


def _plain(content: Any) -> str:
    """The text of a message's content, which some servers send in parts."""
    if isinstance(content, list):
        return "".join(map(_part, content))
    if content is not None and not isinstance(content, str):
        raise TypeError(type(content).__name__)
    return content or ""


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    text = part["text"] if part.get("type") in ("text", "output_text") else ""
    if not isinstance(text, str):
        raise TypeError(type(text).__name__)
    return text


def _optional(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _word(value: Any) -> str:
    return value.casefold() if isinstance(value, str) else ""


def _usage(told: Any, prompt: str, completion: str) -> dict[str, float] | None:
    """The counts that make sense, under our names: one that doesn't is as good as not told."""
    if not isinstance(told, dict):
        return None
    names = (("prompt_tokens", prompt), ("completion_tokens", completion), ("cost", "cost"))
    return {ours: told[name] for ours, name in names if _count(told.get(name))} or None


def _count(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value <= MOST_COUNTED and math.isfinite(value)
