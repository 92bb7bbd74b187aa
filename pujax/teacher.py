"""The black box: messages in, text out, each answer asked for once and kept.

The anchor store is a JSONL file that only grows, one answer a line. Beside `anchors.jsonl` stand
`anchors.failed.jsonl` (answers that were refused, filtered or empty: kept for the record, never
used as anchors) and `anchors.jsonl.lock`. The lock file's bytes are what processes lock (POSIX
record locks, which the kernel drops when a process dies): byte 0 to append, and byte 1 + a number
from the key while that key is being asked, so two processes never ask for the same answer.
"""

import asyncio
import contextlib
import email.utils
import errno
import fcntl
import hashlib
import json
import os
import random
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import httpx
import tenacity
from aiolimiter import AsyncLimiter

from pujax.config import CollectConfig, ConfigError, PriceConfig, TeacherConfig
from pujax.prompts import Digests, Prompt, canonical, messages_key

FORMAT = 1
FIELDS = {"key", "id", "messages", "response", "finish_reason", "model", "usage", "cost", "created"}
BALLAST = 1 << 20  # bytes set aside on the disk for the answers in flight when it is full
CHARS_PER_TOKEN = 4  # to estimate what a black box's tokenizer will count
UNKNOWN_LENGTH = 1024  # tokens to expect of an answer that max_tokens doesn't bound

Messages = Sequence[Mapping[str, str]]


class TeacherError(RuntimeError):
    """The teacher can't be used as it is set: asking again would not help."""


class StoreError(RuntimeError):
    """The anchor store can't be read or written; the message names the file and the remedy."""


class Retryable(RuntimeError):
    """This attempt failed, another may not. `billed`: the teacher may have answered and charged."""

    def __init__(self, reason: str, *, after: float = 0.0, billed: bool = False) -> None:
        super().__init__(reason)
        self.after = after
        self.billed = billed


class Unreachable(Retryable):
    """No connection came about."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the teacher said. `usage` has prompt_tokens and completion_tokens, when it told them."""

    text: str
    finish_reason: str | None = None
    model: str | None = None
    usage: Mapping[str, float] | None = None
    refusal: str | None = None

    @property
    def failure(self) -> str | None:
        """Why this can't be an anchor: refusal, content_filter or empty; None when it can."""
        if self.refusal:
            return "refusal"
        if self.finish_reason == "content_filter":
            return "content_filter"
        return None if self.text.strip() else "empty"


@dataclass(frozen=True, slots=True)
class Anchor:
    """A teacher's answer as training uses it."""

    response: str
    finish_reason: str | None
    model: str | None


class Teacher(Protocol):
    """Anything that answers a chat."""

    async def ask(self, messages: Messages) -> Answer:
        """The answer to `messages`. Raises `Retryable` or `TeacherError`."""
        ...


def anchor_key(teacher: TeacherConfig, messages: Messages) -> str:
    """The sha256 of the teacher's model, its sampling parameters and the messages."""
    asked = {
        "model": teacher.model,
        "sampling": _sampling(teacher),
        "messages": [{"role": turn["role"], "content": turn["content"]} for turn in messages],
    }
    return hashlib.sha256(canonical(asked)).hexdigest()


def _sampling(teacher: TeacherConfig) -> dict[str, Any]:
    """The settings that change what the teacher says."""
    return {
        "system": teacher.system,
        "temperature": None if teacher.temperature is None else float(teacher.temperature),
        "max_tokens": teacher.max_tokens,
        **dict(teacher.extra_body),
    }


# --- the store ------------------------------------------------------------------------------------


def failures_path(store: Path) -> Path:
    """Where the answers of `store` that can't be anchors are kept."""
    return store.with_name(f"{store.stem}.failed{store.suffix}")


def read_failures(store: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of the answers that can't be anchors; none when there is no such file."""
    file = failures_path(store)
    return read_records(file) if file.exists() else iter(())


def read_records(path: Path, start: int = 0, line: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each whole record from byte `start` on, with the byte after it; a torn tail is left out.

    Raises `StoreError` for a record of another format or a line that isn't one.
    """
    try:
        with path.open("rb") as lines:
            lines.seek(start)
            for number, raw in enumerate(lines, line):
                if not raw.endswith(b"\n"):
                    return
                start += len(raw)
                yield start, _record(raw, path, number if line else None)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}: check `store`") from error


def _record(raw: bytes, path: Path, number: int | None) -> dict[str, Any]:
    place = f"{path}:{number}" if number else str(path)
    try:
        record = json.loads(raw)
        found = record["format"] if isinstance(record, dict) else None
    except KeyError:
        found = None
    except ValueError as error:
        raise StoreError(f"{place}: not a record ({error}): take this line out") from error
    if found != FORMAT:
        raise StoreError(
            f"{place}: store format {found}, this pujax has format {FORMAT}: "
            "collect into another file, or use the pujax that wrote it"
        )
    lacking = FIELDS - record.keys()
    if lacking or not re.fullmatch("[0-9a-f]{64}", record["key"]):
        what = f"without {sorted(lacking)}" if lacking else f"with key {record['key']!r}"
        raise StoreError(f"{place}: a record {what}: take this line out")
    return record


class AnchorStore:
    """The anchors in `path`, open for collecting by this process and others at the same time.

    `answered` and `failed` hold the first half of each key. Opening mends a torn tail and tells of
    it in `repairs`. One process opens a store once: its record locks are the process's own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.repairs: list[str] = []
        self.full = False
        self._read = dict.fromkeys((path, failures_path(path)), 0)
        self._files: dict[Path, int] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _open(path.with_name(path.name + ".lock"))
            self._ballast, name = tempfile.mkstemp(dir=path.parent)
            os.unlink(name)  # so the space comes back when the process ends, however it ends
            with contextlib.suppress(OSError):  # a disk that is full already
                os.write(self._ballast, bytes(BALLAST))
            with self._locked():
                self._files[path] = _open(path)
                for file in self._read:
                    if file.exists():
                        self._mend(file)
            _sync_folder(path.parent)
        except OSError as error:
            raise StoreError(
                f"{path}: can't open the store for writing: {error.strerror}: choose another "
                "`store`, or mend the permissions"
            ) from error
        self.answered = Digests()
        self.failed = Digests()
        self._known = {path: self.answered, failures_path(path): self.failed}
        try:
            self.refresh()
        except StoreError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the files and of every claim."""
        for known in self._known.values():
            known.close()
        for descriptor in (*self._files.values(), self._lock, self._ballast):
            os.close(descriptor)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, 0)

    def _mend(self, file: Path) -> None:
        """End the file with a whole line: under the lock nobody is in the middle of writing one."""
        descriptor = self._descriptor(file)
        size = os.fstat(descriptor).st_size
        tail, start = b"", size
        while start and b"\n" not in tail:
            start = max(0, start - 65536)
            tail = os.pread(descriptor, size - start, start)
        torn = tail[tail.rfind(b"\n") + 1 :]
        if not torn:
            return
        with contextlib.suppress(StoreError):
            _record(torn, file, None)
            os.write(descriptor, b"\n")
            os.fsync(descriptor)
            self.repairs.append(f"{file}: ended the last record, which lacked its newline")
            return
        os.ftruncate(descriptor, size - len(torn))
        os.fsync(descriptor)
        self.repairs.append(f"{file}: cut off a torn last line of {len(torn)} bytes, to ask again")

    def _descriptor(self, file: Path) -> int:
        """The open file; most stores never have failures, so theirs is made when one comes."""
        if file not in self._files:
            self._files[file] = _open(file)
            _sync_folder(file.parent)
        return self._files[file]

    def refresh(self) -> None:
        """Take in what this process and others have written since the last time."""
        for file, known in self._known.items():
            start = self._read[file]
            if file.exists() and file.stat().st_size > start:
                for end, record in read_records(file, start, 1 if start == 0 else 0):
                    known.put(_digest(record["key"]))
                    self._read[file] = end

    def claim(self, key: str) -> bool:
        """Whether this process may ask for `key`: False while another one is asking."""
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _claim_byte(key))
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise StoreError(f"{self.path}: no file locks here: {error.strerror}") from error
        return True

    def release(self, key: str) -> None:
        """Give up the claim on `key`."""
        fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, _claim_byte(key))

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Put the records on the disk: a `reason` sends one to the failures. Returns after fsync.

        When the disk is full the space set aside for this moment is used, and `full` becomes true.
        Raises `StoreError` when even that does not help; whole lines stay, nothing torn does.
        """
        file = self.path
        try:
            with self._locked():
                for file in self._known:
                    failures = file != self.path
                    lines = [
                        _line(record) for record in records if ("reason" in record) == failures
                    ]
                    if lines:
                        descriptor = self._descriptor(file)
                        self._write(descriptor, b"".join(lines))
                        os.fsync(descriptor)
        except OSError as error:
            raise StoreError(
                f"{file}: can't write: {error.strerror}: make room, run the same command again"
            ) from error

    def _write(self, descriptor: int, data: bytes) -> None:
        start = os.fstat(descriptor).st_size
        written, freed = 0, False
        try:
            while written < len(data):
                try:
                    written += os.write(descriptor, data[written:])
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or freed:
                        raise
                    freed = True
                    os.ftruncate(self._ballast, 0)
            self.full = self.full or freed
        finally:
            if written < len(data):
                os.ftruncate(descriptor, start + data[:written].rfind(b"\n") + 1)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def _sync_folder(path: Path) -> None:
    """Make the names of new files durable too."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _digest(key: str) -> bytes:
    """The first half of a key: enough to tell the keys of any store apart."""
    return bytes.fromhex(key[:32])


def _claim_byte(key: str) -> int:
    return 1 + int(key[:15], 16)


def _line(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate: legal in JSON, not in UTF-8
        return json.dumps(record).encode() + b"\n"


def read_anchors(path: Path, model: str | None = None) -> dict[str, Anchor]:
    """The anchors of a store by `messages_key`, for replay; of `model`'s alone when it is given.

    Where one model answered the same messages under several settings the newest answer counts.
    Raises `StoreError` when there is no store, or when two models answered the same messages.
    """
    if not path.is_file():
        raise StoreError(f"{path}: no such store: collect it with `python -m pujax.collect`")
    anchors: dict[str, Anchor] = {}
    for _, record in read_records(path):
        if model is not None and record["model"] != model:
            continue
        key = messages_key(record["messages"])
        if key in anchors and anchors[key].model != record["model"]:
            raise StoreError(
                f"{path}: {anchors[key].model!r} and {record['model']!r} both answered the same "
                "prompt: choose one with teacher.model"
            )
        anchors[key] = _anchor(record)
    return anchors


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


class HttpTeacher:
    """A server that speaks the OpenAI chat-completions protocol, over connections kept alive.

    Proxies and certificates come from the environment (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE). Use
    it as an async context manager.
    """

    def __init__(self, settings: TeacherConfig, *, timeout: float, connections: int) -> None:
        self._settings = settings
        self._timeout = timeout
        self._secrets: list[str] = []
        headers = {name: self._header(name, value) for name, value in settings.headers.items()}
        if settings.api_key_env is not None:
            headers["Authorization"] = f"Bearer {self._secret(settings.api_key_env)}"
        self._url = str(settings.base_url).rstrip("/") + "/chat/completions"
        # A pool does work quadratic in its connections for each request (httpcore 1.0): 64 requests
        # in flight cost 5 ms each in one pool of 64 connections, and 0.8 ms in 64 pools of one.
        certificates = httpx.create_ssl_context()
        self._idle: asyncio.LifoQueue[httpx.AsyncClient] = asyncio.LifoQueue()
        for _ in range(connections):
            client = httpx.AsyncClient(
                headers=headers,
                http2=True,
                verify=certificates,
                timeout=httpx.Timeout(timeout, pool=None),
                limits=httpx.Limits(max_connections=1, max_keepalive_connections=1),
            )
            self._idle.put_nowait(client)

    async def __aenter__(self) -> "HttpTeacher":
        return self

    async def __aexit__(self, *_: object) -> None:
        while not self._idle.empty():
            await self._idle.get_nowait().aclose()

    def _header(self, name: str, value: str) -> str:
        return self._secret(value[4:]) if value.startswith("env:") else value

    def _secret(self, variable: str) -> str:
        value = os.environ.get(variable, "").strip()
        if not value:
            raise ConfigError(f"environment variable {variable} is not set: put the key there")
        self._secrets.append(value)
        return value

    def _clean(self, text: str) -> str:
        """One short line of `text`, without the keys: servers quote them back."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())[:300]

    async def ask(self, messages: Messages) -> Answer:
        """The first choice of one request. Raises `Retryable` or `TeacherError`."""
        settings = self._settings
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": with_system(settings.system, messages),
            **settings.extra_body,
        }
        for name in ("temperature", "max_tokens"):
            if getattr(settings, name) is not None:
                body[name] = getattr(settings, name)
        client = await self._idle.get()
        try:
            async with asyncio.timeout(self._timeout):  # the client's own starts anew a chunk
                response = await client.post(self._url, json=body)
        except (TimeoutError, httpx.TimeoutException) as error:
            if isinstance(error, httpx.ConnectTimeout):
                raise Unreachable(f"{self._url}: no connection in {self._timeout:g} s") from error
            raise Retryable(f"no answer in {self._timeout:g} s", billed=True) from error
        except (httpx.ConnectError, httpx.ProxyError) as error:
            raise Unreachable(self._clean(f"{self._url}: can't connect: {error}")) from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise TeacherError(self._clean(f"{self._url}: {error}")) from error
        except httpx.HTTPError as error:
            reason = self._clean(f"connection broke: {error or type(error).__name__}")
            raise Retryable(reason, billed=True) from error
        finally:
            self._idle.put_nowait(client)
        return self._read(response)

    def _read(self, response: httpx.Response) -> Answer:
        try:
            body = response.json()
        except ValueError as error:
            if response.is_success:
                raise Retryable("the answer is not JSON", billed=True) from error
            body = None
        fault = body.get("error") if isinstance(body, dict) else None
        if fault or not response.is_success:
            return self._fault(response, fault)
        try:
            return _answer(body)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Retryable("the answer is not a chat completion", billed=True) from error

    def _fault(self, response: httpx.Response, fault: Any) -> Answer:
        """What an error means: a failed answer, another try, or the end."""
        status = response.status_code
        code = fault.get("code") if isinstance(fault, dict) else None
        if response.is_success and isinstance(code, int):  # an error in the body alone (OpenRouter)
            status = code
        said = fault.get("message") if isinstance(fault, dict) else fault
        said = self._clean(str(said or response.text or response.reason_phrase))
        if code == "content_filter":  # Azure answers so when it filters the prompt
            return Answer("", finish_reason="content_filter")
        wait = status in (408, 409, 429) or status >= 500
        if (wait and code != "insufficient_quota") or status == 200:
            raise Retryable(f"{status}: {said}", after=_retry_after(response))
        remedies = {
            401: f"check the key in {self._settings.api_key_env or 'teacher.api_key_env'}",
            403: f"may the key in {self._settings.api_key_env or 'teacher.api_key_env'} do this?",
            404: f"check teacher.base_url and teacher.model={self._settings.model}",
        }
        other = "teacher.base_url" if status < 400 else "teacher.model and its parameters"
        remedy = remedies.get(status, f"check {other}")
        raise TeacherError(f"{self._url} answered {status}: {said}: {remedy}")


def _answer(body: Any) -> Answer:
    """The first choice of a chat completion. Raises what indexing raises when it isn't one."""
    choice = body["choices"][0]
    message, usage = choice["message"], body.get("usage")
    counts = ("prompt_tokens", "completion_tokens", "cost")
    if isinstance(usage, dict):
        usage = {name: usage[name] for name in counts if isinstance(usage.get(name), int | float)}
    return Answer(
        text=_plain(message.get("content")),
        finish_reason=choice.get("finish_reason"),
        model=body.get("model"),
        usage=usage or None,
        refusal=message.get("refusal"),
    )


def with_system(system: str | None, messages: Messages) -> list[dict[str, str]]:
    """The turns as sent: many servers allow one system message alone, and only at the start."""
    turns = [dict(turn) for turn in messages]
    if system is None:
        return turns
    if turns[0]["role"] == "system":
        return [{"role": "system", "content": f"{system}\n\n{turns[0]['content']}"}, *turns[1:]]
    return [{"role": "system", "content": system}, *turns]


def _plain(content: Any) -> str:
    """The text of a message's content, which some servers send in parts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError(type(content).__name__)
    return content or ""


def _retry_after(response: httpx.Response) -> float:
    """The seconds that the server asks to wait: it may give them, or a date."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


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
                known.put(_digest(record["key"]), b"cached")
        for _, record in read_failures(store):
            if not retry_failed:
                known.put(_digest(record["key"]), b"failed")
        for prompt in prompts:
            count["prompts"] += 1
            key = anchor_key(teacher, prompt.messages)
            found = known.put(_digest(key), b"duplicates")
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
        digest = _digest(key)
        if digest in self._store.answered or digest in self._failed_now:
            return False
        return self._settings.retry_failed or digest not in self._store.failed

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
            self._failed_now.add(_digest(key))
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
            "sampling": _sampling(self._identity),
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


OpenTeacher = Callable[[TeacherConfig, CollectConfig], AbstractAsyncContextManager[Teacher]]


def open_endpoint(teacher: TeacherConfig, settings: CollectConfig) -> HttpTeacher:
    """The server at `teacher.base_url`, with as many connections as may be in flight."""
    return HttpTeacher(teacher, timeout=settings.timeout, connections=settings.concurrency)


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
            messages_key(record["messages"]): _anchor(record)
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


def _anchor(record: dict[str, Any]) -> Anchor:
    return Anchor(record["response"], record["finish_reason"], record["model"])
