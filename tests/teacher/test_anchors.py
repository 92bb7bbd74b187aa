import json
import os
import signal
import socket

import pytest

from pujax.errors import StopRequested, StoreError
from pujax.records import Prompt, messages_key
from pujax.teacher.anchors import anchors_for
from pujax.teacher.settings import BudgetConfig, CollectConfig, TeacherConfig
from pujax.teacher.store import read_anchors
from tests.teacher_client import at, run, user
from tests.teacher_server import TeacherServer, completion, echo


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
        "1 prompt is left out: the teacher gave no usable answer",
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


@pytest.mark.parametrize("name", ["tickets.csv", "a.JSON", "p.parquet"])
def test_a_table_is_no_store_and_nobody_is_asked(tmp_path, server, name):
    table = tmp_path / name
    table.write_text("prompt\nHi\n")
    for ask in (REPLAY, at(server)):
        with pytest.raises(StoreError, match=r"is not a store: name the \.jsonl file"):
            anchors_for(user("a"), ask, table, CollectConfig(), say=[].append)
    assert not server.seen
    assert list(tmp_path.iterdir()) == [table]


def test_a_folder_that_is_not_there_is_named_or_said_to_be_made(tmp_path, server):
    store = tmp_path / "new" / "store.jsonl"
    with pytest.raises(StoreError, match=r"no such store, and no folder .*new: collect"):
        anchors_for(user("a"), REPLAY, store, CollectConfig(), say=[].append)
    said = []
    anchors_for(user("a"), at(server), store, CollectConfig(), say=said.append)
    assert said[0] == f"{store.parent}: a new folder, for the store"


def test_a_stored_line_is_json_alone(stored):
    for line in stored.read_text().splitlines():
        assert set(json.loads(line)) >= {"key", "messages", "response", "finish_reason", "usage"}


def test_training_on_a_budget_says_that_the_same_command_goes_on(store, server):
    one = CollectConfig(concurrency=1, budget=BudgetConfig(requests=1))
    why = r"1 of 2 prompts have no anchor \(id-b\): the budget is reached: run the same command"
    with pytest.raises(StoreError, match=why):
        anchors_for(user("a", "b"), at(server), store, one)
    assert len(anchors_for(user("a", "b"), at(server), store, one)) == 2


def test_a_signal_while_training_asks_ends_it_with_what_was_answered(store, server):
    def reply(request):
        os.kill(os.getpid(), signal.SIGTERM)
        return echo(request)

    server.reply = reply
    settings = CollectConfig(concurrency=1)
    with pytest.raises(StopRequested, match="stopped while asking") as stopped:
        anchors_for(user("a", "b"), at(server), store, settings)
    assert stopped.value.number == signal.SIGTERM
    assert len(read_anchors(store)) == 1
