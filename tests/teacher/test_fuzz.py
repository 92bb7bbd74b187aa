"""Whatever stands in a file or comes from a server, the room's own errors alone come of it."""

import contextlib
import json
import re
import sys
import tempfile
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pujax import collect
from pujax.errors import PujaxError, StoreError
from pujax.teacher.anchors import anchors_for
from pujax.teacher.prompts import load_prompts
from pujax.teacher.protocols import Answer, Retryable, anthropic_answer
from pujax.teacher.settings import CollectConfig, TeacherConfig
from pujax.teacher.store import Contents, read_anchors
from pujax.teacher.writer import AnchorStore
from tests.teacher_client import ask, at
from tests.teacher_server import TeacherServer, completion

SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=SLOW_IS_FINE, derandomize=True)
MANY = settings(max_examples=3000, deadline=None, suppress_health_check=SLOW_IS_FINE)

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -1, 2**63]),
    st.floats(),
    st.text(),
    st.sampled_from(["\ud83d", "\x1b[31m", "", "stop", "error", "</think>", "<think>", "NaN"]),
)
value = st.recursive(
    odd,
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part, max_size=3)
    ),
)


def changed(document):
    """`document` with a few of its parts replaced, taken out or put elsewhere."""
    paths = list(parts(document))

    @st.composite
    def draw_one(draw):
        copy = json.loads(json.dumps(document))
        for path in draw(st.lists(st.sampled_from(paths), max_size=3)):
            with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError):
                inside = copy
                for key in path[:-1]:
                    inside = inside[key]
                if draw(st.booleans()) or isinstance(inside, list):
                    inside[path[-1]] = draw(value)
                else:
                    inside.pop(path[-1])
        return copy

    return draw_one()


def parts(document, path=()):
    inside = document.items() if isinstance(document, dict) else enumerate(document)
    for key, part in inside:
        yield (*path, key)
        if isinstance(part, dict | list):
            yield from parts(part, (*path, key))


def encoded(document):
    """JSON as bytes; sometimes cut off or damaged."""
    whole = document.map(lambda found: json.dumps(found, ensure_ascii=True).encode())
    torn = st.builds(lambda raw, at: raw[: at % (len(raw) + 1)], whole, st.integers(0, 10_000))
    return st.one_of(whole, torn, st.binary(max_size=60))


RECORD = {
    "format": 1,
    "key": "0" * 64,
    "id": "a",
    "messages": [{"role": "user", "content": "Hi"}],
    "response": "Hello",
    "finish_reason": "stop",
    "model": "m",
    "sampling": {"max_tokens": 8},
    "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    "cost": 0.5,
    "created": "2026-01-01",
}
ROWS = st.sampled_from(
    [
        {"id": "a", "prompt": "Hi", "answer": "yo", "kind": "k"},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]},
        {"instruction": "Add", "input": "1", "output": "2"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    ]
).flatmap(changed)
FAULT = {"error": {"code": "x", "type": "y", "message": "z", "param": None}}
CHOICE = completion("x") | {"id": None}
MESSAGE = {
    "content": [{"type": "text", "text": "x"}],
    "stop_reason": "end_turn",
    "model": "m",
    "usage": {"input_tokens": 1, "output_tokens": 2},
}


def folder():
    return tempfile.TemporaryDirectory()


@contextlib.contextmanager
def refused_in(place: str, kind: type[Exception] = PujaxError):
    """Within the block `kind` alone is raised: one line that says `place`, a pattern."""
    try:
        yield
    except kind as error:
        told = str(error)
        assert told.isprintable(), told
        assert re.search(place, told), told


def check_store(lines, ending):
    with folder() as name:
        path = Path(name) / "anchors.jsonl"
        path.write_bytes(b"\n".join(lines) + ending)
        at_line = r"/anchors\.jsonl(:\d+)?: .+: ."
        for read in (read_anchors, Contents):
            with refused_in(at_line, StoreError):
                read(path)
        with refused_in(at_line, StoreError):
            AnchorStore(path).close()
        with refused_in(at_line, StoreError):
            anchors_for([], TeacherConfig(), path, CollectConfig(), say=[].append)


def check_prompts(suffix, data):
    with folder() as name:
        path = Path(name) / f"p{suffix}"
        path.write_bytes(data)
        with refused_in(rf"/p{re.escape(suffix)}(:\d+|\[\d+\])?: .+"):
            for prompt in load_prompts(str(path), [].append):
                json.dumps(prompt.messages, ensure_ascii=False).encode()


def check_reply(status, headers, data):
    server.reply = lambda request: (status, headers, data)
    for protocol in ({}, {"answer": anthropic_answer}):
        # What is asked again says no address: whoever gives up says it.
        with refused_in(f"{server.url}.*: .+: ."), refused_in("", Retryable):
            answer = ask(at(server), **protocol)
            assert isinstance(answer, Answer)
            json.dumps(answer.usage, allow_nan=False)


def check_command(lines, ending):
    """`pujax collect stats=true` of any store and prompts: status 0, or 1 and a line of where."""
    with folder() as name, pytest.MonkeyPatch.context() as patched:
        store, prompts = Path(name) / "anchors.jsonl", Path(name) / "p.jsonl"
        for path in (store, prompts):
            path.write_bytes(b"\n".join(lines) + ending)
        words = [f"store={store}", f"data.prompts={prompts}", "stats=true"]
        patched.setattr(sys, "argv", ["pujax collect", *words])
        said, status = StringIO(), 0
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(StringIO()):
                collect.main()
        except SystemExit as ended:
            status = ended.code
        *_, line = ["", *said.getvalue().splitlines()]
        assert status == 0 or (status == 1 and line.startswith("pujax.collect: "))
        assert status == 0 or re.search(rf"{name}/(anchors|p)\.jsonl(:\d+)?: ", line), line
        assert "Traceback" not in said.getvalue()
        assert status == 1 or lines != [b"{"]


server = TeacherServer()


@pytest.fixture(autouse=True, scope="module")
def serving():
    with server:
        yield


stores = (
    st.lists(encoded(changed(RECORD)), max_size=4),
    st.sampled_from([b"", b"\n", b"\n\n", b"\x00", b"\r\n"]),
)
files = (
    st.sampled_from([".jsonl", ".txt", ".csv", ".tsv", ".parquet", ".json", "", ".x"]),
    st.lists(encoded(ROWS), max_size=4).map(b"\n".join)
    | st.lists(encoded(ROWS), max_size=4).map(lambda rows: b"[" + b",".join(rows) + b"]")
    | st.binary(max_size=80)
    | st.text().map(lambda text: b"prompt,answer\n" + text.encode(errors="surrogatepass")),
)
answers = (
    st.sampled_from([200, 200, 200, 201, 204, 302, 400, 401, 404, 413, 429, 500]),
    st.dictionaries(
        st.sampled_from(["content-encoding", "content-type", "retry-after"]),
        st.sampled_from(["gzip", "br", "1e400", "-5", "nan", "Fri, 31 Dec 9999 23:59:59 GMT", "x"])
        | st.integers().map(str),
        max_size=2,
    ),
    encoded(st.sampled_from([FAULT, CHOICE, MESSAGE]).flatmap(changed) | value),
)


@FEW
@given(*stores)
def test_store_lines(lines, ending):
    check_store(lines, ending)


@settings(FEW, max_examples=5)
@example([b"{"], b"\n")
@given(*stores)
def test_a_whole_command(lines, ending):
    check_command(lines, ending)


@FEW
@given(*files)
def test_prompt_files(suffix, data):
    check_prompts(suffix, data)


@FEW
@example(400, {}, b"\t")  # an error whose reason is white space
@given(*answers)
def test_replies(status, headers, data):
    check_reply(status, headers, data)


@pytest.mark.long
@MANY
@given(*stores)
def test_many_store_lines(lines, ending):
    check_store(lines, ending)


@pytest.mark.long
@MANY
@given(*files)
def test_many_prompt_files(suffix, data):
    check_prompts(suffix, data)


@pytest.mark.long
@MANY
@given(*answers)
def test_many_replies(status, headers, data):
    check_reply(status, headers, data)
