import io
import json
import os
import re
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from event_files import PROTOS, events
from rich.console import Console

from pujax.errors import DiskError, RecordError
from pujax.files import durable
from pujax.files.durable import read_jsonl
from pujax.run.logs import RunLog, SampleGroup, cut, duration, eta, progress, summary

GROUP = SampleGroup("p1", "Say hi.", "Hi.", ["Hello.", "Hey!"], [1.0, 0.5, 0.25], [0.5, 0.3, 0.2])


def train(log, stage, steps):
    for step in steps:
        log.step(stage, step, {"loss": 1 / step}, seconds=0.5, tokens=64)
        log.samples(stage, step, [GROUP])


def places(path):
    return [(line["stage"], line["step"]) for line in read_jsonl(path)]


def test_a_step_is_one_line_with_its_pace_and_six_digits(tmp_path):
    with RunLog(tmp_path) as log:
        metrics = {"loss": np.float32(1 / 3), "kl/ref": 1e-7}
        line = log.step("sft", 1, metrics, seconds=0.25, tokens=100)
    assert line == {
        "stage": "sft",
        "step": 1,
        "loss": 0.333333,
        "kl/ref": 1e-7,
        "time/step_s": 0.25,
        "time/tokens_per_s": 400.0,
    }
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(line) + "\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_null_and_the_line_is_json(tmp_path, value):
    with RunLog(tmp_path) as log:
        log.step("align", 1, {"loss": value}, seconds=1.0, tokens=1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_a_sample_keeps_text_scores_and_labels(tmp_path):
    with RunLog(tmp_path) as log:
        log.samples("align", 3, [GROUP])
    assert read_jsonl(tmp_path / "samples.jsonl") == [
        {
            "stage": "align",
            "step": 3,
            "id": "p1",
            "prompt": "Say hi.",
            "anchor": "Hi.",
            "candidates": ["Hello.", "Hey!"],
            "scores": [1.0, 0.5, 0.25],
            "labels": [0.5, 0.3, 0.2],
        }
    ]


def test_a_score_that_is_not_finite_is_null_and_others_have_six_digits(tmp_path):
    group = SampleGroup("p", "", "", ["a", "b"], [float("nan"), 1 / 3, 0.0], [0.0, 2 / 3, 1 / 3])
    with RunLog(tmp_path) as log:
        log.samples("align", 1, [group])
    (line,) = read_jsonl(tmp_path / "samples.jsonl")
    assert line["scores"] == [None, 0.333333, 0.0]
    assert line["labels"] == [0.0, 0.666667, 0.333333]


def test_text_that_is_not_unicode_proper_comes_back_as_it_was(tmp_path):
    text = "\ud800 \u2028 é \n \x00"
    with RunLog(tmp_path) as log:
        log.samples("align", 1, [SampleGroup("p", text, text, [text], [0.0, 1.0], [0.0, 1.0])])
    (line,) = read_jsonl(tmp_path / "samples.jsonl")
    assert line["prompt"] == text
    assert line["candidates"] == [text]


def test_a_sample_without_a_label_for_each_response_is_refused():
    with pytest.raises(ValueError, match="'p1': 2 responses, 2 scores and 1 labels"):
        SampleGroup("p1", "", "", ["one"], [0.1, 0.2], [0.5])


def test_a_resumed_run_drops_what_lies_beyond_its_checkpoint(tmp_path):
    with RunLog(tmp_path) as log:
        train(log, "sft", range(1, 6))
    with RunLog(tmp_path, resume=("sft", 3)) as log:
        train(log, "sft", range(4, 6))
    assert places(tmp_path / "metrics.jsonl") == [("sft", step) for step in range(1, 6)]
    assert places(tmp_path / "samples.jsonl") == [("sft", step) for step in range(1, 6)]


def test_the_second_stage_lies_beyond_every_checkpoint_of_the_first(tmp_path):
    with RunLog(tmp_path) as log:
        train(log, "sft", [1, 2])
        train(log, "align", [1])
    with RunLog(tmp_path, resume=("sft", 2)):
        pass
    assert places(tmp_path / "metrics.jsonl") == [("sft", 1), ("sft", 2)]


def test_a_checkpoint_of_the_second_stage_keeps_the_whole_first(tmp_path):
    with RunLog(tmp_path) as log:
        train(log, "sft", range(1, 8))
        train(log, "align", range(1, 4))
    with RunLog(tmp_path, resume=("align", 2)):
        pass
    expected = [("sft", step) for step in range(1, 8)] + [("align", 1), ("align", 2)]
    assert places(tmp_path / "metrics.jsonl") == expected


def test_evaluations_stay_or_go_with_the_steps_around_them(tmp_path):
    with RunLog(tmp_path) as log:
        log.evaluation("base", 0, {"eval/exact": 0.1})
        train(log, "sft", [1, 2])
        log.evaluation("sft", 2, {"eval/exact": 0.2})
        train(log, "align", [1, 2])
        log.evaluation("aligned", 2, {"eval/exact": 0.3})
    with RunLog(tmp_path, resume=("align", 1)):
        pass
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["model"] for line in lines if line["stage"] == "eval"] == ["base", "sft"]
    assert lines[0] == {"stage": "eval", "model": "base", "step": 0, "eval/exact": 0.1}


def test_an_evaluation_made_again_after_a_resume_is_not_written_twice(tmp_path):
    with RunLog(tmp_path) as log:
        log.evaluation("base", 0, {"eval/exact": 0.1})
    with RunLog(tmp_path, resume=("sft", 0)) as log:
        log.evaluation("base", 0, {"eval/exact": 0.1})
        log.evaluation("aligned", 0, {"eval/exact": 0.1})
    models = [line["model"] for line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert models == ["base", "aligned"]


def test_a_torn_last_line_is_left_out_and_gone_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with RunLog(tmp_path) as log:
        train(log, "sft", [1])
    with path.open("a") as file:
        file.write('{"stage": "sft", "step": 2, "lo')
    assert places(path) == [("sft", 1)]
    with RunLog(tmp_path, resume=("sft", 1)) as log:
        train(log, "sft", [2])
    assert places(path) == [("sft", 1), ("sft", 2)]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ('{"stage": "sft", "st', "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"stage": "sft"}', "no `step`"),
        ('{"stage": "sft", "step": "2"}', "no `step` that a run writes .'2'."),
        ('{"stage": 7, "step": 2}', "no `stage` that a run writes .7."),
        ('{"stage": "eval", "step": 2}', "no `model`"),
    ],
)
def test_a_bad_line_in_the_middle_is_named_and_nothing_is_lost(tmp_path, bad, why):
    path = tmp_path / "metrics.jsonl"
    content = f'{{"stage": "sft", "step": 1}}\n{bad}\n{{"stage": "sft", "step": 3}}\n'
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}:2: .*{why}"):
        RunLog(tmp_path, resume=("sft", 3))
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("was", "is_", "message"),
    [
        ('"step": 2', '"step": 9', ":3: sft step 3 comes after sft step 9"),
        ('"step": 3', '"step": 2', ":3: sft step 2 comes after sft step 2"),
        ('"step": 1', '"step": 5', ":2: sft step 2 comes after sft step 5"),
        ('"align", "step": 1', '"align", "step": 2', ":6: align step 2 comes after align step 2"),
        ('"align", "step": 2', '"sft", "step": 5', ":6: sft step 5 comes after align step 1"),
    ],
)
def test_a_step_that_is_not_the_next_one_is_named_and_nothing_is_lost(tmp_path, was, is_, message):
    with RunLog(tmp_path) as log:
        train(log, "sft", range(1, 5))
        train(log, "align", range(1, 3))
    path = tmp_path / "metrics.jsonl"
    content = path.read_text().replace(was, is_, 1)
    path.write_text(content)
    with pytest.raises(RecordError, match=re.escape(f"{path}{message}")):
        RunLog(tmp_path, resume=("align", 2))
    assert path.read_text() == content


def test_samples_that_went_back_are_named(tmp_path):
    with RunLog(tmp_path) as log:
        train(log, "align", range(1, 4))
    path = tmp_path / "samples.jsonl"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3', 1))
    cut(path, "align", 3)
    path.write_text(path.read_text().replace('"step": 3', '"step": 4', 1))
    with pytest.raises(RecordError, match=r":3: align step 3 comes after align step 4"):
        cut(path, "align", 5)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_metrics_that_are_lost_are_said(tmp_path, kept):
    with RunLog(tmp_path) as log:
        train(log, "sft", range(1, 4))
        assert log.lost == ""
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)[:kept]
    path.write_text("".join(lines))
    if not kept:
        path.unlink()
    with RunLog(tmp_path, resume=("sft", 3)) as log:
        lost = f"{path} lacks what led to sft step 3: it goes on from there"
        assert log.lost == (lost if kept < 3 else "")
        train(log, "sft", [4])
    with RunLog(tmp_path, resume=("sft", 4)) as log:  # what was gone on from once is so again
        lost = f"{path} lacks what led to sft step 4: it goes on from there"
        assert log.lost == (lost if kept < 3 else "")
    assert [step for _, step in places(path)] == [*range(1, kept + 1), 4]


def test_metrics_of_an_earlier_run_are_never_written_over(tmp_path):
    with RunLog(tmp_path) as log:
        train(log, "sft", [1])
    with pytest.raises(FileExistsError, match=r"resume=auto.*run\.dir"):
        RunLog(tmp_path)


def test_a_cut_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    def full_disk(_):
        raise OSError(28, "No space left on device")

    with RunLog(tmp_path) as log:
        train(log, "sft", [1, 2, 3])
    monkeypatch.setattr(durable.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        RunLog(tmp_path, resume=("sft", 1))
    assert len(places(tmp_path / "metrics.jsonl")) == 3


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes meanwhile, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_with_the_files_name_and_the_run_goes_on_with_room(tmp_path):
    with RunLog(tmp_path) as log:
        train(log, "sft", [1, 2])
        log.flush()
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with room_for(size + 10), pytest.raises(DiskError, match=r"metrics\.jsonl can't .*make ro"):
            train(log, "sft", [3])
    with RunLog(tmp_path, resume=("sft", 2)) as log:
        train(log, "sft", [3])
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_what_is_plotted_does_not_wait_for_ever_where_the_disk_is_full(tmp_path):
    """tensorboardX's thread ended at the first write that failed, and its queue holds ten."""
    log = RunLog(tmp_path)
    with room_for(30), pytest.raises(DiskError, match=r"eval-base can't .*: make room on its disk"):
        log.evaluation("base", 0, {"eval/exact": 0.1})
    with ThreadPoolExecutor(1) as other:
        for step in range(1, 20):
            other.submit(log.step, "sft", step, {"loss": 0.5}, seconds=1.0, tokens=1).result(
                timeout=10
            )
        log.close()
    kept = events(tmp_path / "tensorboard" / "sft")
    assert [event.step for event in kept if event.summary.value] == [*range(1, 20)]


def test_tensorboard_gets_a_run_a_stage_and_purges_what_a_resume_makes_again(tmp_path):
    with RunLog(tmp_path) as log:
        train(log, "sft", [1, 2])
        log.step("sft", 3, {"loss": float("nan")}, seconds=1.0, tokens=1)
    sft = tmp_path / "tensorboard" / "sft"
    scalars = [(v.tag, e.step, v.simple_value) for e in events(sft) for v in e.summary.value]
    assert [entry for entry in scalars if entry[0] == "loss"] == [
        ("loss", 1, 1.0),
        ("loss", 2, 0.5),
    ]
    assert ("time/tokens_per_s", 1, 128.0) in scalars

    with RunLog(tmp_path, resume=("sft", 1)) as log:
        train(log, "sft", [2])
        train(log, "align", [1])
    for stage, first in (("sft", 2), ("align", 0)):
        starts = [
            event.step
            for event in events(tmp_path / "tensorboard" / stage)
            if event.session_log.status == PROTOS["SessionLog"].START
        ]
        assert starts == [first]


def test_a_flush_waits_for_the_disk_of_metrics_and_samples(tmp_path, monkeypatch):
    waited, real = set(), os.fsync

    def fsync(descriptor):
        waited.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    with RunLog(tmp_path) as log:
        log.step("sft", 1, {"loss": 0.5}, seconds=1.0, tokens=1)
        monkeypatch.setattr("pujax.run.logs.os.fsync", fsync)
        log.flush()
    assert waited >= {(tmp_path / f"{name}.jsonl").stat().st_ino for name in ("metrics", "samples")}


def test_an_evaluation_is_on_the_disk_at_once_and_once_in_tensorboard(tmp_path):
    """As after a kill: nothing is closed."""
    killed = RunLog(tmp_path)
    killed.evaluation("base", 0, {"eval/exact": 0.1})
    killed.step("align", 1, {"loss": 0.5}, seconds=1.0, tokens=1)
    killed.flush()
    kept = [
        (v.tag, e.step) for e in events(tmp_path / "tensorboard" / "align") for v in e.summary.value
    ]
    assert ("loss", 1) in kept
    with RunLog(tmp_path, resume=("align", 1)) as log:
        assert log.has("base", 0)
        assert not log.has("aligned", 1)
        log.evaluation("base", 0, {"eval/exact": 0.1})
        log.evaluation("aligned", 1, {"eval/exact": 0.2})
    for name, step in (("base", 0), ("aligned", 1)):
        found = events(tmp_path / "tensorboard" / f"eval-{name}")
        assert [(v.tag, e.step) for e in found for v in e.summary.value] == [("eval/exact", step)]
    models = [row.get("model") for row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert models == ["base", None, "aligned"]
    killed.close()


def test_the_eta_is_the_pace_of_the_steps_after_the_first_times_what_is_left():
    assert eta([100.0, 102.0, 106.0], left=10) == 30.0
    assert eta([100.0], left=10) is None
    assert eta([], left=10) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (75.0, "1:15"), (3599.7, "1:00:00"), (7384.0, "2:03:04")],
)
def test_durations_read_as_clocks_do(seconds, text):
    assert duration(seconds) == text


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def __call__(self):
        return self.now


def line(step, **metrics):
    return {"stage": "align", "step": step, "time/tokens_per_s": 250.4} | metrics


def test_after_a_resume_the_eta_counts_this_process_for_pace_and_all_that_is_left(tmp_path):
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=120)
    with progress("align", done=90, steps=100, console=console, clock=clock) as show:
        clock.now += 60  # compiling, with the first step
        show(line(91, loss=0.6934, **{"score/mean": 0.5, "kl/ref": None}))
        for step in range(92, 101):
            clock.now += 4
            show(line(step, loss=0.5))
    assert out.getvalue().splitlines() == [
        "align 91/100  loss 0.693  score 0.500  kl not finite  250 tok/s",
        "align 94/100  loss 0.500  250 tok/s  0:24 left",
        "align 97/100  loss 0.500  250 tok/s  0:12 left",
        "align 100/100  loss 0.500  250 tok/s  0:00 left",
    ]


def test_lines_tell_of_the_stage_and_of_the_whole_run(tmp_path):
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=120)

    def rest(pace):
        return 100 * pace

    with progress("sft", done=0, steps=10, console=console, clock=clock, rest=rest) as show:
        for step in range(1, 11):
            clock.now += 20
            show(line(step, loss=0.5))
    lines = out.getvalue().splitlines()
    assert lines[0] == "sft 1/10  loss 0.500  250 tok/s"
    # 8 steps of 20 s and 100 after them; then those alone.
    assert lines[1].endswith("  2:40 left, about 36 min to the run's end")
    assert lines[-1].endswith("  0:00 left, about 33 min to the run's end")


def test_a_terminal_gets_a_bar_that_goes_on_from_the_steps_done(tmp_path):
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    with progress("align", done=36, steps=100, console=console, clock=clock) as show:
        for step in (37, 38):
            clock.now += 2
            show(line(step, loss=0.5))
    assert "38/100 loss 0.500  250 tok/s  2:04 left" in out.getvalue()
    assert "36/100 compiling" in out.getvalue()


def test_the_order_of_pairs_is_shown_where_a_step_has_no_score_of_its_own():
    pairs = {"reward/accuracy": 0.75}
    assert summary(line(1, loss=0.5, **pairs)) == "loss 0.500  pair accuracy 0.750  250 tok/s"
    scored = line(1, loss=0.5, **pairs, **{"score/mean": 0.5})
    assert summary(scored) == "loss 0.500  score 0.500  250 tok/s"


def test_a_bar_fits_into_eighty_columns_whole():
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    metrics = {"loss": -0.0123456, "score/mean": -0.123456, "kl/ref": 0.00123456}
    with progress("align", done=0, steps=100, console=console, clock=clock) as show:
        for step in (1, 2):
            clock.now += 20
            show(line(step, **metrics))
    assert "2/100" in out.getvalue()
    assert "32:40 left" in out.getvalue()
