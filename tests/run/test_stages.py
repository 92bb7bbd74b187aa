"""A stage of a toy: its one parameter counts the steps, and its held-out metric is a table."""

import io
import itertools
import json
import signal
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from pujax.config.settings import CheckpointConfig, EvalConfig, TrainConfig
from pujax.errors import DiskError, DivergedError, StopRequested
from pujax.evaluation.metrics import METRICS
from pujax.evaluation.results import Evaluation, Row
from pujax.models.sharding import make_mesh, put_batch
from pujax.records import Example, Prompt
from pujax.run.batches import collate
from pujax.run.checkpoint import Checkpoints, Place
from pujax.run.data import Dataset
from pujax.run.forecast import Forecast
from pujax.run.logs import RunLog
from pujax.run.selection import Criterion
from pujax.run.stages import Run, Stage
from pujax.types import Completions, TrainState

EXAMPLES = tuple(
    Example(Prompt(str(i), ({"role": "user", "content": "?"},)), (1, 2), (1,), "a", (3,), True)
    for i in range(8)
)
DATA = Dataset(EXAMPLES, 2, 1, 1, 0, 0, 0)
# By step; measured are 0, 2, 4 ..., and what a stage begins with is step 0.
RISES_AND_FALLS = [0.1, 0.2, 0.3, 0.9, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]


class Killed(BaseException):
    """In a signal's place."""


def fresh():
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, {"embed": jnp.zeros((8, 1)), "layers": {}}, (), zero)


def advancing(loss):
    """A step that adds one to the parameter; `loss` says its loss by its number."""

    def advance(state, batch, examples):
        params, step = jax.tree.map(lambda x: x + 1, state.params), state.step + 1
        metrics = {"loss": loss(int(step)), "skipped": 0}
        return TrainState(step, params, (), state.skipped), metrics, None

    return advance


def gone_through(
    directory,
    table,
    *,
    steps,
    criterion=None,
    every=2,
    saved=3,
    die=lambda: None,
    loss=lambda step: 1.0,
    forecast=None,
):
    """The parameter and the step that a stage hands on, and what it said.

    `die` is called where a process may be killed: after each thing that is put on the disk.
    """
    said: list[str] = []

    class Log(RunLog):
        def step(self, *given, **more):
            line = super().step(*given, **more)
            die()
            return line

    class Kept(Checkpoints):
        def save(self, *given):
            super().save(*given)
            die()

        def save_best(self, *given):
            super().save_best(*given)
            die()

    class Toy(Run):
        def evaluated(self, name, step, trainable, *, keep=True) -> Any:
            self.log.evaluation(name, step, {"eval/exact": table[int(trainable["embed"][0, 0])]})
            die()

    checkpoints = Kept(directory, keep=2, model={}, say=said.append)
    place, state = checkpoints.newest(fresh()) or (Place("sft", 0), fresh())
    config = TrainConfig(
        eval=EvalConfig(every=every), checkpoint=CheckpointConfig(every=saved, keep=2)
    )
    unused: Any = SimpleNamespace()
    with Log(directory, resume=(place.stage, place.step)) as log:
        run = Toy(
            config,
            directory,
            make_mesh(),
            unused,
            None,
            DATA,
            DATA,
            {},
            unused,
            checkpoints,
            log,
            Console(file=io.StringIO()),
            said.append,
            lambda: 0,
            criterion,
            forecast=forecast,
        )
        log.evaluation("base", 0, {"eval/exact": table[0]})
        stage = Stage(
            "sft", "sft", ("base", 0), steps, 8, DATA, before=0, salt=0, advance=advancing(loss)
        )  # fmt: skip
        params, step = run.through(stage, state, place.step)
    checkpoints.close()
    told = [line for line in said if line != "sft: compiling, with the first step"]
    return float(params["embed"][0, 0]), step, told


def test_a_batch_that_was_not_finite_is_on_the_disk_whole_or_not_at_all(tmp_path):
    run: Any = SimpleNamespace(directory=tmp_path, config=TrainConfig(), say=print)
    stage: Any = SimpleNamespace(name="sft")
    batch = collate(EXAMPLES[:2], DATA)
    Run._not_finite(run, stage, 3, batch, 1, fresh())
    (path,) = tmp_path.iterdir()
    with np.load(path) as kept:
        np.testing.assert_array_equal(kept["prompts.ids"], batch.prompts.ids)
    run.directory = tmp_path / "gone"
    with pytest.raises(DiskError, match=r"nonfinite-sft-4\.npz can't be written"):
        Run._not_finite(run, stage, 4, batch, 1, fresh())


def test_a_reward_is_asked_of_the_examples_and_not_of_what_fills_up_the_mesh():
    asked = []

    def of(examples, texts):
        asked.extend(texts)
        return SimpleNamespace(
            failures=(), scores=(jnp.array([[1.0, 2.0], [3.0, 4.0]]),), metrics={}
        )

    rewards: Any = SimpleNamespace(of=of)
    mesh, run = make_mesh(), SimpleNamespace()
    run.mesh, run.chat, run.say = mesh, SimpleNamespace(decode=list), print
    some: Any = EXAMPLES[:2]
    batch = put_batch(mesh, collate(some, DATA), 2)
    tokens = put_batch(mesh, jnp.array([[[7]], [[9]]], jnp.int32), 2)
    made = Completions(tokens, tokens > 0, tokens[:, :, 0] > 0, None)
    toy: Any = run
    batch, _ = Run.rewarded(toy, rewards, batch, made, some)
    assert asked == [[[7]], [[9]]]
    assert batch.rewards[0].tolist() == [[1.0, 2.0], *[[3.0, 4.0]] * 7]


def metrics(directory):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def test_without_a_criterion_the_last_state_is_handed_on_and_measured_by_who_gets_it(tmp_path):
    value, step, said = gone_through(tmp_path, RISES_AND_FALLS, steps=4, criterion=None)
    assert (value, step, said) == (4.0, 4, [])
    assert [line["step"] for line in metrics(tmp_path) if line["stage"] == "eval"] == [0, 2]
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize(
    ("table", "steps", "patience", "best", "last"),
    [
        (RISES_AND_FALLS, 10, 2, 4, 8),  # step 3, which is better, is not measured
        (RISES_AND_FALLS, 7, None, 4, 7),
        ([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], 5, 1, 5, 5),  # the last is measured too
        ([0.5, 0.4, 0.4, 0.4, 0.4, 0.4], 5, 2, 0, 4),
    ],
)
def test_the_best_of_the_measured_states_is_handed_on(tmp_path, table, steps, patience, best, last):
    criterion = Criterion("exact", higher=True, patience=patience)
    value, step, said = gone_through(tmp_path, table, steps=steps, criterion=criterion)
    assert (value, step) == (best, best)
    assert said[-1] == f"sft: exact was best after step {best} of {last}: that state is handed on"
    assert (len(said) == 2) == (last < steps)
    steps_done = [line["step"] for line in metrics(tmp_path) if line["stage"] == "sft"]
    assert steps_done == list(range(1, last + 1))


def test_a_stage_whose_loss_stays_far_above_its_best_stops_with_what_was_good_last(tmp_path):
    def loss(step):
        return 1.0 if step <= 7 else 4.0 + step  # beyond 1 + 2 x 1

    for _ in range(2):  # the same command again: from step 6, to the same end
        with pytest.raises(DivergedError) as caught:
            gone_through(tmp_path, [0.5] * 99, steps=40, saved=3, loss=loss)
        assert str(caught.value) == (
            "sft diverged after step 7 of 40: the loss is 21, and was 1 at best, after 10 such "
            f"steps; the last good checkpoint is {tmp_path}/checkpoints/6; nothing is exported: "
            "begin another run with a lower sft.lr than 2e-05"
        )
        steps = [line["step"] for line in metrics(tmp_path) if line["stage"] == "sft"]
        assert steps == list(range(1, 18))
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", "6"}


def test_a_loss_that_comes_back_stops_nothing_and_a_short_stage_need_not_last(tmp_path):
    (tmp_path / "back").mkdir()
    back = gone_through(
        tmp_path / "back", [0.5] * 99, steps=14, loss=lambda step: 9.0 if 2 < step < 12 else 1.0
    )
    assert back[:2] == (14.0, 14)
    with pytest.raises(DivergedError, match=r"after step 1 of 3: .*; no checkpoint is from before"):
        gone_through(tmp_path, [0.5] * 9, steps=3, saved=2, loss=lambda step: 10.0**step)
    assert not (tmp_path / "checkpoints" / "2").exists()


def test_a_stage_killed_anywhere_hands_on_what_one_does_that_was_not(tmp_path):
    """The best is measured between two checkpoints, and the stage ends before its last step."""
    table, criterion = [0.1, 0.2, 0.9, 0.5, 0.4], Criterion("exact", higher=True, patience=1)
    moments = 0

    def count():
        nonlocal moments
        moments += 1

    (tmp_path / "whole").mkdir()
    whole = gone_through(tmp_path / "whole", table, steps=10, criterion=criterion, die=count)
    assert whole[:2] == (2.0, 2)
    assert moments == 10  # 4 steps, 2 measurements, 2 states that may be best, 2 checkpoints
    for moment in range(1, moments + 1):
        directory = tmp_path / str(moment)
        directory.mkdir()
        left = moment

        def die():
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed

        with pytest.raises(Killed):
            gone_through(directory, table, steps=10, criterion=criterion, die=die)
        again = gone_through(directory, table, steps=10, criterion=criterion)
        assert again[:2] == whole[:2], moment
        assert metrics(directory) == metrics(tmp_path / "whole"), moment


def test_what_is_logged_is_on_the_disk_before_the_checkpoint_behind_it(tmp_path, monkeypatch):
    put = []

    def recorded(kind, name, done):
        def record(self, *given):
            put.append(name)
            done(self, *given)

        monkeypatch.setattr(kind, name, record)

    recorded(RunLog, "flush", RunLog.flush)
    recorded(Checkpoints, "save", Checkpoints.save)
    gone_through(tmp_path, RISES_AND_FALLS, steps=4, criterion=None)
    before = [put[place - 1] for place, name in enumerate(put) if name == "save"]
    assert before == ["flush"] * 2  # after steps 3 and 4


def test_a_best_state_outlives_the_loss_of_the_newest_checkpoint(tmp_path):
    """Checkpoints after 3 and 6, and of the measured states 3 was the best by then, and 5."""
    rising = [0.1 * step for step in range(8)]
    criterion = Criterion("exact", higher=True)

    def stop():
        if (tmp_path / "best" / "sft-6").exists():
            raise Killed

    with pytest.raises(Killed):
        gone_through(tmp_path, rising, steps=7, criterion=criterion, every=1, die=stop)
    kept = {path.name for path in (tmp_path / "best").glob("sft-?")}
    assert kept == {"sft-3", "sft-5", "sft-6"}
    for path in (tmp_path / "checkpoints" / "6" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    falling = [0.0, 0.1, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1]  # as numbers may, on another machine
    value, step, said = gone_through(tmp_path, falling, steps=7, criterion=criterion, every=1)
    assert (value, step) == (3.0, 3)
    assert "going on from the one before it, 3" in said[0]


def test_a_wish_to_stop_is_granted_while_evaluating_and_costs_no_evaluation(tmp_path, monkeypatch):
    row = Row("0", None, "?", None, "a", "b", {"exact": 0.0})
    wished = 0

    def evaluate(*_, name, collate, **more):
        collate(EXAMPLES)
        return Evaluation(name, (row,))

    def heard(*_):
        nonlocal wished
        wished = signal.SIGTERM

    monkeypatch.setattr("pujax.run.stages.evaluate", evaluate)
    unused: Any = SimpleNamespace(clone=lambda budget: None, decode=None, evaluation=heard)
    config, console = TrainConfig(eval=EvalConfig(batch=8)), Console(file=io.StringIO())
    run = Run(
        config,
        tmp_path,
        make_mesh(),
        unused,
        None,
        DATA,
        DATA,
        {},
        unused,
        unused,
        unused,
        console,
        print,
        lambda: wished,
    )
    with pytest.raises(
        StopRequested, match="stopped after evaluating base; the state is in"
    ) as end:
        run.evaluated("base", 0, {"embed": jnp.zeros(2), "layers": {}})
    assert end.value.number == signal.SIGTERM
    assert (tmp_path / "eval-base.jsonl").exists()
    with pytest.raises(StopRequested, match="stopped while evaluating sft"):
        run.evaluated("sft", 0, {"embed": jnp.zeros(2), "layers": {}})
    assert not (tmp_path / "eval-sft.jsonl").exists()


def test_an_evaluation_on_disk_is_taken_where_it_is_of_these_parameters_and_draws(
    tmp_path, monkeypatch
):
    row = Row("0", None, "?", None, "a", "b", {"exact": 0.0})
    asked: list[str] = []
    said: list[str] = []

    def evaluate(*_, name, **more):
        asked.append(name)
        return Evaluation(name, (row,))

    monkeypatch.setattr("pujax.run.stages.evaluate", evaluate)
    unused: Any = SimpleNamespace(
        clone=lambda budget: None, decode=None, evaluation=lambda *_: None
    )
    (tmp_path / "other").mkdir()

    def evaluated(params, directory=tmp_path, adapter=None, **settings):
        run = Run(
            TrainConfig(eval=EvalConfig(prompts=1, **settings)),
            directory,
            make_mesh(),
            unused,
            None,
            DATA,
            DATA,
            {},
            unused,
            unused,
            unused,
            Console(file=io.StringIO()),
            said.append,
            lambda: 0,
        )
        before = len(asked)
        run.evaluated("aligned", 1, {"embed": jnp.asarray(params), "layers": adapter or {}})
        return len(asked) - before

    assert evaluated([1.0, 2.0]) == 1
    assert evaluated([1.0, 2.0]) == 0
    assert said == []
    assert evaluated([1.0, 3.0], tmp_path / "other") == 1
    ours, theirs = tmp_path / "eval-aligned.jsonl", tmp_path / "other" / "eval-aligned.jsonl"
    whole = ours.read_bytes()
    ours.write_bytes(theirs.read_bytes())  # as somebody may by hand
    assert evaluated([1.0, 2.0]) == 1
    assert said == [f"{ours} is of another model, or asked otherwise: evaluating aligned again"]
    assert ours.read_bytes() == whole
    assert evaluated([1.0, 2.0], samples=2) == 1
    assert evaluated([1.0, 2.0], samples=2, temperature=0.5) == 1
    ours.write_bytes(whole)
    fresh = {"q_lora_a": jnp.ones((1, 2, 1)), "q_lora_b": jnp.zeros((1, 1, 2))}
    assert evaluated([1.0, 2.0], adapter=fresh) == 0  # it changes nothing
    assert evaluated([1.0, 2.0], adapter=fresh | {"q_lora_b": jnp.ones((1, 1, 2))}) == 1
    ours.write_bytes(whole.split(b"\n", 1)[1])  # as a pujax before wrote it
    assert evaluated([1.0, 2.0]) == 0


def test_what_a_stage_measured_of_the_state_that_it_hands_on_is_not_measured_again(
    tmp_path, monkeypatch
):
    """And a metric that no prompt has a value of is named, once."""
    asked: list[str] = []
    said: list[str] = []

    def evaluate(model, params, *_, name, **more):
        asked.append(name)
        worth = 1.0 - abs(float(params["embed"][0, 0]) - 2.0)  # best after step 2
        row = Row("0", None, "?", None, "a", "b", {"exact": worth})
        return Evaluation(name, (row,), {"exact": METRICS["exact"].shown})

    monkeypatch.setattr("pujax.run.stages.evaluate", evaluate)
    monkeypatch.setattr("pujax.run.stages.Run._kept", lambda *_: None)  # nothing is on the disk
    unused: Any = SimpleNamespace(clone=lambda budget: None, decode=None)
    checkpoints = Checkpoints(tmp_path, keep=2, model={}, say=said.append)
    with RunLog(tmp_path, resume=None) as log:
        run = Run(
            TrainConfig(eval=EvalConfig(every=1, batch=8)),
            tmp_path,
            make_mesh(),
            unused,
            None,
            DATA,
            DATA,
            {"exact": METRICS["exact"], "mine": METRICS["rouge_l"]},
            unused,
            checkpoints,
            log,
            Console(file=io.StringIO()),
            said.append,
            lambda: 0,
            Criterion("exact", higher=True),
        )
        state = fresh()
        run.evaluated("base", 0, state.params)
        stage = Stage(
            "sft", "sft", ("base", 0), 4, 8, DATA, 0, 0, advance=advancing(lambda step: 1.0)
        )  # fmt: skip
        params, step = run.through(stage, state, 0)
        assert (step, asked) == (2, ["base"] + ["sft"] * 4)
        table = run.evaluated("sft", step, params)
        assert (len(asked), table.means()) == (5, {"eval/exact": 1.0})
        other = run.evaluated("sft", 4, jax.tree.map(lambda x: x + 2, params))  # not of that state
        assert (len(asked), other.means()) == (6, {"eval/exact": -1.0})
    checkpoints.close()
    lost = [line for line in said if "no held-out prompt has a value" in line]
    assert len(lost) == 1  # of the base, and said once
    assert lost[0].startswith("in no table: eval.metrics.mine: ")


def test_the_first_steps_say_how_long_the_run_still_takes(tmp_path, monkeypatch):
    clock = itertools.count(0.0, 0.001)  # a machine at other work may be slow
    ticks = SimpleNamespace(monotonic=lambda: next(clock), process_time=lambda: next(clock))
    monkeypatch.setattr("pujax.run.stages.time", ticks)
    work = Forecast({"sft": 1.0, "align": 1.0}, {"sft": 9, "align": 0}, 1.0, {"sft": 1, "align": 0})
    (tmp_path / "short").mkdir()
    *_, said = gone_through(tmp_path, [0.5] * 99, steps=9, forecast=work)
    assert said == ["time: about a minute left, 0:00 of it sft, by the first steps"]
    *_, said = gone_through(tmp_path / "short", [0.5] * 99, steps=6, forecast=work)
    assert said == []
