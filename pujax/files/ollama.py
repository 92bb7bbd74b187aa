"""A Modelfile: what Ollama is told of a GGUF file beside it.

Ollama knows the Jinja template in a GGUF file by its likeness to those that it has translated, and
writes prompts by a template in a language of its own. Where a chat template puts each message
between two fixed texts, as most do, it is said in that language here, and held against what the
chat template itself renders.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pujax.errors import ChatError, ConfigError

if TYPE_CHECKING:  # transformers with it: what is at a place is asked without
    from pujax.files.chat import Chat, Message

MADE = "# Made by pujax"
"""How a Modelfile begins that an export wrote."""


@dataclass(frozen=True)
class Turns:
    """A chat template as fixed texts: around each role's message, before all, and after all.

    `default` is the system message that a conversation without one gets.
    """

    head: str
    around: dict[str, tuple[str, str]]
    opening: str
    default: str | None

    def render(self, messages: Sequence["Message"]) -> str:
        """The prompt of a conversation that has its system message."""
        written = [
            self.around[turn["role"]][0] + turn["content"] + self.around[turn["role"]][1]
            for turn in messages
        ]
        return self.head + "".join(written) + self.opening

    def in_go(self) -> str:
        """The same as an Ollama template."""
        branches = "".join(
            f'{{{{ {"else if" if place else "if"} eq .Role "{role}" }}}}'
            f"{before}{{{{ .Content }}}}{after}"
            for place, (role, (before, after)) in enumerate(self.around.items())
        )
        return (
            f"{self.head}{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}"
            + self.opening
        )


def modelfile(chat: "Chat", file: str, system: str | None) -> str:
    """The Modelfile of the GGUF `file` beside it, for a model that was trained with `system`."""
    turns = turns_of(chat)
    system = turns.default if turns is not None and system is None else system
    endings = map(str, chat.tokenizer.convert_ids_to_tokens(list(chat.eos_ids)))
    lines = [
        f"{MADE}: ollama create NAME -f THIS_FILE",
        f"FROM ./{file}",
        "# The likeliest token each time, as the model was evaluated.",
        "PARAMETER temperature 0",
        *(f"PARAMETER stop {_quoted(token)}" for token in endings),
    ]
    if turns is None or '"""' in turns.in_go():
        lines += [
            "# The model's chat template can't be said in Ollama's language: Ollama takes that of",
            f"# its own which is most like the template in {file}: hold what",
            "# `ollama show NAME --template` says against that.",
        ]
    else:
        lines.append(f'TEMPLATE """{turns.in_go()}"""')
    if system is not None and '"""' in system:
        lines.append("# The system message has three quotation marks, which can't stand here.")
    elif system is not None:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


def refuse_foreign_modelfile(path: Path) -> None:
    """Raise `ConfigError` unless the name is free or an export's Modelfile has it."""
    if path.is_dir() or (path.exists() and not path.read_bytes().startswith(MADE.encode())):
        raise ConfigError(
            f"{path}: a Modelfile that no export wrote: move it away, or choose another out"
        )


def turns_of(chat: "Chat") -> Turns | None:
    """The chat template as fixed texts around messages; None where it is none of those."""
    S, U, A, V = (
        {"role": role, "content": f"pujax-{place}"}
        for place, role in enumerate(("system", "user", "assistant", "user"))
    )
    try:
        whole = chat.render_text([S, U, A, V])
        asked = chat.render_text([S, U], add_generation_prompt=False)
        answered = chat.render_text([S, U, A], add_generation_prompt=False)
        alone = chat.render_text([U])
    except ChatError:
        return None
    before_S, before_U, before_A, before_V, end = _parts(whole, 4)
    user_after, answer_after = _parts(asked, 2)[-1], _parts(answered, 3)[-1]
    user_before = before_V.removeprefix(answer_after)
    bos = str(chat.tokenizer.bos_token or "")
    opening = end.removeprefix(user_after)
    turn = user_before + U["content"] + user_after + opening
    # What stands before a user's turn as before a system message, such as virtual tokens.
    head = alone.removesuffix(turn)
    if head == alone or not before_S.startswith(head):
        # ChatML's BOS, where it has one, begins every turn.
        head = bos if before_S.startswith(bos) and not user_before.startswith(bos) else ""
    around = {
        "system": (before_S.removeprefix(head), before_U.removesuffix(user_before)),
        "user": (user_before, user_after),
        "assistant": (before_A.removeprefix(user_after), answer_after),
    }
    found = Turns(head, around, opening, default=None)
    if found.render([S, U, A, V]) != whole or "{{" in whole:
        return None
    default, bare = None, found.render([U])
    if alone != bare:
        before, after = around["system"]
        start, rest = head + before, after + bare.removeprefix(head)
        default = alone.removeprefix(start).removesuffix(rest)
        if not default or start + default + rest != alone:
            return None
    # Where llama.cpp puts the BOS before a text by itself, the template must not.
    begun = chat.tokenizer.backend_tokenizer.encode("a").ids[0] == chat.tokenizer.bos_token_id
    return replace(found, head=head.removeprefix(bos) if begun else head, default=default)


def _parts(text: str, count: int) -> list[str]:
    """What stands before, between and after the first `count` messages of `turns_of`."""
    parts = []
    for place in range(count):
        part, _, text = text.partition(f"pujax-{place}")
        parts.append(part)
    return [*parts, text]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
