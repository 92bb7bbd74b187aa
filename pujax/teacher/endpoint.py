"""A server that answers chats, over HTTP."""

import asyncio
import email.utils
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from pujax.errors import ConfigError, TeacherError
from pujax.records import Messages
from pujax.teacher.settings import CollectConfig, TeacherConfig


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


class Teacher(Protocol):
    """Anything that answers a chat."""

    async def ask(self, messages: Messages) -> Answer:
        """The answer to `messages`. Raises `Retryable` or `TeacherError`."""
        ...


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


OpenTeacher = Callable[[TeacherConfig, CollectConfig], AbstractAsyncContextManager[Teacher]]


def open_endpoint(teacher: TeacherConfig, settings: CollectConfig) -> HttpTeacher:
    """The server at `teacher.base_url`, with as many connections as may be in flight."""
    return HttpTeacher(teacher, timeout=settings.timeout, connections=settings.concurrency)
