"""Where nothing is heard for a while, something is said."""

import threading

import pytest

from pujax.evaluation.waiting import through, waited


def test_silence_is_broken_each_time_and_ends_with_the_work():
    said, heard = [], threading.Event()

    def say(line):
        said.append(line)
        if len(said) == 2:
            heard.set()

    with waited("compiling", say, every=0.01):
        assert heard.wait(10)
    count = len(said)
    assert set(said) == {"compiling: still at it, 0:00 by now"}
    assert not [t for t in threading.enumerate() if t.name == "compiling"]
    assert len(said) == count


def test_whoever_has_spoken_is_not_spoken_over():
    said = []
    with waited("steps", said.append, every=0.2) as noted:
        for _ in range(30):
            noted()
            threading.Event().wait(0.01)
    assert said == []


def test_work_that_fails_ends_the_watch():
    with pytest.raises(ValueError, match="mine"), waited("steps", print, every=5):
        raise ValueError("mine")
    assert "steps" not in [thread.name for thread in threading.enumerate()]


def test_a_terminal_with_a_bar_gets_no_thread():
    before = threading.active_count()
    with waited("steps", None) as noted:
        noted()
        assert threading.active_count() == before


def test_of_one_wait_within_another_the_inner_one_speaks():
    outer, inner, heard = [], [], threading.Event()

    def say(line):
        inner.append(line)
        heard.set()

    with waited("suite", outer.append, every=0.05):
        with waited("sampling", say, every=0.01):
            assert heard.wait(10)
        assert outer == []
        for _ in range(1000):
            if outer:
                break
            threading.Event().wait(0.01)
    assert outer[0].startswith("suite: still at it")


def test_how_far_it_is_is_said_with_what_goes_on(monkeypatch):
    def often(what, say):
        return waited(what, say, every=0.01)

    monkeypatch.setattr("pujax.evaluation.waiting.waited", often)
    said, heard = [], threading.Event()

    def say(line):
        said.append(line)
        heard.set()

    for start in through(range(0, 10, 4), "sampling", 10, say):
        if start == 8:
            heard.clear()
            assert heard.wait(10)
    assert said[-1] == "sampling: still at it, 0:00 by now, 8 of 10"
