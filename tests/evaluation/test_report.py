import json
import re
import shutil
import struct

import numpy as np
import pytest

from pujax import report
from pujax.evaluation.page import running_mean, write
from pujax.evaluation.results import Evaluation, Row, save
from pujax.run.logs import RunLog, SampleGroup

EVIL = "<script>alert('x')</script> & \"quotes\""


def evaluation(model, rouge):
    rows = [
        Row(
            id=f"p{i}",
            kind=kind,
            prompt=EVIL,
            answer=None if kind == "writing" else EVIL,
            anchor=EVIL,
            response=EVIL,
            values={
                "anchor_logp": -1.0,
                "rouge_l": rouge,
                "exact": None if kind == "writing" else 1.0,
                "contains": None if kind == "writing" else 1.0,
                "length": 3.0,
                "finished": 1.0,
            },
        )
        for i, kind in enumerate(["writing", EVIL] * 15)
    ]
    return Evaluation(model, tuple(rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "smoke" / "<b>now"
    with RunLog(directory) as log:
        for step in range(1, 6):
            metrics = {"loss": 1.0 / step, "grad_norm": 2.0}
            log.step("sft", step, metrics, seconds=1.0, tokens=10)
        for step in range(1, 4):
            metrics = {
                "loss": float("nan") if step == 2 else 0.5,
                "score/mean": 0.1,
                "kl/ref": 0.01,
                "label/entropy": 1.0,
                "samples/length": 12.0,
                "samples/finished": 0.5,
                "grad_norm": 1.0,
            }
            log.step("align", step, metrics, seconds=60.0, tokens=10)
            group = SampleGroup(EVIL, EVIL, EVIL, [EVIL, EVIL], [1.0, 0.5, 0.0], [0.0, 0.75, 0.25])
            log.samples("align", step, [group] * 5)
    for model, rouge in (("base", 0.25), ("sft", 0.5), ("aligned", 0.375)):
        save(evaluation(model, rouge), directory)
    config = {"seed": 7, "model": {"path": EVIL}, "loss": {"_target_": "pujax.method.losses.dpo"}}
    (directory / "config.yaml").write_text(json.dumps(config))
    return directory


def page(directory):
    return write(directory).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(run):
    return page(run)


def visible(html):
    return re.sub(r"<style>.*?</style>|base64,[A-Za-z0-9+/=]+", "", html, flags=re.DOTALL)


def test_text_of_prompts_models_and_settings_is_escaped_everywhere(html):
    assert "<script" not in html
    assert "<b>now" not in html
    escaped = "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;quotes&quot;"
    assert html.count(escaped) > 20
    assert "smoke/&lt;b&gt;now" in html


def test_the_page_needs_nothing_from_elsewhere(html):
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', html)
    assert len(sources) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"url\(|@import|<link|<iframe", visible(html))


def test_every_element_that_is_opened_is_closed_in_order(html):
    stack = []
    for closing, name in re.findall(r"<(/?)([a-z][a-z0-9]*)\b[^>]*>", visible(html)):
        if name in ("meta", "img", "source"):
            continue
        if closing:
            assert stack.pop() == name
        else:
            stack.append(name)
    assert stack == []


def test_the_page_shows_settings_evaluation_and_groups(html):
    for part in (
        "<dt>seed</dt><dd>7</dd>",
        "<dt>loss</dt><dd>losses.dpo</dd>",
        "<dt>SFT</dt><dd>5 steps, 5 s</dd>",
        "<dt>alignment</dt><dd>3 steps, 3.0 min</dd>",
        '<td class="gain">+0.250* <small>[0.250, 0.250]</small></td>',
        '<td class="loss">-0.125* <small>[-0.125, -0.125]</small></td>',
        "0.25 → 0.50 → 0.38",
        "label 0.75 · score 0.50",
    ):
        assert part in html
    # Three groups of the first step and three of the last, each with the anchor last by its label.
    assert html.count("alignment step 1<") == 3
    assert html.count("alignment step 3<") == 3
    group = html[html.index("alignment step 1<") :]
    assert group.index("#1") < group.index("#2") < group.index(">anchor<")


def test_the_plot_is_a_png_with_a_row_for_every_three_metrics(run, html):
    png = (run / "curves.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert (width, height) == (1760, 3 * 416)


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    with RunLog(tmp_path) as log:
        log.step("sft", 1, {"loss": float("nan")}, seconds=1.0, tokens=10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "st')
    html = page(tmp_path)
    assert "<dd>1 steps, 1 s</dd>" in html
    assert "Held-out" not in html


def test_a_run_without_a_step_has_a_report(tmp_path):
    with RunLog(tmp_path) as log:
        log.evaluation("base", 0, {"eval/exact": 0.0})
    assert "<h1>" in page(tmp_path)


def test_a_running_mean_reaches_to_both_sides_and_skips_what_is_not_finite():
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    np.testing.assert_allclose(running_mean(values, 1), [2.0, 2.0, 4.0, 6.0, 6.0])
    np.testing.assert_array_equal(running_mean(values, 0), values)


def test_the_command_names_what_it_wrote_or_what_is_wrong(run, tmp_path, capsys):
    directory = shutil.copytree(run, tmp_path / "run")
    assert report.main([str(directory)]) == 0
    assert capsys.readouterr().out.strip() == str(directory / "report.html")
    assert report.main([str(directory / "nowhere")]) == 1
    assert "is not there: is" in capsys.readouterr().err
    (directory / "samples.jsonl").write_text("broken\n")
    assert report.main([str(directory)]) == 1
    assert "samples.jsonl:1: not JSON" in capsys.readouterr().err
