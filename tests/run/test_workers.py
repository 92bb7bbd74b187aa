import doctest
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pujax.errors import ConfigError
from pujax.run import workers
from pujax.run.workers import Outcome, Workers

CHECKS = """
import os, subprocess, sys, time
from pujax.errors import ConfigError

def check(response, answer):
    if response == "raise":
        raise ValueError("no such\\nthing")
    if response == "sleep":
        time.sleep(60)
    if response == "catch":  # all that can be caught
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    if response == "die":
        os._exit(3)
    if response == "exit":
        sys.exit()
    if response == "fork" and os.fork() == 0:
        return 7.0  # the child comes back where its parent does
    if response == "fork":
        return 8.0
    if response == "setting":
        raise ConfigError("scorer.score.function.x=1: wrong")
    if response == "none":
        return None
    return float(response)

def words(response):
    return response

def modules(response):
    return "jax" in sys.modules

def all_at_once(response):
    if response[0] == "short":
        return [1.0]
    return [float(one) if one else "what" for one in response]

def again(response):
    child = subprocess.Popen(["sleep", "600"])
    with open(response + ".new", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename(response + ".new", response)
    while True:
        pass
"""


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """A module of a user's own."""
    directory = tmp_path_factory.mktemp("user")
    (directory / "user_checks.py").write_text(CHECKS)
    (directory / "user_broken.py").write_text("def check(response): pass\n")
    sys.path.insert(0, str(directory))
    yield importlib.import_module("user_checks")
    sys.path.remove(str(directory))


def test_the_examples_in_docstrings_hold():
    failed, tried = doctest.testmod(workers)
    assert (failed, tried) == (0, 2)


def test_each_call_has_its_own_outcome_whatever_the_others_do(checks):
    said = ["1", "raise", "die", "sleep", "exit", "none", "catch", "nan", "2", "3"]
    begun = time.monotonic()
    with Workers(checks.check, count=3, seconds=0.5) as pool:
        made = pool.call([{"response": one, "answer": ""} for one in said])
        outcomes = [outcome for one in made for outcome in one]
        assert [outcome.value for outcome in outcomes if outcome.failure is None] == [
            *(1.0, None, 2.0, 3.0)
        ]
        assert [outcome.failure for outcome in outcomes] == [
            None,
            "ValueError: no such",
            "its process ended with status 3",
            "took more than 0.5 s",
            "SystemExit: no message",
            None,
            "took more than 0.5 s",
            "returned nan",
            None,
            None,
        ]
        assert time.monotonic() - begun < 30
        assert pool.call([{"response": "4", "answer": ""}]) == [[Outcome(4.0)]]
        pids = [worker.process.pid for worker in pool._started]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_a_function_forks_answers_for_nobody(checks):
    """Else each later call would get the answer to one before it."""
    with Workers(checks.check, count=1, seconds=10) as pool:
        for _ in range(3):
            said = [{"response": one, "answer": ""} for one in ("fork", "2", "3", "4")]
            assert pool.call(said) == [[Outcome(x)] for x in (8.0, 2.0, 3.0, 4.0)]


def test_an_error_that_cannot_say_what_it_is_is_told_by_its_type():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    assert workers._told(Mute()) == "Mute: no message"


@pytest.mark.parametrize(("number", "fine"), [(1e15, True), (-1.1e15, False), (1e39, False)])
def test_a_reward_that_float32_could_not_standardise_is_a_failure_by_name(number, fine):
    value, failure = workers._number(number)
    if fine:
        assert (value, failure) == (number, None)
        group = np.array([0.0, number], np.float32)
        assert np.isfinite(np.square(group - group.mean()).sum())
    else:
        assert failure == f"returned {number:g}, more than 1e+15: scale it down"


def test_a_batch_is_one_call_and_a_value_that_is_no_number_fails_alone(checks):
    with Workers(checks.all_at_once, count=2, seconds=10, batched=True) as pool:
        ((first, second),) = pool.call([{"response": ["1", ""]}])
        assert first == Outcome(1.0)
        assert second.failure == "returned 'what', not a number"
        ((one, two),) = pool.call([{"response": ["short", ""]}])
        assert one.failure == two.failure == "returned 1 numbers for 2 responses"


def test_a_worker_has_no_jax(checks):
    with Workers(checks.modules, count=1, seconds=10) as pool:
        assert pool.call([{"response": ""}]) == [[Outcome(0.0)]]


def test_what_the_function_says_of_its_settings_ends_the_run(checks):
    with (
        Workers(checks.check, count=1, seconds=10) as pool,
        pytest.raises(ConfigError, match=r"^scorer\.score\.function\.x=1: wrong$"),
    ):
        pool.call([{"response": "setting", "answer": ""}])


def test_a_function_that_no_other_process_finds_is_refused(checks, tmp_path):
    with pytest.raises(ConfigError, match="write it at the top level of a module"):
        Workers(lambda response: 1.0, count=1, seconds=1)
    user_broken = importlib.import_module("user_broken")
    Path(str(user_broken.__file__)).write_text("import no_such_module\n")
    with (
        Workers(user_broken.check, count=1, seconds=1) as pool,
        pytest.raises(ConfigError, match="can't be loaded: ModuleNotFoundError: No module named"),
    ):
        pool.call([{"response": ""}])


def gone(pids, within):
    """Whether all of these processes have ended after so many seconds."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def alive(pid):
    try:  # who has ended and not been waited for, by an init that does not, is gone too
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_call_that_takes_too_long_ends_with_all_that_it_started(checks, tmp_path):
    path = tmp_path / "pids"
    with Workers(checks.again, count=1, seconds=2.0) as pool:
        ((outcome,),) = pool.call([{"response": str(path)}])
    assert outcome.failure == "took more than 2 s"
    assert gone([*map(int, path.read_text().split())], 10)


def test_a_worker_ends_with_all_that_it_started_when_the_run_is_killed(checks, tmp_path):
    path = tmp_path / "pids"
    code = (
        "import sys; sys.path[:] = eval(sys.argv[1]); import user_checks; "
        "from pujax.run.workers import Workers; "
        "Workers(user_checks.again, count=1, seconds=600).call([{'response': sys.argv[2]}])"
    )
    run = subprocess.Popen([sys.executable, "-c", code, repr(sys.path), str(path)])
    until = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)
    pids = list(map(int, path.read_text().split()))
    assert all(map(alive, pids))
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert gone(pids, 20)
