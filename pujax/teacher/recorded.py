"""A teacher whose answers somebody has already, in a file."""

from collections.abc import Mapping
from typing import Any

from pujax.errors import PromptError, TeacherError, require
from pujax.records import Messages, messages_key
from pujax.teacher.prompts import Rows, checked_text, prompt_of, rows
from pujax.teacher.protocols import Answer
from pujax.teacher.settings import CollectConfig, TeacherConfig
from pujax.text import blank, printable


class Recorded:
    """The answers in the file at `teacher.path`: prompts as `data.prompts` has them, and a column.

    It is what `teacher.protocol` names in place of a server; nothing is asked of anybody. Where a
    row has no such column, its answer is that of Alpaca's and ShareGPT's rows, or the assistant's
    turn at the end of `messages`; one without any answers nothing. A row's `finish_reason` says
    whether its answer broke off (`length`); without one it is whole.

    Settings:
        column: what the file calls an answer.

    Raises `ConfigError` without a file, and `PromptError` for one that can't be read, an answer
    that is no text, a file without any answer, and two answers to one prompt.
    """

    def __init__(
        self, settings: TeacherConfig, collect: CollectConfig, *, column: str = "response"
    ) -> None:
        require(bool(settings.path), "teacher.path", settings.path, "name the file of answers")
        self._path, self._model = str(settings.path), settings.model
        self._answers: dict[str, Answer] = {}
        seen: list[str] = []
        for place, row in _rows(self._path):
            seen = seen or sorted(map(str, row))
            messages, text = _parted(row, column, place)
            if text is None:
                continue
            reason = row.get("finish_reason") or "stop"
            answer = Answer(text, finish_reason=str(reason), model=self._model, timed=False)
            before = self._answers.setdefault(messages_key(messages), answer)
            if before.text.strip() != text.strip():
                raise PromptError(
                    f"{place}: {printable(text, 40)!r} is a second answer to a prompt that has "
                    f"{printable(before.text, 40)!r}: leave one out"
                )
        if not self._answers:
            raise PromptError(
                f"{self._path}: has {seen} and no answer in {column!r}: write it there, or name "
                "its column with +teacher.protocol.column=COLUMN"
            )

    async def __aenter__(self) -> "Recorded":
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def ask(self, messages: Messages) -> Answer:
        """The answer that the file has. Raises `TeacherError`, for none: no server refused it."""
        answer = self._answers.get(messages_key(messages))
        if answer is None:
            raise TeacherError(
                f"teacher.path={self._path}: has no answer to "
                f"{printable(messages[-1]['content'], 60)!r}: add it, or leave the prompt out; of "
                "several files collect each by itself"
            )
        return answer


def _rows(path: str) -> Rows:
    """The file's rows. What can't be read is said of the setting that names it."""
    try:
        yield from rows(path)
    except PromptError as error:
        said = str(error).replace("data.prompts or data.heldout", "teacher.path")
        raise PromptError(said) from error


def _parted(row: Mapping[str, Any], column: str, place: str) -> tuple[Messages, str | None]:
    """A row's prompt, and its answer where it has one."""
    given, turns, end = row.get(column), row.get("messages"), None
    if isinstance(turns, list) and turns:
        *before, last = turns
        if isinstance(last, Mapping) and last.get("role") == "assistant":
            row, end = {**row, "messages": before}, last.get("content")
    prompt = prompt_of(row, place)
    if given is None:
        ours = row.get("prompt") is not None or turns is not None
        given = end if ours else prompt.answer  # of ours it is the true answer, not a teacher's
    if given is None or (isinstance(given, str) and blank(given)):
        return prompt.messages, None
    return prompt.messages, checked_text(given, column, place)
