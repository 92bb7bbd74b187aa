import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from omegaconf import OmegaConf

from pujax.config.compose import conf_dir
from pujax.config.functions import build, build_metrics
from pujax.config.settings import EvalConfig
from pujax.errors import ConfigError, EvaluationError
from pujax.evaluation import metrics
from pujax.evaluation.metrics import METRICS, Metric, Reading, Shown, measure, perplexity
from pujax.evaluation.results import Evaluation, Row, load, save
from pujax.records import Example, Given, Prompt

READING = Reading(
    prompt=Prompt("p", ({"role": "user", "content": "1 + 1"},), "2"),
    anchor="It is 2.",
    response="it is it is",
    anchor_logp=-2.0,
    length=5.0,
    finished=1.0,
    samples=("2", "3", "2.", "so 2"),
    rated=((2.0, -3.0), (0.0, -4.0), (1.0, -1.0), (1.0, -3.0)),
)


def test_perplexity_is_e_to_the_nats():
    np.testing.assert_allclose(metrics.perplexity(READING), np.e**2)


def test_repeated_bigrams_count_once():
    # it-is, is-it, it-is: two of three.
    assert metrics.distinct_n(READING, n=2) == pytest.approx(2 / 3)
    assert metrics.distinct_n(READING, n=5) is None
    with pytest.raises(ConfigError, match="n=0: must be positive"):
        metrics.distinct_n(READING, n=0)


def test_a_sampled_metric_is_the_mean_over_the_samples():
    assert metrics.sampled(READING, metric=metrics.exact) == 0.5
    assert metrics.sampled(READING, metric=metrics.contains) == 0.75
    assert metrics.sampled(replace(READING, samples=()), metric=metrics.exact) is None
    unknown = replace(READING, prompt=replace(READING.prompt, answer=None))
    assert metrics.sampled(unknown, metric=metrics.exact) is None


def test_pairs_of_rated_responses_are_told_apart_by_their_summed_log_probs():
    # 2 above 1: -3 + 1 = -2 and -3 + 3 = 0; 2 above 0: 1; 1 above 0: 3 and 1; the two 1s no pair.
    assert metrics.pair_accuracy(READING) == 4 / 5
    assert metrics.pair_margin(READING) == 3 / 5
    alike = replace(READING, rated=((1.0, -3.0), (1.0, -4.0)))
    assert metrics.pair_accuracy(alike) is metrics.pair_margin(alike) is None
    wrong = replace(READING, rated=((1.0, -4.0), (0.0, -3.0)))
    assert metrics.pair_accuracy(wrong) == 0.0  # which is a value, not none


def test_pass_at_k_is_the_chance_that_a_draw_of_k_holds_a_right_one():
    # Of the 6 pairs of 4 samples only the pair of both wrong ones fails.
    assert metrics.pass_at_k(READING, k=2) == pytest.approx(5 / 6)
    assert metrics.pass_at_k(READING, k=1) == 0.5
    assert metrics.pass_at_k(READING, k=4) == 1.0
    assert metrics.pass_at_k(replace(READING, samples=("3",) * 4), k=2) == 0.0
    assert metrics.pass_at_k(replace(READING, samples=()), k=2) is None
    with pytest.raises(ConfigError, match=r"eval\.samples=4: pass@5 needs at least 5"):
        metrics.pass_at_k(READING, k=5)


@pytest.mark.parametrize(("samples", "fits"), [(0, True), (3, False), (4, True)])
def test_too_few_samples_for_a_metric_are_refused_before_anything_is_asked(samples, fits):
    node = {"_target_": "pujax.evaluation.metrics.pass_at_k", "_partial_": True, "k": 4}
    config = EvalConfig(samples=samples, metrics={"p": {"function": node, "title": "pass@4"}})
    wrong = pytest.raises(ConfigError, match=r"eval\.samples=3: pass@4 needs at least 4: draw more")
    with nullcontext() if fits else wrong:
        build_metrics(config)


FILES = sorted(
    path
    for path in Path(conf_dir(), "eval").glob("*.yaml")
    if "function:" in path.read_text(encoding="utf-8")  # a list of others has none
)


def node(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# @package eval.metrics.{path.stem}\n")
    told = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(told, dict)
    return told


def test_the_files_of_the_metrics_that_every_run_has_say_what_the_code_says():
    built = build_metrics(EvalConfig(metrics={p.stem: node(p) for p in FILES}))
    assert {name: built[name].shown for name in METRICS} == {
        name: metric.shown for name, metric in METRICS.items()
    }
    for name, metric in METRICS.items():
        assert built[name].function(READING) == metric.function(READING)
    assert build_metrics(EvalConfig()) == METRICS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_metric_measures_a_reading(path):
    value = build(node(path)["function"], "function")(READING)
    assert isinstance(value, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": None}, "title=None"),
        ({"better": "up"}, "better='up': choose higher, lower or None"),
        ({"better": "up"}, r"^eval\.metrics\.mine: .* or None, which YAML writes as null"),
        ({"function": None}, r"eval\.metrics\.mine\.function=None: name a function"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_metric_that_is_told_wrongly_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        build_metrics(EvalConfig(metrics={"mine": node(FILES[0]) | change}))


OWN = """
def divides(reading):
    return 1 / (len(reading.response) - 3)
def says(reading):
    return "high"
def lists(reading):
    return [1.0]
def two(reading, other):
    return 1.0
def counts(reading):
    return len(reading.response)
def known(reading):
    return reading.finished > 0
def misnamed(reading):
    return float(len(reading.answr))
def forgot(reading):
    return math.sqrt(reading.length)
def lacks(reading):
    import no_such_module_of_mine
def of_a_text(reading):
    return reading.response.lowered()
def of_a_match(reading):
    import re
    return float(re.search("[$]([0-9]+)", reading.response).group(1))
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("says", "my_metrics.says returned 'high', want a number or None, on a made-up prompt"),
        ("lists", r"my_metrics.lists returned \[1.0\], want a number or None"),
        ("two", "my_metrics.two: missing a required argument: 'other': a metric takes one reading"),
        ("misnamed", "my_metrics.misnamed raised AttributeError: .*'answr' .*line 15.*made-up"),
        ("forgot", "my_metrics.forgot raised NameError: name 'math' is not defined"),
        ("lacks", "my_metrics.lacks raised ModuleNotFoundError: .*no_such_module_of_mine"),
        ("of_a_text", "my_metrics.of_a_text raised AttributeError: 'str' object has no"),
    ],
)
def test_a_metric_of_ones_own_is_tried_when_it_is_built(tmp_path, monkeypatch, name, said):
    with pytest.raises(ConfigError, match=rf"^eval\.metrics\.mine: {said}"):
        own(tmp_path, monkeypatch, name)


def test_what_may_lie_in_the_reading_is_left_to_the_readings(tmp_path, monkeypatch):
    for name in ("of_a_match", "divides"):
        assert own(tmp_path, monkeypatch, name)


def own(tmp_path, monkeypatch, name):
    (tmp_path / "my_metrics.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    function = {"_target_": f"my_metrics.{name}", "_partial_": True}
    node = {"title": "mine", "function": function}
    return build_metrics(EvalConfig(metrics={"mine": node}), ["my_metrics"])


def test_a_metric_that_fails_on_a_prompt_is_named_with_it(tmp_path, monkeypatch):
    reading = replace(READING, response="abc")
    said = r"^eval\.metrics\.mine: my_metrics\.divides raised ZeroDivisionError: .*line 3\)"
    with pytest.raises(ConfigError, match=rf"{said}, on prompt '{reading.prompt.id}'"):
        measure(reading, own(tmp_path, monkeypatch, "divides"))
    with pytest.raises(ConfigError, match="returned 'high', want a number or None, on prompt"):
        measure(reading, {"x": Metric(cast(Any, lambda _: "high"), Shown("x"))})


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (10**400, "returned a number that float64 can't hold, beyond 1.8e308, on prompt"),
        (float("nan"), "returned nan, want a number or None, on prompt"),
        (np.float32("nan"), "nan.*, want a number or None, on prompt"),
        (np.array("x"), r"returned array\('x'.*, want a number or None, on prompt"),
    ],
    ids=["beyond float64", "NaN", "NumPy's NaN", "a text in an array"],
)
def test_what_no_mean_can_take_is_refused_with_metric_and_prompt(made, said):
    mine = {"mine": Metric(cast(Any, lambda _: made), Shown("mine"))}
    with pytest.raises(ConfigError, match=rf"^eval\.metrics\.mine: .*{said} '"):
        measure(READING, mine)


def test_a_model_whose_own_log_prob_is_no_number_is_not_blamed_on_a_metric():
    found = measure(replace(READING, anchor_logp=float("nan")), METRICS)
    assert str(found["anchor_logp"]) == "nan"


def test_a_perplexity_beyond_float64_is_infinite():
    assert perplexity(replace(READING, anchor_logp=-800.0)) == float("inf")


@pytest.mark.parametrize(("name", "value"), [("counts", 3.0), ("known", 1.0)])
def test_what_counts_as_a_number_is_one(tmp_path, monkeypatch, name, value):
    found = measure(replace(READING, response="abc"), own(tmp_path, monkeypatch, name))
    assert found == {"mine": value}
    assert isinstance(found["mine"], float)


def row(**values):
    return Row("p0", "sum", "1 + 1", "2", "2", "3", values)


OLD = {
    "id": "p0",
    "kind": "sum",
    "prompt": "1 + 1",
    "answer": "2",
    "anchor": "2",
    "response": "3",
    "anchor_logp": -1.0,
    "rouge_l": 0.5,
    "exact": None,
    "contains": 0.0,
    "length": 4.0,
    "finished": 1.0,
}


def test_a_file_whose_values_stand_beside_the_texts_is_read(tmp_path):
    path = tmp_path / "eval-sft.jsonl"
    path.write_text(json.dumps(OLD) + "\n")
    found = load(path)
    assert found.rows == (row(**{name: OLD[name] for name in METRICS}),)
    assert found.model == "sft"
    assert found.shown == {name: metric.shown for name, metric in METRICS.items()}


def test_a_metric_that_nobody_knows_is_kept_with_its_name(tmp_path):
    path = tmp_path / "eval-x.jsonl"
    path.write_text(json.dumps(OLD | {"elo": 3}) + "\n")
    assert load(path).rows[0].values["elo"] == 3
    assert load(path).shown["elo"] == Shown("elo")


@pytest.mark.parametrize(
    ("was", "is_"),
    [("0.25", "0.35"), ('"PPL"', '"QPL"'), ("four", "five"), ('"crc32"', '"brc32"')],
)
def test_a_line_that_is_not_what_was_written_is_refused(tmp_path, was, is_):
    rows = (row(perplexity=0.25), replace(row(perplexity=None), samples=("a", "four \ud800")))
    path = save(Evaluation("base", rows, {"perplexity": Shown("PPL", 1, "lower")}), tmp_path)
    text = path.read_text()
    assert load(path).rows == rows
    path.write_text(text.replace(was, is_, 1))
    assert path.read_text() != text
    with pytest.raises(EvaluationError, match=r"eval-base\.jsonl:\d: .*not what was written: del"):
        load(path)
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        del line["crc32"]  # as the version before wrote them
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load(path).rows == rows


def test_how_an_own_metric_is_shown_is_kept_in_the_file(tmp_path):
    shown = {"perplexity": Shown("PPL", 1, "lower")}
    rows = (row(perplexity=7.0), replace(row(perplexity=None), samples=("a", "\u2028b")))
    path = save(Evaluation("base", rows, shown), tmp_path)
    found = load(path)
    assert found.rows == rows
    assert found.shown["perplexity"] == Shown("PPL", 1, "lower")
    assert found.means() == {"eval/perplexity": 7.0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**OLD, "response": None}, ":1: not a row of an evaluation: response is None"),
        ({**OLD, "rouge_l": "high"}, "rouge_l is 'high'"),
        ({**OLD, "values": 3}, "not a row"),
        ({**OLD, "values": {}, "samples": [1]}, "samples are"),
        ({"metrics": {"x": {"colour": "red"}}}, "colour"),
        ({"metrics": 3}, "not a row"),
    ],
)
def test_a_line_that_is_no_row_is_refused_in_one_line(tmp_path, line, message):
    path = tmp_path / "eval-x.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(EvaluationError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    path.write_text("")
    with pytest.raises(EvaluationError, match="no rows in it"):
        load(path)


def test_metric_functions_are_given_by_name():
    measured = metrics.measure(READING, {"twice": Metric(lambda r: 2 * r.length, Shown("x"))})
    assert measured == {"twice": 10.0}


def test_a_metric_without_a_value_is_named_but_for_one_of_samples_or_pairs_that_nobody_has():
    def node(name):
        function = {"_target_": f"pujax.evaluation.metrics.{name}", "_partial_": True}
        return {"title": name, "function": function}

    three = ("pass_at_k", "exact", "pair_margin")
    named = build_metrics(EvalConfig(metrics={name: node(name) for name in three}, samples=4))

    def missing(found, samples, rated=False, answer: str | None = "4"):
        ids = (1,)
        one = Example(replace(READING.prompt, answer=answer), ids, ids, "4", ids, True)
        given = (Given(ids, 1.0), Given((2,), 0.0)) if rated else ()
        return metrics.missing(named, found, samples=samples, examples=[replace(one, given=given)])

    assert missing(("pass_at_k", "exact"), 4) is None
    begins = "in no table: eval.metrics.pass_at_k, eval.metrics.exact: no held-out prompt"
    assert (missing((), 4) or "").startswith(begins)
    assert (missing((), 0) or "").startswith("in no table: eval.metrics.exact: ")
    assert missing(("exact",), 0) is None
    # That no prompt has a true answer is said under a table; without a table, here.
    assert missing(("rouge_l",), 4, answer=None) is None
    assert (missing((), 4, answer=None) or "").startswith(begins)
    begins = "in no table: eval.metrics.pair_margin: "
    assert (missing(("exact",), 0, rated=True) or "").startswith(begins)
