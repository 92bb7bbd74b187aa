import asyncio
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time

import h2.config
import h2.connection
import h2.events
import pytest

from pujax.errors import ConfigError, StoreError, TeacherError
from pujax.records import Prompt, messages_key
from pujax.teacher import asking as teacher_module
from pujax.teacher.anchors import anchors_for, collect
from pujax.teacher.endpoint import HttpTeacher
from pujax.teacher.plan import make_plan
from pujax.teacher.protocols import Answer, Retryable
from pujax.teacher.settings import BudgetConfig, CollectConfig, PriceConfig, TeacherConfig
from pujax.teacher.store import Contents, failures_path, read_anchors, read_records
from pujax.teacher.writer import AnchorStore
from tests.teacher_server import Request, TeacherServer, completion, echo

KEY = "sk-very-secret"
TURN = {"role": "user", "content": "Hi"}


def user(*texts):
    return [Prompt(f"id-{text}", ({"role": "user", "content": text},)) for text in texts]


def many(count):
    return user(*(f"prompt {n}" for n in range(count)))


@pytest.fixture
def server():
    with TeacherServer() as running:
        yield running


@pytest.fixture
def store(tmp_path):
    return tmp_path / "anchors.jsonl"


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch):
    """Wait as long as the server asks, but no more than a blink otherwise."""
    monkeypatch.setattr(teacher_module, "_backoff", lambda state: state.outcome.exception().after)


def at(server, **settings):
    return TeacherConfig(**{"base_url": server.url, "model": "m", "max_tokens": 8} | settings)


def run(prompts, server, store, said=None, teacher=None, **settings):
    settings = CollectConfig(**{"timeout": 60.0, "retries": 5} | settings)
    said = [] if said is None else said
    return collect(lambda: prompts, teacher or at(server), store, settings, say=said.append)


def ask(settings, messages=(TURN,)):
    async def once():
        async with HttpTeacher(settings, timeout=60.0, connections=1) as http:
            return await http.ask(messages)

    return asyncio.run(once())


def replies(*bodies):
    """A server's replies in turn; the last goes on."""
    left = list(bodies)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


def error(status, message="no", code=None, **headers):
    return status, headers, {"error": {"message": message, "code": code}}


# --- keys -----------------------------------------------------------------------------------------


def test_a_key_is_the_sha256_of_model_sampling_and_messages():
    settings = TeacherConfig(model="m", temperature=0, max_tokens=8, extra_body={"top_p": 0.5})
    asked = (
        '{"messages":[{"content":"Hi","role":"user"}],"model":"m",'
        '"sampling":{"max_tokens":8,"system":null,"temperature":0.0,"top_p":0.5}}'
    )
    assert messages_key([TURN], settings.asked) == hashlib.sha256(asked.encode()).hexdigest()


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"model": "other"}, False),
        ({"system": "Be brief."}, False),
        ({"temperature": 0.5}, False),
        ({"max_tokens": 9}, False),
        ({"extra_body": {"seed": 1}}, False),
        ({"base_url": "http://elsewhere/v1"}, True),
        ({"api_key_env": "KEY"}, True),
        ({"headers": {"x-title": "y"}}, True),
        ({"price": PriceConfig(1.0, 2.0)}, True),
    ],
)
def test_only_the_model_and_its_sampling_change_the_key(change, same):
    settings = TeacherConfig(base_url="http://here/v1", model="m", max_tokens=8)
    changed = dataclasses.replace(settings, **change)
    assert (messages_key([TURN], settings.asked) == messages_key([TURN], changed.asked)) is same


# --- the wire -------------------------------------------------------------------------------------


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


# --- collecting -----------------------------------------------------------------------------------


def test_each_prompt_is_asked_once_and_never_again(server, store):
    said = []
    tally = run(many(50), server, store, said)
    assert (tally.answered, server.delivered.total(), len(server.delivered)) == (50, 50, 50)
    again = run(many(60), server, store, said)
    assert (again.asked, server.delivered.total()) == (10, 60)
    assert said[0].startswith("50 prompts: had 0, asked 50: 50 answered, 0 failed")
    assert said[1].startswith("60 prompts: had 50, asked 10: 10 answered")


def test_nothing_to_ask_needs_no_key_and_no_server(server, store):
    run(many(3), server, store)
    seen = server.seen
    teacher = at(server, api_key_env="SURELY_NOT_SET")
    assert run(many(3), server, store, teacher=teacher).asked == 0
    assert server.seen == seen


def test_prompts_with_the_same_messages_are_asked_once(server, store):
    server.latency = 0.05
    prompts = [*user("a", "a", "b"), Prompt("other-id", user("a")[0].messages)]
    run(prompts, server, store)
    assert server.delivered == {"a": 1, "b": 1}


def test_a_record_holds_what_was_asked_and_what_it_cost(server, store):
    teacher = at(server, system="S", temperature=0.0, price=PriceConfig(1.0, 2.0))
    run(user("a"), server, store, teacher=teacher)
    ((_, record),) = read_records(store)
    assert record.pop("created").endswith("+00:00")
    assert record == {
        "format": 1,
        "key": messages_key(user("a")[0].messages, teacher.asked),
        "id": "id-a",
        "messages": [{"role": "user", "content": "a"}],
        "response": "answer to a",
        "finish_reason": "stop",
        "model": "m",
        "served_model": "served-model",
        "sampling": {"system": "S", "temperature": 0.0, "max_tokens": 8},
        "usage": {"prompt_tokens": 10, "completion_tokens": 5},
        "cost": (10 * 1.0 + 5 * 2.0) / 1e6,
    }


def test_a_success_is_on_the_disk_before_it_is_counted(server, store, monkeypatch):
    synced = []
    sync = os.fsync

    def fsync(descriptor):
        sync(descriptor)
        with contextlib.suppress(OSError):
            synced.append(store.read_bytes().count(b"\n"))

    monkeypatch.setattr(os, "fsync", fsync)
    seen = []
    collect(
        lambda: many(40),
        at(server),
        store,
        CollectConfig(concurrency=8),
        say=seen.append,
        tick=lambda plan, tally: seen.append((tally.answered, max(synced))),
    )
    counts = [pair for pair in seen if isinstance(pair, tuple)]
    assert len(counts) == 40
    assert all(answered <= on_disk for answered, on_disk in counts)


def test_no_more_are_in_flight_than_the_concurrency_allows(server, store):
    server.latency = 0.02
    run(many(40), server, store, concurrency=4)
    assert server.most_busy == 4
    assert server.connections <= 4


def test_a_fault_is_retried_until_it_passes(server, store):
    server.reply = replies(error(500), error(429), (200, {}, b"torn"), (200, {}, completion("ok")))
    tally = run(user("a"), server, store)
    assert (tally.answered, tally.requests, tally.retried) == (1, 4, 3)


def test_retry_after_holds_every_worker_back(server, store):
    times = []

    def reply(request: Request):
        times.append(time.monotonic())
        return error(429, **{"retry-after": "0.5"}) if len(times) == 1 else echo(request)

    server.reply = reply
    run(many(4), server, store, concurrency=1)
    assert times[1] - times[0] >= 0.5
    times.clear()
    run(many(40), server, store, concurrency=2)
    early = sum(later - times[0] < 0.5 for later in times[1:])
    assert early < 10  # what was in flight when the server spoke


def test_retries_end_and_the_prompt_is_asked_again_next_time(server, store):
    server.reply = lambda request: error(500) if request.prompt == "b" else echo(request)
    with pytest.raises(TeacherError, match=r"1 prompts have no answer after 2 retries each .*500"):
        run(user("a", "b"), server, store, retries=2, concurrency=8)
    server.reply = echo
    assert run(user("a", "b"), server, store).asked == 1


def test_an_error_that_nobody_foresaw_ends_the_run_and_keeps_what_is_in_flight(server, store):
    server.latency = 0.1

    def prompts():
        yield from many(3)
        raise ZeroDivisionError

    settings = CollectConfig(concurrency=4)
    plans = [many(3)]
    with pytest.raises(ZeroDivisionError):
        collect(
            lambda: plans.pop() if plans else prompts(), at(server), store, settings, say=[].append
        )
    assert len(list(read_records(store))) == server.delivered.total() == 3


def test_a_teacher_that_only_fails_stops_the_run_early(server, store):
    server.reply = lambda request: error(500, "down")
    with pytest.raises(TeacherError, match="4 prompts in a row failed: 500: down"):
        run(many(500), server, store, retries=1, concurrency=4)
    assert server.seen <= 4 * 2 * 2


@pytest.mark.parametrize("status", [401, 402, 404])
def test_a_wrong_request_stops_at_once_and_what_was_answered_stays(server, store, status):
    server.latency = 0.01
    server.reply = lambda request: (
        error(status, "wrong") if request.prompt == "prompt 20" else echo(request)
    )
    with pytest.raises(TeacherError, match=rf"{status}: wrong.* \(asked for id-prompt 20\)"):
        run(many(500), server, store, concurrency=4)
    assert server.seen < 30
    assert len(list(read_records(store))) == server.delivered.total() >= 20


def test_an_unreachable_host_is_one_error_after_a_few_tries(store):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        teacher = TeacherConfig(
            base_url=f"http://127.0.0.1:{unused.getsockname()[1]}/v1", model="m"
        )
        with pytest.raises(TeacherError, match=r"can't connect: .*check teacher.base_url"):
            run(many(100), None, store, teacher=teacher)


def test_a_slow_trickle_meets_the_deadline(server, store):
    server.faults, server.stall = 1.0, 20.0
    server.faults_drawn = ("trickle",)
    start = time.monotonic()
    with pytest.raises(TeacherError, match=r"no answer in 0\.3 s"):
        run(user("a"), server, store, timeout=0.3, retries=1)
    assert time.monotonic() - start < 10


def test_failed_answers_are_kept_apart_and_asked_again_only_on_request(server, store):
    kinds = {
        "refuse": completion("no", refusal="I won't"),
        "filter": completion("x", finish_reason="content_filter"),
        "empty": completion(""),
    }
    server.reply = lambda request: (200, {}, kinds.get(request.prompt) or completion("fine"))
    prompts = user("a", *kinds, "refuse")
    said = []
    tally = run(prompts, server, store, said)
    assert (tally.answered, tally.failed) == (1, {"refusal": 1, "content_filter": 1, "empty": 1})
    assert [record["id"] for _, record in read_records(store)] == ["id-a"]
    reasons = {record["id"]: record["reason"] for _, record in read_records(failures_path(store))}
    assert reasons == {
        "id-refuse": "refusal",
        "id-filter": "content_filter",
        "id-empty": "empty",
    }
    assert run(prompts, server, store, said).asked == 0
    assert "4 failed before (collect.retry_failed=true asks again)" in said[-1]
    again = run(prompts, server, store, retry_failed=True, concurrency=1)
    assert (again.asked, again.failed) == (3, {"refusal": 1, "content_filter": 1, "empty": 1})
    server.reply = echo
    assert run(prompts, server, store, retry_failed=True).answered == 3
    assert run(prompts, server, store, retry_failed=True).asked == 0


def test_a_collection_with_faults_answers_all_and_pays_once_each(server, store):
    server.faults = 0.3
    server.faults_drawn = ("429", "500", "503", "408", "reset", "half", "junk", "shape", "slow")
    tally = run(many(150), server, store, concurrency=16, retries=30, timeout=30.0)
    assert tally.answered == len(server.delivered) == server.delivered.total() == 150
    assert len({record["key"] for _, record in read_records(store)}) == 150
    assert tally.retried > 20


# --- plan, budget and pace ------------------------------------------------------------------------


def test_the_plan_counts_what_there_is_to_do(server, store):
    teacher = at(server, price=PriceConfig(1e6, 2e6))
    run(user("a"), server, store, teacher=teacher)
    server.reply = lambda request: (200, {}, completion(""))
    run(user("b"), server, store, teacher=teacher)
    plan = make_plan(
        user("a", "b", "c" * 40, "c" * 40), teacher, Contents(store), retry_failed=False
    )
    assert (plan.prompts, plan.cached, plan.failed, plan.duplicates, plan.to_ask) == (4, 1, 1, 1, 1)
    assert (plan.prompt_tokens, plan.completion_tokens) == (40 // 4 + 5, 8)
    assert plan.cost == pytest.approx(15 * 1.0 + 8 * 2.0)
    assert make_plan(user("b"), teacher, Contents(store), retry_failed=True).to_ask == 1


@pytest.mark.parametrize(
    ("budget", "answered"),
    [
        (BudgetConfig(requests=7), 7),
        # 15 tokens used an answer; the last must fit with the 7 + 8 it may take
        (BudgetConfig(tokens=100), 6),
        (BudgetConfig(money=100 / 1e6), 6),
    ],
)
def test_a_budget_is_reached_but_never_exceeded(server, store, budget, answered):
    prompts = user(*(f"prompt {n:02d}" for n in range(30)))
    teacher = at(server, price=PriceConfig(1.0, 1.0))
    said = []
    tally = run(prompts, server, store, said, teacher=teacher, budget=budget, concurrency=4)
    assert tally.answered == server.seen == answered
    assert said[-1] == (
        f"stopped: the budget is reached; at most {30 - answered} are left: run the same command "
        "to go on"
    )
    assert run(prompts, server, store, teacher=teacher).asked == 30 - answered


def test_retries_count_as_requests_of_the_budget(server, store):
    server.reply = lambda request: error(500)
    tally = run(many(1), server, store, budget=BudgetConfig(requests=3), retries=9)
    assert (server.seen, tally.stopped) == (3, "the budget is reached")


def test_an_answer_that_may_have_been_charged_counts_for_the_budget(server, store):
    server.reply = replies((200, {}, b"torn"), (200, {}, completion("ok")))
    budget = BudgetConfig(tokens=30)  # 15 for the torn one at worst, 15 for the next, no third
    tally = run(many(3), server, store, budget=budget, concurrency=1)
    assert (tally.answered, server.seen) == (1, 2)


def test_a_money_budget_needs_prices(server, store):
    with pytest.raises(ConfigError, match=r"teacher\.price"):
        run(many(1), server, store, budget=BudgetConfig(money=1.0))
    assert server.seen == 0


def test_the_cost_that_a_provider_tells_is_taken(server, store):
    body = completion("ok")
    body["usage"]["cost"] = 0.25
    server.reply = lambda request: (200, {}, body)
    assert run(user("a", "b"), server, store).cost == pytest.approx(0.5)


@pytest.mark.parametrize(
    "pace",
    [
        {"requests_per_minute": 600},
        {"tokens_per_minute": 600 * 15},  # a prompt takes at most 7 + 8 tokens
    ],
)
def test_requests_and_tokens_keep_to_their_rates(server, store, pace):
    prompts = user(*(f"prompt {n:02d}" for n in range(22)))
    start = time.monotonic()
    run(prompts, server, store, concurrency=16, **pace)
    assert 1.0 < time.monotonic() - start < 6.0  # 10 at once, then 10 a second


# --- the store ------------------------------------------------------------------------------------


def test_a_torn_tail_is_cut_off_reported_and_asked_again(server, store):
    run(many(3), server, store, concurrency=1)
    whole = store.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    store.write_bytes(whole[: -len(last)] + last[:40])
    assert len(list(read_records(store))) == 2
    said = []
    assert run(many(3), server, store, said, concurrency=1).asked == 1
    assert "cut off a torn last line of 40 bytes, to ask again" in said[0]
    assert [record["id"] for _, record in read_records(store)] == [
        f"id-prompt {n}" for n in range(3)
    ]


def test_a_whole_record_that_lacks_its_newline_is_kept(server, store):
    run(many(2), server, store)
    store.write_bytes(store.read_bytes().rstrip(b"\n"))
    book = AnchorStore(store)
    book.close()
    assert len(list(read_records(store))) == 2
    assert "lacked its newline" in book.repairs[0]


def test_a_store_of_another_format_is_named_and_left_alone(store):
    store.write_text('{"format": 2, "key": "00"}\n')
    with pytest.raises(
        StoreError, match=r"anchors\.jsonl:1: store format 2, this pujax has format"
    ):
        AnchorStore(store)
    with pytest.raises(StoreError, match="store format 2"):
        read_anchors(store)
    assert store.read_text() == '{"format": 2, "key": "00"}\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", r"not a record .*take this line out"),
        ("[1]", "store format None"),
        (
            '{"format": 1, "key": "00"}',
            r"a record without \['cost', 'created', .*take this line out",
        ),
    ],
)
def test_a_line_that_is_not_a_record_is_named(server, store, line, said):
    run(many(2), server, store)
    store.write_text(store.read_text() + line + "\n")
    with pytest.raises(StoreError, match=rf"anchors\.jsonl:3: {said}"):
        read_anchors(store)


def test_a_record_whose_key_is_not_a_digest_is_named(server, store):
    run(many(1), server, store)
    ((_, record),) = read_records(store)
    store.write_text(json.dumps(record | {"key": "k" * 64}) + "\n")
    with pytest.raises(StoreError, match=r":1: a record with key 'kkk"):
        AnchorStore(store)


def test_a_full_disk_keeps_what_is_in_flight_and_stops(server, store, monkeypatch):
    full(monkeypatch, room=3000, ballast=1 << 20)
    server.latency = 0.02
    with pytest.raises(StoreError, match="the disk is full: make room"):
        run(many(100), server, store, concurrency=4)
    assert len(list(read_records(store))) == server.delivered.total() < 20


def test_a_disk_that_stays_full_leaves_whole_lines_alone(server, store, monkeypatch):
    full(monkeypatch, room=3000, ballast=0)
    with pytest.raises(StoreError, match="can't write: No space left on device"):
        run(many(100), server, store, concurrency=4)
    assert store.read_bytes().endswith(b"\n")
    assert 5 <= len(list(read_records(store))) <= 10
    monkeypatch.undo()
    assert run(many(100), server, store).answered >= 90


def full(monkeypatch, *, room, ballast):
    """Let a disk have `room` bytes for the store, and `ballast` more once that file is cut."""
    write, truncate = os.write, os.ftruncate
    quota = [room]

    def limited(descriptor, data):
        left = quota[0] - os.fstat(descriptor).st_size
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:left])

    def ftruncate(descriptor, size):
        quota[0] += ballast if size == 0 else 0
        truncate(descriptor, size)

    monkeypatch.setattr(os, "write", limited)
    monkeypatch.setattr(os, "ftruncate", ftruncate)


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"can't open the store for writing: .*choose another"):
        AnchorStore(tmp_path / "file" / "anchors.jsonl")


def test_text_that_utf8_can_not_hold_is_stored(server, store):
    server.reply = lambda request: (200, {}, completion("half \ud83d \u2028 whole é"))
    run(user("a"), server, store)
    ((_, record),) = read_records(store)
    assert record["response"] == "half \ud83d \u2028 whole é"


HOLD = """
import sys
from pathlib import Path
from pujax.teacher.writer import AnchorStore
store = AnchorStore(Path(sys.argv[1]))
print(store.claim(sys.argv[2]), flush=True)
sys.stdin.read()
"""


def test_a_prompt_that_a_dead_process_was_asking_is_asked_and_a_living_ones_is_not(server, store):
    prompts = user("a", "b")
    key = messages_key(prompts[0].messages, at(server).asked)
    ticks = []
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store), key],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"

        def tick(plan, tally):
            ticks.append((holder.poll(), sorted(server.delivered)))
            if holder.poll() is None:  # b is answered, a is another's: until that one is killed
                holder.kill()
                holder.wait()

        collect(lambda: prompts, at(server), store, CollectConfig(), say=ticks.append, tick=tick)
    assert ticks[:2] == [(None, ["b"]), (-9, ["a", "b"])]
    assert server.delivered == {"a": 1, "b": 1}


# --- replay ---------------------------------------------------------------------------------------


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*_):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)


REPLAY = TeacherConfig()


@pytest.fixture
def stored(store):
    """A store with answers to a and b by model m, and a refusal of c."""
    with TeacherServer() as running:
        running.reply = lambda request: (
            (200, {}, completion("no", refusal="no")) if request.prompt == "c" else echo(request)
        )
        run(user("a", "b", "c"), running, store)
    return store


def test_replay_answers_from_the_store_without_a_socket(stored, no_sockets):
    said = []
    anchors = anchors_for(user("a", "b", "c"), REPLAY, stored, CollectConfig(), say=said.append)
    assert {key: anchor.response for key, anchor in anchors.items()} == {
        messages_key(prompt.messages): f"answer to {name}"
        for name, prompt in zip("ab", user("a", "b"), strict=True)
    }
    assert said == [
        "3 prompts: had 2, asked 0",
        "1 prompts are left out: the teacher gave no usable answer",
    ]


def test_replay_names_the_prompts_that_have_no_anchor(stored, no_sockets):
    with pytest.raises(StoreError, match=r"2 of 3 prompts have no anchor \(id-x, id-y\)"):
        anchors_for(user("a", "x", "y"), REPLAY, stored, CollectConfig(), say=[].append)


def test_two_models_answers_need_a_choice(stored, server):
    run(user("a"), server, stored, teacher=at(server, model="other"))
    with pytest.raises(StoreError, match=r"'m' and 'other' both answered .* teacher.model"):
        read_anchors(stored)
    (only,) = read_anchors(stored, "other").values()
    assert only.model == "other"


def test_training_asks_for_what_is_missing_and_says_so(stored, server):
    said = []
    prompts = [*user("a", "b", "d"), Prompt("twin", user("d")[0].messages)]
    anchors = anchors_for(prompts, at(server), stored, CollectConfig(), say=said.append)
    responses = [anchors[messages_key(prompt.messages)].response for prompt in prompts]
    assert responses == ["answer to a", "answer to b", "answer to d", "answer to d"]
    assert server.delivered == {"d": 1}
    assert said[0].startswith("4 prompts: had 2, asked 1: 1 answered")


def test_a_store_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"no\.jsonl: no such store"):
        read_anchors(tmp_path / "no.jsonl")


def test_a_stored_line_is_json_alone(stored):
    for line in stored.read_text().splitlines():
        assert set(json.loads(line)) >= {"key", "messages", "response", "finish_reason", "usage"}
