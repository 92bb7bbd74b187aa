import errno
import json
import subprocess
import sys
import tempfile

import pytest

from pujax import collect
from pujax.errors import ConfigError, StoreError
from pujax.records import messages_key
from pujax.teacher import merging
from pujax.teacher.describing import describe
from pujax.teacher.merging import merge
from pujax.teacher.store import failures_path, read_failures, read_records
from pujax.teacher.writer import AnchorStore


def line(name, response="yes", *, model="m", **changes):
    messages = [{"role": "user", "content": name}]
    asked = {"model": model, "sampling": {}}
    record = {
        "format": 1,
        "key": messages_key(messages, asked),
        "id": name,
        "messages": messages,
        "response": response,
        "finish_reason": "stop",
        "model": model,
        "usage": None,
        "cost": None,
        "created": "2026-11-26T00:00:00Z",
    }
    return json.dumps(record | changes) + "\n"


def answers(store):
    return [(record["id"], record["response"]) for _, record in read_records(store)]


@pytest.fixture
def shards(tmp_path):
    """Two that share an answer and differ in another; a failure is answered in the other one."""
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text(line("a") + line("b", "left") + '{"format": 1, "key": "torn')
    other.write_text(line("b", "right") + line("a", created="later") + line("c") + line("d"))
    failed = [line("d", "", reason="refused"), line("e", "", reason="empty")]
    failures_path(one).write_text("".join(failed))
    failures_path(other).write_text(failed[1])
    return one, other


def test_shards_become_one_store_with_each_answer_once_and_none_replaced(shards, tmp_path):
    store, said = tmp_path / "all.jsonl", []
    before = [path.read_bytes() for path in shards]
    merge(shards, store, say=said.append)
    merged = [("a", "yes"), ("b", "left"), ("c", "yes"), ("d", "yes")]
    assert answers(store) == merged
    assert [record["id"] for _, record in read_failures(store)] == ["e"]
    assert said == [
        f"{shards[0]}: its last line, of 26 bytes, is no whole record: left out; merge it again "
        "once whoever writes it is done",
        f"{shards[1]}: 1 answer is other than what was there before to the same prompt and "
        "settings (b): left out",
        f"{store}: 4 answers and 1 failure of 2 stores put in, 1 answer had already",
    ]
    assert [path.read_bytes() for path in shards] == before
    whole = store.read_bytes()
    merge(shards, store, say=said.append)
    assert store.read_bytes() == whole
    assert (
        said[-1] == f"{store}: 0 answers and 0 failures of 2 stores put in, 5 answers had already"
    )


def test_a_store_keeps_what_it_has_and_another_models_answer_is_another(shards, tmp_path):
    store = tmp_path / "all.jsonl"
    store.write_text(line("b", "mine") + line("a", "theirs", model="other"))
    merge(shards, store, say=lambda text: None)
    assert answers(store)[:3] == [("b", "mine"), ("a", "theirs"), ("a", "yes")]
    assert [name for name, _ in answers(store)] == ["b", "a", "a", "c", "d"]


def test_what_a_run_kept_beside_a_shard_is_told(shards, tmp_path):
    kept, said = tmp_path / "one.kept.jsonl", []
    kept.write_text(line("f"))
    merge(shards, tmp_path / "all.jsonl", say=said.append)
    assert said[0] == (
        f"{kept} is left out: a collection into {shards[0]} puts its answers there first"
    )


def test_the_command_merges_and_refuses_what_it_can_not(shards, tmp_path, capsys):
    store = tmp_path / "all.jsonl"
    names = [str(path) for path in shards]
    assert collect.run(collect.CollectRun(store=str(store), merge=names)) == 0
    assert "4 answers and 1 failure of 2 stores put in" in capsys.readouterr().out
    with pytest.raises(StoreError, match=r"all.jsonl: is the `store` itself"):
        merge([store], store)
    with pytest.raises(StoreError, match=r"gone.jsonl: no such store"):
        merge([tmp_path / "gone.jsonl"], store)
    with pytest.raises(StoreError, match="a failure among answers"):
        merge([failures_path(shards[0])], store)
    asking = collect.PromptsConfig("prompts.jsonl")
    with pytest.raises(ConfigError, match=r"^merge=.*leave data\.prompts"):
        collect.run(collect.CollectRun(store=str(store), merge=names, data=asking))
    with pytest.raises(ConfigError, match=r"^merge=\[\].*merge=\[A,B\]"):
        collect.run(collect.CollectRun(store=str(tmp_path / "new.jsonl"), merge=[]))
    dry = collect.CollectConfig(dry_run=True)
    with pytest.raises(ConfigError, match=r"^collect\.dry_run=True.*merge"):
        collect.run(collect.CollectRun(store=str(tmp_path / "new.jsonl"), merge=names, collect=dry))
    assert not (tmp_path / "new.jsonl").exists()


def test_a_last_record_that_lacks_its_newline_is_put_in_and_counted(tmp_path):
    shard, store, said = tmp_path / "one.jsonl", tmp_path / "all.jsonl", []
    shard.write_text(line("a") + line("b").rstrip("\n"))
    failed = line("c", "", reason="empty").rstrip("\n")
    failures_path(shard).write_text(failed)
    assert describe(shard).startswith("answers        2\n")
    merge([shard], store, say=said.append)
    assert answers(store) == [("a", "yes"), ("b", "yes")]
    assert failures_path(store).read_text() == failed + "\n"
    assert said == [f"{store}: 2 answers and 1 failure of 1 store put in, 0 answers had already"]
    assert not shard.read_text().endswith("\n")


def test_what_another_process_puts_in_meanwhile_is_not_put_in_twice(tmp_path, monkeypatch):
    shard, store, said = tmp_path / "one.jsonl", tmp_path / "all.jsonl", []
    shard.write_text("".join(map(line, "abcd")))

    def slowly(path, **kinds):
        for number, record in enumerate(read_records(path, **kinds)):
            if number == 1:  # the first one is in place
                with store.open("a") as other:
                    other.write(line("b") + line("c", "another"))
            yield record

    monkeypatch.setattr(merging, "AT_ONCE", 1)
    monkeypatch.setattr(merging, "read_records", slowly)
    merge([shard], store, say=said.append)
    assert answers(store) == [("a", "yes"), ("b", "yes"), ("c", "another"), ("d", "yes")]
    assert said == [
        f"{shard}: 1 answer is other than what was there before to the same prompt and settings "
        "(c): left out",
        f"{store}: 2 answers and 0 failures of 1 store put in, 1 answer had already",
    ]


def test_a_full_disk_leaves_nothing_beside_the_store_which_the_shards_have_anyway(
    shards, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    store = tmp_path / "all.jsonl"
    monkeypatch.setattr(AnchorStore, "_write", full)
    with pytest.raises(StoreError) as told:
        merge(shards, store, say=lambda text: None)
    assert str(told.value) == (
        f"{store}: can't write: No space left on device: make room, run the same command again"
    )
    book = AnchorStore(store)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    record = json.loads(line("a"))
    with monkeypatch.context() as patched:
        patched.setattr("pujax.teacher.writer.os.fsync", full)
        with pytest.raises(StoreError, match="be kept anywhere"):
            book.append([record])  # as a collection does
    book.close()
    assert not list(tmp_path.glob("*.kept*"))


ASKING = """
import sys
from pathlib import Path
from pujax.teacher.writer import AnchorStore, parse
book, raw = AnchorStore(Path(sys.argv[1])), sys.argv[2].encode()
record = parse(raw, "")
assert book.claim(record["key"])
print("asks", flush=True)
sys.stdin.readline()
book.append([record])
book.release(record["key"])
book.close()
"""


def test_what_a_collection_asks_for_now_is_waited_for(tmp_path):
    shard, store, said = tmp_path / "one.jsonl", tmp_path / "all.jsonl", []
    shard.write_text(line("a") + line("b"))
    run = [sys.executable, "-c", ASKING, str(store), line("a", "asked")]
    other = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "asks\n"

    into = other.stdin

    def say(text):
        said.append(text)
        if len(said) == 1:
            into.write("\n")
            into.flush()

    merge([shard], store, say=say)
    other.communicate()
    assert other.returncode == 0
    assert answers(store) == [("b", "yes"), ("a", "asked")]
    assert said[0] == f"{store}: waits for 1 answer that others ask for now"
    assert "(a): left out" in said[1]
