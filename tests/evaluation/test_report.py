import json
import re
import shutil
import struct
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest

from pujax import report
from pujax.errors import DiskError, EvaluationError
from pujax.evaluation.cards import _answer
from pujax.evaluation.curves import LIGHT, curves, drawable, held_out, running_mean
from pujax.evaluation.metrics import Shown
from pujax.evaluation.page import write
from pujax.evaluation.results import Evaluation, Row, save
from pujax.evaluation.subjects import SuiteAnswer, keep_answer, kept_answers
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
    bulk = r"<style>.*?</style>|<script>.*?</script>|base64,[A-Za-z0-9+/=]+"
    return re.sub(bulk, "", html, flags=re.DOTALL)


def test_a_page_masks_what_the_settings_of_an_earlier_run_may_hold(run, monkeypatch):
    monkeypatch.setenv("THEIR_TOKEN", "losses.dpo")  # which stands in them
    settings = page(run).partition("<h2>Settings</h2>")[2]
    assert "pujax.method.***" in settings
    assert "losses.dpo" not in settings


def test_text_of_prompts_models_and_settings_is_escaped_everywhere(html):
    assert html.count("<script") == 1  # the page's own
    assert "<script" not in visible(html)
    assert "alert('x')" not in html
    assert "<b>now" not in html
    escaped = "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;quotes&quot;"
    assert html.count(escaped) > 20
    assert "smoke/&lt;b&gt;now" in html


def test_the_page_needs_nothing_from_elsewhere(html):
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', html)
    assert len(sources) == 2 * html.count("<picture>") == 2 * 9
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"url\(|@import|<link|<iframe|fetch\(|XMLHttp", html)


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
    plain = re.sub(r' data-column="[^"]*"', "", html)
    for part in (
        "<dt>seed</dt><dd>7</dd>",
        "<dt>loss</dt><dd>pair_losses.dpo</dd>",
        "<dt>SFT</dt><dd>5 steps, 5 s</dd>",
        "<dt>alignment</dt><dd>3 steps, 3.0 min</dd>",
        '<td class="gain">+0.250* <small>[0.250, 0.250]</small></td>',
        '<td class="loss">-0.125* <small>[-0.125, -0.125]</small></td>',
        "0.25 → 0.50 → 0.38",
        "label 0.75 · score 0.50",
    ):
        assert part in plain
    # All groups of each step, each with the anchor last by its label.
    for step in (1, 2, 3):
        assert html.count(f'class="kind">alignment step {step}<') == 5
    assert html.count('class="kind">writing<') == 15
    group = html[html.index('class="kind">alignment step 1<') :]
    assert group.index("#1") < group.index("#2") < group.index(">anchor<")


def test_the_page_shows_what_a_suite_found_beside_the_evaluation(tmp_path):
    found = SuiteAnswer(
        ("costs", "student", "<b>teacher"), (("p50 & p95", "1", "2"),), "a <note>", ()
    )
    keep_answer(found, "costs", tmp_path)
    assert kept_answers(tmp_path) == {"costs": found}
    (tmp_path / "metrics.jsonl").write_text("")
    html = page(tmp_path)
    costs = html[html.index("<h2>Costs</h2>") :]
    assert "<th></th><th>student</th><th>&lt;b&gt;teacher</th>" in costs
    assert "<th>p50 &amp; p95</th>" in costs
    assert '<td class="" data-column="&lt;b&gt;teacher">2</td>' in costs
    assert "<p>a &lt;note&gt;</p>" in costs


@pytest.mark.parametrize("content", ["[]", '{"header": 5}', "[" * 5000])
def test_a_file_that_no_suite_wrote_is_one_line(tmp_path, content):
    (tmp_path / "suite-costs.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"suite-costs\.json: not what a suite found"):
        kept_answers(tmp_path)


def test_the_page_begins_with_the_verdict_and_what_speaks_against_it(run, tmp_path):
    directory = shutil.copytree(run, tmp_path / "run")
    for model in ("base", "sft", "aligned"):
        rows = evaluation(model, 0.9 if model == "aligned" else 0.5).rows
        said = [
            replace(row, anchor=f"a{at}", response="billing" if model == "aligned" else f"r{at}")
            for at, row in enumerate(rows)
        ]
        save(Evaluation(model, tuple(said)), directory)
    (directory / "metrics.jsonl").write_text("")  # no curves, which take a while to draw
    html = page(directory)
    body = html[html.index("<main>") :]
    begun = re.findall(r"<(h1|h2|p|ul|dl|table|section|picture)\b([^>]*)>", body)[:4]
    assert begun == [
        ("h1", ""),
        ("p", ' class="verdict loss" id="verdict"'),  # though ROUGE-L has gained
        ("ul", ' class="warnings"'),
        ("dl", ' class="facts"'),
    ]
    assert re.search(r'id="verdict">Not a success[^<]*“billing”[^<]*<a href="#answers">Read', body)
    assert body.count("aligned says the same") == 1  # above all else
    assert '<section class="browser" id="answers"' in body


def test_an_answer_of_white_space_takes_no_room_and_says_what_it_is():
    assert "<em>nothing that can be seen</em>" in _answer("base", "\n" * 16, "wrong", "loss")


def pairs_of(run, tmp_path, rule):
    directory = shutil.copytree(run, tmp_path / rule)
    loss = {"_target_": "pujax.method.losses.dpo", "pairs": {"_target_": f"pujax.labels.{rule}"}}
    (directory / "config.yaml").write_text(json.dumps({"loss": loss}))
    html = page(directory)
    group = html[html.index('class="kind">alignment step 1<') :]
    group = group[: group.index("</article>")]
    answers = re.findall(r'class="who(?: anchor)?">([^<]*)<.*?<span class="[^"]*">([^<]*)<', group)
    return [(who, mark.split(" · ")[0]) for who, mark in answers]


def test_a_pair_loss_shows_what_it_chooses_and_rejects(run, tmp_path):
    # Scores: anchor 1, #1 .5, #2 0.
    assert pairs_of(run, tmp_path, "anchor_vs_worst") == [
        ("anchor", "chosen"),
        ("#1", "not used"),
        ("#2", "rejected"),
    ]
    assert pairs_of(run, tmp_path, "best_vs_worst") == [
        ("#1", "chosen"),
        ("anchor", "not used"),
        ("#2", "rejected"),
    ]
    assert pairs_of(run, tmp_path, "anchor_vs_all") == [
        ("anchor", "chosen"),
        ("#1", "rejected 0.50"),
        ("#2", "rejected 0.50"),
    ]


def test_a_run_of_given_responses_has_no_teacher_and_no_scorer(run, tmp_path):
    directory = shutil.copytree(run, tmp_path / "given")
    scorer = {"score": {"_target_": "pujax.method.scoring.blend"}}
    given = {"preferences": "pairs.jsonl", "prompts": None}
    (directory / "config.yaml").write_text(json.dumps({"scorer": scorer, "data": given}))
    html = page(directory)
    assert ">teacher<" not in html
    assert "scoring.blend" not in html[: html.index("config.yaml")]
    assert "the given responses, the best of them as the anchor too, " in html
    assert ">best given<" in html
    (directory / "config.yaml").write_text(
        json.dumps({"scorer": scorer, "data": given | {"prompts": "mine.jsonl"}})
    )
    assert ">teacher<" in (mixed := page(directory))
    assert "scoring.blend" in mixed[: mixed.index("config.yaml")]
    unaligned = {"scorer": scorer, "loss": {"_target_": "a.losses.dpo"}, "align": {"steps": 0}}
    (directory / "config.yaml").write_text(json.dumps(unaligned))
    facts = page(directory)
    assert not re.search("scoring.blend|losses.dpo", facts[: facts.index("config.yaml")])


def test_the_teacher_is_marked_and_is_the_ceiling(tmp_path, run):
    directory = shutil.copytree(run, tmp_path / "run")
    for model in ("base", "sft", "aligned"):
        rows = [replace(row, anchor="wrong") for row in evaluation(model, 0.5).rows[:-1]]
        rows.append(replace(evaluation(model, 0.5).rows[-1], anchor=EVIL))
        save(Evaluation(model, tuple(rows)), directory)
    html = page(directory)
    # Of 15 prompts with a truth it is right on the last.
    assert '<td class="" data-column="teacher">0.067</td>' in html
    assert '<div class="text">wrong</div><div class="mark"><span class="loss">wrong<' in html


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
    assert "<dd>1 step, 1 s</dd>" in html
    assert "Held-out" not in html


def test_values_too_large_to_add_up_give_no_warnings(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "eval", "step": 0, "model": "base"}\n')
    for model, value in (("base", 1e308), ("aligned", -1e308)):
        found = evaluation(model, 0.5)
        rows = tuple(replace(row, values={"rouge_l": value}) for row in found.rows)
        save(replace(found, rows=rows), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "<h1>" in page(tmp_path)


def test_a_run_without_a_step_has_a_report(tmp_path):
    with RunLog(tmp_path) as log:
        log.evaluation("base", 0, {"eval/exact": 0.0})
    assert "<h1>" in page(tmp_path)


def evaluated(model, step, exact):
    return {"stage": "eval", "model": model, "step": step, "eval/exact": exact, "eval/length": 3.0}


def test_held_out_points_stand_at_the_step_they_are_of_counted_through_both_stages():
    lines = [
        evaluated("base", 0, 0.1),
        {"stage": "sft", "step": 1, "loss": 1.0},
        {"stage": "sft", "step": 2, "loss": 1.0},
        evaluated("sft", 1, 0.3),  # the best, which alignment began with
        evaluated("sft", 2, None),
        evaluated("aligned", 0, 0.3),  # what no step aligned
        evaluated("aligned", 4, 0.4),
        evaluated("aligned", 2, 0.5),
        evaluated("q4", 0, 0.9),  # no model of the run's own
    ]
    points = held_out(lines, "eval/exact")
    assert [(step, stage) for step, _, stage in points] == [
        (0, ""),
        (1, "sft"),
        (2, "sft"),
        (4, "align"),
        (6, "align"),
    ]
    np.testing.assert_array_equal([y for _, y, _ in points], [0.1, 0.3, np.nan, 0.5, 0.4])
    # A length has no better end, and no panel of its own.
    assert [panel.title for panel in drawable(lines)] == ["Held-out exact answer", "SFT loss"]
    # Of another's metric what its YAML calls it; of one of pujax's own nobody else decides that.
    lines += [{"stage": "eval", "model": "sft", "step": 2, "eval/sampled_exact": 0.5}]
    shown = {name: Shown(f"called {name}", 3, "higher") for name in ("sampled_exact", "exact")}
    assert [panel.title for panel in drawable(lines, shown)] == [
        "Held-out exact answer",
        "Held-out called sampled_exact",
        "SFT loss",
    ]


def test_the_page_has_a_panel_for_each_held_out_metric(tmp_path):
    with RunLog(tmp_path) as log:
        log.evaluation("base", 0, {"eval/exact": 0.1, "eval/of_my_own": 7.0, "eval/length": 3.0})
    html = page(tmp_path)
    assert re.findall(r'alt="([^"]*) over the steps"', html) == [
        "Held-out exact answer",
        "Held-out of_my_own",
    ]


def test_a_dollar_and_half_a_character_in_a_metrics_name_are_drawn():
    lines = [{"stage": "eval", "model": "base", "step": 0, "eval/$\\frac{$\ud800": 0.1}]
    assert curves(lines, LIGHT, "png", drawable(lines)).startswith(b"\x89PNG")


def test_pairs_have_panels_where_responses_are_given():
    pairs = {"stage": "align", "step": 1, "reward/accuracy": 0.5, "reward/margin": 0.1}
    assert [panel.metric for panel in drawable([pairs])] == ["reward/accuracy", "reward/margin"]
    assert [panel.metric for panel in drawable([pairs | {"score/mean": 1.0}])] == ["score/mean"]


def test_six_digits_of_noise_are_no_course(monkeypatch):
    drawn = []
    monkeypatch.setattr("pujax.evaluation.curves._image", lambda figure, form: drawn.append(figure))
    for step in (1e-7, 0.5):
        values = [0.09, 0.09 * (1 + step)]
        lines = [{"stage": "align", "step": i, "label/entropy": v} for i, v in enumerate(values)]
        curves(lines, LIGHT, "png", drawable(lines))
    flat, course = (figure.axes[0].get_ylim() for figure in drawn)
    np.testing.assert_allclose(flat, (0.081, 0.099), rtol=1e-5)
    assert 0.08 < course[0] < 0.09 < 0.135 < course[1] < 0.15


def test_a_running_mean_reaches_to_both_sides_and_skips_what_is_not_finite():
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    np.testing.assert_allclose(running_mean(values, 1), [2.0, 2.0, 4.0, 6.0, 6.0])
    np.testing.assert_array_equal(running_mean(values, 0), values)


def test_the_command_names_what_it_wrote_or_what_is_wrong(run, tmp_path, capsys, monkeypatch):
    def status(*given):
        monkeypatch.setattr(sys, "argv", ["pujax", *given])
        try:
            report.main()
        except SystemExit as end:
            return end.code
        return 0

    directory = shutil.copytree(run, tmp_path / "run")
    other = shutil.copytree(run, tmp_path / "other")
    assert status(f"run={directory}") == 0
    assert capsys.readouterr().out.strip() == str(directory / "report.html")
    assert status(f"run=[{directory},{other}]") == 0
    *each, together = capsys.readouterr().out.split()
    assert each == [f"{d}/report.html" for d in (directory, other)]
    assert together == f"{tmp_path}/compared.html"
    assert status(f"run={directory / 'nowhere'}") == 1
    assert "nowhere: no run there" in capsys.readouterr().err
    (directory / "samples.jsonl").write_text("broken\n")
    assert status(f"run={directory}") == 1
    assert "samples.jsonl:1: not JSON" in capsys.readouterr().err
    assert (
        status(str(directory))
        == f"pujax.report: write it as: python -m pujax.report run={directory}"
    )


@pytest.mark.parametrize(
    ("settings", "stage", "message"),
    [
        (None, "train", r"config\.yaml is not there: is .* a run's directory"),
        ("epochs: 3\nmodel: resnet\n", "sft", r"config\.yaml: not the settings of a run \(no loss"),
        ("model: {}\nloss: {}\n", "train", r"metrics\.jsonl:1: 'train' is no stage of a run"),
        ("model: {}\nloss: {}\n", [1], r"metrics\.jsonl:1: '\[1\]' is no stage of a run"),
    ],
)
def test_what_another_program_left_in_a_folder_is_not_written_over(
    tmp_path, settings, stage, message
):
    if settings is not None:
        (tmp_path / "config.yaml").write_text(settings)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"stage": stage, "step": 1}) + "\n")
    for name in ("report.html", "curves.png"):
        (tmp_path / name).write_text("theirs")
    with pytest.raises(EvaluationError, match=message):
        report.run(report.ReportConfig(run=str(tmp_path)))
    assert {(tmp_path / name).read_text() for name in ("report.html", "curves.png")} == {"theirs"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b'{"stage": "sft"}\n', "step is no number"),
        ("metrics.jsonl", b'{"stage": "sft", "step": 1, "loss": "low"}\n', "loss is no number"),
        *(
            (
                "metrics.jsonl",
                b'{"stage": "sft", "step": 1, "loss": %s}\n' % value,
                "loss is no num",
            )
            for value in (b"1e308", b"1e999", b"NaN", b"true", b"9" * 400)
        ),
        # As the perplexity of a model that has come apart.
        ("metrics.jsonl", b'{"stage": "align", "step": 1, "loss": 9e299}\n', ""),
        ("metrics.jsonl", b'{"stage": "align", "step": 1, "loss": -9e299}\n', ""),
        ("metrics.jsonl", b'{"stage": "align", "step": 1, "signal/groups": 8}\n', ""),
        ("metrics.jsonl", b"\x00\x00\n", "metrics.jsonl:1: not JSON"),
        ("metrics.jsonl", b'{"stage": "eval", "step": 1}\n', "metrics.jsonl:1: of no model"),
        ("samples.jsonl", b'{"stage": "align", "step": 1}\n', "samples.jsonl:1: no 'prompt'"),
        (
            "samples.jsonl",
            b'{"stage": "align", "step": 1, "prompt": "", "anchor": "", "candidates": [], "labels":'
            b' [1], "scores": [%s]}\n' % (b"9" * 400),
            "samples.jsonl:1: not a group of samples",
        ),
        ("eval-base.jsonl", b'{"id": 1}\n', "eval-base.jsonl:1: not a row"),
        (
            "eval-base.jsonl",
            b'{"id": "", "prompt": "", "anchor": "", "response": "", "values": {"exact": %s}}\n'
            % (b"9" * 400),
            "eval-base.jsonl:1: not a row",
        ),
        (
            "eval-base.jsonl",
            b'{"metrics": {"exact": {"title": "e", "digits": 10000000000}}}\n',
            "digits=10000000000: must lie in",
        ),
        ("eval-base.jsonl", b"\xff\n", "eval-base.jsonl:1: not JSON"),
        ("eval-base.jsonl", b"", "eval-base.jsonl: no rows"),
        ("suite-costs.json", b'{"header": ["a"]}', "suite-costs.json: not what a suite found"),
        ("suite-costs.json", b"[]", "suite-costs.json: not what a suite found"),
        (
            "suite-costs.json",
            b'{"header": ["a", "b"], "rows": [["c"]], "note": ""}',
            "suite-costs.json: its rows are not as long as its header",
        ),
        ("config.yaml", b"a: [1, 2", "config.yaml: not settings"),
        ("config.yaml", b"\xff\xfe", "config.yaml: not settings"),
        ("config.yaml", b"- 1\n- 2\n", "config.yaml: not settings by name"),
        ("config.yaml", b"model: 3\nloss: [x]\n", ""),
    ],
)
def test_a_file_that_is_not_what_a_run_writes_is_named_in_a_line(
    run, tmp_path, name, content, message
):
    directory = shutil.copytree(run, tmp_path / "run")
    (directory / name).write_bytes(content)
    if not message:
        write(directory)
        return
    with pytest.raises(ValueError, match=message) as caught:
        write(directory)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_told_in_a_line_and_leaves_the_old_page(run, tmp_path, monkeypatch):
    directory = shutil.copytree(run, tmp_path / "run")
    write(directory)
    before = (directory / "report.html").read_bytes()

    def full(path):
        if "report.html" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("pujax.files.durable.flush", full)
    said = r"report\.html can't be written \(No space left on device\): make room"
    with pytest.raises(DiskError, match=said):
        write(directory)
    assert (directory / "report.html").read_bytes() == before


def test_a_page_begins_with_the_red_verdict_on_a_model_that_says_one_thing(tmp_path):
    """Its ROUGE-L rose, and its teacher says that one thing to four prompts in five."""
    with RunLog(tmp_path) as log:
        log.step("align", 1, {"loss": 1.0}, seconds=1.0, tokens=10)
    for model, rouge in (("sft", 0.25), ("aligned", 0.75)):
        rows = [
            replace(
                row,
                answer=("billing", "account")[n % 2],
                anchor="account" if n % 5 == 0 else "billing",
                response="billing" if model == "aligned" else f"answer {n}",
            )
            for n, row in enumerate(evaluation(model, rouge).rows)
        ]
        save(Evaluation(model, tuple(rows)), tmp_path)
    main = re.sub(r"\s+", " ", page(tmp_path).partition("<main>")[2])
    assert re.match(
        r" <h1>[^<]*</h1> <p class=\"verdict loss\" id=\"verdict\">Not a success, whatever the "
        r"averages say: aligned says the same to 30 of 30 prompts, “billing”[^<]*"
        r"<a href=\"#answers\">Read the answers.</a></p>"
        r"<ul class=\"warnings\"><li>\d+ of \d+ prompts have the same anchor",
        main,
    )
