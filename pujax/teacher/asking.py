"""Asking: workers that share the prompts, the pace, the budget and the store."""

import asyncio
import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tenacity
from aiolimiter import AsyncLimiter

from pujax.errors import ConfigError, StoreError, TeacherError
from pujax.records import Anchor, Messages, Prompt, messages_key
from pujax.teacher.endpoint import (
    Answer,
    OpenTeacher,
    Retryable,
    Teacher,
    Unreachable,
    open_endpoint,
    with_system,
)
from pujax.teacher.prompts import Digests
from pujax.teacher.settings import CollectConfig, PriceConfig, TeacherConfig
from pujax.teacher.store import (
    FORMAT,
    AnchorStore,
    anchor_key,
    anchor_of,
    digest,
    read_anchors,
    read_failures,
    read_records,
    sampling_of,
)

CHARS_PER_TOKEN = 4  # to estimate what a black box's tokenizer will count

UNKNOWN_LENGTH = 1024  # tokens to expect of an answer that max_tokens doesn't bound

# --- teachers -------------------------------------------------------------------------------------


class ReplayTeacher:
    """Answers from a store alone: it never opens a socket."""

    def __init__(self, store: Path, model: str | None = None) -> None:
        self._store = store
        self._anchors = read_anchors(store, model)

    async def ask(self, messages: Messages) -> Answer:
        """The stored answer. Raises `TeacherError` when there is none."""
        anchor = self._anchors.get(messages_key(messages))
        if anchor is None:
            raise TeacherError(f"{self._store} has no answer to {messages[-1]['content']!r:.80}")
        return Answer(anchor.response, anchor.finish_reason, anchor.model)


# --- asking ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """What a collection has to do. Tokens are estimates; completion tokens and cost a maximum."""

    prompts: int = 0
    cached: int = 0
    failed: int = 0
    duplicates: int = 0
    to_ask: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None


@dataclass(slots=True)
class Tally:
    """Where a collection stands. `answered` are on the disk; tokens and cost are this run's."""

    passed: int = 0  # prompts that needed no asking
    asked: int = 0
    answered: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    unanswered: int = 0
    requests: int = 0
    retried: int = 0
    prompt_tokens: float = 0
    completion_tokens: float = 0
    cost: float | None = 0.0
    trouble: str | None = None
    stopped: str | None = None
    error: Exception | None = None


def make_plan(
    prompts: Iterable[Prompt], teacher: TeacherConfig, store: Path, *, retry_failed: bool
) -> Plan:
    """What asking `teacher` for the anchors that `store` lacks takes; reads every prompt once."""
    names = ("prompts", "cached", "failed", "duplicates", "to_ask")
    count: dict[str, int] = dict.fromkeys(names, 0)
    prompt_tokens = completion_tokens = 0
    with contextlib.closing(Digests()) as known:
        if store.exists():
            for _, record in read_records(store):
                known.put(digest(record["key"]), b"cached")
        for _, record in read_failures(store):
            if not retry_failed:
                known.put(digest(record["key"]), b"failed")
        for prompt in prompts:
            count["prompts"] += 1
            key = anchor_key(teacher, prompt.messages)
            found = known.put(digest(key), b"duplicates")
            count["to_ask" if found is None else found.decode()] += 1
            if found is None:
                asked, longest = estimate_tokens(teacher, prompt.messages)
                prompt_tokens += asked
                completion_tokens += longest
    return Plan(
        **count,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost=cost(teacher.price, prompt_tokens, completion_tokens),
    )


def estimate_tokens(teacher: TeacherConfig, messages: Messages) -> tuple[int, int]:
    """About how many tokens a request has, and how many its answer has at most."""
    turns = with_system(teacher.system, messages)
    prompt = sum(len(turn["content"]) // CHARS_PER_TOKEN + 5 for turn in turns)
    longest = teacher.max_tokens or teacher.extra_body.get("max_completion_tokens")
    return prompt, int(longest or UNKNOWN_LENGTH)


def cost(price: PriceConfig, prompt_tokens: float, completion_tokens: float) -> float | None:
    """What these tokens cost; None when a price is unknown."""
    if price.input is None or price.output is None:
        return None
    return (prompt_tokens * price.input + completion_tokens * price.output) / 1e6


class Collection:
    """One run of asking: workers that share the prompts, the pace, the budget and the store."""

    def __init__(
        self,
        teacher: Teacher,
        identity: TeacherConfig,
        store: AnchorStore,
        settings: CollectConfig,
        tick: Callable[[Tally], None],
    ) -> None:
        self._teacher = teacher
        self._identity = identity
        self._store = store
        self._settings = settings
        self._tick = tick
        self._tally = Tally()
        self._stop = asyncio.Event()
        self._asking: set[str] = set()
        self._failed_now: set[bytes] = set()
        self._elsewhere: list[Prompt] = []
        self._queue: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[None]]] = asyncio.Queue()
        self._resume_at = 0.0
        self._failing = 0
        self._heard = False
        self._in_flight = 0
        self._reserved = [0.0, 0.0, 0.0]  # requests, tokens, money
        self._spent = [0.0, 0.0, 0.0]
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
        finally:
            writer.cancel()
        return self._tally

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
        key = anchor_key(self._identity, prompt.messages)
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
        name = digest(key)
        if name in self._store.answered or name in self._failed_now:
            return False
        return self._settings.retry_failed or name not in self._store.failed

    async def _ask(self, prompt: Prompt, key: str) -> None:
        """Ask until an answer is on the disk, the patience ends, or the run stops."""
        tally = self._tally
        tally.asked += 1
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Retryable),
            stop=self._enough,
            wait=_backoff,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            answer = await retrying(self._attempt, prompt)
        except Retryable as error:
            tally.unanswered += 1
            tally.trouble = str(error)
            self._failing += 1
            if isinstance(error, Unreachable) and not self._heard:
                self._fail(TeacherError(f"{error}: check teacher.base_url, and that it is running"))
            elif self._failing >= self._settings.concurrency:
                self._fail(TeacherError(f"{self._failing} prompts in a row failed: {error}"))
            return
        except TeacherError as error:
            raise TeacherError(f"{error} (asked for {prompt.id})") from error
        if answer is None:
            return
        self._failing = 0
        on_disk = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((self._record(prompt, key, answer), on_disk))
        await on_disk
        self._store.refresh()
        if answer.failure is None:
            tally.answered += 1
        else:
            tally.failed[answer.failure] = tally.failed.get(answer.failure, 0) + 1
            self._failed_now.add(digest(key))
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
        await self._pace(need[1])
        if self._stop.is_set() or not await self._reserve(need):
            return None
        tally = self._tally
        tally.requests += 1
        spent = [1.0, 0.0, 0.0]
        try:
            answer = await self._teacher.ask(prompt.messages)
            self._heard = True
            prompt_tokens, completion_tokens = self._used(prompt, answer)
            tally.prompt_tokens += prompt_tokens
            tally.completion_tokens += completion_tokens
            paid = self._paid(answer, prompt_tokens, completion_tokens)
            tally.cost = None if paid is None or tally.cost is None else tally.cost + paid
            spent = [1.0, prompt_tokens + completion_tokens, paid or 0.0]
            return answer
        except Retryable as error:
            tally.retried += 1
            if error.after:
                self._resume_at = max(self._resume_at, time.monotonic() + error.after)
            if error.billed:  # the budget takes the worst for granted
                spent = need
            raise
        finally:
            await self._settle(need, spent)

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
        _, rest = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()

    def _most(self, prompt: Prompt) -> list[float]:
        """The most requests, tokens and money that one attempt at `prompt` may take."""
        prompt_tokens, longest = estimate_tokens(self._identity, prompt.messages)
        money = cost(self._identity.price, prompt_tokens, longest)
        return [1.0, float(prompt_tokens + longest), money or 0.0]

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

    async def _reserve(self, need: list[float]) -> bool:
        """Whether the budget covers `need`; first waits for what is in flight to cost less."""
        budget = self._settings.budget
        limits = (budget.requests, budget.tokens, budget.money)
        async with self._freed:
            while any(
                limit is not None and spent + reserved + more > limit * (1 + 1e-9)
                for limit, spent, reserved, more in zip(
                    limits, self._spent, self._reserved, need, strict=True
                )
            ):
                if self._in_flight == 0 or self._stop.is_set():
                    self.stop("the budget is reached")
                    return False
                await self._freed.wait()
            self._reserved = [a + b for a, b in zip(self._reserved, need, strict=True)]
            self._in_flight += 1
        return True

    async def _settle(self, need: list[float], spent: list[float]) -> None:
        async with self._freed:
            self._in_flight -= 1
            self._reserved = [a - b for a, b in zip(self._reserved, need, strict=True)]
            self._spent = [a + b for a, b in zip(self._spent, spent, strict=True)]
            self._freed.notify_all()

    def _record(self, prompt: Prompt, key: str, answer: Answer) -> dict[str, Any]:
        failure = answer.failure
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
            "sampling": sampling_of(self._identity),
            "usage": answer.usage,
            "cost": self._paid(answer, prompt_tokens, completion_tokens),
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


def _backoff(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt: exponential with jitter, never under the server's wish."""
    error = state.outcome.exception() if state.outcome else None
    wished = error.after if isinstance(error, Retryable) else 0.0
    return max(tenacity.wait_random_exponential(multiplier=1, max=60)(state), wished)


def ask_all(
    prompts: Iterable[Prompt],
    teacher: TeacherConfig,
    store: AnchorStore,
    settings: CollectConfig,
    tick: Callable[[Tally], None],
    open_teacher: OpenTeacher,
) -> Tally:
    """Ask `teacher` for every anchor that `store` lacks and keep each; how it went.

    SIGINT or SIGTERM stops: no more is asked, what is in flight is waited for and kept.
    """

    async def run() -> Tally:
        async with open_teacher(teacher, settings) as black_box:
            collection = Collection(black_box, teacher, store, settings, tick)
            loop, caught = asyncio.get_running_loop(), []
            if threading.current_thread() is threading.main_thread():
                caught = [signal.SIGINT, signal.SIGTERM]

            def stop(number: signal.Signals) -> None:
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


def collect(
    prompts: Callable[[], Iterable[Prompt]],
    teacher: TeacherConfig,
    store: Path,
    settings: CollectConfig,
    *,
    say: Callable[[str], None] = print,
    tick: Callable[[Plan, Tally], None] = lambda plan, tally: None,
    open_teacher: OpenTeacher = open_endpoint,
) -> Tally:
    """Ask `teacher` for each anchor that `store` lacks and say how many it had and asked.

    `prompts` is called twice: once to check them all and to count, before anything is spent.
    Raises what stopped the run early; everything that was answered by then is in the store.
    """
    plan = make_plan(prompts(), teacher, store, retry_failed=settings.retry_failed)
    if not plan.to_ask:
        say(f"{plan.prompts} prompts: had {plan.cached}, asked 0{_left_out(plan.failed)}")
        return Tally(passed=plan.prompts)
    if settings.budget.money is not None and plan.cost is None:
        raise ConfigError(
            "collect.budget.money needs teacher.price.input and teacher.price.output (a million "
            "tokens)"
        )
    book = AnchorStore(store)
    try:
        for repair in book.repairs:
            say(repair)
        tally = ask_all(
            prompts(), teacher, book, settings, lambda tally: tick(plan, tally), open_teacher
        )
    finally:
        book.close()
    failed = sum(tally.failed.values())
    money = "unknown" if tally.cost is None else f"{tally.cost:.4f}"
    say(
        f"{plan.prompts} prompts: had {plan.cached}, asked {tally.asked}: {tally.answered} answered"
        f", {failed} failed {tally.failed or ''}".rstrip()
        + f", {tally.unanswered} without an answer; {tally.requests} requests ({tally.retried} "
        f"failed); {tally.prompt_tokens:.0f} + {tally.completion_tokens:.0f} tokens; cost {money}"
        + _left_out(plan.failed)
    )
    if tally.stopped:
        left = plan.to_ask - tally.answered - failed
        say(f"stopped: {tally.stopped}; at most {left} are left: run the same command to go on")
    if tally.error:
        raise tally.error
    if tally.unanswered and not tally.stopped:
        raise TeacherError(
            f"{tally.unanswered} prompts have no answer after {settings.retries} retries each (the "
            f"last: {tally.trouble}): run the same command again"
        )
    return tally


def _left_out(failed: int) -> str:
    again = "collect.retry_failed=true asks again"
    return f"; {failed} failed before ({again})" if failed else ""


def anchors_for(
    prompts: Sequence[Prompt],
    teacher: TeacherConfig,
    store: Path,
    settings: CollectConfig,
    *,
    say: Callable[[str], None] = print,
    open_teacher: OpenTeacher = open_endpoint,
) -> dict[str, Anchor]:
    """The prompts' anchors by `messages_key`, asking `teacher` for those that `store` lacks.

    Without an endpoint or a local model (replay) the store alone answers, whatever settings it was
    collected under. Prompts that the teacher refused, filtered or answered with nothing are left
    out, and counted aloud.

    Raises `StoreError` naming the prompts that have no anchor, and what `collect` raises.
    """
    if teacher.base_url is None and teacher.path is None:
        anchors = read_anchors(store, teacher.model)
        failed = {messages_key(record["messages"]) for _, record in read_failures(store)}
        had = sum(messages_key(prompt.messages) in anchors for prompt in prompts)
        say(f"{len(prompts)} prompts: had {had}, asked 0")
    else:
        collect(lambda: prompts, teacher, store, settings, say=say, open_teacher=open_teacher)
        wanted = {anchor_key(teacher, prompt.messages) for prompt in prompts}
        anchors = {
            messages_key(record["messages"]): anchor_of(record)
            for _, record in read_records(store)
            if record["key"] in wanted
        }
        failed = {
            messages_key(record["messages"])
            for _, record in read_failures(store)
            if record["key"] in wanted
        }
    lacking = [prompt for prompt in prompts if messages_key(prompt.messages) not in anchors]
    missing = [prompt.id for prompt in lacking if messages_key(prompt.messages) not in failed]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise StoreError(
            f"{store}: {len(missing)} of {len(prompts)} prompts have no anchor ({some}): collect "
            "them with `python -m pujax.collect`"
        )
    if lacking:
        say(f"{len(lacking)} prompts are left out: the teacher gave no usable answer")
    return anchors
