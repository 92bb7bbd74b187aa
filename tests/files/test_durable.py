import errno
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from pujax.errors import DiskError, PujaxError
from pujax.files import durable
from pujax.files.durable import read_jsonl, write_whole, written_whole


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


def test_no_link_is_followed_to_where_a_file_is_written_first(tmp_path):
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / ".a.json.new").symlink_to("theirs")
    with pytest.raises(DiskError, match="move away what is in its way"):
        write_whole(tmp_path / "a.json", b"{}")
    assert (tmp_path / "theirs").read_bytes() == b"theirs"


@pytest.mark.parametrize("put", [os.mkfifo, lambda at: os.link(at.with_name("theirs"), at)])
def test_no_pipe_and_no_file_of_two_names_is_written_to(tmp_path, put):
    (tmp_path / "theirs").write_bytes(b"theirs")
    put(tmp_path / ".a.json.new")
    with ThreadPoolExecutor(1) as other:
        writing = other.submit(write_whole, tmp_path / "a.json", b"{}")
        if not wait([writing], timeout=2).done:  # a pipe's reader ends it
            (tmp_path / ".a.json.new").read_bytes()
        with pytest.raises(DiskError, match="move away what is in its way"):
            writing.result()
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    assert not (tmp_path / "a.json").exists()


def test_what_libraries_in_rust_say_of_a_full_disk_is_understood(tmp_path):
    with pytest.raises(DiskError, match="make room"), durable.on_disk(tmp_path / "a"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="something else"), durable.on_disk(tmp_path / "a"):
        raise RuntimeError("something else")


@pytest.mark.parametrize("name", ["a.json", ".a.json.new"])
def test_a_folder_in_the_way_is_named(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(DiskError, match=r"a\.json can't be written .*move away what is in its way"):
        write_whole(tmp_path / "a.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_disk_that_is_really_full_says_so(tmp_path):
    with (
        pytest.raises(DiskError, match=r"No space left on device\): make room"),
        durable.on_disk(tmp_path),
        open("/dev/full", "wb") as file,
    ):
        file.write(bytes(10**6))


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
