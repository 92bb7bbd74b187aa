import contextlib
import json
import math
import os
import socket
import time
from functools import partial

import pytest
from aiolimiter import AsyncLimiter

from pujax.errors import ConfigError, TeacherError
from pujax.records import Prompt, messages_key
from pujax.teacher import asking
from pujax.teacher.anchors import anchors_for, collect
from pujax.teacher.describing import describe_plan
from pujax.teacher.endpoint import open_endpoint
from pujax.teacher.plan import make_plan
from pujax.teacher.protocols import Retryable
from pujax.teacher.settings import BudgetConfig, CollectConfig, PriceConfig, TeacherConfig
from pujax.teacher.store import Contents, failures_path, read_records
from tests.teacher_client import at, error, many, replies, run, user
from tests.teacher_server import Request, completion, echo

WAIT = asking._backoff  # as it is where no test hurries it

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
    server.latency = 0.05
    teacher = at(server, system="S", temperature=0.0, price=PriceConfig(1.0, 2.0))
    run(user("a"), server, store, teacher=teacher)
    ((_, record),) = read_records(store)
    assert record.pop("created").endswith("+00:00")
    assert 0.05 <= record.pop("seconds") < 5
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


@pytest.mark.parametrize(
    ("status", "others", "doubled"),
    [(500, 0, [0, 1, 2, 3]), (500, 60, [0, 0, 0, 0]), (429, 60, [0, 1, 2, 3])],
)
def test_waits_double_while_nobody_is_answered_or_the_server_is_busy(
    status, others, doubled, server, store, monkeypatch
):
    waits = []
    monkeypatch.setattr(asking, "_backoff", lambda error, doubled: waits.append(doubled) or 0.0)
    server.latency = 0.01
    server.reply = lambda request: error(status) if request.prompt == "b" else echo(request)
    with pytest.raises(TeacherError, match="no answer after 3 retries"):
        run([*user("b"), *many(others)], server, store, retries=3, concurrency=8)
    assert waits == doubled


def test_a_wait_is_drawn_up_to_its_bound_and_never_under_the_servers_wish():
    drawn = [WAIT(Retryable("500"), doubled) for doubled in (0, 3, 6, 5000) for _ in range(200)]
    for place, bound in enumerate((1.0, 8.0, 60.0, 60.0)):
        waits = drawn[200 * place : 200 * (place + 1)]
        assert 0.0 <= min(waits) < 0.2 * bound
        assert 0.8 * bound < max(waits) <= bound
    assert WAIT(Retryable("429", after=90.0), 0) == 90.0


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
    with pytest.raises(
        TeacherError, match=r"1 prompt has no answer after 2 retries each at http.*500"
    ):
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
    with pytest.raises(TeacherError, match=r"4 prompts in a row failed: 500: down \(asked at http"):
        run(many(500), server, store, retries=1, concurrency=4)
    assert server.seen <= 4 * 2 * 2


@pytest.mark.parametrize(("count", "asked"), [(2, 2), (50, 3)])
def test_replies_that_ones_own_function_can_not_read_end_the_run_unretried(
    server, store, count, asked
):
    teacher = at(server, protocol=partial(open_endpoint, answer=lambda body: body["respons"]))
    said = []
    with pytest.raises(TeacherError, match=r"KeyError: 'respons'.*the reply has"):
        run(many(count), server, store, said, teacher, concurrency=1)
    assert server.delivered.total() == asked
    assert f"{asked} without an answer" in said[0]
    assert said[0].endswith("cost unknown")


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
    assert time.monotonic() - start < 30


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


def test_answers_under_other_settings_are_told_with_what_differs(server, store):
    run(user("a", "b"), server, store)
    run(user("a"), server, store, teacher=at(server, system="Be brief.", max_tokens=8))
    other = at(server, system="Be brief.", max_tokens=9)
    held = Contents(store, asked=other.asked)
    plan = make_plan(user("a", "b", "c"), other, held, retry_failed=False)
    assert (plan.to_ask, plan.otherwise, plan.differing) == (3, 2, ("max_tokens", "system"))
    said = "2 of these have answers under other settings (teacher.max_tokens, teacher.system)"
    assert said in describe_plan(plan, other)
    told = []
    run(user("a", "b", "c"), server, store, told, teacher=other)
    assert told[0].startswith(said)
    told = []
    run(user("a", "b", "d"), server, store, told, teacher=other)
    assert "other settings" not in told[0]  # none of those that are asked


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
        f"stopped: the budget is reached ({budget}); at most {30 - answered} are left: run the "
        "same command to go on, with a larger budget to get further"
    )
    assert tally.left == 30 - answered
    # What no request was made for was not asked.
    assert (tally.asked, tally.unanswered, tally.requests) == (answered, 0, answered)
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
    assert 1.0 < time.monotonic() - start < 20.0  # 10 at once, then 10 a second


# --- refusals, waits and what is left -------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_prompt_that_the_server_refuses_fails_alone(server, store, status):
    server.reply = lambda request: (
        error(status, "too long \x1b[31m") if request.prompt == "prompt 2" else echo(request)
    )
    said = []
    tally = run(many(12), server, store, said, concurrency=2)
    assert (tally.answered, tally.failed) == (11, {"rejected": 1})
    ((_, record),) = read_records(failures_path(store))
    assert (record["id"], record["reason"], record["cost"]) == ("id-prompt 2", "rejected", None)
    assert f"answered {status}: too long \\x1b[31m: " in record["refusal"]
    assert run(many(12), server, store, said).asked == 0


def test_the_first_prompts_may_be_the_refused_ones(server, store):
    long = {f"prompt {n}" for n in range(5)}
    server.reply = lambda request: error(400) if request.prompt in long else echo(request)
    tally = run(many(12), server, store, concurrency=1)
    assert (tally.answered, tally.failed) == (7, {"rejected": 5})


def test_when_all_are_refused_the_settings_are_at_fault(server, store):
    server.reply = lambda request: error(400, "unknown parameter")
    with pytest.raises(TeacherError, match=r"400: unknown parameter: check teacher\.model and its"):
        run(many(100), server, store, concurrency=4)
    assert server.seen <= 8 + 4
    assert not failures_path(store).exists()


def test_refused_prompts_stop_no_collection_for_ever_where_the_store_has_answers(server, store):
    """The answers may be an earlier run's: eight of one wording ended each run, with none kept."""
    run(many(3), server, store)
    long = {f"prompt {n}" for n in range(3, 43)}
    server.reply = lambda request: (
        error(400, "maximum context length is 9") if request.prompt in long else echo(request)
    )
    with pytest.raises(TeacherError, match=r"32 prompts in a row .*: maximum context length is 9"):
        run(many(50), server, store, concurrency=1)
    again = run(many(50), server, store, concurrency=1)
    assert (again.passed, again.answered, again.failed) == (3 + 32, 7, {"rejected": 8})


def test_refusals_in_differing_words_are_each_their_own_prompts(server, store):
    server.reply = lambda request: (
        echo(request) if server.seen > 9 else error(400, f"{server.seen} tokens are too many")
    )
    tally = run(many(12), server, store, concurrency=1)
    assert (tally.answered, tally.failed) == (3, {"rejected": 9})


def test_where_nothing_is_ever_answered_refusals_end_the_run_in_whatever_words(server, store):
    server.reply = lambda request: error(400, f"request {server.seen}: no such parameter")
    with pytest.raises(TeacherError, match=r"32 prompts in a row were refused: .*no such param"):
        run(many(500), server, store, concurrency=4)
    assert 32 <= len(list(read_records(failures_path(store)))) <= server.seen <= 36


def test_an_account_that_runs_dry_late_does_not_fail_all_the_rest(server, store):
    server.reply = lambda request: (
        echo(request) if server.seen <= 20 else error(400, "your credit is too low")
    )
    with pytest.raises(
        TeacherError, match=r"32 prompts in a row were refused: .* credit is too low"
    ):
        run(many(500), server, store, concurrency=4)
    assert len(list(read_records(store))) == 20
    assert 32 <= len(list(read_records(failures_path(store)))) <= 36
    server.reply = echo
    assert run(many(500), server, store, retry_failed=True).answered == 480


def test_a_code_that_blames_the_prompt_counts_at_once(server, store):
    server.reply = lambda request: error(400, "long", code="context_length_exceeded")
    said = []
    tally = run(many(20), server, store, said, concurrency=4)
    assert tally.failed == {"rejected": 20}
    reason = f"{server.url}/chat/completions answered 400: long: this prompt is why: "
    reason += "change it or leave it out"
    assert {record["refusal"] for _, record in read_records(failures_path(store))} == {reason}
    assert "0 answered, 20 failed (20 rejected)" in said[0]
    assert "20 requests (20 errors)" in said[0]
    assert said[1] == f"failed, such as: {reason}; all are in {failures_path(store)}"


def test_a_refusal_in_an_answer_is_quoted_in_one_short_line(server, store):
    server.reply = lambda request: (200, {}, completion("no", refusal="I can't\n" + "so " * 200))
    said = []
    run(user("a"), server, store, said)
    assert said[1].startswith("failed, such as: I can't so so ")
    assert len(said[1]) < 350 + len(str(store))


@pytest.mark.parametrize(
    ("wait", "until"),
    [
        ("864000", r"20\d\d-\d\d-\d\d \d\d:\d\d UTC"),
        ("Fri, 31 Dec 9999 23:59:59 GMT", "9999-12-31 23:59 UTC"),
        ("inf", "some year"),
        ("1e400", "some year"),
    ],
)
def test_a_long_wait_ends_the_run_and_says_until_when(server, store, wait, until):
    server.reply = lambda request: error(429, **{"retry-after": wait})
    start = time.monotonic()
    with pytest.raises(TeacherError, match=rf"asks to wait until {until}: run the same command"):
        run(many(9), server, store)
    assert time.monotonic() - start < 60
    assert server.seen <= 8


def test_a_wait_is_said_aloud(server, store, monkeypatch):
    monkeypatch.setattr(asking, "TOLD_WAIT", 0.2)
    server.reply = replies(error(429, **{"retry-after": "0.3"}), (200, {}, completion("ok")))
    said = []
    run(many(2), server, store, said, concurrency=1)
    assert said[0] == "the server asks to wait 1 s"


@pytest.mark.parametrize("thoughts", ["strip", "fail"])
def test_a_thought_without_an_end_is_a_failure(server, store, thoughts):
    server.reply = lambda request: (200, {}, completion("<think>\nHmm", finish_reason="length"))
    tally = run(user("a"), server, store, teacher=at(server, thoughts=thoughts))
    assert tally.failed == {"thought": 1}


def test_a_thought_is_stored_and_cut_off_when_it_is_read(server, store):
    server.reply = lambda request: (200, {}, completion("<think>\nHmm\n</think>\n\nParis"))
    for thoughts, response in (("strip", "Paris"), ("keep", "<think>\nHmm\n</think>\n\nParis")):
        teacher = at(server, thoughts=thoughts)
        (anchor,) = anchors_for(user("a"), teacher, store, CollectConfig(), say=[].append).values()
        assert anchor.response == response
    assert server.seen == 1


def test_an_unknown_end_is_counted_aloud(server, store):
    server.reply = lambda request: (200, {}, completion("ok", finish_reason=None))
    said = []
    anchors_for(many(3), at(server), store, CollectConfig(), say=said.append)
    assert said[-1].startswith("3 anchors end with the reason None, which is unknown: 3 count as")


def test_an_error_is_said_once(server, store):
    server.reply = lambda request: error(401, "bad key")
    said = []
    with pytest.raises(TeacherError, match="bad key"):
        run(many(3), server, store, said, concurrency=1)
    assert said[-1] == "stopped: an error; at most 3 are left for this command once it is mended"
    assert ", 0 failed, 1 without an answer; 1 request (1 error); " in said[0]
    assert said[0].endswith("; cost unknown")  # no price is set
    assert not any("bad key" in line for line in said)


def test_what_goes_wrong_while_waiting_for_a_turn_is_not_swallowed(server, store, monkeypatch):
    def broken(self, amount=1):
        raise ZeroDivisionError

    monkeypatch.setattr(AsyncLimiter, "acquire", broken)
    with pytest.raises(ZeroDivisionError):
        run(many(3), server, store, requests_per_minute=600)


def test_nonsense_in_the_usage_is_as_good_as_none(server, store):
    def reply(request):
        bad = {"a": -5, "b": math.nan, "c": 1e400, "d": True, "e": "7", "f": 10**400}
        body = completion("ok")
        body["usage"] = {"prompt_tokens": bad[request.prompt], "completion_tokens": -1, "cost": -3}
        return 200, {}, body

    server.reply = reply
    tally = run(user(*"abcdef"), server, store)
    assert tally.answered == 6
    endless = json.dumps(completion("ok")).replace(": 10,", f": {'9' * 5000},").encode()
    server.reply = lambda request: (200, {}, endless)
    assert run(user("g"), server, store).requests == 1  # an answer is paid for once
    usages = [record["usage"] for _, record in read_records(store)]
    assert usages == [None] * 6 + [{"completion_tokens": 5}]
    assert math.isfinite(tally.prompt_tokens)
    assert tally.prompt_tokens > 0
