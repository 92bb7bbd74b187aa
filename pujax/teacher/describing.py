"""What a store holds, and what a collection would take, in words."""

import heapq
import statistics
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from pujax.errors import StoreError
from pujax.teacher.plan import Plan
from pujax.teacher.settings import TeacherConfig
from pujax.teacher.store import anchor_of, check_torn, read_failures, read_records
from pujax.text import printable


def describe_plan(plan: Plan, teacher: TeacherConfig) -> str:
    """What a collection would take, for `collect.dry_run`."""
    money = "unknown: set teacher.price.input and teacher.price.output, per million tokens"
    if plan.cost is not None:
        money = f"at most about {plan.cost:,.4f}"
    bound = "at most" if teacher.max_tokens else "a guess, as teacher.max_tokens is null,"
    return "\n".join(
        (
            f"prompts     {plan.prompts:>10,}",
            f"cached      {plan.cached:>10,}",
            f"failed      {plan.failed:>10,}   asked again with collect.retry_failed=true alone",
            f"duplicates  {plan.duplicates:>10,}",
            f"to ask      {plan.to_ask:>10,}" + (f"   {plan.again}" if plan.again else ""),
            f"tokens in   {plan.prompt_tokens:>10,}   about, by a count of characters",
            f"tokens out  {plan.completion_tokens:>10,}   {bound} of all answers",
            f"cost        {money}",
        )
    )


def describe(store: Path) -> str:
    """Counts, lengths, finish reasons, cost and the extremes of a store, for `stats`."""
    if not store.is_file():
        raise StoreError(f"{store}: no such store, so nothing to describe: check `store`")
    lengths: list[int] = []
    unfinished = thoughts = 0
    counts: dict[str, Counter[str]] = {"model": Counter(), "finish_reason": Counter()}
    bill: Counter[str] = Counter()
    keys: set[str] = set()
    seconds: list[float] = []
    tails: list[str] = []

    def torn(path: Path, tail: bytes) -> None:
        check_torn(tail, path)
        tails.append(f"{path} ends in {len(tail):,} bytes of a record that a crash cut off")

    def answers() -> Iterable[tuple[int, str, str]]:
        nonlocal unfinished, thoughts
        for _, record in read_records(store, torn=torn):
            anchor = anchor_of(record)
            unfinished += anchor is not None and not anchor.finished
            thoughts += anchor is None or len(anchor.response) < len(record["response"])
            keys.add(record["key"])
            if record.get("seconds") is not None:
                seconds.append(record["seconds"])
            lengths.append(len(record["response"]))
            for name, counter in counts.items():
                counter[str(record[name])] += 1
            _charge(bill, record)
            yield lengths[-1], printable(record["id"], 80), record["response"]

    short: list[tuple[int, str, str]] = []
    long: list[tuple[int, str, str]] = []
    for answer in answers():
        if answer[-1] not in {text for *_, text in short}:
            short = heapq.nsmallest(10, [*short, answer])
        if answer[-1] not in {text for *_, text in long}:
            long = heapq.nlargest(10, [*long, answer])
    reasons: Counter[str] = Counter()
    for _, record in read_failures(store, torn):
        reasons[record["reason"]] += 1
        _charge(bill, record)
    lines = [f"answers        {len(lengths):,}" + _twice(len(lengths) - len(keys))]
    lines += [f"{name:<14} {_table(counter)}" for name, counter in counts.items()]
    lines += [f"unfinished     {unfinished:,}", f"with thoughts  {thoughts:,}"]
    lines += [f"failures       {_table(reasons) if reasons else 0}"]
    lines += [
        f"tokens         {bill['prompt_tokens']:,} in, {bill['completion_tokens']:,} out",
        *([f"seconds        {_latency(seconds)}"] if lengths else []),
        f"cost           {_money(bill['cost'] / 10**9, bill['unpriced'], bill['records'])}",
    ]
    if lengths:
        lines += [
            f"characters     shortest {min(lengths)}, median {statistics.median(lengths):g}, "
            f"mean {statistics.fmean(lengths):.1f}, longest {max(lengths)}"
        ]
    lines += [f"cut off        {tail}: the next collection leaves it out" for tail in tails]
    rest = [answer for answer in long if answer not in short]  # few answers stand there but once
    for title, extremes in (("shortest", short), ("longest", rest)):
        lines += [f"{title}:"] if extremes else []
        lines += [f"  {size:>6}  {name}  {text!r:.80}" for size, name, text in extremes]
    return "\n".join(lines)


def _charge(bill: Counter[str], record: dict[str, Any]) -> None:
    for name in ("prompt_tokens", "completion_tokens"):
        bill[name] += (record["usage"] or {}).get(name, 0)
    bill["cost"] += round(Fraction(record["cost"] or 0) * 10**9)  # exact, however much it is
    bill["unpriced"] += record["cost"] is None
    bill["records"] += 1


def _latency(seconds: list[float]) -> str:
    """How long answers took; what an older pujax stored doesn't tell."""
    if not seconds:
        return "not stored"
    last = (
        statistics.quantiles(seconds, n=20, method="inclusive")[-1] if seconds[1:] else seconds[0]
    )
    return f"p50 {statistics.median(seconds):.2f}, p95 {last:.2f} an answer"


def _table(counter: Counter[str]) -> str:
    return ", ".join(f"{printable(name, 80)} {count:,}" for name, count in counter.most_common())


def _twice(count: int) -> str:
    return f" ({count:,} of them asked twice)" if count else ""


def _money(known: float, unpriced: int, records: int) -> str:
    """A sum of money; what had no price is not taken for nothing."""
    if records and unpriced == records:
        return "unknown"
    return f"{known:,.4f}" + (f" (the price of {unpriced:,} was unknown)" if unpriced else "")
