"""Shards of a store, which several machines filled, put together: each answer once, none replaced.

For where file locks don't hold between machines: each collects into a shard of its own.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pujax.errors import StoreError
from pujax.teacher.store import (
    Contents,
    digest,
    failures_path,
    read_failures,
    read_records,
    require_store,
)
from pujax.teacher.writer import AnchorStore, kept_beside
from pujax.text import counted, printable

AT_ONCE = 1000  # records that are held in memory, and wait for the disk together

_Records = Sequence[dict[str, Any]]


def merge(shards: Sequence[Path], store: Path, *, say: Callable[[str], None] = print) -> None:
    """Put into `store` what it lacks of the shards' answers and failures, in their order.

    An answer under a key (model, sampling, messages) that the store has is not put in again, and
    one that is another there is told of and left out; so is a failure to what is answered. Other
    processes may merge or collect into the store meanwhile. The shards stay as they are: a torn
    last line is told of. Raises `StoreError` for a shard that is not there, is the store itself
    or holds something else than records, with what came before it in place.
    """
    for shard in shards:
        require_store(shard, "name stores that are there with `merge`")
        if store.exists() and store.samefile(shard):
            raise StoreError(f"{shard}: is the `store` itself: take it out of `merge`")
    answers: dict[bytes, bytes] = {}

    def take(record: dict[str, Any], failed: bool) -> None:
        if not failed:
            answers.setdefault(digest(record["key"]), _what(record))

    def torn(path: Path, tail: bytes) -> None:
        say(
            f"{path}: its last line, of {counted(len(tail), 'byte')}, is no whole record: left "
            "out; merge it again once whoever writes it is done"
        )

    book = AnchorStore(store, Contents(store, take))
    put, refused, had = 0, 0, 0
    others: list[str] = []

    def lacking_answers(records: _Records) -> list[dict[str, Any]]:
        nonlocal had
        new: dict[bytes, bytes] = {}
        chosen = []
        for record in records:
            key, answer = digest(record["key"]), _what(record)
            # What was read of a store that has been replaced since may be gone.
            before = answers[key] if key in book.contents.answered else new.get(key)
            if before is None:
                new[key] = answer
                chosen.append(record)
            elif before == answer:
                had += 1
            else:
                others.append(printable(record["id"], 40))
        return chosen

    def lacking_failures(records: _Records) -> list[dict[str, Any]]:
        new = {digest(record["key"]): record for record in records}
        answered, failed = book.contents.answered, book.contents.failed
        return [new[key] for key in new if key not in answered and key not in failed]

    def append(
        records: Iterable[tuple[int, dict[str, Any]]], lacking: Callable[[_Records], _Records]
    ) -> int:
        rest, count = iter(records), 0
        asked: list[dict[str, Any]] = []
        while some := [record for _, record in islice(rest, AT_ONCE)]:
            added, later = book.append_lacking(some, lacking)
            count += added
            asked += later
        if asked:
            say(f"{store}: waits for {counted(len(asked), 'answer')} that others ask for now")
        while asked:
            time.sleep(0.2)
            added, asked = book.append_lacking(asked, lacking)
            count += added
        return count

    try:
        for shard in shards:
            for kept in (*kept_beside(shard), *kept_beside(failures_path(shard))):
                say(f"{kept} is left out: a collection into {shard} puts its answers there first")
            put += append(read_records(shard, failed=False, torn=torn), lacking_answers)
            if others:
                some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
                say(
                    f"{shard}: {counted(len(others), 'answer is', 'answers are')} other than what "
                    f"was there before to the same prompt and settings ({some}): left out"
                )
                others.clear()
        for shard in shards:  # once all answers are known
            refused += append(read_failures(shard, torn), lacking_failures)
    finally:
        book.close()
        for repair in book.repairs:
            say(repair)
    say(
        f"{store}: {counted(put, 'answer')} and {counted(refused, 'failure')} of "
        f"{counted(len(shards), 'store')} put in, {counted(had, 'answer')} had already"
    )


def _what(record: dict[str, Any]) -> bytes:
    """What tells two answers apart: the text, and how it ended."""
    said = f"{record['finish_reason']}\n{record['response']}"
    return hashlib.sha256(said.encode(errors="surrogatepass")).digest()[:16]
