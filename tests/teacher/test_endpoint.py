import asyncio
import contextlib
import gzip
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import zlib
from pathlib import Path
from urllib.parse import quote, urlsplit

import h2.config
import h2.connection
import h2.events
import httpx
import pytest
from omegaconf import OmegaConf

from pujax.config.compose import conf_dir
from pujax.config.functions import build
from pujax.errors import ConfigError, TeacherError, Unread
from pujax.teacher import endpoint
from pujax.teacher.protocols import Answer, Retryable, anthropic_answer, anthropic_request
from pujax.teacher.settings import CollectConfig, TeacherConfig
from tests.teacher_client import KEY, TURN, ask, at, error
from tests.teacher_server import completion


def test_the_request_carries_the_settings_and_the_key(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    monkeypatch.setenv("OTHER", "o-key")
    settings = at(
        server,
        system="Be brief.",
        temperature=0.0,
        extra_body={"seed": 7},
        api_key_env="MY_KEY",
        headers={"x-title": "p", "x-secret": "env:OTHER"},
    )
    assert ask(settings) == Answer(
        "answer to Hi", "stop", "served-model", {"prompt_tokens": 10, "completion_tokens": 5}
    )
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.body == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, TURN],
        "temperature": 0.0,
        "max_tokens": 8,
        "seed": 7,
    }
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert (request.headers["x-title"], request.headers["x-secret"]) == ("p", "o-key")


def test_settings_that_are_null_are_not_sent(server):
    ask(at(server, max_tokens=None))
    assert server.requests[0].body == {"model": "m", "messages": [TURN]}
    assert "authorization" not in server.requests[0].headers


def test_the_teachers_system_goes_before_the_prompts_own_in_one_message(server):
    ask(at(server, system="A"), [{"role": "system", "content": "B"}, TURN])
    assert server.requests[0].body["messages"] == [{"role": "system", "content": "A\n\nB"}, TURN]


def test_text_that_comes_in_parts_is_joined(server):
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    server.reply = lambda request: (200, {}, completion(None) | _choice(content=parts))
    assert ask(at(server)).text == "ab"


def _choice(**message):
    return {"choices": [{"message": message, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((200, {}, completion("no", refusal="I won't")), "refusal"),
        ((200, {}, completion("half", finish_reason="content_filter")), "content_filter"),
        ((200, {}, completion(" \n")), "empty"),
        ((200, {}, completion(None)), "empty"),
        ((200, {}, completion("\u200b\ufeff \u2060")), "empty"),
        ((200, {}, completion("Let me look.", finish_reason="tool_calls")), "tool_calls"),
        ((200, {}, completion("Let me look.", finish_reason="function_call")), "tool_calls"),
        ((200, {}, completion("Let me look.", tool_calls=[{"id": "1"}])), "tool_calls"),
        ((200, {}, completion("No tool.", tool_calls=[])), None),
        (error(400, code="content_filter"), "content_filter"),
        ((200, {}, completion("cut", finish_reason="length")), None),
    ],
)
def test_what_can_not_be_an_anchor_has_a_reason(server, reply, reason):
    server.reply = lambda request: reply
    assert ask(at(server)).failure == reason


@pytest.mark.parametrize(
    "reply",
    [
        *(error(status) for status in (408, 409, 429, 500, 502, 503, 529)),
        (200, {}, b"{"),
        (200, {}, {"choices": []}),
        (200, {}, ["no"]),
        (200, {}, {"error": "busy"}),
        (200, {}, {"error": {"code": 502, "message": "upstream"}}),
    ],
)
def test_what_may_pass_is_worth_another_try(server, reply):
    server.reply = lambda request: reply
    with pytest.raises(Retryable):
        ask(at(server))


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (error(401, "bad key"), "401: bad key: check the key in teacher.api_key_env"),
        (error(403, "not yours"), "403: not yours"),
        (error(404, "no model m"), "404: no model m: check teacher.base_url and teacher.model=m"),
        (error(400, "too long"), "400: too long"),
        (error(429, "pay first", code="insufficient_quota"), "429: pay first"),
        ((302, {"location": "/"}, b""), "302: .*check teacher.base_url"),
        ((404, {}, b"<h1>nothing\nhere</h1>"), "404: <h1>nothing here</h1>"),
        ((200, {}, {"error": {"code": 401, "message": "bad key"}}), "401: bad key"),
    ],
)
def test_what_will_not_pass_stops_with_the_servers_words(server, reply, said):
    server.reply = lambda request: reply
    with pytest.raises(TeacherError, match=said):
        ask(at(server))


def test_retry_after_is_seconds_or_a_date(server):
    for value, low, high in (
        ("7", 7, 7),
        ("Wed, 21 Oct 2099 07:28:00 GMT", 1e8, 1e10),
        ("x", 0, 0),
    ):
        server.reply = lambda request, value=value: error(429, **{"retry-after": value})
        with pytest.raises(Retryable) as caught:
            ask(at(server))
        assert low <= caught.value.after <= high


def test_a_key_that_the_server_quotes_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    server.reply = lambda request: error(401, f"wrong key {KEY}!")
    with pytest.raises(TeacherError) as caught:
        ask(at(server, api_key_env="MY_KEY"))
    assert KEY not in str(caught.value)
    assert "wrong key ***!" in str(caught.value)


def test_a_key_that_is_not_set_names_its_variable(server, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="MY_KEY is not set"):
        ask(at(server, api_key_env="MY_KEY"))


def test_a_key_in_place_of_its_variables_name_is_not_shown():
    with pytest.raises(ConfigError) as first:
        TeacherConfig(api_key_env=KEY)
    with pytest.raises(ConfigError) as second:
        TeacherConfig(base_url=f"https://u:{KEY}@host/v1", model="m")
    assert KEY not in f"{first.value} {second.value}"


def test_proxies_come_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
    monkeypatch.setenv("NO_PROXY", "")
    ask(TeacherConfig(base_url="http://teacher.invalid/v1", model="m"))
    assert server.requests[0].path == "http://teacher.invalid/v1/chat/completions"


@pytest.fixture
def http2_server(tmp_path):
    """The address of a TLS server that speaks HTTP/2 alone, and its certificate's file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext"
    make += " subjectAltName=DNS:localhost"
    files = ["-keyout", key, "-out", certificate]
    subprocess.run([openssl, *make.split(), *files], check=True, capture_output=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    tls.set_alpn_protocols(["h2"])
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve_http2, args=[listener, tls])
    thread.start()
    yield f"https://localhost:{listener.getsockname()[1]}/v1", certificate
    listener.shutdown(socket.SHUT_RDWR)  # closing alone would not end a waiting accept
    thread.join()
    listener.close()


def serve_http2(listener, tls):
    """Answer every request on every connection, one connection after another."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with (
            contextlib.closing(connection),
            contextlib.suppress(OSError),
            tls.wrap_socket(connection, server_side=True) as wire,
        ):
            http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
            http.initiate_connection()
            wire.sendall(http.data_to_send())
            while data := wire.recv(65536):
                for event in http.receive_data(data):
                    if isinstance(event, h2.events.StreamEnded):
                        body = json.dumps(completion("over two")).encode()
                        http.send_headers(event.stream_id, [(":status", "200")])
                        http.send_data(event.stream_id, body, end_stream=True)
                wire.sendall(http.data_to_send())


def test_http2_is_spoken_with_the_certificates_of_the_environment(http2_server, monkeypatch):
    url, certificate = http2_server
    settings = TeacherConfig(base_url=url, model="m")
    with pytest.raises(Retryable, match="certificate"):
        ask(settings)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert ask(settings).text == "over two"


# --- protocols ------------------------------------------------------------------------------------


def test_a_second_protocol_is_two_functions(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    server.reply = lambda request: (
        200,
        {},
        {
            "type": "message",
            "model": "served",
            "content": [
                {"type": "thinking", "thinking": "Hm"},
                {"type": "text", "text": "Bonjour"},
            ],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 9, "output_tokens": 4},
        },
    )
    settings = at(
        server,
        system="A",
        temperature=0.0,
        extra_body={"top_k": 3},
        headers={"x-api-key": "env:MY_KEY", "anthropic-version": "2023-06-01"},
    )
    messages = [{"role": "system", "content": "B"}, TURN]
    answer = ask(settings, messages, request=anthropic_request, answer=anthropic_answer)
    usage = {"prompt_tokens": 9, "completion_tokens": 4}
    assert answer == Answer("Bonjour", "end_turn", "served", usage)
    (request,) = server.requests
    assert request.path == "/v1/messages"
    assert request.headers["x-api-key"] == KEY
    assert request.body == {
        "model": "m",
        "messages": [TURN],
        "system": "A\n\nB",
        "temperature": 0.0,
        "max_tokens": 8,
        "top_k": 3,
    }


def test_a_protocol_that_needs_a_limit_says_so(server):
    with pytest.raises(ConfigError, match=r"teacher\.max_tokens=None: Anthropic's"):
        ask(at(server, max_tokens=None), request=anthropic_request, answer=anthropic_answer)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            lambda body: Answer(body["respons"]),
            r"raised KeyError: 'respons' \(test_end.*, line \d+",
        ),
        (
            lambda body: body["response"],
            r"returned a str: want .*; the reply has \['response'",
        ),
        (lambda body: Answer(body["n"]), "returned an Answer whose text is int: want"),
        (lambda: None, r"raised TypeError: .* takes 0 positional .*: want a .*\.Answer"),
    ],
)
def test_an_answer_function_of_ones_own_is_named_with_what_it_got(server, answer, said):
    server.reply = lambda request: (200, {}, {"response": "hi", "n": 1})
    with pytest.raises(Unread, match=rf"^tests\.teacher\.test_endpoint\.<lambda> {said}"):
        ask(at(server), answer=answer)


@pytest.mark.parametrize(
    ("request_function", "said"),
    [
        (lambda teacher: ("/x", {}), r"raised TypeError: .*; it takes \(teacher, messages\): want"),
        (lambda teacher, messages: {"a": 1}, "returned a dict: want the path after base_url"),
    ],
)
def test_a_request_function_of_ones_own_is_named_before_anything_is_sent(
    server, request_function, said
):
    with pytest.raises(TeacherError, match=said):
        ask(at(server), request=request_function)
    assert not server.requests


@pytest.mark.parametrize(
    ("name", "path"), [("openai", "/v1/chat/completions"), ("anthropic", "/v1/messages")]
)
def test_a_yaml_names_the_protocol(server, name, path):
    node = OmegaConf.load(Path(conf_dir()) / "teacher" / "protocol" / f"{name}.yaml")
    opened = build(node, "teacher.protocol")

    async def once():
        async with opened(at(server), CollectConfig()) as teacher:
            await teacher.ask([TURN])

    with contextlib.suppress(Retryable):  # the server answers as OpenAI's
        asyncio.run(once())
    assert server.requests[0].path == path


@pytest.mark.parametrize(
    ("base_url", "asked"),
    [
        (
            "/openai/deployments/d?api-version=1",
            "/openai/deployments/d/chat/completions?api-version=1",
        ),
        ("/v1/", "/v1/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/?a=b", "/v1/chat/completions?a=b"),
        ("", "/chat/completions"),
    ],
)
def test_the_path_is_joined_once_and_the_query_stays(server, base_url, asked):
    ask(at(server, base_url=server.url.removesuffix("/v1") + base_url))
    assert server.requests[0].path == asked


# --- half answers and answers without bounds ------------------------------------------------------


@pytest.mark.parametrize("reason", ["error", "network_error", "insufficient_system_resource"])
def test_half_an_answer_is_asked_for_again_and_counted(server, reason):
    server.reply = lambda request: (200, {}, completion("Half an ans", finish_reason=reason))
    with pytest.raises(Retryable) as caught:
        ask(at(server))
    assert caught.value.billed


def test_an_error_inside_the_choice_is_half_an_answer(server):
    body = completion("Half an ans")
    body["choices"][0]["error"] = {"code": 502, "message": "upstream"}
    server.reply = lambda request: (200, {}, body)
    with pytest.raises(Retryable, match="broke off"):
        ask(at(server))


@pytest.mark.parametrize("reason", ["SAFETY", "RECITATION", "sensitive", "content_filter"])
def test_what_the_provider_takes_away_is_filtered(server, reason):
    server.reply = lambda request: (200, {}, completion("x", finish_reason=reason))
    assert ask(at(server)).failure == "content_filter"


@pytest.mark.parametrize("code", ["invalid_api_key", "insufficient_quota", "model_not_found"])
def test_an_error_about_all_in_a_good_answer_stops(server, code):
    server.reply = lambda request: (200, {}, {"error": {"code": code, "message": "no"}})
    with pytest.raises(TeacherError, match="no: check"):
        ask(at(server))


def test_parts_of_other_kinds_are_text_too(server):
    parts = [{"type": "output_text", "text": "a"}, "b"]
    server.reply = lambda request: (200, {}, completion(None) | _choice(content=parts))
    assert ask(at(server)).text == "ab"


def test_a_body_without_end_and_a_bomb_are_cut_off(server, monkeypatch):
    monkeypatch.setattr(endpoint, "LONGEST", 100_000)
    bomb = gzip.compress(json.dumps(completion("x" * 10_000_000)).encode())
    assert len(bomb) < 100_000
    for headers, body in (({}, b"x" * 200_000), ({"content-encoding": "gzip"}, bomb)):
        server.reply = lambda request, reply=(200, headers, body): reply
        with pytest.raises(Retryable, match="more than") as caught:
            ask(at(server))
        assert caught.value.billed


def test_a_packed_answer_is_unpacked(server):
    body = json.dumps(completion("packed")).encode()
    for packed in (gzip.compress(body), zlib.compress(body)):
        server.reply = lambda request, packed=packed: (200, {"content-encoding": "gzip"}, packed)
        assert ask(at(server)).text == "packed"


def test_a_packed_answer_may_have_several_members_but_nothing_after_them(server, monkeypatch):
    body = json.dumps(completion("packed")).encode()
    packed = gzip.compress(body[:9]) + gzip.compress(body[9:])
    server.reply = lambda request: (200, {"content-encoding": "gzip"}, packed)
    assert ask(at(server)).text == "packed"
    for more, said in ((b"junk", "can't be unpacked"), (gzip.compress(b"x" * 99), "more than")):
        monkeypatch.setattr(endpoint, "LONGEST", len(body) + 90)
        server.reply = lambda request, more=more: (200, {"content-encoding": "gzip"}, packed + more)
        with pytest.raises(Retryable, match=said):
            ask(at(server))


def test_an_answer_is_read_in_the_charset_that_it_names(server):
    body = json.dumps(completion("café"), ensure_ascii=False)
    latin = body.encode("latin-1")
    named = {"content-type": "application/json; charset=ISO-8859-1"}
    server.reply = lambda request: (200, named, latin)
    assert ask(at(server)).text == "café"
    quoted = {"content-type": 'a/b; v=1 ;Charset = "iso-8859-1"; w=2'}
    server.reply = lambda request: (200, quoted, latin)
    assert ask(at(server)).text == "café"
    server.reply = lambda request: (200, {"content-type": "a/b; charset=utf-8"}, b"\xef\xbb\xbf{}")
    with pytest.raises(Retryable, match="not one of this protocol"):
        ask(at(server))
    server.reply = lambda request: (200, {"content-type": "application/json"}, latin)
    with pytest.raises(Retryable, match="not UTF-8"):
        ask(at(server))


@pytest.mark.parametrize("charset", ["punycode", "idna", "unicode_escape", "utf-7"])
def test_a_charset_that_no_server_writes_is_not_decoded(server, charset):
    body = json.dumps(completion("a-b \\u0063")).encode()  # a backslash, which escapes would read
    server.reply = lambda request: (200, {"content-type": f"a/b; charset={charset}"}, body)
    assert ask(at(server)).text == r"a-b \u0063"


@pytest.mark.parametrize(
    "named",
    [
        "charset*" + "9" * 5000 + "*=x",
        "charset*=x%00y''abc",
        "charset*=punycode''" + "a" * 9000,
        "charset*=utf-8''\xe9",
        "charset=\xe9",
        "charset=" + "x" * 9000,
        "charset=../latin-1",
        ";" * 9000,
    ],
)
def test_a_content_type_that_names_nothing_leaves_utf8(named):
    headers = [(b"content-type", f"application/json; {named}".encode("latin-1"))]
    response = httpx.Response(200, headers=headers)
    assert endpoint._text(response, '{"a": "é"}'.encode()) == '{"a": "é"}'


@pytest.mark.parametrize("charset", ["latin-1", "Windows-1252", "GBK", "shift_jis", "euc-kr"])
def test_the_charsets_of_old_servers_are_decoded(server, charset):
    text = {"GBK": "é天", "shift_jis": "天", "euc-kr": "가"}.get(charset, "é")
    body = json.dumps(completion(text), ensure_ascii=False).encode(charset)
    server.reply = lambda request: (200, {"content-type": f"a/b; charset={charset}"}, body)
    assert ask(at(server)).text == text


def test_a_packed_answer_of_very_many_members_is_not_gone_through(server):
    body = gzip.compress(b"") * endpoint.MEMBERS + gzip.compress(json.dumps({}).encode())
    server.reply = lambda request: (200, {"content-encoding": "gzip"}, body)
    with pytest.raises(Retryable, match=rf"more than {endpoint.MEMBERS} parts"):
        ask(at(server))


def test_an_answer_that_quotes_a_secret_is_a_failure_without_it(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    for reply in (completion(f"You sent {KEY}."), completion("x", finish_reason=KEY)):
        server.reply = lambda request, reply=reply: (200, {}, reply)
        answer = ask(at(server, api_key_env="MY_KEY"))
        assert answer.failure == "holds a key"
        assert KEY not in repr(answer)
        assert "***" in repr(answer)
    monkeypatch.setenv("MY_KEY", "EMPTY")  # as local servers have it
    server.reply = lambda request: (200, {}, completion("EMPTY set"))
    assert ask(at(server, api_key_env="MY_KEY")) == Answer(
        "EMPTY set", "stop", "served-model", {"prompt_tokens": 10, "completion_tokens": 5}
    )


def test_a_long_part_of_a_secret_in_an_answer_counts_as_the_secret(server, monkeypatch):
    key = "sk-ant-api03-" + "".join(f"{n:02x}" for n in range(40))
    monkeypatch.setenv("MY_KEY", key)
    for start in range(0, len(key) - 15, 5):
        part = key[start : start + 16]
        server.reply = lambda request, part=part: (200, {}, completion(f"It is {part}..."))
        answer = ask(at(server, api_key_env="MY_KEY"))
        assert (answer.failure, answer.text) == ("holds a key", "It is ***...")
    for harmless in ("Keys begin with sk-ant-api03- here.", f"It ends in {key[-15:]}."):
        server.reply = lambda request, text=harmless: (200, {}, completion(text))
        assert ask(at(server, api_key_env="MY_KEY")).text == harmless


@pytest.mark.parametrize("late", [0.0, 0.02])
def test_an_answer_that_comes_twice_is_not_the_next_ones(late):
    """In one piece, or while nothing is asked; during the next request nothing tells them apart."""

    async def twice(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(re.findall(rb"content-length: (\d+)", head.lower())[0])
                asked = json.loads(await reader.readexactly(size))["messages"][-1]["content"]
                data = json.dumps(completion(f"to {asked}")).encode()
                whole = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(data) + data
                writer.write(whole if late else 2 * whole)
                if late:
                    await asyncio.sleep(late)
                    writer.write(whole)
        writer.close()

    async def several():
        async with await asyncio.start_server(twice, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            settings = TeacherConfig(base_url=url, model="m")
            async with endpoint.HttpTeacher(settings, timeout=60.0, connections=1) as http:
                told = []
                for text in "abc":
                    told.append((await http.ask([TURN | {"content": text}])).text)
                    await asyncio.sleep(5 * late)
                return told

    assert asyncio.run(several()) == ["to a", "to b", "to c"]


def test_a_server_that_streams_unasked_ends_the_run_at_its_first_answer(server):
    line = b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\n'
    server.reply = lambda request: (200, {"content-type": "text/event-stream"}, line)
    with pytest.raises(TeacherError, match=r"streams its answers: set .*stream=false"):
        ask(at(server))


def test_a_connection_that_breaks_without_a_word_names_what_broke(server, monkeypatch):
    async def broken(response):
        raise endpoint.httpx.ReadError("")

    monkeypatch.setattr(endpoint, "_whole", broken)
    with pytest.raises(Retryable, match="connection broke: ReadError"):
        ask(at(server))


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b"[" * 100_000),
        ({"content-type": "application/json; charset=hex"}, b"\xff\xfe\xff"),
        ({"content-type": "application/json; charset=rot13"}, b"\xff"),
        ({}, b'{"choices": ' + b"9" * 10_000 + b"}"),
        ({"content-encoding": "br"}, b"x"),
        ({"content-encoding": "gzip"}, b"x"),
        ({"content-encoding": "gzip"}, gzip.compress(b"{}", mtime=0)[:-3]),
        ({}, b'{"choices": [{"message": {"content": {"a": 1}}}]}'),
        ({}, b'{"choices": [{"message": {"content": [{"type": "text", "text": 3}]}}]}'),
    ],
)
def test_what_can_not_be_read_is_worth_another_try(server, headers, body):
    server.reply = lambda request: (200, headers, body)
    with pytest.raises(Retryable):
        ask(at(server))


def test_an_answer_in_an_odd_charset_is_utf8(server):
    body = json.dumps(completion("ok")).encode()
    server.reply = lambda request: (200, {"content-type": "text/x; charset=hex"}, body)
    assert ask(at(server)).text == "ok"


# --- the environment ------------------------------------------------------------------------------


@pytest.fixture
def proxies(monkeypatch):
    for name in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch.setenv


@pytest.mark.parametrize(
    "environment",
    [
        {"ALL_PROXY": "socks5://127.0.0.1:1080"},
        {"ALL_PROXY": "socks://127.0.0.1:1080"},
        {"HTTPS_PROXY": "http://p:3128", "NO_PROXY": "127.0.0.1,fe80::/10"},
        {"HTTP_PROXY": "http://p:notaport"},
        {"SSL_CERT_FILE": "/nonexistent.pem"},
    ],
)
def test_loopback_needs_neither_proxies_nor_certificates(server, proxies, environment):
    for name, value in environment.items():
        proxies(name, value)
    assert ask(at(server)).text == "answer to Hi"


@pytest.mark.parametrize(
    ("url", "environment", "said"),
    [
        ("http", {"ALL_PROXY": "socks5://me:pw@h:1"}, "variable ALL_PROXY: can't use this socks5"),
        ("https", {"HTTPS_PROXY": "socks://h:1"}, "variable HTTPS_PROXY: can't use this socks"),
        ("http", {"http_proxy": "http://h:x"}, "variable http_proxy: can't use this http"),
        ("https", {"SSL_CERT_FILE": "/none.pem"}, r"SSL_CERT_FILE=/none\.pem: .*No such file"),
    ],
)
def test_what_is_wrong_in_the_environment_is_named(proxies, url, environment, said):
    for name, value in environment.items():
        proxies(name, value)
    with pytest.raises(TeacherError, match=said) as caught:
        ask(TeacherConfig(base_url=f"{url}://teacher.invalid/v1", model="m"))
    assert "pw" not in str(caught.value)


def test_a_network_of_no_proxy_is_passed_by(proxies):
    proxies("HTTP_PROXY", "http://p:3128")
    proxies("NO_PROXY", "fe80::/10, 10.0.0.0/8,.example.org")
    for host, proxied in (("10.1.2.3", False), ("11.1.2.3", True), ("a.example.org", False)):
        assert (endpoint._proxy(urlsplit(f"http://{host}/v1"))[1] is not None) is proxied


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("sk-secret123\nsk-other456", "a line break at position 12"),
        ("sk-secret123\rsk-other456", "a line break"),
        ("“sk-secret123”", r"the character U\+201C"),
        ("sk-sécret123", r"the character U\+00E9"),
        ("sk-secret\x01123", r"the character U\+0001"),
        ("sk-secret 123", r"the character U\+0020"),
    ],
)
@pytest.mark.parametrize("header", [True, False])
def test_a_key_that_no_header_can_hold_is_refused_unseen(server, monkeypatch, value, what, header):
    monkeypatch.setenv("MYKEY", value)
    settings = {"headers": {"x-key": "env:MYKEY"}} if header else {"api_key_env": "MYKEY"}
    with pytest.raises(ConfigError, match=f"variable MYKEY holds {what}") as caught:
        ask(at(server, **settings))
    assert "secret" not in str(caught.value)
    assert server.seen == 0


@pytest.mark.parametrize(
    "shown",
    ["{}", "b'{}'", "{:.14}...", "...{}", "%s"],
)
def test_a_key_is_hidden_whole_in_parts_and_escaped(server, monkeypatch, shown):
    key = 'sk-very"se\\cret/value+1='
    monkeypatch.setenv("MY_KEY", key)
    for form in (key, repr(key), json.dumps(key), quote(key), quote(key, ""), key[5:], key[:-5]):
        text = shown.format(form) if "%" not in shown else form
        server.reply = lambda request, text=text: error(401, f"wrong key {text}!")
        with pytest.raises(TeacherError) as caught:
            ask(at(server, api_key_env="MY_KEY"))
        said = str(caught.value)
        assert "***" in said
        assert not any(key[n : n + 8] in said for n in range(len(key) - 8))


@pytest.mark.parametrize("form", [KEY.upper(), KEY.title(), f"\u0130 {KEY.upper()}"])
def test_a_key_in_capitals_is_a_key(server, monkeypatch, form):
    monkeypatch.setenv("MY_KEY", KEY)
    hidden = form.replace(KEY.upper(), "***").replace(KEY.title(), "***")
    server.reply = lambda request: (200, {}, completion(f"{form}!"))
    answer = ask(at(server, api_key_env="MY_KEY"))
    assert (answer.failure, answer.text) == ("holds a key", f"{hidden}!")
    server.reply = lambda request: error(401, f"{form}!")
    with pytest.raises(TeacherError, match=rf"401: {re.escape(hidden)}!: check the key"):
        ask(at(server, api_key_env="MY_KEY"))


def test_a_short_key_may_be_a_word_and_hides_no_other_case(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "EMPTY")
    server.reply = lambda request: error(401, "EMPTY: messages is empty")
    with pytest.raises(TeacherError, match=r"\*\*\*: messages is empty:"):
        ask(at(server, api_key_env="MY_KEY"))


ESCAPED = "".join(f"\\u{ord(one):04X}" for one in KEY)


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (json.dumps({"error": {"detail": KEY}}).encode("utf-16"), r'{"error": {"detail": "***"}}'),
        (f"no {KEY}".encode("utf-16-le") + b"x", "no ***\ufffd"),
        (f'{{"error": {{"detail": "{ESCAPED}"}}}}'.encode(), r'{"error": {"detail": "***"}}'),
        (f'{{"error": {{"message": "{{\\"a\\": \\"{ESCAPED}\\"}}"}}}}'.encode(), '{"a": "***"}'),
        (f'torn {{"error": "{ESCAPED}'.encode(), 'torn {"error": "***'),
        (f"é {KEY}".encode("latin-1"), "\ufffd ***"),
    ],
)
def test_a_key_is_hidden_however_an_error_is_written(server, monkeypatch, body, shown):
    monkeypatch.setenv("MY_KEY", KEY)
    server.reply = lambda request: (401, {}, body)
    with pytest.raises(TeacherError) as caught:
        ask(at(server, api_key_env="MY_KEY"))
    assert f"401: {shown}: check" in str(caught.value)


def test_no_escape_sequence_of_a_server_reaches_the_terminal(server):
    server.reply = lambda request: error(401, "\x1b]0;title\x07 \x9b31m red\u202e")
    with pytest.raises(TeacherError) as caught:
        ask(at(server))
    assert str(caught.value).isprintable()
