"""Asking: workers that share the prompts, the pace, the budget and the store."""

import asyncio
import contextlib
import math
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import tenacity
from aiolimiter import AsyncLimiter

from pujax.errors import Rejected, StoreError, TeacherError, Unread, forget_closed_terminal, stops
from pujax.records import Prompt, messages_key
from pujax.teacher.endpoint import OpenTeacher, open_endpoint
from pujax.teacher.plan import CHARS_PER_TOKEN, Spend, cost, estimate_tokens
from pujax.teacher.protocols import Answer, Retryable, Teacher, Unreachable
from pujax.teacher.settings import CollectConfig, TeacherConfig
from pujax.teacher.store import FORMAT, digest, said
from pujax.teacher.writer import AnchorStore
from pujax.text import printable

SEVERAL = 8  # refusals in the same words before there is any answer: the settings are at fault

FEW = 3  # replies that a function of the user's own can't read before it has read any

# Refusals in a row in the very same words: the account is at fault, late in a run. And in whatever
# words, before there is any answer.
ALIKE = 32

LONGEST_WAIT = 600.0  # seconds that a server may ask to wait for; for more, the run ends
TOLD_WAIT = 10.0  # seconds of a wait that are worth a line

OVER_BUDGET = "the budget is reached"
"""Why a collection stopped, where no signal and no error did it."""


@dataclass(slots=True)
class Tally:
    """Where a collection stands. `answered` are on the disk; tokens and cost are this run's."""

    passed: int = 0  # prompts that needed no asking
    asked: int = 0
    answered: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    refusal: str | None = None  # what was said of the first that failed, of those with words
    unanswered: int = 0
    left: int = 0  # prompts that are still to be asked, where the run was stopped
    requests: int = 0
    replies: int = 0  # to requests, without those that were errors
    retried: int = 0
    prompt_tokens: float = 0
    completion_tokens: float = 0
    cost: float | None = 0.0
    trouble: str | None = None
    stopped: str | None = None
    error: Exception | None = None

    @property
    def failures(self) -> str:
        """How many failed in which way: `2 rejected, 1 empty`."""
        return ", ".join(f"{count} {why}" for why, count in self.failed.items())


class Collection:
    """One run of asking: workers that share the prompts, the pace, the budget and the store."""

    def __init__(
        self,
        teacher: Teacher,
        identity: TeacherConfig,
        store: AnchorStore,
        settings: CollectConfig,
        tick: Callable[[Tally], None],
        say: Callable[[str], None],
    ) -> None:
        self._teacher = teacher
        self._identity = identity
        self._store = store
        self._settings = settings
        self._tick = tick
        self._say = say
        self._asked = identity.asked
        self._tally = Tally()
        self._stop = asyncio.Event()
        self._asking: set[str] = set()
        self._failed_now: set[bytes] = set()
        self._rejected: list[tuple[Prompt, str, str]] = []
        self._alike = Counter[str]()
        self._refused = 0  # since the last answer
        self._elsewhere: list[Prompt] = []
        self._queue: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[None]]] = asyncio.Queue()
        self._resume_at = 0.0
        self._failing = 0
        self._unheard = 0  # requests that failed since one was answered
        self._heard = False
        self._in_flight = 0
        self._reserved = Spend()
        self._spent = Spend()
        self._freed = asyncio.Condition()
        rate = settings.requests_per_minute
        # Bursts of a second's worth: a limiter of a whole minute lets two minutes' worth through.
        self._requests = (
            None if rate is None else AsyncLimiter(max(1.0, rate / 60), max(60 / rate, 1.0))
        )
        rate = settings.tokens_per_minute
        self._tokens = None if rate is None else AsyncLimiter(rate / 60, 1.0)

    async def run(self, prompts: Iterable[Prompt]) -> Tally:
        """Ask for what `prompts` lack; the tally says how it went."""
        writer = asyncio.create_task(self._write())
        try:
            await self._work_on(prompts)
            while self._elsewhere and not self._stop.is_set():
                # Another process asks these: see whether it has finished them, or has died.
                await self._sleep(0.2)
                again, self._elsewhere = self._elsewhere, []
                await self._work_on(again)
            if not self._stop.is_set():
                await self._keep_rejected()
        finally:
            writer.cancel()
        tally = self._tally
        tally.unanswered = tally.asked - tally.answered - sum(tally.failed.values())
        return tally

    def stop(self, why: str) -> None:
        """Ask nothing more; what is in flight is waited for and kept."""
        self._tally.stopped = self._tally.stopped or why
        self._stop.set()

    def _fail(self, error: Exception) -> None:
        self._tally.error = self._tally.error or error
        self.stop(str(error))

    async def _work_on(self, prompts: Iterable[Prompt]) -> None:
        shared = iter(prompts)

        async def work() -> None:
            try:
                for prompt in shared:
                    if self._stop.is_set():
                        return
                    await self._take(prompt)
            except Exception as error:
                self._fail(error)  # whatever it is: what the others ask is paid for, so wait for it

        async with asyncio.TaskGroup() as group:
            for _ in range(self._settings.concurrency):
                group.create_task(work())

    async def _take(self, prompt: Prompt) -> None:
        store = self._store
        key = messages_key(prompt.messages, self._asked)
        if key in self._asking or not self._missing(key):
            self._tally.passed += 1
        elif not store.claim(key):
            self._elsewhere.append(prompt)
        else:
            self._asking.add(key)
            try:
                store.refresh()  # whoever had the claim until now may have written the answer
                if self._missing(key):
                    await self._ask(prompt, key)
                else:
                    self._tally.passed += 1
            finally:
                self._asking.discard(key)
                store.release(key)
                self._tick(self._tally)

    def _missing(self, key: str) -> bool:
        name, store = digest(key), self._store.contents
        if name in store.answered or name in self._failed_now:
            return False
        return self._settings.retry_failed or name not in store.failed

    async def _ask(self, prompt: Prompt, key: str) -> None:
        """Ask until an answer is on the disk, the patience ends, or the run stops."""
        tally = self._tally
        tally.asked += 1
        busy, again = 0, False

        def wait(state: tenacity.RetryCallState) -> float:
            """Doubled while nobody is answered, and each time that the server has too much to do.

            A fault amid answers is one request's own, and all may be asked again soon.
            """
            nonlocal busy, again
            again = True
            error = state.outcome.exception() if state.outcome else None
            assert isinstance(error, Retryable)
            busy += error.busy
            rounds = self._unheard // len(self._asking)
            return _backoff(error, max(busy - 1, min(state.attempt_number - 1, rounds)))

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Retryable),
            stop=self._enough,
            wait=wait,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            answer = await retrying(self._attempt, prompt)
        except Retryable as error:
            tally.trouble = str(error)
            self._failing += 1
            if isinstance(error, Unreachable) and not self._heard:
                self._fail(TeacherError(f"{error}: check teacher.base_url, and that it is running"))
            elif self._failing >= self._settings.concurrency:
                failed = f"{self._failing} prompts in a row failed: {error}"
                self._fail(TeacherError(f"{failed} (asked at {self._identity.place})"))
            return
        except Rejected as error:
            await self._reject(prompt, key, error)
            return
        except Unread as error:
            tally.error = tally.error or error  # said at the end, where it does not stop the run
            self._failing += 1
            if self._failing >= (self._settings.concurrency if self._heard else FEW):
                self._fail(error)
            return
        except TeacherError as error:
            raise TeacherError(f"{error} (asked for {printable(prompt.id)})") from error
        if answer is None:
            tally.asked -= not again  # the run stopped before its first request
            return
        self._failing = 0
        self._alike.clear()
        self._refused = 0
        failure = answer.failure
        if failure is None and said(answer.text, self._identity.thoughts) is None:
            failure = "thought"
        await self._keep(prompt, key, answer, failure)
        await self._keep_rejected()

    async def _reject(self, prompt: Prompt, key: str, error: Rejected) -> None:
        """A prompt that the server refused fails alone, and is kept as such; several alike stop.

        Where there is no answer yet, in the store neither, and all are refused in the same words,
        it may be the settings: then none is kept. Those that are kept are not asked again, so that
        the same command gets beyond them.
        """
        why = self._tally.trouble = str(error)
        self._rejected.append((prompt, key, why))
        self._alike = Counter({why: self._alike[why] + 1})
        answered = self._tally.answered or self._store.contents.answered
        if error.certain:
            await self._keep_rejected()
            return
        self._refused += 1
        if answered or self._refused > self._alike[why]:
            await self._keep_rejected()
            if (self._alike[why] if answered else self._refused) >= ALIKE:
                again = "collect.retry_failed=true asks them again"
                self._fail(TeacherError(f"{ALIKE} prompts in a row were refused: {why}; {again}"))
        elif self._refused >= SEVERAL:
            self._fail(
                TeacherError(
                    f"{error} (as the first {self._refused} prompts were all refused; if they are "
                    "at fault, put others before them)"
                )
            )

    async def _keep_rejected(self) -> None:
        while self._rejected:
            prompt, key, why = self._rejected.pop()
            nothing = {"prompt_tokens": 0, "completion_tokens": 0}
            await self._keep(prompt, key, Answer("", usage=nothing, refusal=why), "rejected")

    async def _keep(self, prompt: Prompt, key: str, answer: Answer, failure: str | None) -> None:
        """Wait until the answer is on the disk, and count it."""
        on_disk = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((self._record(prompt, key, answer, failure), on_disk))
        await on_disk
        tally = self._tally
        if failure is None:
            tally.answered += 1
        else:
            tally.failed[failure] = tally.failed.get(failure, 0) + 1
            tally.refusal = tally.refusal or answer.refusal
            self._failed_now.add(digest(key))
        self._store.refresh()
        if self._store.full:
            self._fail(
                StoreError(
                    f"{self._store.path}: the disk is full: make room, run the same command again"
                )
            )

    async def _attempt(self, prompt: Prompt) -> Answer | None:
        """One request, in its turn; None when the run stops before it."""
        need = self._most(prompt)
        pause = self._resume_at - time.monotonic()
        if pause > 0:
            await self._sleep(pause * random.uniform(1.0, 1.1))  # not all at the same moment
        await self._pace(need.tokens)
        if self._stop.is_set() or not await self._reserve(need):
            return None
        tally = self._tally
        tally.requests += 1
        spent = Spend(requests=1.0)
        try:
            begun = time.monotonic()
            answer = await self._teacher.ask(prompt.messages)
            if answer.timed:
                answer = replace(answer, seconds=time.monotonic() - begun)
            tally.replies += 1
            self._heard, self._unheard = True, 0
            prompt_tokens, completion_tokens = self._used(prompt, answer)
            tally.prompt_tokens += prompt_tokens
            tally.completion_tokens += completion_tokens
            paid = self._paid(answer, prompt_tokens, completion_tokens)
            tally.cost = None if paid is None or tally.cost is None else tally.cost + paid
            spent = Spend(1.0, prompt_tokens + completion_tokens, paid or 0.0)
            return answer
        except Retryable as error:
            tally.retried += 1
            self._unheard += 1
            if error.after:
                self._hold(error.after)
            if error.billed:
                spent = self._worst(need)
            raise
        except Unread:
            spent = self._worst(need)
            raise
        finally:
            await self._settle(need, spent)

    def _worst(self, need: Spend) -> Spend:
        """What the budget takes for granted where an answer was lost; the cost may be unknown."""
        if cost(self._identity.price, 1.0, 1.0) is None:
            self._tally.cost = None
        return need

    def _hold(self, seconds: float) -> None:
        """Ask nothing for as long as the server wishes, and say so; end the run when it is long."""
        if seconds > LONGEST_WAIT:
            when = "some year"
            with contextlib.suppress(OverflowError):
                when = f"{datetime.now(UTC) + timedelta(seconds=seconds):%Y-%m-%d %H:%M} UTC"
            self._fail(
                TeacherError(
                    f"the server asks to wait until {when}: run the same command again then"
                )
            )
            return
        until = time.monotonic() + seconds
        if seconds >= TOLD_WAIT and until > self._resume_at + 1:
            self._say(f"the server asks to wait {math.ceil(seconds)} s")
        self._resume_at = max(self._resume_at, until)

    def _enough(self, state: tenacity.RetryCallState) -> bool:
        retries = self._settings.retries
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, Unreachable) and not self._heard:
            retries = min(retries, 2)  # nothing has ever answered: most likely a wrong address
        return self._stop.is_set() or state.attempt_number > retries

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    async def _pace(self, tokens: float) -> None:
        """Wait for the turn that the rates allow, or for the stop."""
        if self._requests is None and self._tokens is None:
            return

        async def turn() -> None:
            if self._requests is not None:
                await self._requests.acquire()
            left = tokens if self._tokens is not None else 0.0
            while self._tokens is not None and left > 0:
                await self._tokens.acquire(min(left, self._tokens.max_rate))
                left -= self._tokens.max_rate

        waits = {asyncio.create_task(turn()), asyncio.create_task(self._stop.wait())}
        done, rest = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        for task in done:
            task.result()  # raises what went wrong in it

    def _most(self, prompt: Prompt) -> Spend:
        """The most requests, tokens and money that one attempt at `prompt` may take."""
        prompt_tokens, longest = estimate_tokens(self._identity, prompt.messages)
        money = cost(self._identity.price, prompt_tokens, longest)
        return Spend(1.0, prompt_tokens + longest, money or 0.0)

    def _used(self, prompt: Prompt, answer: Answer) -> tuple[float, float]:
        usage = answer.usage or {}
        guess, _ = estimate_tokens(self._identity, prompt.messages)
        return (
            usage.get("prompt_tokens", guess),
            usage.get("completion_tokens", len(answer.text) // CHARS_PER_TOKEN + 1),
        )

    def _paid(self, answer: Answer, prompt_tokens: float, completion_tokens: float) -> float | None:
        told = (answer.usage or {}).get("cost")
        return (
            cost(self._identity.price, prompt_tokens, completion_tokens) if told is None else told
        )

    async def _reserve(self, need: Spend) -> bool:
        """Whether the budget covers `need`; first waits for what is in flight to cost less."""
        async with self._freed:
            while not self._spent.plus(self._reserved).plus(need).within(self._settings.budget):
                if self._in_flight == 0 or self._stop.is_set():
                    self.stop(OVER_BUDGET)
                    return False
                await self._freed.wait()
            self._reserved = self._reserved.plus(need)
            self._in_flight += 1
        return True

    async def _settle(self, need: Spend, spent: Spend) -> None:
        async with self._freed:
            self._in_flight -= 1
            self._reserved = self._reserved.plus(need, -1)
            self._spent = self._spent.plus(spent)
            self._freed.notify_all()

    def _record(
        self, prompt: Prompt, key: str, answer: Answer, failure: str | None
    ) -> dict[str, Any]:
        prompt_tokens, completion_tokens = self._used(prompt, answer)
        return {
            "format": FORMAT,
            "key": key,
            "id": prompt.id,
            "messages": list(prompt.messages),
            "response": answer.text,
            "finish_reason": answer.finish_reason,
            "model": self._identity.model,
            "served_model": answer.model,
            "sampling": self._identity.sampling,
            "usage": answer.usage,
            "cost": self._paid(answer, prompt_tokens, completion_tokens),
            "seconds": None if answer.seconds is None else round(answer.seconds, 3),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        } | ({} if failure is None else {"reason": failure, "refusal": answer.refusal})

    async def _write(self) -> None:
        """Commit answers as they come: all that arrive during one fsync share the next."""
        while True:
            batch = [await self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            try:
                await asyncio.to_thread(self._store.append, [record for record, _ in batch])
            except Exception as error:
                for _, on_disk in batch:
                    on_disk.set_exception(error)
            else:
                for _, on_disk in batch:
                    on_disk.set_result(None)


def _backoff(error: Retryable, doubled: int) -> float:
    """Seconds before the next attempt, drawn up to one that is `doubled` so often, up to a minute.

    Never under the server's wish.
    """
    return max(random.uniform(0.0, min(60.0, 2.0 ** min(doubled, 6))), error.after)


def ask_all(
    prompts: Iterable[Prompt],
    teacher: TeacherConfig,
    store: AnchorStore,
    settings: CollectConfig,
    tick: Callable[[Tally], None],
    say: Callable[[str], None],
) -> Tally:
    """Ask `teacher` for every anchor that `store` lacks and keep each; how it went.

    A signal to stop does so: no more is asked, what is in flight is waited for and kept.
    """
    open_teacher: OpenTeacher = teacher.protocol or open_endpoint

    async def run() -> Tally:
        async with open_teacher(teacher, settings) as black_box:
            collection = Collection(black_box, teacher, store, settings, tick, say)
            loop, caught = asyncio.get_running_loop(), []
            if threading.current_thread() is threading.main_thread():
                caught = stops()

            def stop(number: signal.Signals) -> None:
                if number == signal.SIGHUP:
                    forget_closed_terminal()
                collection.stop(number.name)
                loop.remove_signal_handler(number)  # the second one ends the process

            for number in caught:
                loop.add_signal_handler(number, stop, number)
            try:
                return await collection.run(prompts)
            finally:
                for number in caught:
                    loop.remove_signal_handler(number)

    return asyncio.run(run())
