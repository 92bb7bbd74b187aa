"""A server that answers chats, over HTTP."""

import asyncio
import codecs
import email.utils
import ipaddress
import json
import math
import os
import re
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

import httpx

from pujax.errors import PujaxError, Rejected, TeacherError, Unread, name_of, raised_in
from pujax.records import Messages
from pujax.teacher.protocols import (
    Answer,
    AnswerFn,
    RequestFn,
    Retryable,
    Teacher,
    Unreachable,
    openai_answer,
    openai_request,
)
from pujax.teacher.secrets import Secrets
from pujax.teacher.settings import CollectConfig, TeacherConfig

if find_spec("sniffio") is None:
    # httpcore tries this import again for every lock, in all of the path: a tenth of a request.
    modules: dict[str, Any] = sys.modules
    modules["sniffio"] = None  # which makes it fail at once

LONGEST = 1 << 24  # bytes that an answer may have, unpacked; the longest real ones have 1 % of it

MEMBERS = 64  # parts of a gzip body: for each one all that follows is copied

CHARSETS = frozenset(
    {
        "ascii",
        "big5",
        "cp1252",
        "euc_jp",
        "euc_kr",
        "gb18030",
        "gb2312",
        "gbk",
        "iso8859-1",
        "iso8859-15",
        "shift_jis",
    }
)
"""Python's names for the charsets that are read beside Unicode's.

Of the others some are no charsets, and some take time quadratic in the length (punycode).
"""

CHARSET = re.compile(r";\s*charset\s*=\s*[\"']?([a-z0-9_.:-]{1,40})", re.IGNORECASE | re.ASCII)
"""Where a content type names it.

Python's own reading of such a header (`email`) also takes `charset*=`, which nobody sends: it may
raise anything there, and decodes the value in a charset of the sender's choice.
"""

ABOUT_ALL = {
    "account_deactivated": 401,
    "authentication_error": 401,
    "billing_error": 402,
    "billing_hard_limit_reached": 402,
    "billing_not_active": 402,
    "insufficient_quota": 402,
    "invalid_api_key": 401,
    "invalid_authentication": 401,
    "model_not_found": 404,
    "not_found_error": 404,
    "unauthenticated": 401,
}
"""Errors that every prompt would meet, with the status that goes with them."""

ABOUT_PROMPT = frozenset(
    {
        "content_policy_violation",
        "context_length_exceeded",
        "data_inspection_failed",
        "invalid_prompt",
        "request_too_large",
        "string_above_max_length",
    }
)
"""Errors that say that one prompt is why."""


class HttpTeacher:
    """A server that is asked with `request` and whose replies `answer` reads.

    Connections are kept alive. Proxies and certificates come from the environment (HTTPS_PROXY,
    NO_PROXY, SSL_CERT_FILE) where the address needs them. Use it as an async context manager.
    Raises `ConfigError` and `TeacherError` for what is wrong in the environment.
    """

    def __init__(
        self,
        settings: TeacherConfig,
        *,
        timeout: float,
        connections: int,
        request: RequestFn = openai_request,
        answer: AnswerFn = openai_answer,
    ) -> None:
        self._settings = settings
        self._timeout = timeout
        self._request, self._answer = request, answer
        self._secrets = Secrets()
        headers = headers_of(settings, self._secrets)
        address = urlsplit(str(settings.base_url))
        self._url = urlunsplit(address)
        variable, proxy = _proxy(address)
        # A pool does work quadratic in its connections for each request (httpcore 1.0): 64 requests
        # in flight cost 5 ms each in one pool of 64 connections, and 0.8 ms in 64 pools of one.
        self._idle: asyncio.LifoQueue[httpx.AsyncClient] = asyncio.LifoQueue()
        certificates = _certificates(address, proxy)
        try:
            for _ in range(connections):
                client = httpx.AsyncClient(
                    headers=headers,
                    http2=True,
                    verify=certificates,
                    proxy=proxy,
                    trust_env=False,
                    timeout=httpx.Timeout(timeout, pool=None),
                    limits=httpx.Limits(max_connections=1, max_keepalive_connections=1),
                )
                self._idle.put_nowait(client)
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            if variable is None:
                raise TeacherError(self._secrets.clean(f"{self._url}: {error}")) from error
            scheme = str(proxy).partition("://")[0]
            raise TeacherError(  # its value may hold a password
                f"environment variable {variable}: can't use this {scheme} proxy: unset it, set an "
                f"http:// one, or add {address.hostname} to NO_PROXY"
            ) from error

    async def __aenter__(self) -> "HttpTeacher":
        return self

    async def __aexit__(self, *_: object) -> None:
        while not self._idle.empty():
            await self._idle.get_nowait().aclose()

    async def ask(self, messages: Messages) -> Answer:
        """The answer to one request. Raises `Retryable` or `TeacherError`."""
        path, body = self._asked(messages)
        self._url = url = _joined(str(self._settings.base_url), path)
        clean = self._secrets.clean
        client = await self._idle.get()
        try:
            async with (
                asyncio.timeout(self._timeout),  # the client's own starts anew a chunk
                client.stream("POST", url, json=body) as response,
            ):
                data = await _whole(response)
            if _sent_more(client):
                await response.extensions["network_stream"].aclose()
        except (TimeoutError, httpx.TimeoutException) as error:
            if isinstance(error, httpx.ConnectTimeout):
                raise Unreachable(f"{url}: no connection in {self._timeout:g} s") from error
            raise Retryable(f"no answer in {self._timeout:g} s", billed=True) from error
        except (httpx.ConnectError, httpx.ProxyError) as error:
            raise Unreachable(
                clean(f"{url}: can't connect: {str(error) or type(error).__name__}")
            ) from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, ValueError) as error:
            raise TeacherError(clean(f"{url}: {error}")) from error
        except httpx.HTTPError as error:
            reason = clean(f"connection broke: {str(error) or type(error).__name__}")
            raise Retryable(reason, billed=True) from error
        finally:
            self._idle.put_nowait(client)
        return self._read(response, data)

    def _asked(self, messages: Messages) -> tuple[str, dict[str, Any]]:
        """What is sent. Raises `TeacherError` for a function of the user's own that fails."""
        wanted = "want the path after base_url and the body, as in ('/chat', {...})"
        try:
            made: Any = self._request(self._settings, messages)
        except Exception as error:
            if isinstance(error, PujaxError) or not _is_own(self._request):
                raise
            said = f"{raised_in(self._request, error)}; it takes (teacher, messages): {wanted}"
            raise TeacherError(self._secrets.clean(said)) from error
        if not isinstance(made, tuple) or [type(part) for part in made] != [str, dict]:
            kind = type(made).__name__
            raise TeacherError(f"{name_of(self._request)} returned a {kind}: {wanted}")
        return made

    def _answered(self, body: Any) -> Answer:
        """The answer by a function of the user's own. Raises `Unread` where it makes none."""
        keys = list(body)[:20] if isinstance(body, dict) else type(body).__name__
        wanted = f"want a pujax.teacher.protocols.Answer; the reply has {keys}"
        try:
            made: Any = self._answer(body)
        except (PujaxError, Retryable):
            raise
        except Exception as error:
            said = f"{raised_in(self._answer, error)}: {wanted}"
            raise Unread(self._secrets.clean(said)) from error
        if not isinstance(made, Answer):
            said = f"{name_of(self._answer)} returned a {type(made).__name__}: {wanted}"
            raise Unread(self._secrets.clean(said))
        for name in ("text", "finish_reason", "model", "refusal"):
            value = getattr(made, name)
            if not isinstance(value, str) and (name == "text" or value is not None):
                kind = type(value).__name__
                said = (
                    f"{name_of(self._answer)} returned an Answer whose {name} is {kind}: {wanted}"
                )
                raise Unread(self._secrets.clean(said))
        return made

    def _read(self, response: httpx.Response, data: bytes) -> Answer:
        text = _text(response, data)
        try:
            body = json.loads(text, parse_int=_number)
        except (ValueError, RecursionError) as error:
            if response.is_success and re.match(r"\s*(event|data|id|retry)?:", text):
                raise TeacherError(
                    f"{self._url}: streams its answers: set +teacher.extra_body.stream=false, or "
                    "choose a server that sends them whole"
                ) from error
            if response.is_success:
                raise Retryable("the answer is not JSON", billed=True) from error
            body = None
        fault = body.get("error") if isinstance(body, dict) else None
        if fault or not response.is_success:
            return self._fault(response, fault, text)
        if _is_own(self._answer):
            return self._redacted(self._answered(body))
        try:
            return self._redacted(self._answer(body))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Retryable("the answer is not one of this protocol", billed=True) from error

    def _redacted(self, answer: Answer) -> Answer:
        """The answer; one that quotes a secret can't be an anchor, and is kept without it."""
        said = (answer.text, answer.finish_reason, answer.model, answer.refusal)
        text, reason, model, refusal = (one and self._secrets.mask(one) for one in said)
        if (text, reason, model, refusal) == said:
            return answer
        return replace(
            answer,
            text=text or "",
            finish_reason=reason,
            model=model,
            refusal=refusal,
            holds_key=True,
        )

    def _fault(self, response: httpx.Response, fault: Any, text: str) -> Answer:
        """What an error means: a failed answer, another try, or the end."""
        status = response.status_code
        told = fault if isinstance(fault, dict) else {"message": fault}
        codes = [str(told[key]).lower() for key in ("code", "type", "status") if told.get(key)]
        if "content_filter" in codes:  # Azure answers so when it filters the prompt
            return Answer("", finish_reason="content_filter")
        if response.is_success:  # an error in the body alone (OpenRouter)
            numbers = [int(code) for code in codes if code.isdecimal() and len(code) == 3]
            status = numbers[0] if numbers else status
        status = next((ABOUT_ALL[code] for code in codes if code in ABOUT_ALL), status)
        words = (told.get("message"), text, response.reason_phrase, "and no reason")
        plain = (self._secrets.clean(each) for each in words if isinstance(each, str))
        said = next(each for each in plain if each.strip())
        if status in (200, 408, 409, 425, 429) or status >= 500:
            busy = status in (429, 503, 529)
            raise Retryable(f"{status}: {said}", after=_retry_after(response), busy=busy)
        key = self._settings.api_key_env or "teacher.api_key_env"
        remedies = {
            401: f"check the key in {key}",
            402: f"check the account of the key in {key}",
            403: f"may the key in {key} do this?",
            404: f"check teacher.base_url and teacher.model={self._settings.model}",
        }
        other = "teacher.model and its parameters, or this prompt"
        remedy = remedies.get(status, f"check {'teacher.base_url' if status < 400 else other}")
        shown = status if response.is_success else response.status_code
        certain = status == 413 or not ABOUT_PROMPT.isdisjoint(codes)
        if certain and status not in remedies:
            remedy = "this prompt is why: change it or leave it out"
        line = f"{self._url} answered {shown}: {said}: {remedy}"
        if status < 400 or status in (401, 402, 404, 405, 407, 410):
            raise TeacherError(line)
        raise Rejected(line, certain=certain)


def _is_own(function: Callable[..., Any]) -> bool:
    """Whether a function is the user's own and not one of pujax."""
    return not name_of(function).startswith("pujax.")


def _sent_more(client: httpx.AsyncClient) -> bool:
    """Whether more came than the answer, which would be taken for that to the next request.

    httpcore closes a connection on which something comes between two requests, but keeps what came
    in one piece with an answer, and shows it nowhere.
    """
    transports = [client._transport, *client._mounts.values()]
    # By getattr, since none of these names is promised: where one has changed, nothing is seen.
    pools = [getattr(transport, "_pool", None) for transport in transports]
    for connection in (one for pool in pools for one in getattr(pool, "connections", ())):
        while (inner := getattr(connection, "_connection", None)) is not None:
            connection = inner
        state = getattr(connection, "_h11_state", None)  # HTTP/2 says which request each answers
        if getattr(state, "trailing_data", (b"",))[0]:
            return True
    return False


async def _whole(response: httpx.Response) -> bytes:
    """The body, unpacked, of at most `LONGEST` bytes at each moment. Raises `Retryable`."""
    parts, size = [], 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > LONGEST:
            raise Retryable(f"the answer has more than {LONGEST >> 20} MiB", billed=True)
        parts.append(part)
    data = b"".join(parts)
    packed = response.headers.get("content-encoding", "").strip().lower()
    if packed in ("", "identity"):
        return data
    if packed not in ("gzip", "x-gzip", "deflate"):
        raise Retryable("the answer is packed in a way that was not asked for", billed=True)
    return _unpacked(data)


def _unpacked(data: bytes) -> bytes:
    """The whole of a gzip body, which may have several members, or of a zlib one."""
    parts, left = [], LONGEST
    while data:
        header = zlib.MAX_WBITS | (16 if parts else 32)  # first gzip's or zlib's, then gzip's
        unpacking = zlib.decompressobj(header)
        try:
            parts.append(unpacking.decompress(data, left + 1))
        except zlib.error as error:
            raise Retryable("the answer can't be unpacked", billed=True) from error
        if len(parts) > MEMBERS:
            raise Retryable(f"the answer is packed in more than {MEMBERS} parts", billed=True)
        left -= len(parts[-1])
        if left < 0 or not unpacking.eof:
            why = f"the answer is torn, or has more than {LONGEST >> 20} MiB"
            raise Retryable(why, billed=True)
        data = unpacking.unused_data
    return b"".join(parts)


def _text(response: httpx.Response, data: bytes) -> str:
    """The body in the charset that the server names; else as JSON is, in UTF-8."""
    named = CHARSET.search(response.headers.get("content-type", ""))
    try:
        if named is not None and codecs.lookup(named[1]).name in CHARSETS:
            return data.decode(named[1])
    except (LookupError, ValueError):  # servers name charsets that aren't, or aren't theirs
        pass
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding, "surrogatepass")
    except UnicodeDecodeError as error:
        if response.is_success:
            raise Retryable("the answer is not UTF-8", billed=True) from error
        return data.decode(encoding, "replace")


def _number(digits: str) -> float:
    """A whole number; one of more digits than Python reads is endless, and spoils no answer."""
    return int(digits) if len(digits) <= 400 else math.inf


def _joined(base_url: str, path: str) -> str:
    """The address of `path`: the query of `base_url` stays at the end, a path isn't doubled."""
    base = urlsplit(base_url)
    before = base.path.rstrip("/").removesuffix(path)
    return urlunsplit(base._replace(path=before + path, fragment=""))


def _proxy(address: SplitResult) -> tuple[str | None, str | None]:
    """The environment variable whose proxy this address needs, and the proxy."""
    host = address.hostname or ""
    if _is_loopback(host) or urllib.request.proxy_bypass(host) or _in_no_proxy(host):
        return None, None
    proxies = urllib.request.getproxies()
    for scheme in (address.scheme, "all"):
        proxy = proxies.get(scheme)
        if proxy:
            names = (f"{scheme}_proxy", f"{scheme}_PROXY".upper())
            variable = next((name for name in names if os.environ.get(name)), names[1])
            return variable, proxy if "://" in proxy else f"http://{proxy}"
    return None, None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _in_no_proxy(host: str) -> bool:
    """Whether NO_PROXY has a network (10.0.0.0/8) that holds the host, which urllib can't tell."""
    for entry in urllib.request.getproxies().get("no", "").split(","):
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip(), strict=False):
                return True
        except ValueError:
            continue
    return False


def _certificates(address: SplitResult, proxy: str | None) -> Any:
    """What checks the server's certificate, where there is one. Raises `TeacherError`."""
    if "https" not in (address.scheme, str(proxy).partition("://")[0]):
        return False
    try:
        return httpx.create_ssl_context()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        set_here = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
        named = ", ".join(f"{name}={os.environ[name]}" for name in set_here) or "certificates"
        raise TeacherError(f"{named}: {error}: name a file of certificates, or unset it") from error


def _retry_after(response: httpx.Response) -> float:
    """The seconds that the server asks to wait, perhaps inf: it may give them, or a date."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


OpenTeacher = Callable[[TeacherConfig, CollectConfig], AbstractAsyncContextManager[Teacher]]
"""What `teacher.protocol` names.

One that computes on this process's devices, and so can't answer in one of several processes of a
run, has an attribute `on_device` that is true.
"""


def on_device(teacher: TeacherConfig) -> bool:
    """Whether the teacher says that it computes on this process's devices."""
    opener = getattr(teacher.protocol, "func", teacher.protocol)
    return getattr(opener, "on_device", False)


def headers_of(teacher: TeacherConfig, secrets: Secrets) -> httpx.Headers:
    """What is sent with every request. Raises `ConfigError` for a key that is not there."""
    headers = httpx.Headers({"Accept-Encoding": "gzip"})  # in which authorization is one name
    headers.update(secrets.headers(teacher.headers))
    if teacher.api_key_env is not None:
        headers["Authorization"] = f"Bearer {secrets.read(teacher.api_key_env)}"
    return headers


def open_endpoint(
    teacher: TeacherConfig,
    settings: CollectConfig,
    *,
    request: RequestFn = openai_request,
    answer: AnswerFn = openai_answer,
) -> HttpTeacher:
    """The server at `teacher.base_url`, with as many connections as may be in flight.

    Settings:
        request: from a prompt's messages to what is sent.
        answer: from what came back to the answer.
    """
    return HttpTeacher(
        teacher,
        timeout=settings.timeout,
        connections=settings.concurrency,
        request=request,
        answer=answer,
    )
