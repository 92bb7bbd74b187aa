"""Several runs on one page."""

import json
import re

import pytest

from pujax import report
from pujax.errors import DiskError, EvaluationError
from pujax.evaluation.results import Evaluation, Row, save
from pujax.run.logs import RunLog

PROMPTS = 30


def run(directory, *, loss, right, seed=0, anchor="a", said=None):
    """A run whose aligned model is right on the first `right` of the prompts."""
    with RunLog(directory) as log:
        for model, step, exact in (("base", 0, 0.0), ("sft", 3, 0.1), ("aligned", 5, 0.5)):
            log.evaluation(model, step, {"eval/exact": exact})
    for model, many in (("base", 0), ("aligned", right)):
        rows = [
            Row(f"p{at}", None, f"{at}?", "4", f"{anchor}{at}", said or f"r{at}", {"exact": exact})
            for at in range(PROMPTS)
            for exact in [float(at < many)]
        ]
        save(Evaluation(model, tuple(rows)), directory)
    config = {"seed": seed, "model": {"path": "m"}, "loss": {"_target_": f"losses.{loss}"}}
    (directory / "config.yaml").write_text(json.dumps(config | {"run": {"dir": str(directory)}}))
    return directory


def page(*directories):
    return report.of_several(directories).read_text(encoding="utf-8")


def cells(html, name):
    (row,) = re.findall(rf"<tr><th>{name}</th>(.*?)</tr>", html)
    return re.findall(r'data-column="([^"]*)">(.*?)</td>', row)


def test_arms_stand_side_by_side_each_against_the_first(tmp_path):
    one = [run(tmp_path / "a" / f"{s}", loss="dpo", right=r, seed=s) for s, r in ((0, 6), (1, 12))]
    two = run(tmp_path / "b" / "0", loss="grpo", right=30)
    html = page(*one, two)
    assert html == (tmp_path / "compared.html").read_text(encoding="utf-8")
    assert "3 runs side by side" in html
    names = [name for name, _ in cells(html, "exact answer")]
    first, second, gain = (re.sub(r"\s*<small>.*", "", c) for _, c in cells(html, "exact answer"))
    assert names[2] == f"{names[1]} - {names[0]}"
    assert (first, second, gain) == ("0.300", "1.000", "+0.700*")
    # The verdict comes first, and has the difference too.
    begun = html[html.index("</h1>") : html.index("<h2>")]
    assert '<p class="verdict gain">' in begun
    assert "better in exact answer +0.700" in begun
    assert cells(html, "loss._target_") == [(names[0], "losses.dpo"), (names[1], "losses.grpo")]
    links = re.findall(r'<a href="([^"]*)">', html)
    assert links == ["a/0/report.html", "a/1/report.html", "b/0/report.html"]
    assert re.findall(r'alt="([^"]*)"', html) == ["Held-out exact answer over the steps"]
    colours = re.findall(r'<i style="background:(#\w+)"></i> ([^<]*)<', html)
    assert [name for _, name in colours] == names[:2]
    assert len({colour for colour, _ in colours}) == 2
    assert html.count("<article") == PROMPTS
    assert f'<div class="who">{names[1]}</div>' in html
    assert not re.search(r'(?:src|srcset)="(?!data:)', html)


def test_runs_that_differ_in_their_seed_alone_are_shown_by_stage(tmp_path):
    seeds = [run(tmp_path / str(s), loss="dpo", right=r, seed=s) for s, r in ((0, 6), (1, 12))]
    html = page(*seeds)
    assert [name for name, _ in cells(html, "exact answer")] == [
        "base",
        "aligned",
        "aligned - base",
    ]
    assert "Means of 2, 2 runs." in html
    assert "What sets them apart" not in html
    assert '<div class="who anchor">teacher</div>' in html


def test_runs_of_given_responses_had_no_teacher(tmp_path):
    one, two = (run(tmp_path / loss, loss=loss, right=6) for loss in ("dpo", "ipo"))
    for directory in (one, two):
        config = json.loads((directory / "config.yaml").read_text())
        config["data"] = {"preferences": "p.jsonl", "prompts": None}
        (directory / "config.yaml").write_text(json.dumps(config))
    html = page(one, two)
    assert '<div class="who anchor">best given</div>' in html
    assert '<div class="who anchor">teacher</div>' not in html


def test_an_arm_that_says_one_thing_to_everything_is_warned_of(tmp_path):
    fine = run(tmp_path / "fine", loss="dpo", right=6)
    html = page(fine, run(tmp_path / "fallen", loss="grpo", right=6, said="billing"))
    warnings = html[html.index('<ul class="warnings">') : html.index("<h2>")]
    assert re.search(r"<li>fallen says the same to 30 of 30 prompts", warnings)
    assert "fine says" not in warnings


def test_a_run_that_has_not_ended_is_said_to_be_compared_by_an_earlier_model(tmp_path):
    one, two = (run(tmp_path / loss, loss=loss, right=6) for loss in ("dpo", "grpo"))
    assert "the last that it has" not in page(one, two)
    (two / "eval-aligned.jsonl").unlink()
    assert "<li>grpo is compared by its base model, the last that it has" in page(one, two)


def test_runs_on_other_prompts_are_refused_before_a_page_is_written(tmp_path):
    one = run(tmp_path / "a", loss="dpo", right=6)
    other = run(tmp_path / "b", loss="grpo", right=6, anchor="b")
    with pytest.raises(EvaluationError, match="on different prompts"):
        report.run(report.ReportConfig(run=[str(one), str(other)]))
    assert not list(tmp_path.rglob("*.html"))


def test_a_page_of_ones_own_of_that_name_is_refused_and_stays(tmp_path):
    runs = [run(tmp_path / loss, loss=loss, right=9) for loss in ("dpo", "grpo")]
    page_of_ones_own = tmp_path / "compared.html"
    theirs = '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Thesis'
    page_of_ones_own.write_text(theirs)
    told = report.ReportConfig(run=list(map(str, runs)))
    with pytest.raises(DiskError, match=r"compared\.html can't be written .*move away"):
        report.run(told)
    assert page_of_ones_own.read_text() == theirs
    assert not (runs[0] / "report.html").exists()  # nothing is begun
    with pytest.raises(DiskError, match=r"compared\.html"):
        report.of_several(runs)
    page_of_ones_own.unlink()
    html = page(*runs)
    of_before = html.replace('<meta name="generator" content="pujax">\n', "")
    assert of_before != html
    page_of_ones_own.write_text(of_before)
    assert page(*runs) == html == page(*runs)
