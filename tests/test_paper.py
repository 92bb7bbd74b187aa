import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments.paper import figures, judge, plan, raw, reproduce, tables, together
from experiments.paper.plan import Found, load_profile, next_tasks, tasks_of
from pujax import __version__
from pujax.errors import ConfigError, EvaluationError
from pujax.files.durable import read_jsonl
from pujax.records import messages_key
from pujax.run.fit import stop_signals
from pujax.run.plan import fitting

ARMS = """
data:
  train: [{folder}/train.jsonl]
  validation: {folder}/validation.jsonl
  test: {folder}/test.jsonl
  store: {folder}/anchors.jsonl
metric: sampled_exact
profiles:
  tiny:
    prompts: 6
    results: results
    runs: runs
    guess: {{sft: 1.5, align: 4.5, prompt: 0.5}}
    settings: {{data.max_prompt_tokens: 80, align.steps: 200}}
arms:
  sft:
    title: SFT
    group: main
    seeds: 2
    set: {{align.steps: 0}}
    choose: {{sft.lr: [1.0e-4, 3.0e-5], sft.steps: [400, 200]}}
  sft_continued:
    title: SFT continued
    group: main
    seeds: 2
    from: sft
    as_long_as: grpo
    paced_by: pace
    set: {{align.steps: 0, sft.lr: 1.0e-5}}
  pace: {{title: pace, group: pace, seeds: 2, from: sft, set: {{sft.steps: 30, align.steps: 15}}}}
  grpo:
    title: GRPO
    group: main
    seeds: 1
    from: sft
    set: {{sft.steps: 0, loss: grpo}}
    choose: {{align.lr: [1.0e-5]}}
  random:
    title: random
    group: ablations
    like: grpo
    after: 2
    set: {{scorer: random}}
  oracle: {{title: oracle, group: main, like: grpo, needs: scorer/nobody-has-it.yaml}}
curve:
  4:
    sft: {{seeds: 1, choose: {{}}, set: {{align.steps: 0, sft.steps: 10}}}}
    grpo: {{seeds: 0}}
    random: {{seeds: 0}}
"""


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "arms.yaml"
    path.write_text(ARMS.format(folder=tmp_path))
    counts = {"train": 6, "validation": 2, "test": 3}
    store = []
    for name, count in counts.items():
        rows = [
            {"id": f"{name}-{i}", "prompt": f"{name} {i}?", "answer": "4"} for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            messages = [{"role": "user", "content": row["prompt"]}]
            store.append(
                {"format": 1, "key": messages_key(messages), "id": row["id"], "messages": messages}
                | {"response": "4", "finish_reason": "stop", "model": "m", "cost": None}
                | {"usage": {"prompt_tokens": 10, "completion_tokens": 2}, "created": "now"}
            )
    (tmp_path / "anchors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in store))
    return load_profile(path, "tiny")


def result_of(task, score=0.5, sft_s=1.5, align_s=4.5):
    """A result with what a plan looks at."""
    run = task.run
    return {
        "arm": run.arm.name,
        "settings": dict(run.settings),
        "prompts": {"training": run.prompts - run.after, "evaluated": 2},
        "after": run.after,
        "step_s": {
            "sft": {"wall": 2 * sft_s, "processor": sft_s},
            "align": {"wall": 2 * align_s, "processor": align_s},
        },
        "machine": {"cores": 2},
        "evaluation_s": 1.0,
        "name": run.name,
        "values": {"sampled_exact": [score, None]},
    }


def known(profile, results=None, prompts=10_000, tests=True):
    return Found(profile.metric, results or {}, prompts, tests)


def walked(profile, score, failing=(), only=()):
    """The tasks in the order in which they are done, with the results that `score` gives."""
    found, order = known(profile), []
    while some := next_tasks(tasks_of(profile, found, only), found):
        [task] = some
        order.append(task)
        if task.run.name in failing:
            found.failed.add(task.key)
            continue
        assert all(found.of(run) for run in task.run.needs)
        found.results[task.key] = result_of(task, score(task.run))
    return order


def named(tasks):
    return [f"{t.run.name} {t.run.seed} {t.split}" for t in tasks]


# --- the plan -------------------------------------------------------------------------------------


def test_what_validation_chooses_is_done_for_every_seed_and_each_task_follows_its_needs(profile):
    # The lower rate is better, and so are fewer steps: lr first, then steps at the better lr.
    order = walked(profile, lambda run: 1 - run.point.get("sft.lr", 0) - run.steps("sft") / 1e6)
    best = "sft-lr3e-05-steps200"
    assert named(order) == [
        "sft-lr0.0001-steps400 0 validation",
        "sft-lr3e-05-steps400 0 validation",
        f"{best} 0 validation",
        f"{best} 0 test",
        "pace 0 validation",  # which says how long SFT may continue
        "pace 1 validation",
        "sft_continued 0 validation",
        "sft_continued 0 test",
        "grpo-lr1e-05 0 validation",
        "grpo-lr1e-05 0 test",
        f"{best} 1 validation",
        f"{best} 1 test",
        "sft_continued 1 validation",
        "sft_continued 1 test",
        "sft-4 0 validation",
        "sft-4 0 test",
        "random-lr1e-05 0 validation",
        "random-lr1e-05 0 test",
    ]
    starts = {t.run.name: t.run.settings.get("model.path", "") for t in order}
    assert starts["random-lr1e-05"].endswith(f"runs/{best}/0/export")
    random = next(t.run for t in order if t.run.arm.name == "random")
    assert random.settings["loss"] == "grpo"
    assert (random.settings["scorer"], random.settings["align.lr"]) == ("random", 1e-5)
    small = next(t.run for t in order if t.run.arm.name == "sft-4")
    assert (small.prompts, small.steps("sft"), small.arm.group) == (4, 10, "anchors")
    assert (profile.arms["grpo-4"].origin, profile.arms["random-4"].like) == ("sft-4", "grpo-4")


def test_of_equals_the_first_value_stays_and_a_run_that_fails_is_the_worst(profile):
    order = walked(profile, lambda run: 0.5)
    assert "sft-lr0.0001-steps400 0 test" in named(order)
    order = walked(profile, lambda run: 0.5, failing=["sft-lr0.0001-steps400"])
    assert "sft-lr3e-05-steps400 0 test" in named(order)
    # Where no value is left, neither is what starts from it; other arms go on.
    none = ["sft-lr0.0001-steps400", "sft-lr3e-05-steps400", "sft-lr0.0001-steps200"]
    order = walked(profile, lambda run: 0.5, failing=none)
    assert {task.run.arm.name for task in order} == {"sft", "sft-4"}


def test_sft_continues_for_as_many_processor_seconds_as_the_alignment_took(profile):
    assert plan.equal_steps(200, 4.5, 1.5) == 600
    assert plan.equal_steps(1, 0.1, 10.0) == 1
    order = walked(profile, lambda run: 0.5)
    lengths = {t.run.steps("sft") for t in order if t.run.arm.name == "sft_continued"}
    assert lengths == {600}  # 200 steps of 4.5 s are 600 of 1.5 s, for every seed
    # Where the wall's clock decides: steps of 30 and 10 s in two runs are 20, of SFT 3 and 3.
    found = known(profile, {task.key: result_of(task) for task in order})
    for number, seconds in enumerate((30.0, 10.0)):
        found.results["pace", number, "validation"]["step_s"]["align"]["wall"] = seconds
    _, run = plan.way_to(replace(profile, clock="wall"), found, "sft_continued", 1)
    assert run.steps("sft") == round(200 * 20 / 3)


def test_several_seeds_may_choose_by_their_mean(profile):
    sft = replace(profile.arms["sft"], choose={"sft.lr": [1e-4, 3e-5]}, chosen_by=2)
    profile = replace(profile, arms={"sft": sft})
    # The first seed likes the larger rate, the other one likes the smaller much better.
    scores = {(1e-4, 0): 0.6, (3e-5, 0): 0.5, (1e-4, 1): 0.2, (3e-5, 1): 0.6}
    order = walked(profile, lambda run: scores[run.point["sft.lr"], run.seed])
    assert named(order) == [
        "sft-lr0.0001 0 validation",
        "sft-lr0.0001 1 validation",
        "sft-lr3e-05 0 validation",
        "sft-lr3e-05 1 validation",
        "sft-lr3e-05 0 test",
        "sft-lr3e-05 1 test",
    ]


def test_tables_hold_arms_against_the_choice_that_validation_likes_by_seeds_that_all_have():
    def line(name, *scores, seeds=None):
        seeds = range(len(scores)) if seeds is None else seeds
        runs = [
            made(name, "SFT", 0, seed, (score, score))
            for seed, score in zip(seeds, scores, strict=True)
        ]
        return tables.Line(name, tuple(run | {"arm": "sft"} for run in runs))

    wide, small = line("sft-lr0.0001", 0.6, 0.2, 0.9), line("sft-lr3e-05", 0.5, 0.6)
    assert tables.best_of_arms([wide, small])["sft"] is small  # .55 of two seeds against .40
    tested = [line("sft-lr3e-05", 0.1), line("sft-lr0.0001", 0.9)]
    assert tables.chosen_of_arms(tested, [wide, small])["sft"] is tested[0]
    assert tables.chosen_of_arms(tested[1:], [wide, small])["sft"] is tested[1]
    assert tables.chosen_of_arms(tested, [])["sft"] is tested[0]


def test_an_arm_and_its_origin_without_a_seed_in_common_are_in_no_row():
    one = made("grpo", "GRPO", 1, 0, (0.5, 1.0)) | {"origin": "sft"}
    other = made("sft", "SFT", 0, 1, (0.5, 1.0), origin=None)
    lines = [tables.Line(run["title"], (run,)) for run in (one, other)]
    assert tables.above_origin(lines, lines) == ""


def test_it_continues_by_the_steps_that_validation_chose_for_the_alignment(profile):
    grpo = replace(profile.arms["grpo"], choose={"align.steps": [200, 400]})
    profile = replace(profile, arms={**profile.arms, "grpo": grpo})
    order = walked(profile, lambda run: run.steps("align"))
    assert [t.run.steps("sft") for t in order if t.run.arm.name == "sft_continued"] == [1200] * 4
    names = [task.run.name for task in order]
    assert names.index("grpo-steps400") < names.index("sft_continued")


def test_an_arm_alone_is_done_with_all_that_it_needs():
    """Its own line has another origin than that of the run which says how long it may continue."""
    profile = load_profile(reproduce.HERE / "arms.yaml", "paper")
    order = walked(profile, lambda run: 0.5, only=["sft_half_continued"])
    arms = list(dict.fromkeys(task.run.arm.name for task in order))
    assert arms == ["sft_half", "sft", "pace", "sft_half_continued"]
    left = tasks_of(profile, known(profile, {t.key: result_of(t) for t in order}), arms[-1:])
    assert {task.key for task in left} == {task.key for task in order}


def test_arms_that_are_named_are_done_in_that_order_with_as_many_seeds_as_are_asked(profile):
    found = known(profile)
    arms = [t.run.arm.name for t in tasks_of(profile, found, ["grpo", "sft"], 1)]
    assert arms == ["sft"] * 3 + ["grpo"] * 2 + ["sft"]
    seeds = {t.run.seed for t in tasks_of(profile, found, ["sft"])}
    assert seeds == {0, 1}
    arms = {"sft_more": replace(profile.arms["sft"], seeds=0), "sft_more-30": profile.arms["sft"]}
    profile = replace(profile, arms=profile.arms | arms)
    with pytest.raises(ConfigError, match="--only='sft_more': has no seeds but as sft_more-30"):
        tasks_of(profile, found, ["sft_more"])


def test_a_model_that_is_not_here_is_made_again_where_something_needs_it(profile):
    order = walked(profile, lambda run: 0.5)
    found = known(profile, {task.key: result_of(task) for task in order})
    here = {"sft-lr0.0001-steps400"}
    found = replace(found, kept=lambda run: run.name in here)
    assert next_tasks(tasks_of(profile, found), found) == []  # all has its result
    del found.results["random-lr1e-05", 0, "test"]
    [random] = next_tasks(tasks_of(profile, found), found)
    assert named([random]) == ["random-lr1e-05 0 validation"]
    here.clear()  # nor is what it starts from
    [first] = next_tasks(tasks_of(profile, found), found)
    assert first is not None
    assert named([first]) == ["sft-lr0.0001-steps400 0 validation"]
    assert next_tasks(tasks_of(profile, found), found, {first.key}) == []
    assert "1 to make again: no model here" in "\n".join(plan.told(profile, found))
    found.failed.add(first.key)
    assert next_tasks(tasks_of(profile, found), found) == []


def test_a_step_that_compiled_is_no_measure_of_a_step():
    seconds = (4.0, 1.0, 2.0, 3.0, 40.0, None)
    lines = [{"stage": "sft", "step": i, "time/cpu_s": s} for i, s in enumerate(seconds, 1)]
    lines += [{"stage": "align", "step": 2, "time/cpu_s": 9.0}, {"stage": "eval", "step": 2}]
    # Not the first; of the others the median is 2.5, and what is over 7.5 compiled.
    assert raw.step_seconds(lines, "sft", "time/cpu_s") == 2.0
    assert raw.step_seconds(lines, "align", "time/step_s") is None


def test_what_is_done_is_not_done_again_and_other_settings_are_refused(profile):
    found = known(profile)
    tasks = tasks_of(profile, found)
    found.results[tasks[0].key] = result_of(tasks[0])
    assert next_tasks(tasks_of(profile, found), found) == tasks[1:2]
    found.results[tasks[0].key]["settings"]["eval.every"] = 7  # touches no number
    assert next_tasks(tasks_of(profile, found), found) == tasks[1:2]
    found.results[tasks[0].key]["settings"]["data.max_prompt_tokens"] = 96
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens.*away"):
        next_tasks(tasks_of(profile, found), found)


def test_each_pace_that_was_measured_has_its_own_line():
    def pace(title, sft, align):
        seconds = {"sft": {"processor": sft}, "align": {"processor": align}}
        return {"group": raw.PACE, "title": title, "step_s": seconds}

    told = tables.paces(
        {
            ("pace", 0, "validation"): pace("of 4 × 8", 2.0, 5.0),
            ("pace", 1, "validation"): pace("of 4 × 8", 4.0, 7.0),
            ("pace_wide", 0, "validation"): pace("of 8 × 4", 2.0, 8.0),
            ("sft", 0, "validation"): {"group": "main"},
        }
    )
    of = "a step of SFT {} processor seconds, one of alignment {}, which is worth {} of SFT"
    assert told.splitlines()[-2:] == [
        f"* of 4 × 8: {of.format(3, 6, '2.00')}",
        f"* of 8 × 4: {of.format(2, 8, '4.00')}",
    ]


def test_the_forecast_is_steps_and_prompts_times_their_paces(profile, monkeypatch):
    found = known(profile)
    first, *_ = tasks = tasks_of(profile, found, only=["grpo"])
    # 400 steps of SFT, and of two prompts an evaluation; the guesses of the profile.
    assert plan.seconds_left(profile, found, first) == 400 * 1.5 + 2 * 0.5
    first.run.directory.mkdir(parents=True)
    (first.run.directory / "metrics.jsonl").write_text('{"stage": "sft", "step": 100}\n')
    assert plan.seconds_left(profile, found, first) == 300 * 1.5 + 2 * 0.5
    # Measured: 1.5 processor seconds a step, 1 s for two prompts. More cores than the machine had
    # that measured it make nothing faster.
    found.results[first.key] = result_of(first)
    assert plan.seconds_left(profile, found, first) == 0
    for cores, pace in ((1, 1.5), (2, 0.75), (64, 0.75)):
        monkeypatch.setattr(plan, "_cores", lambda cores=cores: cores)
        assert plan.seconds_left(profile, found, tasks[1]) == 400 * pace + 2 * 0.5
    by_the_wall = replace(profile, clock="wall")
    assert plan.seconds_left(by_the_wall, found, tasks[1]) == 400 * 3.0 + 2 * 0.5
    # On the way too, every 80 of 200 steps.
    aligned = next(task for task in tasks if task.run.arm.name == "grpo")
    aligned = replace(
        aligned, run=replace(aligned.run, settings={"align.steps": 200, "eval.every": 80})
    )
    assert plan.seconds_left(by_the_wall, found, aligned) == 200 * 9.0 + 3 * 2 * 0.5
    text = "\n".join(plan.told(profile, found))
    assert "oracle" in text
    assert "left out: there is no conf/scorer/nobody-has-it.yaml" in text


@pytest.mark.parametrize(("name", "only"), [("cpu", []), ("paper", ["sft_continued"])])
def test_the_arms_of_the_experiment_compose(name, only, capsys):
    profile = load_profile(reproduce.HERE / "arms.yaml", name)
    reproduce.check(profile, tasks_of(profile, known(profile), only))
    assert "compose" in capsys.readouterr().out


def test_a_wrong_arm_is_named_before_anything_runs(profile):
    wrong = replace(profile.arms["grpo"], settings={"loss": "grpo", "align.stepps": 3})
    profile = replace(profile, arms={**profile.arms, "grpo": wrong})
    with pytest.raises(ConfigError, match=r"arms\.grpo: .*stepps"):
        reproduce.check(profile, tasks_of(profile, known(profile), ["grpo"]))


def test_arms_that_go_round_in_a_circle_are_refused(tmp_path, profile):
    text = ARMS.format(folder=tmp_path)
    for given, made, said in (
        ("  grpo:\n    title: GRPO\n", "  grpo:\n    like: random\n    title: GRPO\n", "like"),
        ("  grpo:\n    title: GRPO\n    group: main\n    seeds: 1\n    from: sft\n", "", "from"),
    ):
        (tmp_path / "arms.yaml").write_text(text.replace(given, made or given[:-4] + "grpo\n"))
        with pytest.raises(ConfigError, match=rf"arms\.\w+\.{said}"):
            plan.tasks_of(load_profile(tmp_path / "arms.yaml", "tiny"), known(profile))


@pytest.mark.parametrize(
    ("given", "made", "said"),
    [
        ("align.lr: [1.0e-5]", "align.lr: 1.0e-5", r"grpo\.choose\.align\.lr=1e-05: give a list"),
        ("align.lr: [1.0e-5]", "align.lr: []", r"grpo\.choose\.align\.lr=\[\]: give a list"),
        (
            "seeds: 1\n    from: sft",
            "seeds: two\n    from: sft",
            "grpo.seeds='two': must be a whole",
        ),
        ("seeds: 1\n    from: sft", "seeds: true\n    from: sft", "seeds=True: must be a whole"),
        ("seeds: 1\n    from: sft", "seeds: -1\n    from: sft", "seeds=-1: must not be neg"),
        ("seeds: 1\n    from: sft", "chosen_by: 0\n    from: sft", "chosen_by=0: must be pos"),
        ("seeds: 1\n    from: sft", "prompts: -1\n    from: sft", "grpo.prompts=-1: must be pos"),
        ("seeds: 1\n    from: sft", "test: 'no'\n    from: sft", "grpo.test='no': must be true"),
        ("seeds: 1\n    from: sft", "needs: 5\n    from: sft", "grpo.needs=5: must be a text"),
        ("seeds: 1\n    from: sft", "suite: noone\n    from: sft", "grpo.suite='noone': choose"),
        ("seeds: 1\n    from: sft", "against: no\n    from: sft", "grpo.against=False: must be"),
        ("seeds: 1\n    from: sft", "against: nn\n    from: sft", "grpo.against='nn': choose"),
        ("set: {scorer: random}", "set:", "random.set=None: must be a mapping"),
        ("    title: random\n", "    title:\n", "random.title=None: must be a text"),
        ("    after: 2\n", "    after: -2\n", "random.after=-2: must not be negative"),
        ("    after: 2\n", "    after: 6\n", "random.after=6: leaves none of 6"),
        ("    prompts: 6\n", "    prompts: '6'\n", "tiny.prompts='6': must be a whole number"),
        ("    settings: {data", "    clock: cpu\n    settings: {data", "tiny.clock='cpu': choose"),
        ("settings: {data.max_prompt_tokens: 80, align.steps: 200}", "settings:", "settings=None"),
        ("  test: ", "  tset: ", "has no test: name the file"),
        ("seeds: 2, from: sft,", "from: sft_continued,", "paced_by='pace': starts from this arm"),
    ],
)
def test_what_no_arm_can_be_is_refused_by_its_key(tmp_path, given, made, said):
    text = ARMS.format(folder=tmp_path)
    assert given in text
    (tmp_path / "arms.yaml").write_text(text.replace(given, made))
    with pytest.raises(ConfigError, match=said):
        load_profile(tmp_path / "arms.yaml", "tiny")


def test_the_models_of_all_choices_stay_until_one_is_made(profile):
    sft = replace(profile.arms["sft"], seeds=1, choose={"sft.lr": [1e-4, 3e-5, 1e-5]})
    profile = replace(profile, arms={"sft": sft})
    tried, (first, second, third) = (
        walked(profile, lambda run: 0.5),
        plan.choice(profile, known(profile), "sft")[0],
    )
    results = {task.key: result_of(task) for task in tried if task.run != third}
    model = second.directory / "export"
    model.mkdir(parents=True)
    assert (first.name, 0, "test") in results  # of before there were others to choose from
    reproduce.make_room(profile, known(profile, results))
    assert model.exists()
    results[third.key] = result_of(plan.Task(third, "validation"))
    reproduce.make_room(profile, known(profile, results))
    assert not model.exists()


def test_room_is_made_of_no_run_that_is_at_work(profile):
    run = plan.way_to(profile, known(profile), "grpo", 0)[1]
    found = known(profile, {run.key: result_of(plan.Task(run, "validation"))})
    checkpoints = run.directory / "checkpoints"
    checkpoints.mkdir(parents=True)
    reproduce.make_room(profile, found, [run])
    assert checkpoints.exists()
    reproduce.make_room(profile, found)
    assert not checkpoints.exists()


def test_a_profile_may_drop_an_arm_and_what_needs_that_is_named(tmp_path):
    path = tmp_path / "arms.yaml"
    text = ARMS.format(folder=tmp_path)
    dropped = text.replace("    prompts: 6\n", "    prompts: 6\n    arms: {random: null}\n")
    path.write_text(dropped)
    with pytest.raises(ConfigError, match=r"curve\.4='random': choose sft, "):
        load_profile(path, "tiny")
    path.write_text(dropped.replace("    random: {seeds: 0}\n", ""))
    arms = load_profile(path, "tiny").arms
    assert "random" not in arms
    assert "grpo" in arms
    path.write_text(
        text.partition("curve:")[0].replace(
            "    prompts: 6\n", "    prompts: 6\n    arms: {grpo: null}\n"
        )
    )
    with pytest.raises(ConfigError, match=r"arms\.\w+\.(like|as_long_as)='grpo': no such arm"):
        load_profile(path, "tiny")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arms: [", "line 1"),
        ("a: ${b", "mend it"),
        ("profiles: {cpu: {}}", "mend it"),
        ("- 1", "mend it"),
        ("a: \0", "mend it"),
        (None, "No such file"),
    ],
)
def test_arms_that_cannot_be_read_are_one_line(tmp_path, capsys, text, said):
    path = tmp_path / "arms.yaml"
    if text is not None:
        path.write_text(text)
    assert reproduce.main(["--plan", "--arms", str(path)]) == 1
    err = capsys.readouterr().err
    assert "arms.yaml" in err
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_jax_that_cannot_start_is_one_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    with pytest.raises(ConfigError, match=r"jax finds no device \(.*nowhere.*JAX_PLATFORMS"):
        reproduce.accelerator()


# --- doing it -------------------------------------------------------------------------------------


class Stub:
    """Stands for the commands: leaves behind what they do."""

    def __init__(self):
        self.called = []

    def call(self, words):
        told = dict(word.split("=", 1) for word in words if "=" in word)
        self.called.append(words[1].rpartition(".")[2])
        if "suite" in told:
            found = {"header": ["", ""], "rows": [["the model", "0.6", "0.7"]] * 3, "note": "n"}
            directory = reproduce.ROOT / told["run"]
            if not (directory / "reference").is_dir():
                return 1
            (directory / f"suite-{told['suite']}.json").write_text(json.dumps(found))
        elif "out" in told:
            self.answers(reproduce.ROOT / told["out"], told["data.heldout"])
        elif "run.dir" in told:
            directory = reproduce.ROOT / told["run.dir"]
            self.answers(directory, told["data.heldout"])
            lines = [
                {"stage": "eval", "model": "base", "step": 0, "eval/sampled_exact": 0.25},
                {"stage": "align", "step": 2, "time/step_s": 9.0, "time/cpu_s": 4.5, "kl/ref": 0.1},
                {"stage": "sft", "step": 2, "time/step_s": 3.0, "time/cpu_s": 1.5},
                {"stage": "eval", "model": "aligned", "step": 1, "eval/sampled_exact": 0.5},
            ]
            (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
            for name in ("checkpoints", "reference", "export"):
                (directory / name).mkdir()
            (directory / "done").touch()
        return 0

    def answers(self, directory, heldout):
        directory.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(line) for line in Path(heldout).read_text().splitlines()]
        lines = [
            {"id": row["id"], "kind": "sum", "prompt": row["prompt"], "answer": "4", "anchor": "4"}
            | {"response": "4", "values": {"sampled_exact": 0.5, "rouge_l": 1.0}}
            for row in rows
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / "eval-aligned.jsonl").write_text(text)


def test_every_arm_is_run_once_and_its_result_kept(profile):
    stub = Stub()
    assert reproduce.work(profile, (["random"], None), stub.call) == 0
    # Two choices of SFT's rate and one more of its steps, GRPO, the arm itself, and its test.
    assert stub.called.count("train") == 5
    assert stub.called.count("evaluate") == 1
    found = raw.read_all(profile.results)
    result = found["random-lr1e-05", 0, "test"]
    # It has the last four of six prompts.
    assert result["teacher"] == {"queries": 4, "prompt_tokens": 40, "completion_tokens": 8}
    assert (profile.runs / "prompts-2-6.jsonl").read_text().startswith('{"id": "train-2"')
    assert result["values"] == {"sampled_exact": [0.5] * 3, "rouge_l": [1.0] * 3}
    assert result["origin"] == "sft-lr0.0001-steps400"
    assert found["random-lr1e-05", 0, "validation"]["course"][-1] == {
        "model": "aligned",
        "step": 1,
        "seconds": {"wall": 12.0, "processor": 6.0},
        "kl": 0.1,
        "eval/sampled_exact": 0.5,
    }
    run = profile.runs / "random-lr1e-05" / "0"
    assert (run / "eval-base.jsonl").exists()  # the evaluation of what it started from
    assert not (run / "checkpoints").exists()
    again = Stub()
    assert reproduce.work(profile, (["random"], None), again.call) == 0
    assert again.called == []
    # Its test alone is lost, and so is the model: that one is made again, and no result of it.
    files = {path.name: path for path in (profile.results / "raw").iterdir()}
    files["random-lr1e-05-seed0-test.json"].unlink()
    reproduce.shutil.rmtree(run / "export", ignore_errors=True)
    kept = files["random-lr1e-05-seed0-validation.json"]
    kept.write_text(kept.read_text().replace('"evaluation_s"', '"evaluation s"'))
    assert reproduce.work(profile, (["random"], None), again.call) == 0
    assert [name for name in again.called if name != "tables"] == ["train", "evaluate"]
    assert '"evaluation s"' in kept.read_text()
    made_again = raw.read_all(profile.results)["random-lr1e-05", 0, "test"]
    assert made_again["values"] == result["values"]


def test_a_result_is_kept_where_pujax_is_not_installed(profile, monkeypatch):
    def refused(name):
        if name == "pujax":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", refused)
    monkeypatch.setattr(raw, "version", refused)
    assert reproduce.work(profile, (["sft"], None), Stub().call) == 0
    results = raw.read_all(profile.results).values()
    assert {result["versions"]["pujax"] for result in results} == {__version__}


def test_a_method_is_asked_how_it_ranks_and_not_read_on_the_test_split(profile):
    method = plan.Arm("ipo", "IPO", "methods", seeds=2, test=False, like="grpo", suite="ranking")
    continued = replace(profile.arms["sft_continued"], seeds=1)
    arms = {**profile.arms, "sft_continued": continued, "ipo": method}
    profile, stub = replace(profile, arms=arms), Stub()
    assert reproduce.work(profile, (["sft_continued", "ipo"], None), stub.call) == 0
    found = raw.read_all(profile.results)
    assert [split for name, _, split in found if name.startswith("ipo")] == [
        "ranking",  # of the first seed alone
        "validation",
        "validation",
    ]
    assert not (profile.runs / "ipo-lr1e-05" / "0" / "export").exists()  # nothing more needs it
    assert not (profile.runs / "ipo-lr1e-05" / "0" / "reference").exists()
    lines = tables.lines_of(found, "validation")
    zero = "+0.000 [0.000, 0.000]"
    told = f"| IPO | 0.500 | {zero} | {zero} | {zero} | "
    assert told + "0.6 | 0.7 | 0.6 |" in tables.methods(lines[-1:], lines, found)
    assert told + "– | – | – |" in tables.methods(lines[-1:], lines, {})
    again = Stub()
    assert reproduce.work(profile, (["ipo"], None), again.call) == 0
    assert again.called == []
    asked = plan.Task(plan.way_to(profile, reproduce.look(profile), "ipo", 0)[1], "ranking")
    smaller = replace(profile, suites={"ranking": {"suite.samples": 4}})
    words = reproduce.command_of(smaller, asked)
    assert words[-2:] == ["suite=ranking", "suite.samples=4"]


def test_an_arm_has_its_own_setting_and_not_what_was_chosen_for_the_one_that_it_is_like(profile):
    own = plan.Arm("own", "own", "others", like="grpo", settings={"align.lr": 2e-5})
    profile = replace(profile, arms={**profile.arms, "own": own})
    run = plan.way_to(profile, reproduce.look(profile), "own", 0)[1]
    assert (run.name, run.settings["align.lr"]) == ("own", 2e-5)


def test_a_run_that_failed_once_is_tried_again_and_what_has_no_way_to_it_fails(profile, capsys):
    stub, failed = Stub(), []

    def call(words):
        if words[1].endswith("train") and words not in failed:
            failed.append(words)
            return 1
        return stub.call(words)

    assert reproduce.work(profile, (["random"], None), call) == 0
    assert stub.called.count("train") == len(failed) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Found, "ready", lambda found, task: False)
        (profile.results / "raw" / "random-lr1e-05-seed0-test.json").unlink()
        assert reproduce.work(profile, (["random"], None), call) == 1
    assert capsys.readouterr().out.endswith("not begun: random-lr1e-05, seed 0, test\n")


def test_no_runs_at_a_time_are_refused(capsys):
    assert reproduce.main(["--jobs", "0"]) == 1
    assert "--jobs=0: give one or more" in capsys.readouterr().err


def test_several_runs_at_a_time_begin_when_what_they_need_is_there(profile):
    stub, most, at_work, lock = Stub(), [], [], threading.Lock()

    def call(words):
        name = next((word for word in words if word.startswith("run")), words[1])
        with lock:
            at_work.append(name)
            most.append(len(at_work))
        time.sleep(0.05)
        status = stub.call(words)
        with lock:
            at_work.remove(name)
        return status

    before = {}

    def begun(tasks):
        [task] = tasks
        found = reproduce.look(profile)
        before[task.key] = task.run.before <= found.results.keys()

    done = reproduce.done
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "done", lambda *a: begun(a[1]) or done(*a))
        assert reproduce.work(profile, ((), None), call, 3, "some chip") == 0
    assert max(most) == 3
    assert all(before.values())
    one = {key: result["chosen"] for key, result in raw.read_all(profile.results).items()}
    assert {result["device"] for result in raw.read_all(profile.results).values()} == {"some chip"}
    assert one == {task.key: task.run.point for task in tasks_of(profile, reproduce.look(profile))}


def test_seeds_of_a_run_are_done_in_one_program_and_by_themselves_where_that_fails(profile):
    arms = {name: replace(arm, seeds=4) for name, arm in profile.arms.items()}
    profile, groups = replace(profile, arms=arms), []
    stub = Stub()

    def call(words):
        if not words[1].endswith("together"):
            return stub.call(words)
        parts = [[]]
        for word in words[2:]:
            parts.append([]) if word == "--" else parts[-1].append(word)
        parts = [part for part in parts if part]
        groups.append([next(w for w in part if w.startswith("run.dir")) for part in parts])
        for part in parts[: 2 if "random" in groups[-1][0] else None]:  # one has failed, say
            assert stub.call(["-m", "pujax.train", *part]) == 0
        return 0

    assert reproduce.work(profile, (["random"], None), call, together=3) == 0
    found = raw.read_all(profile.results)
    # Seed 0 chooses; the other three of each of the run's three models go together.
    assert [len(group) for group in groups] == [3, 3]
    seeds = {key[1]: found[key].get("together", 1) for key in found if key[0] == "random-lr1e-05"}
    assert seeds == {0: 1, 1: 3, 2: 3, 3: 1}


def test_runs_that_one_program_cannot_do_are_refused(tmp_path, capsys):
    one = ["+experiment=smoke", "run.dir=" + str(tmp_path / "a")]
    other = ["+experiment=smoke", "run.dir=" + str(tmp_path / "b"), "seed=1"]
    ends = ["eval.patience=2", "checkpoint.best=exact", "eval.every=2"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.yaml").touch()
    for words, said in (
        (one, "runs=1: give two or more"),
        ([*one, "--", *other, "sft.lr=0.5"], "sft.lr=0.5: 0.001 in another run"),
        ([*one, "--", *one, "seed=1"], "a': give each run one of its own"),
        ([*one, "--", *one[:1], "seed=1", f"run.dir={tmp_path / 'c'}"], "c': begun before"),
        (
            [*one, *ends, "--", *other, *ends],
            "eval.patience=2: ends runs at steps of their own",
        ),
    ):
        assert together.main(words) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_one_meeting_does_the_steps_of_all_and_ends_when_one_run_fails():
    meeting, made = together.Meeting(3), {}

    def go(place):
        for step in range(1, 4):
            if (place, step) == (2, 3):
                meeting.leave()
                return
            made[place, step] = meeting.step(place, double, {"x": jnp.float32(place + step)})

    def double(tree):
        traced.append(tree)
        return {"x": 2 * tree["x"]}, tree["x"] > 0

    traced, errors = [], []

    def guarded(place):
        try:
            go(place)
        except threading.BrokenBarrierError:
            errors.append(place)

    threads = [threading.Thread(target=guarded, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    told = {key: float(value["x"]) for key, (value, _) in made.items()}
    assert told == {(place, step): 2.0 * (place + step) for place, step in told}
    assert {(place, 1) for place in range(3)} <= told.keys()
    assert (len(traced), sorted(errors)) == (1, [0, 1])


@pytest.mark.long
def test_runs_in_one_program_learn_what_each_learns_alone(tmp_path):
    words = ["+experiment=smoke", "mesh=single", "sft.steps=1", "align.steps=1"]
    words += ["sampling.candidates=2", "data.max_response_tokens=8", "checkpoint.every=1"]
    words += ["eval.prompts=2", "eval.batch=2"]

    def run(place, seed):
        return [*words, f"run.dir={tmp_path / place}", f"seed={seed}"]

    assert together.main([*run("a", 0), "--", *run("b", 1)]) == 0
    [config] = together.read(run("alone", 1))
    together.train(config, fitting, stop_signals)
    alone, beside = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("alone", "b"))
    assert [line["stage"] for line in beside] == ["eval", "sft", "eval", "align", "eval"]
    shown = ("loss", "grad_norm", "score/mean", "eval/anchor_logp", "eval/rouge_l")
    for one, other in zip(alone, beside, strict=True):
        same = [[line[key] for key in shown if key in line] for line in (one, other)]
        assert same[1] == pytest.approx(same[0], rel=1e-3, abs=1e-4)
    assert (tmp_path / "a" / "done").exists()


def test_what_has_no_answer_yet_is_left_out(profile):
    store = profile.runs.parent / "anchors.jsonl"
    train, validation, test = (6, 2, 3)
    lines = store.read_text().splitlines(keepends=True)
    assert len(lines) == train + validation + test
    found = reproduce.look(profile)
    assert (found.prompts, found.tests) == (6, True)
    store.write_text("".join(lines[:4] + lines[5:-1]))  # not the fifth, nor the last test prompt
    found = reproduce.look(profile)
    assert (found.prompts, found.tests) == (4, False)
    tasks = tasks_of(profile, found)
    assert named(tasks) == ["sft-4 0 validation"]
    text = "\n".join(plan.told(profile, found))
    assert "waits: 4 of its 6 training prompts are answered" in text
    store.write_text("".join(lines[:6]))
    with pytest.raises(ConfigError, match=r"anchors.jsonl answers 0 of 2"):
        reproduce.work(profile, ((), None), Stub().call)


def test_a_signal_is_passed_on_and_ends_all_cleanly(tmp_path, monkeypatch):
    ready, told = tmp_path / "ready", tmp_path / "told"
    code = (
        "import pathlib, signal, sys, time\n"
        f"def end(*_): pathlib.Path({str(told)!r}).touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )

    def interrupt():
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with reproduce.locked(tmp_path) as held:
            children = reproduce.Children(held.fileno())
            threading.Thread(target=interrupt).start()
            with pytest.raises(SystemExit) as ended:
                children.call(["-c", code])
            assert ended.value.code == 143
            assert told.exists()
            with pytest.raises(SystemExit):  # and nothing begins after it
                children.call(["-c", "raise ValueError"])
            with pytest.raises(ConfigError, match="at work here"):
                reproduce.locked(tmp_path)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- tables ---------------------------------------------------------------------------------------


def made(arm, title, place, seed, values, split="test", **changed):
    """A result by hand, of forty prompts: `values` of the first half, and of the second."""
    first, second = values
    return {
        **{"name": arm, "seed": seed, "split": split, "arm": arm, "title": title, "group": "main"},
        **{
            "metric": "sampled_exact",
            "place": place,
            "against": "sft_continued",
            "origin": "sft",
            "chosen": {},
        },
        "settings": {"align.steps": 100, "align.prompts": 4, "sampling.candidates": 8},
        "prompts": {"training": 10, "evaluated": 40, "with an answer": 40},
        "steps": {"sft": 0, "align": 100},
        "seconds": {
            "sft": {"wall": 0.0, "processor": 0.0},
            "align": {"wall": 600.0, "processor": 1080.0},
        },
        "teacher": {"queries": 10, "prompt_tokens": 200, "completion_tokens": 100},
        "machine": {"processor": "abacus"},
        "course": [],
        "shown": {"sampled_exact": {"title": "exact", "digits": 3, "better": "higher"}},
        "id": [str(i) for i in range(40)],
        "kind": ["sum"] * 20 + ["copy"] * 20,
        "answer": ["4"] * 40,
        "response": ["4"] * 40,
        "values": {"sampled_exact": [first] * 20 + [second] * 20},
        **changed,
    }


def test_tables_are_made_of_the_results_alone_the_same_each_time(tmp_path):
    for result in (
        made("sft_continued", "SFT continued", 0, 0, (0.25, 0.75)),
        made("sft_continued", "SFT continued", 0, 1, (0.25, 0.75)),
        made("grpo", "GRPO", 1, 0, (0.25, 1.0)),
        made("grpo", "GRPO", 1, 1, (0.75, 1.0)),
    ):
        raw.write(tmp_path, result)
    tables.build(tmp_path)
    whole = (tmp_path / "tables.md").read_bytes()
    text = whole.decode()
    # Means of the seeds: 0.625 and 0.875; their deviation 0.1768, over the root of 2 0.125.
    assert "| GRPO | 2 | 0.750 ± 0.125 |" in text
    assert "| SFT continued | 2 | 0.500 ± 0.000 |" in text
    # By kind: sums 0.25 and 0.75, copies 1 and 1.
    assert "| GRPO | 1.000 ± 0.000 | 0.500 ± 0.250 |" in text
    assert "| GRPO − SFT continued | 2 | **+0.250 [" in text
    assert "| GRPO | 0 | 100 | 10.0 | 18.0 | 10 | – |" in text
    # Ten queries of 200 and 100 tokens at 0.5 and 1.5 a million are 0.00025; 100 x 4 x 8
    # candidates are judged with 20 + 2 x 10 tokens in and one out: 0.064 and 0.0048.
    assert "| one anchor a prompt | 10 | 200 | 100 | 0 | 0.0003 |" in text
    assert (
        "| the teacher judges every candidate beside the anchor | 3,200 | 128,000 | 3,200 | 0 "
        "| 0.0688 |" in text
    )
    # 30 s at 20 an hour are a sixth: 400 pairs 66.67, 10,000 pairs 1,666.67.
    assert "| 400 | 66.67 |" in text
    assert "| 10,000 | 1,666.67 |" in text
    (tmp_path / "tables.md").unlink()
    tables.build(tmp_path)
    assert (tmp_path / "tables.md").read_bytes() == whole


def test_a_difference_that_no_seed_or_prompt_changes_has_an_interval_of_no_width(tmp_path):
    lines = [
        tables.Line("low", (made("low", "low", 0, 0, (0.25, 0.75)),)),
        tables.Line("high", (made("high", "high", 1, 0, (0.5, 1.0)),)),
    ]
    text = tables.against(lines, {"sft_continued": lines[0]})
    assert "| high − low | 1 | **+0.250 [0.250, 0.250]** |" in text


def test_a_mean_over_fewer_seeds_than_a_line_has_says_of_how_many():
    sft = [made("sft", "SFT", 0, seed, (0.25, 0.75)) for seed in range(2)]
    [metric] = sft[1]["values"]
    sft[1]["values"][metric] = [None, None]
    assert tables.quality([tables.Line("SFT", tuple(sft))]).endswith("| SFT | 2 | 0.500 (of 1) |")
    sft[0]["values"][metric] = [None, None]
    assert tables.quality([tables.Line("SFT", tuple(sft))]).endswith("| SFT | 2 | – |")


def test_an_arm_is_above_its_origin_by_the_seeds_that_both_have(tmp_path):
    sft = [made("sft", "SFT", 0, seed, (0.25, 0.25 + 0.25 * seed)) for seed in range(3)]
    grpo = [made("grpo", "GRPO", 1, seed, (0.5, 0.5 + 0.25 * seed)) for seed in (1, 2)]
    lines = [tables.Line("SFT", tuple(sft)), tables.Line("GRPO", tuple(grpo))]
    lines[0].first["origin"] = None
    # Seeds 1 and 2: 0.375 and 0.5 of SFT, 0.625 and 0.75 of GRPO.
    text = tables.above_origin(lines, lines)
    assert text.count("−") == 1
    assert "| GRPO − SFT | 2 | **+0.250 [" in text
    assert tables.above_origin(lines[:1], lines) == ""


def test_arms_that_began_with_the_same_models_are_compared_by_the_seeds_that_both_have():
    more = [made("sft_continued", "SFT continued", 0, s, (0.25, 0.25 * s)) for s in range(3)]
    one = made("grpo", "GRPO", 1, 2, (0.5, 0.75))
    sft = [made("sft", "SFT", 2, s, (0.0, 0.25 * s), origin=None) for s in range(2)]
    other = made("half", "half", 3, 0, (0.25, 0.75), origin="sft_half")
    lines = [tables.Line(runs[0]["title"], tuple(runs)) for runs in (more, [one], sft, [other])]
    text = tables.against(lines, {"sft_continued": lines[0]})
    # Of seed 2 .625 - .375; of seeds 0 and 1 -.125 each; and .5 - .25, the mean of all three.
    assert "| GRPO − SFT continued | 1 | **+0.250 [" in text
    assert "| SFT − SFT continued | 2 | **-0.125 [-0.163, -0.087]** |" in text
    assert "| half − SFT continued | 1 and 3 | **+0.250 [" in text


def test_of_an_arms_choices_the_one_that_validation_likes_stands_for_it(tmp_path):
    low = made("grpo", "low", 0, 0, (0.25, 0.5))
    same, high = (made("grpo", title, 0, 0, (0.5, 0.5)) for title in ("same", "high"))
    lines = [tables.Line(run["title"], (run,)) for run in (low, high, same)]
    assert tables.best_of_arms(lines)["grpo"].title == "high"
    raw.write(tmp_path, made("sft_continued", "SFT continued", 0, 0, (0.25, 0.75), "validation"))
    raw.write(tmp_path, made("grpo", "GRPO", 1, 0, (0.25, 1.0), "validation", device="chip"))
    text = "\n\n".join(tables.sections(raw.read_all(tmp_path)))
    assert "| GRPO − SFT continued | 1 | **+0.125 [" in text


def test_ablations_of_which_the_test_split_is_not_read_are_shown_by_validation(tmp_path):
    few = {"group": "ablations", "against": "grpo_half", "split": "validation"}
    for result in (
        made("grpo_half", "GRPO", 0, 0, (0.25, 0.75), "validation", group="fresh"),
        made("grpo_half", "GRPO", 0, 1, (0.75, 0.75), "validation", group="fresh"),
        made("k4", "K = 4", 1, 0, (0.5, 1.0), **few),
    ):
        raw.write(tmp_path, result)
    tables.build(tmp_path)
    _, _, text = (tmp_path / "tables.md").read_text().partition("## Ablations\n\n")
    assert text.startswith("On the validation split.\n")
    assert "| GRPO | 2 | 0.625 ± 0.125 |" in text
    assert "| GRPO, seed 0 | 1 | 0.500 |" in text  # what the one seed of K = 4 is to be seen beside
    assert "| K = 4 | 1 | 0.750 |" in text
    assert "| K = 4 − GRPO | 1 | **+0.250 [0.250, 0.250]** |" in text


def test_writing_prompts_are_judged_arm_against_arm_and_once(profile, monkeypatch, capsys):
    ids = {"id": ["test-0", "test-1", "test-2"], "kind": ["writing", "sum", "writing"]}
    kept = {"answer": [None, "4", None], "values": {"sampled_exact": [0.25, 1.0, 1.0]}}
    for name, seed, said in (
        ("sft_continued", 0, ["short", "4", "same"]),
        ("grpo", 0, ["a longer one", "5", "same"]),
        ("grpo", 1, ["longer", "5", "another"]),
    ):
        result = made(name, name, seed, seed, (0.25, 1.0)) | ids | kept | {"response": said}
        raw.write(profile.results, result)
    worse = {"name": "grpo-lr1", "response": ["the longest of them", "5", "same"]}
    raw.write(profile.results, made("grpo", "grpo", 1, 0, (0.0, 0.25)) | ids | kept | worse)
    for each, values in (("grpo", (0.25, 1.0)), ("grpo-lr1", (0.0, 0.25))):
        chosen_by = made("grpo", "grpo", 1, 0, values, "validation") | {"name": each}
        raw.write(profile.results, chosen_by)
    asked = []

    def longest(questions):
        """Takes the longer answer, and the first of two as long."""
        asked.extend(questions)
        texts = {q.id: q.messages[0]["content"] for q in questions}
        found = {i: re.findall(r"Answer [AB]:\n(.*)\n", t) for i, t in texts.items()}
        return {
            i: "A" if len(first) >= len(second) else "B" for i, (first, second) in found.items()
        }

    results = raw.read_all(profile.results)
    for _ in range(2):
        for one, other in judge.pairs(results, ["grpo"]):
            judge.judged(profile, one, other, longest, "a judge", 100)
    # Equal answers are a tie, and neither a sum is judged nor what validation did not choose.
    assert len(asked) == 2 + 4
    assert asked[0].messages[0]["content"].count("test 0?") == 1
    one, other = next(judge.pairs(results, ["grpo"]))
    judge.judged(profile, one, other, longest, "another", 100)
    judge.judged(profile, one, other, longest, "another", 1)
    assert len(asked) == 2 + 4 + 2 + 2  # of another judge, and of other prompts
    for path in profile.results.glob("judged/*another.json"):
        path.unlink()
    other = other | {"name": "sft_continued-lr1e-05"}
    judge.judged(profile, one, other, longest, "another", 1)
    judge.judged(profile, one, other, longest, "another", 1)
    assert len(asked) == 2 + 4 + 2 + 2 + 2  # and against another choice of settings
    judge.judged(profile, one | {"response": ["new", "5", "same"]}, other, longest, "another", 1)
    assert len(asked) == 2 + 4 + 2 + 2 + 2 + 2  # and of other answers
    for path in profile.results.glob("judged/*another.json"):
        path.unlink()
    text = tables.judged(profile.results)
    assert "| grpo, seed 0 | sft_continued, seed 0 | 0.750 [" in text  # one won, one tie
    assert "| grpo, seed 1 | sft_continued, seed 0 | 1.000 [" in text
    assert (
        "| grpo, 2 seeds together | sft_continued, seed 0 | 0.875 [0.500, 1.000] |  | 0.8" in text
    )
    assert tables.judged(profile.runs) == ""
    assert judge.main(["nothing.gguf", "--only", "grppo"]) == 1
    assert "--only='grppo'" in capsys.readouterr().err
    monkeypatch.setattr(judge, "load_profile", lambda *_: replace(profile, results=profile.runs))
    assert judge.main(["nothing.gguf"]) == 1
    assert "no test result of any arm and what that is compared" in capsys.readouterr().err


def test_the_curve_over_anchors_has_one_point_an_arm_and_number(tmp_path, monkeypatch):
    def of(anchors, chosen, **settings):
        size = {"training": anchors, "evaluated": 40, "with an answer": 40}
        own = (
            {
                "model.path": f"runs/{anchors}",
                "align.steps": 100,
                "align.prompts": 4,
                "sampling.candidates": 8,
            }
            | settings
            | chosen
        )
        few = {"group": "anchors"} if anchors < 10 else {}
        return few | {"prompts": size, "settings": own, "chosen": chosen}

    for split in ("validation", "test"):
        for name, values, changed in (
            ("grpo-lr1", (0.25, 0.5), of(10, {"align.lr": 1})),
            ("grpo-lr2", (0.5, 0.5), of(10, {"align.lr": 2})),
            ("grpo-4", (0.25, 0.5), of(4, {"align.lr": 1})),
            ("grpo-6", (0.0, 0.5), of(6, {"align.lr": 1}, **{"align.steps": 300})),
        ):
            result = made(name, "GRPO", 0, 0, values, split, **changed)
            raw.write(tmp_path, result | {"arm": name.partition("-lr")[0]})
    shown, draw = [], figures.anchors
    monkeypatch.setattr(figures, "anchors", lambda tested: shown.append(tested) or draw(tested))
    tables.build(tmp_path)
    # A line joins what validation tuned for each number alone, and nothing that took other steps.
    assert figures.by_anchors(shown[0]) == {"GRPO": ([(4, 0.375), (10, 0.5)], [(6, 0.25)])}


def test_what_seeds_say_together_leaves_out_pairs_of_which_a_verdict_failed():
    first = [{"id": "a", "first is better": [0.9, 0.5]}, {"id": "b", "first is better": [None, 1]}]
    second = [{"id": "a"}, {"id": "b", "first is better": [1.0, 0.0]}]  # of a the same text
    found = [{"records": first}, {"records": second}]
    win, preferred = tables.PARTS.values()
    assert tables._over_seeds(found, win).startswith("0.600 [")  # (0.7 + 0.5) / 2, of a alone
    assert tables._over_seeds(found, preferred).startswith("0.750 [")
    assert tables._over_seeds([{"records": first}, {"records": second[1:]}], win) == ""


def test_results_take_the_places_that_their_arms_have_now(tmp_path):
    for place, name in enumerate(("a", "b", "gone")):
        raw.write(tmp_path, made(name, name.upper(), place, 0, (0.25, 1.0)))
    before = raw.read_all(tmp_path)
    raw.put_in_order(tmp_path, ["new", "a", "b"])
    after = raw.read_all(tmp_path)
    assert [run.pop("place") for run in after.values()] == [1, 2, 2]
    assert [run.pop("place") for run in before.values()] == [0, 1, 2]
    assert after == before


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["results", "results/gpu"])
def test_the_tables_that_are_shipped_are_those_of_the_results_beside_them(
    folder, tmp_path, monkeypatch
):
    shipped = Path(tables.__file__).parent / folder
    shutil.copytree(shipped, tmp_path / "copy", ignore=shutil.ignore_patterns("*.md", "gpu"))
    monkeypatch.setattr(figures, "drawn", lambda *_: ())
    tables.build(tmp_path / "copy")
    assert (tmp_path / "copy" / "tables.md").read_bytes() == (shipped / "tables.md").read_bytes()


def test_figures_are_drawn_of_what_there_is(tmp_path):
    course = [
        {"model": "base", "step": 0, "seconds": {"wall": 0, "processor": 0}, "kl": None}
        | {"eval/sampled_exact": 0.4},
        {"model": "aligned", "step": 100, "seconds": {"wall": 60, "processor": 99}, "kl": 0.01}
        | {"eval/sampled_exact": 0.6},
    ]
    for split in ("validation", "test"):
        raw.write(tmp_path, made("grpo", "GRPO", 1, 0, (0.25, 1.0), split=split, course=course))
    size = {"training": 4, "evaluated": 40, "with an answer": 40}
    small = {"group": "anchors", "prompts": size}
    raw.write(tmp_path, made("sft-4", "SFT, 4 anchors", 2, 0, (0.25, 1.0), **small))
    tables.build(tmp_path)
    for name in ("curves", "kl", "seeds", "anchors"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_of_what_each_seed_gained_and_named_by_where_they_end(monkeypatch):
    def course(*values):
        return [
            {"model": "aligned" if step else "base", "step": step, "eval/sampled_exact": value}
            | {"seconds": {"processor": 60 * step}}
            for step, value in enumerate(values)
        ]

    rows = (0.25, 1.0)
    arms = {
        "down": [made("down", "Down", 1, 0, rows, course=course(0.5, 0.4))],
        "up": [
            made("up", "Up", 2, 0, rows, course=course(0.1, 0.2, 0.5)),
            made("up", "Up", 2, 1, rows, course=course(0.3, 0.3, 0.5)),
        ],
    }
    shown = []
    monkeypatch.setattr(figures, "_png", shown.append)
    figures.curves(arms)
    (drawn,) = shown
    by_step, by_minute = drawn.axes
    found = {line.get_label(): line.get_ydata() for line in by_minute.lines}
    assert found["Down (1)"] == pytest.approx([0, -0.1])
    assert found["Up (2)"] == pytest.approx([0, 0.05, 0.3])
    assert [*by_step.lines[1].get_xdata()] == [*by_minute.lines[1].get_xdata()] == [0, 1, 2]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["Up (2)", "Down (1)"]


def test_arms_asked_on_the_way_are_the_curves_and_in_no_table(tmp_path, monkeypatch):
    def course(*steps):
        return [
            {"model": "aligned" if step else "base", "step": step, "eval/sampled_exact": step / 10}
            | {"seconds": {"processor": step}, "kl": None}
            for step in steps
        ]

    rows, drawn = (0.25, 1.0), []
    for split in ("validation", "test"):
        raw.write(tmp_path, made("a", "Ends", 1, 0, rows, split=split, course=course(0, 4)))
    tables.build(tmp_path)
    told = (tmp_path / "tables.md").read_text()
    asked = {"group": "course", "split": "validation", "course": course(0, 2, 4)}
    raw.write(tmp_path, made("b", "Asked on the way", 2, 0, rows, **asked))
    monkeypatch.setattr(figures, "curves", lambda arms: drawn.append(sorted(arms)) or b"")
    tables.build(tmp_path)
    assert drawn == [["b"]]
    assert (tmp_path / "tables.md").read_text() == told


def test_any_two_arms_are_compared_seed_by_seed_and_nothing_is_written(tmp_path, capsys):
    def put(arm, seed, values, split="test", **more):
        raw.write(tmp_path, made(arm, arm.upper(), 1, seed, values, split=split, **more))

    for seed, (low, high) in enumerate([(0.0, 0.5), (0.25, 0.5), (0.0, 1.0)]):
        put("one", seed, (low, high), origin=f"of-{seed}")
    for seed in range(2):  # and none that began with the same model
        put("two", seed, (0.25, 0.25), origin="another")
    put("two", 0, (0.5, 0.5), split="validation")
    assert tables.main([str(tmp_path), "--compare", "one,two"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("On test:")
    assert "validation" not in said
    row = next(line for line in said.splitlines() if line.startswith("| ONE − TWO"))
    seeds, difference = (cell.strip(" *") for cell in row.split("|")[2:4])
    assert seeds == "2"
    assert difference.startswith("+0.062 [")  # (.25 + .375) / 2 − .25
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("one", "name two arms"),
        ("one,one", "name two arms"),
        ("one,none", "'none': choose one or two"),
        ("one,two", "they share no seed on test"),
        ("one,three", "no split has results of both"),
    ],
)
def test_arms_that_can_not_be_compared_are_told(tmp_path, capsys, named, told):
    raw.write(tmp_path, made("one", "One", 1, 0, (0.0, 0.5), split="test"))
    raw.write(tmp_path, made("two", "Two", 1, 1, (0.0, 0.5), split="test"))
    if "three" in named:
        raw.write(tmp_path, made("three", "Three", 1, 0, (0.0, 0.5), split="validation"))
    assert tables.main([str(tmp_path), "--compare", named]) == 1
    assert told in capsys.readouterr().err


def test_on_a_few_anchors_an_arm_is_held_against_what_has_as_many():
    few = {"group": "anchors", "prompts": {"training": 4, "evaluated": 40, "with an answer": 40}}
    sft, grpo = (
        [
            made("sft_default-4", "SFT, 4", 2, seed, (0.0, 0.5 + seed / 2), origin=None, **few)
            for seed in range(2)
        ],
        made("grpo_default-4", "GRPO, 4", 3, 0, (0.5, 1.0), **few),
    )
    grpo |= {"origin": "sft_default-4", "against": "more-4"}
    whole = [made("sft_default", "SFT", 0, 0, (0.25, 0.75), origin=None)]
    more = [made("more-4", "SFT continued, 4", 4, 0, (0.25, 0.75), **few)]
    lines = [tables.Line(runs[0]["title"], tuple(runs)) for runs in (whole, sft, [grpo], more)]
    text = tables.anchors_curve(lines, tables.chosen_of_arms(lines, []))
    means, above, against = text.split("\n\n")
    assert "| 4 | SFT | 2 | 0.375 ± 0.125 |" in means
    assert "| 10 | SFT | 1 | 0.500 |" in means
    # The seed of SFT that alignment has not is no part of the difference.
    assert "| GRPO, 4 − SFT, 4 | 1 | **+0.500 [0.500, 0.500]** |" in above
    assert "| GRPO, 4 − SFT continued, 4 | 1 and 1 | **+0.250 [0.250, 0.250]** |" in against


def test_the_scores_signal_is_a_table_and_a_figure(tmp_path):
    rows = [
        ["blend (correct)", "0.5 [0.4, 0.6]", "0.830 [0.700, 0.900]", "0.1"],
        ["blend, shuffled anchor (correct)", "–", "0.370 [0.200, 0.500]", ""],
        ["random (correct)", "–", "–", ""],
        ["blend (rouge_l)", "0.5", "0.700 [0.600, 0.800]", ""],
    ]
    asked = {"header": ["scorer", "τ", "pairs", "over"], "rows": rows, "note": "2 prompts."}
    raw.write(tmp_path, made("sft", "SFT", 1, 0, (0.25, 1.0), split="signal") | asked)
    tables.build(tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "SFT, seed 0: its own candidates" in text
    assert "(`suite=signal`). 2 prompts.\n\n| scorer | τ | pairs | over |\n" in text
    assert "| blend (correct) | 0.5 [0.4, 0.6] | 0.830 [0.700, 0.900] | 0.1 |" in text
    assert (tmp_path / "signal.png").read_bytes().startswith(b"\x89PNG")
    nothing = [[name, "–", "–", ""] for name, *_ in rows]  # as of groups that no oracle orders
    raw.write(
        tmp_path, made("sft", "SFT", 1, 0, (0.25, 1.0), split="signal") | asked | {"rows": nothing}
    )
    (tmp_path / "signal.png").unlink()
    tables.build(tmp_path)
    assert not (tmp_path / "signal.png").exists()


@pytest.mark.parametrize("draw", [figures.seeds, figures.anchors])
def test_a_dollar_in_a_title_is_drawn_as_one(draw):
    arms = {"grpo-10": [made("grpo-10", r"$\frac{$", 1, 0, (0.25, 1.0), group="anchors")]}
    assert draw(arms).startswith(b"\x89PNG")


# --- the whole ------------------------------------------------------------------------------------

WHOLE = """
data:
  train: [experiments/quickstart/train.jsonl]
  validation: {folder}/validation.jsonl
  test: {folder}/test.jsonl
  store: experiments/quickstart/anchors.jsonl
metric: rouge_l
profiles:
  smoke:
    prompts: 8
    results: results
    runs: runs
    guess: {{sft: 1, align: 1, prompt: 1}}
    settings:
      model.shape.layers: 2
      data.max_prompt_tokens: 80
      data.max_response_tokens: 8
      sampling.candidates: 2
      sft.batch: 2
      align.prompts: 2
      align.steps: 2
      checkpoint.every: 1
      eval.batch: 4
arms:
  sft: {{title: SFT, group: main, set: {{align.steps: 0, sft.steps: 2}}}}
  grpo:
    title: GRPO
    group: main
    from: sft
    set: {{sft.steps: 0, loss: grpo, model.shape.layers: 0}}
"""


@pytest.mark.long
def test_a_driver_that_is_stopped_goes_on_to_the_same_tables(tmp_path):
    quickstart = reproduce.HERE.parent / "quickstart"
    rows = (quickstart / "heldout.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "validation.jsonl").write_text("".join(rows[:4]))
    (tmp_path / "test.jsonl").write_text("".join(rows[4:8]))

    alone = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}  # one device

    def started(name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "arms.yaml").write_text(WHOLE.format(folder=tmp_path))
        words = ["-m", "experiments.paper.reproduce", "--profile", "smoke"]
        return lambda: subprocess.Popen(
            [sys.executable, *words, "--arms", str(folder / "arms.yaml")],
            cwd=reproduce.ROOT,
            env=alone,
        )

    assert started("whole")().wait() == 0
    go = started("stopped")
    log = tmp_path / "stopped" / "runs" / "grpo" / "0" / "metrics.jsonl"
    first = go()
    while not (log.exists() and '"align"' in log.read_text()):
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    assert go().wait() == 0
    whole, stopped = (raw.read_all(tmp_path / name / "results") for name in ("whole", "stopped"))
    assert len(whole) == 4
    assert whole.keys() == stopped.keys()
    for key, result in whole.items():
        for part in ("values", "response", "steps"):
            assert result[part] == stopped[key][part]


def test_a_result_that_is_not_what_its_file_is_called_is_refused(tmp_path):
    path = raw.write(tmp_path, made("grpo", "GRPO", 1, 0, (0.25, 1.0)))
    path.with_name("zz-copy.json").write_bytes(path.read_bytes())
    with pytest.raises(EvaluationError, match=r"zz-copy.*by what it says it is grpo-seed0-test"):
        raw.read_all(tmp_path)


SHAPED = made("grpo", "GRPO", 1, 0, (0.25, 1.0))


@pytest.mark.parametrize("key", sorted({*raw.SHAPE, *raw.OF_ANSWERS}))
@pytest.mark.parametrize("value", [None, True, 5.5])
def test_a_result_without_what_every_result_has_is_named(tmp_path, key, value):
    path = raw.write(tmp_path, SHAPED)
    path.write_text(json.dumps(SHAPED | {key: value}))
    if value is None and key == "origin":
        assert raw.read_all(tmp_path)
        return
    with pytest.raises(EvaluationError, match=r"grpo-seed0-test\.json: not a result"):
        raw.read_all(tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"group": "nobodys"}, "its group 'nobodys' is none of default"),
        ({"kind": ["sum"]}, "its kind has not as many entries"),
        ({"values": {"sampled_exact": [1.0]}}, "its sampled_exact has not as many entries"),
        ({"values": {"sampled_exact": ["a"] * 40}}, "its sampled_exact has 'a', no number"),
        ({"values": {"sampled_exact": 1.0}}, "its sampled_exact has not as many entries"),
    ],
)
def test_a_result_whose_columns_do_not_fit_is_named(tmp_path, changed, said):
    raw.write(tmp_path, SHAPED | changed)
    with pytest.raises(EvaluationError, match=said):
        raw.read_all(tmp_path)


@pytest.mark.parametrize("text", ['{"arm": ', "[]", '{"arm": "a", "title": "b"}'])
def test_a_judges_result_that_is_none_is_named(tmp_path, text, capsys):
    raw.write(tmp_path, SHAPED)
    (tmp_path / "judged").mkdir()
    (tmp_path / "judged" / "x.json").write_text(text)
    assert tables.main([str(tmp_path)]) == 1
    assert "x.json: not a judge's result" in capsys.readouterr().err


def test_where_there_are_no_results_nothing_is_written(tmp_path, capsys):
    (tmp_path / "tables.md").write_text("my own notes")
    assert tables.main([str(tmp_path)]) == 1
    assert "no results in it: name a folder that has some" in capsys.readouterr().err
    assert (tmp_path / "tables.md").read_text() == "my own notes"
