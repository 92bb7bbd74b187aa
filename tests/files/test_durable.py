import errno
import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pujax.errors import DiskError, PujaxError
from pujax.files import durable
from pujax.files.durable import begun_for, name_beside, read_jsonl, write_whole, written_whole


def test_what_is_written_is_on_the_disk_with_the_folder_that_names_it(tmp_path, monkeypatch):
    flushed = []
    real = os.fsync
    monkeypatch.setattr(
        durable.os,
        "fsync",
        lambda fd: flushed.append(stat.S_IFMT(os.fstat(fd).st_mode)) or real(fd),
    )
    write_whole(tmp_path / "a.json", b"{}")
    assert flushed == [stat.S_IFREG, stat.S_IFDIR]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room on its disk"),
        (errno.EROFS, "choose a place that you may write to"),
        (errno.EIO, "see to its disk"),
    ],
)
def test_a_write_that_fails_leaves_the_old_file_and_one_line(number, remedy, tmp_path, monkeypatch):
    def fails(_):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(durable.os, "fsync", fails)
    with pytest.raises(DiskError, match=rf"a\.json can't be written \(.*\): {remedy}") as caught:
        write_whole(path, b"new")
    assert "\n" not in str(caught.value)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.json", b"old")]


def test_of_two_that_write_one_file_at_once_each_writes_all_of_it(tmp_path):
    path = tmp_path / "a.json"
    with ThreadPoolExecutor(1) as second:
        with written_whole(path) as beside:
            beside.write_bytes(b"first")
            writing = second.submit(write_whole, path, b"second")
            with pytest.raises(TimeoutError):
                writing.result(timeout=0.2)
            assert beside.read_bytes() == b"first"
        writing.result(timeout=10)
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_the_user_has_beside_a_file_is_neither_opened_nor_taken(tmp_path):
    """A file called .a.json.new was overwritten, and gone after a report; at a pipe it hung."""
    theirs, begun = tmp_path / "theirs", name_beside(tmp_path / "a.json").name
    theirs.write_bytes(b"theirs")
    other = begun.replace(".new", "").translate(str.maketrans("0123456789", "1234567890")) + ".new"
    for name in (".a.json.new", ".a.json.0123abcd.new", other, f"x{begun}", f"{begun}.bak"):
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ".b.json.new").symlink_to("theirs")
    os.mkfifo(tmp_path / ".c.json.new")
    os.link(theirs, tmp_path / ".d.json.new")
    (tmp_path / ".e.json.new").mkdir()
    before = {path.name: path.lstat() for path in tmp_path.iterdir()}
    with ThreadPoolExecutor(1) as writer:
        for name in "abcde":
            writer.submit(write_whole, tmp_path / f"{name}.json", b"{}").result(timeout=10)
    assert {path.name for path in tmp_path.iterdir()} == {*before, *(f"{n}.json" for n in "abcde")}
    for name, stat_before in before.items():
        now = (tmp_path / name).lstat()
        assert (now.st_ino, now.st_size, now.st_mtime_ns, now.st_mode) == (
            stat_before.st_ino,
            stat_before.st_size,
            stat_before.st_mtime_ns,
            stat_before.st_mode,
        )


def test_what_a_kill_left_of_a_file_goes_when_that_is_written_again(tmp_path):
    begun = [name_beside(tmp_path / name) for name in ("a.json", "a.json", "b.json")]
    for path in begun:
        path.write_bytes(b"half")
    begun.append(name_beside(tmp_path / "a.json"))
    begun[-1].symlink_to(begun[0].name)  # none that a write began
    write_whole(tmp_path / "a.json", b"{}")
    assert set(tmp_path.iterdir()) == {tmp_path / "a.json", *begun[2:]}
    assert [begun_for(path.name) for path in begun] == ["a.json", "a.json", "b.json", "a.json"]


WRITES = """
import os, signal, sys
from pathlib import Path
from pujax.files.durable import written_whole
with written_whole(Path(sys.argv[1])) as beside:
    beside.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_as_it_writes_leaves_what_the_next_one_removes(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", WRITES, path]).returncode == -signal.SIGKILL
        (left,) = set(os.listdir(tmp_path)) - {"a.json"}
        assert begun_for(left) == "a.json"
        assert path.read_bytes() == b"old"
    write_whole(path, b"new")
    assert os.listdir(tmp_path) == ["a.json"]


def test_four_that_write_one_file_over_and_over_lose_and_leave_nothing(tmp_path):
    path = tmp_path / "a.json"

    def write(number):
        for _ in range(20):
            write_whole(path, b"%d" % number * 5000)
            held = path.read_bytes()
            assert len(held) == 5000
            assert len(set(held)) == 1

    with ThreadPoolExecutor(4) as writers:
        for done in [writers.submit(write, number) for number in range(4)]:
            done.result()
    assert os.listdir(tmp_path) == ["a.json"]


def test_where_files_can_not_be_locked_what_lies_beside_stays(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    begun = name_beside(tmp_path / "a.json")
    begun.write_bytes(b"somebody may be at it")
    monkeypatch.setattr(durable.fcntl, "flock", none)
    write_whole(tmp_path / "a.json", b"{}")
    assert set(tmp_path.iterdir()) == {tmp_path / "a.json", begun}


def test_what_libraries_in_rust_say_of_a_full_disk_is_understood(tmp_path):
    with pytest.raises(DiskError, match="make room"), durable.on_disk(tmp_path / "a"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="something else"), durable.on_disk(tmp_path / "a"):
        raise RuntimeError("something else")


def test_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(DiskError, match=r"a\.json can't be written .*move away what is in its way"):
        write_whole(tmp_path / "a.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_disk_that_is_really_full_says_so(tmp_path):
    for write in (lambda file: file.write(bytes(10**6)), np.zeros(10**6).tofile):
        with (
            pytest.raises(DiskError, match=r"No space left on device\): make room"),
            durable.on_disk(tmp_path),
            open("/dev/full", "wb") as file,
        ):
            write(file)


@pytest.mark.parametrize("line", [b"[1]", b"{", b"[" * 100_000, b"9" * 5000, b"\xff", b""])
def test_a_line_that_is_no_object_is_named_with_its_file(line, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"{}\n" + line + b"\n")
    with pytest.raises(PujaxError, match=r"lines\.jsonl:2: not .*: remove this line") as caught:
        read_jsonl(path)
    assert isinstance(caught.value, ValueError)


def test_an_error_is_one_line_whatever_it_quotes():
    told = str(DiskError("'café' \x1b[31m\nis \ud83d"))
    assert told == "'café' \\x1b[31m\\nis \\ud83d"
