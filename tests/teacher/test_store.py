import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pujax.errors import StoreError
from pujax.records import Anchor, messages_key
from pujax.teacher import store as store_module
from pujax.teacher.anchors import anchors_for, collect
from pujax.teacher.describing import describe
from pujax.teacher.settings import CollectConfig, PriceConfig, TeacherConfig
from pujax.teacher.store import (
    Contents,
    Mark,
    anchor_of,
    failures_path,
    read_anchors,
    read_failures,
    read_records,
    said,
)
from pujax.teacher.writer import AnchorStore, kept_beside, take_up
from tests.teacher_client import TURN, at, many, run, user
from tests.teacher_server import completion, echo

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


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: b'{"my": "notes"}',
        lambda whole: whole + b"my notes",
        lambda whole: whole.replace(b"\n", b"\r"),
        lambda whole: whole.replace(b"\n", b"\x1e"),
        lambda whole: whole.replace(b"\n", b""),
        lambda whole: whole.replace(b'"format": 1', b'"format": 2').splitlines()[0],
        lambda whole: whole.replace(b'"format": 1', b'"format": 12')[:200],
        lambda whole: whole.decode().encode("utf-16"),
    ],
)
def test_a_tail_that_is_no_start_of_a_record_stays(server, store, change):
    run(many(2), server, store)
    changed = change(store.read_bytes())
    store.write_bytes(changed)
    with pytest.raises(StoreError):
        run(many(3), server, store)
    assert store.read_bytes() == changed
    assert server.delivered.total() == 2


@pytest.mark.parametrize("size", [0, 1, 9, 14, 200, -30])
def test_zeros_behind_the_start_of_a_record_are_cut_off_with_it(server, store, size):
    run(many(1), server, store)
    line = store.read_bytes()
    store.write_bytes(line + line[:size] + bytes(50))
    AnchorStore(store).close()
    assert store.read_bytes() == line


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


@pytest.mark.parametrize("path", ["", "."])
def test_a_store_without_a_name_is_refused(path):
    with pytest.raises(StoreError, match="is a folder: name a file in it"):
        Contents(Path(path))


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
from pujax.teacher.writer import AnchorStore, take_up
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


# --- another program writes the store while it is collected ---------------------------------------


def collect_while(server, store, change, at_answer=20, count=60):
    """Collect `count` prompts; `change` is called once, after `at_answer` answers."""
    said, calls = [], []

    def tick(plan, tally):
        if tally.answered == at_answer and not calls:
            calls.append(change())

    settings = CollectConfig(concurrency=4)
    collect(lambda: many(count), at(server), store, settings, say=said.append, tick=tick)
    return said


def ids(path):
    return sorted(record["id"] for _, record in read_records(path))


@pytest.mark.parametrize("rename", [True, False])
def test_a_save_by_an_editor_loses_no_answer(server, store, rename):
    run(many(10), server, store)
    before = store.read_bytes()  # as an editor has loaded it

    def save():
        if rename:
            store.with_suffix(".new").write_bytes(before)
            os.replace(store.with_suffix(".new"), store)
        else:
            store.write_bytes(before)

    said = collect_while(server, store, save)
    assert ids(store) == sorted(f"id-prompt {n}" for n in range(60))
    assert server.delivered.total() == 60
    assert any("another program replaced it" in line for line in said)


def test_a_file_that_was_cut_short_has_changed(tmp_path):
    with (tmp_path / "file").open("wb+", buffering=0) as file:
        file.write(b"abc")
        assert Mark(3, tail=b"abc").stands(file.fileno())
        assert not Mark(3, tail=b"a line that was cut").stands(file.fileno())


def test_a_save_after_the_last_answer_loses_none(server, store):
    said = collect_while(server, store, lambda: os.remove(store), at_answer=60)
    assert len(ids(store)) == 60
    assert any("60 answers" in line for line in said)


def test_what_an_editor_takes_out_stays_out(server, store):
    run(many(10), server, store)
    kept = b"".join(store.read_bytes().splitlines(keepends=True)[1:])

    def save():
        store.with_suffix(".new").write_bytes(kept)
        os.replace(store.with_suffix(".new"), store)

    collect_while(server, store, save)
    assert len(ids(store)) == 59


def test_failures_and_the_lock_may_vanish_too(server, store):
    server.reply = lambda request: (200, {}, completion(""))

    def vanish():
        os.remove(failures_path(store))
        os.remove(store.with_name(store.name + ".lock"))

    calls = []

    def tick(plan, tally):
        if sum(tally.failed.values()) == 20 and not calls:
            calls.append(vanish())

    collect(lambda: many(60), at(server), store, CollectConfig(), say=[].append, tick=tick)
    assert len(ids(failures_path(store))) == server.delivered.total() == 60


def test_a_claim_outlives_its_lock_file(store):
    book = AnchorStore(store)
    assert book.claim("aa" * 32)
    os.remove(store.with_name(store.name + ".lock"))
    assert book.claim("bb" * 32)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store), "aa" * 32],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "False\n"
        other.kill()
    book.close()


def test_a_claim_holds_under_every_name_of_the_store(store):
    link = store.with_name("link.jsonl")
    link.symlink_to(store.name)
    book = AnchorStore(store)
    assert book.claim("aa" * 32)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(link), "aa" * 32],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "False\n"
        other.kill()
    book.close()


def test_a_store_with_two_hard_links_is_refused_and_a_copy_is_not(server, store):
    run(many(2), server, store)
    other = store.with_name("other.jsonl")
    os.link(store, other)
    with pytest.raises(StoreError, match=r"other\.jsonl: has another name too, .*hard link"):
        run(many(3), server, other)
    other.unlink()
    other.write_bytes(store.read_bytes())
    run(many(3), server, other)
    assert server.delivered.total() == len(ids(other)) == 3


def test_a_store_that_becomes_another_file_stops_and_the_answers_are_kept(server, store):
    with pytest.raises(StoreError, match=r"anchors\.jsonl:1: not a record .*answers of this run"):
        collect_while(server, store, lambda: store.write_text("a list of things\n"))
    assert len(ids(store.with_name("anchors.kept.jsonl"))) >= 20


def _folder(store):
    store.unlink()
    store.mkdir()


def _pipe(store):
    store.unlink()
    os.mkfifo(store)


def _null(store):
    store.unlink()
    store.symlink_to("/dev/null")


def _moved(store):
    os.rename(store.parent, store.parent.with_name("elsewhere"))


@pytest.mark.parametrize("change", [_folder, _pipe, _null, _moved])
def test_a_place_that_vanishes_takes_no_paid_answer_with_it(server, tmp_path, monkeypatch, change):
    temp, store = tmp_path / "temp", tmp_path / "here" / "anchors.jsonl"
    temp.mkdir()
    store.parent.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    said, tallies = [], []

    def tick(plan, tally):
        if tally.answered >= 9 and not tallies:
            tallies.append(tally)
            change(store)

    settings = CollectConfig(concurrency=3)
    with pytest.raises(StoreError) as caught:
        collect(lambda: many(40), at(server), store, settings, say=said.append, tick=tick)
    assert "make room" not in str(caught.value)
    kept = (temp if change is _moved else store.parent) / "anchors.kept.jsonl"
    assert change is _moved or str(kept) in str(caught.value)
    assert len(ids(kept)) == server.delivered.total() >= 9
    assert any(f"{kept}: has {len(ids(kept))} answers" in line for line in said)
    (tally,) = tallies
    failed = sum(tally.failed.values())
    assert tally.asked == tally.answered + failed + tally.unanswered == server.delivered.total()


def test_what_another_run_kept_is_not_written_over(server, store):
    kept = store.with_name("anchors.kept.jsonl")
    kept.write_text("paid before\n")
    with pytest.raises(StoreError, match=r"anchors\.kept2\.jsonl"):
        collect_while(server, store, lambda: _folder(store))
    assert kept.read_text() == "paid before\n"


# --- what a run could not store -------------------------------------------------------------------


def kept_by_a_run(server, store, count=9):
    """The file with the `count` answers of a run whose store vanished."""
    with pytest.raises(StoreError, match=r"the next collection puts them into the store"):
        collect_while(server, store, lambda: _folder(store), at_answer=count, count=count)
    store.rmdir()
    kept = store.with_name("anchors.kept.jsonl")
    assert len(ids(kept)) == count
    return kept


def test_what_a_run_kept_is_put_into_the_store_by_the_next_one_and_not_asked_again(server, store):
    kept = kept_by_a_run(server, store)
    said = []
    run(many(20), server, store, said)
    assert said[0] == f"{kept}: 9 answers in it that the store lacked, put into {store}"
    assert said[1].startswith("20 prompts: had 9, asked 11: 11 answered")
    assert len(ids(store)) == len(set(ids(store))) == server.delivered.total() == 20
    assert not kept.exists()


def test_what_a_run_kept_comes_even_where_nothing_is_left_to_ask_and_once(server, store):
    kept = kept_by_a_run(server, store)
    copy = kept.read_bytes()
    kept.with_name("anchors.kept2.jsonl").write_bytes(copy.removesuffix(b"\n"))
    said = []
    found = anchors_for(many(9), at(server), store, CollectConfig(), say=said.append)
    assert len(found) == len(ids(store)) == 9
    assert said[2:] == ["9 prompts: had 9, asked 0"]
    kept.write_bytes(copy)
    anchors_for(many(9), at(server), store, CollectConfig(), say=said.append)
    assert said[3] == f"{kept}: 0 answers in it that the store lacked, put into {store}"
    assert len(ids(store)) == 9
    assert not kept.exists()


def test_failures_that_a_run_kept_stay_failures(server, store):
    server.reply = lambda request: (200, {}, completion(""))
    run(many(2), server, store)
    failed = failures_path(store)
    failed.rename(failed.with_name("anchors.failed.kept.jsonl"))
    said = []
    run(many(2), server, store, said)
    assert said[-1].startswith("2 prompts: had 0, asked 0; 2 failed before")
    assert len(ids(failed)) == server.delivered.total() == 2


def test_failures_that_a_run_kept_stop_no_other_where_the_disk_is_still_full(
    server, store, monkeypatch
):
    reply, server.reply = server.reply, lambda request: (200, {}, completion(""))
    run(many(2), server, store)
    failed = failures_path(store)
    kept = failed.rename(failed.with_name("anchors.failed.kept.jsonl"))
    server.reply = reply

    def full(*_):
        raise OSError(28, "No space left on device")

    said = []
    with monkeypatch.context() as patched:
        patched.setattr(AnchorStore, "_write", full)
        take_up(store, Contents(store), said.append)
    assert said[0].startswith(f"{kept} has answers that {store} lacks: ")
    assert kept.exists()


def test_what_another_model_refused_is_no_failure_of_the_one_that_is_replayed(server, store):
    run(many(1), server, store)
    reply, server.reply = server.reply, lambda request: (200, {}, completion(""))
    other = dataclasses.replace(at(server), model="other")
    anchors_for(many(2), other, store, CollectConfig(), say=[].append)
    server.reply = reply
    replayed = TeacherConfig(model=at(server).model)
    with pytest.raises(StoreError, match="1 of 2 prompts have no anchor"):
        anchors_for(many(2), replayed, store, CollectConfig(), say=[].append)
    found = anchors_for(many(1), replayed, store, CollectConfig(), say=[].append)
    assert len(found) == 1


def test_what_a_run_kept_stays_where_it_can_not_be_read_or_stored(server, store, monkeypatch):
    kept = kept_by_a_run(server, store)
    with kept.open("a") as out:
        out.write('{"torn')
    said = []
    run(many(1), server, store, said)
    assert said[0].startswith(f"{kept}:10: not a record")
    assert kept.exists()
    kept.write_bytes(kept.read_bytes().removesuffix(b'{"torn'))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(AnchorStore, "_write", full)
        anchors_for(many(1), at(server), store, CollectConfig(), say=said.append)
    assert f"{kept} has answers that {store} lacks: " in said[-2]
    assert len(ids(kept)) == 9
    take_up(store, Contents(store), said.append)
    assert len(ids(store)) == 9
    with pytest.raises(StoreError, match="1 of 10 prompts have no anchor"):
        anchors_for(many(10), TeacherConfig(), store, CollectConfig(), say=said.append)


def test_what_was_taken_up_is_renamed_and_never_written_over(server, store):
    run(many(2), server, store)
    whole = store.read_bytes()
    for change in (b"mended by hand", b"otherwise"):
        copy = store.with_name("anchors.kept7.jsonl")
        copy.write_bytes(whole.replace(b"prompt 1", change))
        run(many(2), server, store)
        assert not copy.exists()
    assert store.read_bytes() == whole
    taken = sorted(store.parent.glob("anchors.kept7.jsonl.taken*"))
    assert [b"by hand" in file.read_bytes() for file in taken] == [True, False]


def test_a_store_named_like_what_a_run_kept_stays_a_store(server, store):
    other = store.with_name("anchors.kept.jsonl")
    run(many(3), server, store)
    store.rename(other)
    store.with_name("anchors.jsonl.lock").rename(store.with_name("anchors.kept.jsonl.lock"))
    run(user("mine"), server, store)
    assert ids(store) == ["id-mine"]
    assert len(read_anchors(other)) == len(read_anchors(str(other))) == 3


@pytest.mark.parametrize("name", ["a.kept.jsonl", "a.kept12.jsonl", "a.failed.jsonl", "a.failed"])
def test_a_store_may_not_be_named_like_what_pujax_keeps_beside_one(server, store, name):
    with pytest.raises(StoreError, match=rf"{name}: .*: name the store otherwise"):
        run(many(1), server, store.with_name(name))
    store.symlink_to(name)
    with pytest.raises(StoreError, match="name the store otherwise"):
        run(many(1), server, store)
    assert not server.delivered


def test_answers_are_no_failures_and_failures_no_answers(server, store):
    run(many(2), server, store)
    failed = failures_path(store)
    store.rename(failed)  # as a store of the landed version could be named
    with pytest.raises(StoreError, match=r"failed\.jsonl:1: an answer among failures, .*: rename"):
        run(many(2), server, store)
    with pytest.raises(StoreError, match=r"failed\.jsonl:1: an answer among"):
        list(read_failures(store))
    failed.unlink()
    server.reply = lambda request: (200, {}, completion(""))
    run(many(2), server, store, retry_failed=True)
    with pytest.raises(StoreError, match=r"failed\.jsonl:1: a failure among answers"):
        anchors_for(many(2), TeacherConfig(), failed, CollectConfig(), say=[].append)
    with pytest.raises(StoreError, match=r"failed\.jsonl:1: a failure among answers"):
        read_anchors(failed)
    failed.rename(store.with_name("anchors.kept.jsonl"))
    said = []
    take_up(store, Contents(store), said.append)
    assert "anchors.kept.jsonl:1: a failure among" in said[0]
    assert not store.read_bytes()


def test_a_pipe_or_folder_named_like_what_a_run_kept_is_passed_over(server, store):
    os.mkfifo(store.with_name("anchors.kept.jsonl"))
    store.with_name("anchors.kept2.jsonl").mkdir()
    assert kept_beside(store) == []
    kept = store.with_name("anchors.kept3.jsonl")
    run(many(2), server, store)
    store.rename(kept)
    said = []
    run(many(2), server, store, said)
    assert said[-1].startswith("2 prompts: had 2, asked 0")


def test_a_replay_names_what_waits_beside_the_store(server, store):
    kept = kept_by_a_run(server, store)
    store.touch()
    with pytest.raises(StoreError, match=rf"9 of 9 prompts have no anchor .*{kept} has answers"):
        anchors_for(many(9), TeacherConfig(), store, CollectConfig(), say=[].append)


def test_half_a_line_of_another_program_is_not_glued_to_a_record(server, store):
    def tear():
        with store.open("a") as out:
            out.write('{"key": "ab')

    said = collect_while(server, store, tear)
    assert len(ids(store)) == 60
    assert any("cut off a torn last line of 11 bytes" in line for line in said)


def test_blank_lines_are_passed_over_and_counted(server, store):
    run(many(2), server, store)
    first, second = store.read_text().splitlines()
    store.write_text(f"{first}\n\n \n{second}\n\n")
    assert len(ids(store)) == len(read_anchors(store)) == 2
    contents = Contents(store)
    assert len(contents.answered) == 2
    with store.open("a") as out:
        out.write("\nx\n")
    with pytest.raises(StoreError, match=r"anchors\.jsonl:7: not a record"):
        contents.refresh()


@pytest.mark.parametrize("device", ["/dev/full", "/dev/null"])
def test_a_device_is_no_store(store, device):
    store.symlink_to(device)
    for read in (Contents, AnchorStore, lambda path: list(read_records(path))):
        with pytest.raises(StoreError, match=r"is a folder, a pipe or a device: move it away"):
            read(store)


# --- fields of other types ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key", 5),
        ("key", "K" * 64),
        ("id", 5),
        ("messages", None),
        ("messages", []),
        ("messages", [{"role": "user", "content": 3}]),
        ("response", None),
        ("finish_reason", 1),
        ("model", ["m"]),
        ("usage", [1]),
        ("usage", {"prompt_tokens": "1"}),
        ("usage", {"prompt_tokens": float("nan")}),
        ("cost", "1"),
        ("cost", float("nan")),
        ("cost", True),
        ("created", None),
    ],
)
def test_a_field_of_another_type_is_named_with_its_line(server, store, field, value):
    run(many(2), server, store)
    first, second = store.read_text().splitlines()
    store.write_text(first + "\n" + json.dumps(json.loads(second) | {field: value}) + "\n")
    for read in (read_anchors, Contents, AnchorStore):
        with pytest.raises(StoreError, match=rf"anchors\.jsonl:2: a record with {field} "):
            read(store)


RECORD = {
    **{"format": 1, "key": "0" * 64, "id": "a", "messages": [TURN], "response": "x"},
    **{"finish_reason": "stop", "model": "m", "usage": None, "cost": None, "created": "2026"},
}


@pytest.mark.parametrize("reason", [["a"], {}, 5, None])
def test_a_failure_whose_reason_is_no_text_is_named(store, reason):
    store.touch()
    failures_path(store).write_text(json.dumps(RECORD | {"reason": reason}) + "\n")
    for read in (describe, Contents):
        with pytest.raises(StoreError, match=r"failed\.jsonl:1: a record with reason .*: mend"):
            read(store)


def test_the_costs_of_a_store_add_up_however_large_one_is(store):
    store.write_text("".join(json.dumps(RECORD | {"cost": cost}) + "\n" for cost in (9e299, 0.5)))
    (line,) = [line for line in describe(store).splitlines() if line.startswith("cost ")]
    assert float(line.split()[1].replace(",", "")) == 9e299


def test_a_store_of_the_landed_version_is_read_under_its_keys(store):
    store.write_text(
        '{"format": 1, "key": "a5bb8a66f0ac7ad4f9bd8c9bd7d2ee1dcbd3a1ce9dfcd1ba1ae1f2f6b1a9a9de", '
        '"id": "a", "messages": [{"role": "user", "content": "Hi"}], "response": "Hello", '
        '"finish_reason": "stop", "model": "m", "served_model": null, "sampling": {"system": null, '
        '"temperature": 0.0, "max_tokens": 8}, "usage": null, "cost": null, "created": "2026"}\n'
    )
    anchor = read_anchors(store)[messages_key([TURN])]
    assert anchor == Anchor("Hello", "stop", "m")
    assert (anchor.seconds, anchor.tokens, anchor.cost) == (None, None, None)


def test_an_anchor_knows_what_it_took_and_is_the_same_whatever_that_was(server, store):
    run(many(1), server, store)
    ((_, record),) = read_records(store)
    (anchor,) = read_anchors(store).values()
    assert (anchor.seconds, anchor.tokens) == (record["seconds"], 5)
    assert anchor == dataclasses.replace(anchor, seconds=9.0, cost=1.0)
    store.write_text(json.dumps(record | {"seconds": -1}) + "\n")
    with pytest.raises(StoreError, match=r":1: a record with seconds -1: mend or take out"):
        read_anchors(store)


def test_a_store_is_read_once_a_command(server, store, monkeypatch):
    run(many(5), server, store)
    read = []
    parse = store_module.parse
    monkeypatch.setattr(store_module, "parse", lambda *line: read.append(1) or parse(*line))
    anchors = anchors_for(many(6), at(server), store, CollectConfig(), say=[].append)
    assert (len(anchors), len(read)) == (6, 6)  # the five of before and the one that was asked


# --- anchors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "tokens", "limit", "finished"),
    [
        *((word, 5, 8, True) for word in ("stop", "eos", "EOS_TOKEN", "STOP", "end_turn", "end")),
        *((word, 5, 8, False) for word in ("length", "MAX_TOKENS", "max_tokens", "model_length")),
        (None, 5, 8, True),
        (None, 8, 8, False),
        (None, None, 8, False),
        (None, None, None, True),
        ("what", 5, 8, True),
    ],
)
def test_how_an_answer_ended(reason, tokens, limit, finished):
    record = {
        "response": "x",
        "finish_reason": reason,
        "model": "m",
        "usage": None if tokens is None else {"completion_tokens": tokens},
        "sampling": {"max_tokens": limit},
    }
    anchor = anchor_of(record)
    assert anchor is not None
    assert anchor.finished is finished
    assert anchor.finish_reason == reason


@pytest.mark.parametrize(
    ("response", "strip", "fail"),
    [
        ("Paris", "Paris", "Paris"),
        ("<think>\nHmm\n</think>\n\nParis", "Paris", None),
        ("Hmm, the template has opened it.</think>Paris", "Paris", None),
        ("<think>\nHmm", None, None),
        ("<thinking>Hmm</thinking>", None, None),
        ("<THINK>Hmm</THINK>Paris", "Paris", None),
        ("<THINK>Hmm", None, None),
        ("<think>Hmm</think>\u200b", None, None),
        ("Write <think> before and </think> after.",) * 3,
        ("I think so.",) * 3,
    ],
)
def test_a_thought_is_no_part_of_an_anchor(response, strip, fail):
    assert said(response, "strip") == strip
    assert said(response, "fail") == fail
    assert said(response, "keep") == response


def test_an_answer_that_begins_with_very_much_space_is_read_in_linear_time():
    begun = time.process_time()
    assert said(" " * 20_000 + "I think so", "strip") == " " * 20_000 + "I think so"
    assert said(" " * 20_000 + "<think>Hmm</think>" + "\n" * 20_000 + "Paris", "strip") == "Paris"
    assert time.process_time() - begun < 0.5


def test_half_a_character_becomes_a_replacement_character_in_an_anchor(server, store):
    server.reply = lambda request: (200, {}, completion("smile \ud83d end"))
    run(user("a"), server, store)
    (anchor,) = read_anchors(store).values()
    assert anchor.response == "smile \ufffd end"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_store_that_was_saved_as_utf_16_is_named_so(tmp_path, encoding):
    store = tmp_path / "anchors.jsonl"
    store.write_bytes('{"format": 1, "key": "é"}\n'.encode(encoding))
    for read in (read_anchors, Contents):
        with pytest.raises(StoreError, match=r"anchors\.jsonl:1: UTF-16, .*: save it as UTF-8"):
            read(store)


def test_the_extremes_of_a_store_are_answers_that_differ(server, store):
    server.reply = lambda request: (
        (200, {}, completion("no")) if "1" in request.prompt else echo(request)
    )
    run(many(12), server, store)
    shortest = describe(store).partition("shortest:\n")[2].partition("longest:")[0].splitlines()
    assert [line.rpartition("  ")[2] for line in shortest[:2]] == ["'no'", "'answer to prompt 0'"]
    assert sum("'no'" in line for line in shortest) == 1
    assert len(shortest) == 10  # of 1 and 9 that differ
