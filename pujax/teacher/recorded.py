"""A teacher whose answers somebody has already, in a file."""

from pujax.errors import PromptError, Rejected
from pujax.records import Messages, messages_key
from pujax.teacher.prompts import prompt_of, rows
from pujax.teacher.protocols import Answer
from pujax.teacher.settings import CollectConfig, TeacherConfig
from pujax.text import printable


class Recorded:
    """The answers in the file at `teacher.path`: prompts as `data.prompts` has them, and a column.

    It is what `teacher.protocol` names in place of a server; nothing is asked of anybody. A prompt
    that the file has not is refused, as a server may.

    Settings:
        column: what the file calls an answer.

    Raises `PromptError` for a line without a text there, and for two answers to one prompt.
    """

    def __init__(
        self, settings: TeacherConfig, collect: CollectConfig, *, column: str = "response"
    ) -> None:
        self._settings = settings
        self._answers: dict[str, str] = {}
        for place, row in rows(str(settings.path)):
            text = row.get(column)
            if not isinstance(text, str):
                raise PromptError(
                    f"{place}: has {sorted(map(str, row))} and no text in {column!r}: write the "
                    "answer there, or name its column with +teacher.protocol.column=COLUMN"
                )
            key = messages_key(prompt_of(row, place).messages)
            if self._answers.setdefault(key, text) != text:
                raise PromptError(
                    f"{place}: {printable(text, 40)!r} is a second answer to a prompt that has "
                    f"{printable(self._answers[key], 40)!r}: leave one out"
                )

    async def __aenter__(self) -> "Recorded":
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def ask(self, messages: Messages) -> Answer:
        """The answer that the file has."""
        text = self._answers.get(messages_key(messages))
        if text is None:
            last = printable(messages[-1]["content"], 40)
            raise Rejected(f"{self._settings.path} has no answer to {last!r}", certain=True)
        return Answer(text, finish_reason="stop", model=self._settings.model, timed=False)
