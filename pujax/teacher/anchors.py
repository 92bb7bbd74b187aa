"""The anchors of prompts: from the store, and from the teacher where the store lacks them."""

import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pujax.errors import ConfigError, StopRequested, StoreError, TeacherError
from pujax.records import Anchor, Prompt, messages_key
from pujax.teacher.asking import OVER_BUDGET, Tally, ask_all
from pujax.teacher.endpoint import headers_of
from pujax.teacher.plan import Plan, make_plan
from pujax.teacher.secrets import Secrets
from pujax.teacher.settings import CollectConfig, TeacherConfig
from pujax.teacher.store import COLLECT, Anchors, Contents, failures_path, require_store
from pujax.teacher.writer import AnchorStore, kept_beside, take_up
from pujax.text import counted, printable


def collect(
    prompts: Callable[[], Iterable[Prompt]],
    teacher: TeacherConfig,
    store: Path,
    settings: CollectConfig,
    *,
    say: Callable[[str], None] = print,
    tick: Callable[[Plan, Tally], None] = lambda plan, tally: None,
    contents: Contents | None = None,
) -> Tally:
    """Ask `teacher` for each anchor that `store` lacks and say how many it had and asked.

    `prompts` is called twice: once to check them all and to count, before anything is spent.
    `contents` is what has been read of the store already. Raises what stopped the run early;
    everything that was answered by then is in the store.
    """
    contents = contents or Contents(store, asked=teacher.asked)
    take_up(store, contents, say)
    plan = make_plan(prompts(), teacher, contents, retry_failed=settings.retry_failed)
    if not plan.to_ask:
        had = f"{counted(plan.prompts, 'prompt')}: had {plan.cached}"
        say(f"{had}, asked 0{_left_out(plan.failed)}")
        return Tally(passed=plan.prompts)
    if settings.budget.money is not None and plan.cost is None:
        raise ConfigError(
            "collect.budget.money needs teacher.price.input and teacher.price.output (a million "
            "tokens)"
        )
    headers_of(teacher, Secrets())  # a key that isn't there is told before a store is made
    if plan.again:
        say(plan.again)
    if not store.parent.exists():
        say(f"{store.parent}: a new folder, for the store")
    book = AnchorStore(store, contents)
    for repair in book.repairs:
        say(repair)
    book.repairs.clear()
    try:
        tally = ask_all(prompts(), teacher, book, settings, lambda tally: tick(plan, tally), say)
    finally:
        book.close()
        for repair in book.repairs:
            say(repair)
    failed = sum(tally.failed.values())
    unpriced = tally.cost is None or (plan.cost is None and not tally.replies)
    money = "unknown" if unpriced else f"{tally.cost:.4f}"
    errors = counted(tally.requests - tally.replies, "error")
    say(
        f"{counted(plan.prompts, 'prompt')}: had {plan.cached}, asked {tally.asked}: "
        + f"{tally.answered} answered, {failed} failed"
        + (f" ({tally.failures})" if failed else "")
        + f", {tally.unanswered} without an answer; {counted(tally.requests, 'request')} "
        f"({errors}); {tally.prompt_tokens:.0f} + {tally.completion_tokens:.0f} "
        f"tokens; cost {money}" + _left_out(plan.failed)
    )
    if failed:
        such = f", such as: {printable(tally.refusal)}" if tally.refusal else ""
        say(f"failed{such}; all are in {failures_path(store)}")
    if tally.stopped:
        tally.left = plan.to_ask - tally.answered - failed
        why, then = tally.stopped, ": run the same command to go on"
        if why == OVER_BUDGET:
            again = settings.retry_failed
            rest = make_plan(prompts(), teacher, book.contents, retry_failed=again)
            tally.left = rest.to_ask - (failed if again else 0)  # others may ask too
            why += f" ({settings.budget})"
            then += ", with a larger budget to get further"
        if tally.error:  # which is raised, and so said once, with its remedy
            why, then = "an error", " for this command once it is mended"
        if tally.left or tally.error:
            say(f"stopped: {why}; at most {tally.left} are left{then}")
    if tally.error:
        raise tally.error
    if tally.unanswered and not tally.stopped:
        raise TeacherError(
            f"{counted(tally.unanswered, 'prompt has', 'prompts have')} no answer after "
            f"{counted(settings.retries, 'retry', 'retries')} each at {teacher.place} (the last: "
            f"{tally.trouble}): run the same command again"
        )
    return tally


def _left_out(failed: int) -> str:
    again = "collect.retry_failed=true asks again"
    return f"; {failed} failed before ({again})" if failed else ""


def anchors_for(
    prompts: Sequence[Prompt],
    teacher: TeacherConfig,
    store: Path,
    settings: CollectConfig,
    *,
    say: Callable[[str], None] = print,
    tick: Callable[[Plan, Tally], None] = lambda plan, tally: None,
    remedy: str = COLLECT,
    place: Callable[[Prompt], str] = lambda prompt: "",
) -> dict[str, Anchor]:
    """The prompts' anchors by `messages_key`, asking `teacher` for those that `store` lacks.

    Without a teacher to ask (replay) the store alone answers, whatever settings it was collected
    under. Prompts that the teacher refused, filtered or answered with nothing are left out, and
    counted aloud. The store is read once. `place` is what follows a prompt's name in a message.

    Raises `StoreError` naming the prompts that have no anchor, what `collect` raises, and
    `StopRequested` after a signal.
    """
    anchors = Anchors(store, teacher, prompts)
    if not teacher.asks:
        require_store(store, remedy)
    contents = Contents(store, anchors.take, asked=teacher.asked if teacher.asks else None)
    found = anchors.found
    if teacher.asks:
        tally = collect(
            lambda: prompts, teacher, store, settings, say=say, tick=tick, contents=contents
        )
        if tally.stopped and tally.stopped in signal.Signals.__members__:
            number = signal.Signals[tally.stopped]
            raise StopRequested(f"stopped while asking: {store} has what was answered", number)
        if tally.left:
            remedy = f"{tally.stopped}: run the same command to go on, or raise collect.budget"
    else:
        had = sum(messages_key(prompt.messages) in found for prompt in prompts)
        say(f"{counted(len(prompts), 'prompt')}: had {had}, asked 0")
    lacking = [prompt for prompt in prompts if messages_key(prompt.messages) not in found]
    missing = [p for p in lacking if messages_key(p.messages) not in anchors.failed]
    if missing:
        some = printable(", ".join(_named(prompt) + place(prompt) for prompt in missing[:5]))
        some += ", ..." if len(missing) > 5 else ""
        if kept := kept_beside(store):
            remedy += f"; {kept[0]} has answers that a collection puts into the store"
        total = counted(len(prompts), "prompt has", "prompts have")
        raise StoreError(f"{store}: {len(missing)} of {total} no anchor ({some}): {remedy}")
    if lacking:
        left_out = counted(len(lacking), "prompt is", "prompts are")
        say(f"{left_out} left out: the teacher gave no usable answer")
    _tell_endings(found.values(), say)
    return found


def _named(prompt: Prompt) -> str:
    """A prompt's id, or the beginning of its text where the id was made of that."""
    if not messages_key(prompt.messages).startswith(prompt.id):
        return prompt.id
    text = printable(str(prompt.messages[-1]["content"]), 41)
    return f"“{text}”" if len(text) < 41 else f"“{text[:40]}…”"


def _tell_endings(anchors: Iterable[Anchor], say: Callable[[str], None]) -> None:
    """Say how many anchors don't tell whether they were cut off: it decides over their EOS."""
    untold = [anchor for anchor in anchors if not anchor.told]
    if untold:
        words = sorted({printable(str(anchor.finish_reason), 40) for anchor in untold})
        ended = sum(anchor.finished for anchor in untold)
        say(
            f"{counted(len(untold), 'anchor ends', 'anchors end')} with the reason "
            f"{', '.join(words[:5])}, which is unknown: {counted(ended, 'counts', 'count')} as "
            "finished, by the number of tokens, the others as cut off"
        )
