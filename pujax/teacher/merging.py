"""Shards of a store, which several machines filled, put together: each answer once, none replaced.

For where file locks don't hold between machines: each collects into a shard of its own.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def merge(shards: Sequence[Path], store: Path, *, say: Callable[[str], None] = print) -> None:
    """Put into `store` what it lacks of the shards' answers and failures, in their order.

    An answer under a key (model, sampling, messages) that the store has is not put in again, and
    one that is another there is told of and left out; so is a failure to what is answered. The
    shards stay as they are. Raises `StoreError` for a shard that is not there, is the store itself
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

    book = AnchorStore(store, Contents(store, take))
    failed, put, refused, had = set(book.contents.failed), 0, 0, 0
    others: list[str] = []

    def new_answers(shard: Path) -> Iterator[dict[str, Any]]:
        nonlocal had
        for _, record in read_records(shard, failed=False):
            key, answer = digest(record["key"]), _what(record)
            before = answers.setdefault(key, answer)
            if before is answer:
                yield record
            elif before == answer:
                had += 1
            else:
                others.append(printable(record["id"], 40))

    def new_failures(shard: Path) -> Iterator[dict[str, Any]]:
        for _, record in read_failures(shard):
            if (key := digest(record["key"])) not in failed and key not in answers:
                failed.add(key)
                yield record

    try:
        for shard in shards:
            for kept in (*kept_beside(shard), *kept_beside(failures_path(shard))):
                say(f"{kept} is left out: a collection into {shard} puts its answers there first")
            put += _append(book, new_answers(shard))
            if others:
                some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
                say(
                    f"{shard}: {counted(len(others), 'answer is', 'answers are')} other than what "
                    f"was there before to the same prompt and settings ({some}): left out"
                )
                others.clear()
        for shard in shards:  # once all answers are known
            refused += _append(book, new_failures(shard))
    finally:
        book.close()
        for repair in book.repairs:
            say(repair)
    say(
        f"{store}: {counted(put, 'answer')} and {counted(refused, 'failure')} of "
        f"{counted(len(shards), 'store')} put in, {counted(had, 'answer')} had already"
    )


def _append(book: AnchorStore, records: Iterable[dict[str, Any]]) -> int:
    """How many records there were, which are on the disk now."""
    rest, count = iter(records), 0
    while some := list(islice(rest, AT_ONCE)):
        book.append(some)
        count += len(some)
    return count


def _what(record: dict[str, Any]) -> bytes:
    """What tells two answers apart: the text, and how it ended."""
    said = f"{record['finish_reason']}\n{record['response']}"
    return hashlib.sha256(said.encode(errors="surrogatepass")).digest()[:16]
