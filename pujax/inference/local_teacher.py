"""A teacher on this disk, through pujax's own decoder."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from pujax.errors import ConfigError, TeacherError
from pujax.evaluation.judging import LETTERS
from pujax.records import Messages, check_temperature, check_top_p
from pujax.run.compilation import compile_once
from pujax.teacher.protocols import Answer, asked_turns
from pujax.teacher.settings import CollectConfig, TeacherConfig

GATHER = 0.05  # seconds that a local model waits for more prompts before it answers a batch


Turns = list[dict[str, str]]

Answers = Callable[[Any, TeacherConfig, list[Turns]], list[Answer]]
"""A `Generator` and conversations to what it answers."""


class LocalTeacher:
    """A model on this disk, through pujax's own decoder: as many prompts at a time as are asked.

    It is what `teacher.protocol` names in place of a server. Of `teacher.extra_body` it takes
    top_k, top_p and seed; a temperature of null is 0 here.

    Settings:
        answers: what the model does: it writes, unless that is another function.
    """

    on_device = True

    def __init__(
        self,
        settings: TeacherConfig,
        collect: CollectConfig,
        *,
        answers: Answers | None = None,
    ) -> None:
        unknown = sorted(set(settings.extra_body) - {"top_k", "top_p", "seed"})
        if unknown or settings.max_tokens is None:
            raise ConfigError(
                f"teacher.path: a local teacher needs teacher.max_tokens={settings.max_tokens} to "
                f"be a number and takes top_k, top_p and seed alone in extra_body, not {unknown}"
            )
        check_temperature("teacher.temperature", settings.temperature or 0.0, greedy=True)
        check_top_p("teacher.extra_body.top_p", settings.extra_body.get("top_p", 1.0))
        compile_once()
        from pujax.inference.generator import Generator

        self._settings = settings
        self._answers = answers or written
        self._batch = collect.concurrency
        self._generator = Generator.load(str(settings.path))
        self._waiting: asyncio.Queue[tuple[Messages, asyncio.Future[Answer]]] = asyncio.Queue()

    async def __aenter__(self) -> "LocalTeacher":
        self._running = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running

    async def ask(self, messages: Messages) -> Answer:
        """The model's answer, made together with those that are asked for at the same time."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((messages, answer))
        return await answer

    async def _run(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            await asyncio.sleep(GATHER)
            while not self._waiting.empty():  # no more are in flight than a batch holds
                batch.append(self._waiting.get_nowait())
            try:
                answers = await asyncio.to_thread(self._answer, [asked for asked, _ in batch])
            except Exception as error:
                for _, answer in batch:
                    answer.set_exception(TeacherError(f"{self._settings.path}: {error}"))
            else:
                for (_, answer), made in zip(batch, answers, strict=True):
                    answer.set_result(made)

    def _answer(self, conversations: Sequence[Messages]) -> list[Answer]:
        settings = self._settings
        turns = [asked_turns(settings.system, messages) for messages in conversations]
        # Batches of one size compile once.
        full = turns + turns[:1] * (self._batch - len(turns))
        return self._answers(self._generator, settings, full)[: len(turns)]


def written(generator: Any, settings: TeacherConfig, turns: list[Turns]) -> list[Answer]:
    """What the model writes."""
    replies = generator.answer(
        turns,
        max_tokens=settings.max_tokens or 0,
        temperature=settings.temperature or 0.0,
        **settings.extra_body,
    )
    return [
        Answer(
            text=reply.text,
            finish_reason="stop" if reply.finished else "length",
            model=settings.model,
            usage={"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens},
        )
        for reply in replies
    ]


def weighed(generator: Any, settings: TeacherConfig, turns: list[Turns]) -> list[Answer]:
    """`A=p`: the letter A's share of A and B by the next token's logits. Nothing is written."""
    shares = generator.shares(turns, LETTERS)
    return [
        Answer(text=f"{LETTERS[0]}={share:.6f}", finish_reason="stop", model=settings.model)
        for share in shares[:, 0]
    ]
