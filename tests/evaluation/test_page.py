"""The page in a browser, at a desk's and at a phone's width."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

from pujax.evaluation.cards import Group, answer_cards, group_cards
from pujax.evaluation.page import write
from pujax.evaluation.results import Evaluation, Row, save
from pujax.report import of_several
from pujax.run.logs import RunLog, SampleGroup

MATHS = "<b>maths & co"

# Of each kind in turn: how right SFT's and the aligned answer are, and how near the anchor.
MATHS_ROWS = [(0, 1)] * 4 + [(1, 0)] * 3 + [(1, 1)] * 2 + [(0, 0)] * 6
WRITING_ROWS = [(0.3, 0.5)] * 5 + [(0.5, 0.3)] * 4 + [(0.50, 0.54)] * 6

LONG = "Donaudampfschifffahrtsgesellschaft" * 12


def evaluation(model, place):
    """`place` is 0 before alignment and 1 after it."""
    rows = []
    for maths, writing in zip(MATHS_ROWS, WRITING_ROWS, strict=True):
        at = len(rows)
        right = float(maths[place])
        values = {"anchor_logp": -1.0, "rouge_l": 0.5, "exact": right, "contains": right}
        rows.append(Row(f"p{at}", MATHS, f"p{at} {LONG}", "4", "4", LONG, values))
        values = {"anchor_logp": -1.0, "rouge_l": writing[place], "exact": None, "contains": None}
        rows.append(Row(f"p{at + 1}", "writing", f"p{at + 1} ?", None, LONG, "no", values))
    return Evaluation(model, tuple(rows))


def run_in(directory, models, loss="dpo"):
    with RunLog(directory) as log:
        for step in range(1, 4):
            metrics = {"loss": 1.0 / step, "score/mean": 0.1, "kl/ref": 0.0, "grad_norm": 1.0}
            log.step("align", step, metrics, seconds=1.0, tokens=10)
            log.evaluation("aligned", step, {"eval/exact": 0.1 * step})
            for place in range(5):
                scores = [1.0, 0.5, 0.5 if place == 0 else 0.0]
                name = f"g{5 * step + place - 5}"
                told = SampleGroup(name, f"{name} ?", "a", ["b", LONG], scores, [0.0, 0.75, 0.25])
                log.samples("align", step, [told])
    for at, model in enumerate(models):
        save(evaluation(model, min(1, at // 2)), directory)
    pairs = {"_target_": "pujax.method.labels.anchor_vs_all", "_partial_": True}
    loss = {"_target_": f"pujax.method.losses.{loss}", "pairs": pairs}
    config = {"seed": 7, "model": {"path": f"models/{LONG}"}, "loss": loss}
    (directory / "config.yaml").write_text(json.dumps(config))
    return write(directory).read_text(encoding="utf-8")


PROBE = """
<script>
const told = { width: innerWidth, narrow: [], filters: {}, browsers: {} };
const pen = document.createElement("canvas").getContext("2d");

function measure(boxes, lone) {
  for (const box of boxes) {
    const style = getComputedStyle(box);
    pen.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    const wide = box.getBoundingClientRect().width / pen.measureText("0").width;
    const inside = document.createRange();
    inside.selectNodeContents(box);
    const lines = inside.getBoundingClientRect().height / parseFloat(style.lineHeight);
    // What a single line holds is not squeezed, however short it is.
    if (wide > 0 && wide < 12 && !(lone && lines < 1.5)) {
      told.narrow.push(`${box.tagName}.${box.className} ${wide.toFixed(1)} "${box.textContent}"`);
    }
  }
}

function press(key, more) {
  const given = { key, bubbles: true, cancelable: true, ...more };
  document.body.dispatchEvent(new KeyboardEvent("keydown", given));
}

const TURNS = 9;  // more than any browser has pages

// The names of all cards that the keys reach.
function reached(section, measured) {
  section.scrollIntoView();
  for (let turn = 0; turn < TURNS; turn++) press(turn % 2 ? "p" : "ArrowLeft");
  const seen = new Set();
  for (let turn = 0; turn < TURNS; turn++) {
    for (const card of section.querySelectorAll("article:not([hidden])")) {
      seen.add(card.querySelector(".prompt").textContent.split(" ")[0]);
      if (measured) measure(card.querySelectorAll(".who, .text, .mark"), false);
    }
    press(turn % 2 ? "n" : "ArrowRight");
  }
  return [...seen];
}

function choose(select, value) {
  select.value = value;
  select.dispatchEvent(new Event("change"));
}

measure(document.querySelectorAll("th, td, dd"), true);
for (const section of document.querySelectorAll(".browser")) {
  const output = section.querySelector("output");
  const of = told.browsers[section.id] = { all: section.querySelectorAll("article").length };
  of.reached = reached(section, true);
  of.end = output.textContent;
  press("ArrowLeft");
  of.before = output.textContent;
  press("n", { ctrlKey: true });
  const select = section.querySelector("select");
  select.dispatchEvent(new KeyboardEvent("keydown", { key: "n", bubbles: true }));
  of.still = output.textContent;
  section.querySelector("[data-turn='1']").click();
  of.clicked = output.textContent;
  const selects = frameElement.name.startsWith("run") ? section.querySelectorAll("select") : [];
  for (const each of selects) {
    for (const { value } of [...each.options].slice(1)) {
      choose(each, value);
      told.filters[`${section.id}: ${each.dataset.mark}: ${value}`] = reached(section);
    }
    choose(each, "");
  }
}
const [kind, change, right] = document.querySelectorAll("#answers select");
const count = document.querySelector("#answers output");
if (frameElement.name.startsWith("run")) {
  choose(kind, "writing");
  told.kind = count.textContent;
  choose(change, "gained");
  told.both = reached(document.querySelector("#answers"));
  choose(right, "wrong");
  const left = document.querySelectorAll("#answers article:not([hidden])");
  told.none = [count.textContent, left.length];
}
told.scroll = document.documentElement.scrollWidth - innerWidth;
parent.told[frameElement.name] = told;
</script>
"""

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a browser finds in three pages, each at both widths.

    In frames, since a window of Chromium is never narrower than 500 pixels.
    """
    folder = tmp_path_factory.mktemp("browser")
    pages = {
        "run": run_in(folder / "run", ["base", "sft", "aligned"]),
        "wide": run_in(folder / "wide", ["base", "sft", "aligned", "q4", "Qwen2.5-0.5B-Instruct"]),
    }
    run_in(folder / "as-long-a-name-as-a-sweep-gives-to-its-runs", ["base", "aligned"], "ipo")
    arms = [path for path in folder.iterdir() if path.is_dir()]
    pages["arms"] = of_several(arms).read_text(encoding="utf-8")
    frames = "".join(
        f'<iframe name="{name}-{width}" width="{width}" height="900" style="border: 0" '
        f'srcdoc="{escape(html.replace("</body>", f"{PROBE}</body>"))}"></iframe>'
        for name, html in pages.items()
        for width in WIDTHS
    )
    file = folder / "frames.html"
    file.write_text(
        f"<!doctype html><meta charset=utf-8><script>window.told = {{}};</script>{frames}"
        "<script>onload = () => "
        "{ document.title = JSON.stringify(window.told); };</script>",
        encoding="utf-8",
    )
    command = f"{CHROMIUM} --headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    command += " --disable-background-networking --disable-component-update --disable-sync"
    command += f" --hide-scrollbars --user-data-dir={folder / 'profile'} --dump-dom"
    done = subprocess.run(
        [*command.split(), file.as_uri()], capture_output=True, text=True, timeout=100, check=True
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    return json.loads(unescape(title[1]))


browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium browser on the PATH")


@browser
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "wide", "arms"])
def test_nothing_scrolls_sideways_and_no_column_is_squeezed(seen, name, width):
    told = seen[f"{name}-{width}"]
    assert told["width"] == width
    assert told["scroll"] <= 0
    assert told["narrow"] == []


def names(rows, wanted, first):
    """Those of every second prompt from `first` on whose two values are `wanted`."""
    return {f"p{2 * at + first}" for at, row in enumerate(rows) if row in wanted}


@browser
@pytest.mark.parametrize("width", WIDTHS)
def test_keys_reach_every_card_and_filters_show_theirs_alone(seen, width):
    told = seen[f"run-{width}"]
    answers, groups = told["browsers"]["answers"], told["browsers"]["groups"]
    assert (len(answers["reached"]), answers["all"]) == (30, 30)
    assert (len(groups["reached"]), groups["all"]) == (15, 15)
    assert (groups["end"], groups["before"], groups["still"]) == (
        "13–15 of 15",
        "9–12 of 15",
        "9–12 of 15",
    )
    assert groups["clicked"] == "13–15 of 15"
    maths, writing = (names(rows, rows, at) for at, rows in enumerate((MATHS_ROWS, WRITING_ROWS)))
    gained = names(WRITING_ROWS, [(0.3, 0.5)], 1)
    equal = {"g0", "g5", "g10"}
    expected = {
        f"answers: kind: {MATHS}": maths,
        "answers: kind: writing": writing,
        "answers: change: gained": gained | names(MATHS_ROWS, [(0, 1)], 0),
        "answers: change: lost": names(WRITING_ROWS, [(0.5, 0.3)], 1)
        | names(MATHS_ROWS, [(1, 0)], 0),
        "answers: change: same": names(WRITING_ROWS, [(0.5, 0.54)], 1)
        | names(MATHS_ROWS, [(1, 1), (0, 0)], 0),
        "answers: aligned is: right": names(MATHS_ROWS, [(0, 1), (1, 1)], 0),
        "answers: aligned is: wrong": names(MATHS_ROWS, [(1, 0), (0, 0)], 0),
        "answers: aligned is: no true answer": writing,
        **{
            f"groups: step: alignment step {step}": {f"g{5 * step + at - 5}" for at in range(5)}
            for step in (1, 2, 3)
        },
        "groups: signal: scores are equal": equal,
        "groups: signal: scores differ": set(groups["reached"]) - equal,
    }
    assert {name: set(found) for name, found in told["filters"].items()} == expected
    assert told["kind"] == "1–4 of 15"
    assert set(told["both"]) == gained
    assert told["none"] == ["none", 0]


def test_a_pair_is_found_by_whether_it_is_ranked_rightly():
    def asked(model, *accuracies):
        told = [{"rouge_l": 0.5, "pair_accuracy": a, "pair_margin": a - 3} for a in accuracies]
        rows = [Row(f"p{i}", None, "?", None, "a", "b", values) for i, values in enumerate(told)]
        return Evaluation(model, tuple(rows))

    models = asked("sft", 0.0, 1.0, 0.5), asked("aligned", 1.0, 0.0, 0.5)
    cards = unescape(answer_cards(models, {}))
    assert 'data-mark="aligned ranks the pairs"' in cards
    assert [each.split("\x1f")[1:] for each in re.findall('data-marks="(.*?)"', cards)] == [
        ["gained", "rightly"],
        ["lost", "wrongly"],
        ["same", "in part"],
    ]
    assert "no true answer" not in cards
    assert cards.count("ROUGE-L 0.50 · pair margin -2.0") == 2


# Scores 0, 1, 4 and 3 of the candidates have the mean 2; DPO's pair is the best and the worst of
# all; labels 0, 1/8, 1/2 and 3/8 have the mean 1/4. What is furthest in a group is coloured the
# whole way.
GRPO = {"_target_": "pujax.method.losses.grpo"}
COLOURS = {
    "grpo": (
        GRPO,
        {"#1": "lowered 1.00", "#2": "lowered 0.50", "#3": "raised 1.00", "#4": "raised 0.50"},
    ),
    "dpo": (
        {
            "_target_": "pujax.method.pair_losses.dpo",
            "pairs": {"_target_": "pujax.method.labels.best_vs_worst"},
        },
        {"#1": "lowered 1.00", "#3": "raised 1.00"},
    ),
    "ldl_grpo": (
        {"_target_": "pujax.method.losses.ldl_grpo"},
        {"#1": "lowered 1.00", "#2": "lowered 0.50", "#3": "raised 1.00", "#4": "raised 0.50"},
    ),
    "weighted_sft": (
        {"_target_": "pujax.method.losses.weighted_sft"},
        {"#2": "raised 0.25", "#3": "raised 1.00", "#4": "raised 0.75"},
    ),
    "grpo_anchor": (
        {"_target_": "pujax.method.losses.beside_anchor", "loss": GRPO},
        {
            "anchor": "raised 1.00",
            "#1": "lowered 1.00",
            "#2": "lowered 0.50",
            "#3": "raised 1.00",
            "#4": "raised 0.50",
        },
    ),
    "raft": ({"_target_": "pujax.method.losses.raft"}, {"#3": "raised 1.00"}),
    "nnpu": (
        {"_target_": "pujax.method.losses.nnpu"},
        {"anchor": "raised 1.00", **{f"#{i}": "lowered 1.00" for i in range(1, 5)}},
    ),
}


@pytest.mark.parametrize(("loss", "expected"), COLOURS.values(), ids=COLOURS)
def test_texts_are_coloured_by_how_far_the_loss_raises_or_lowers_them(loss, expected):
    texts = [f"<text {i}>" for i in range(5)]
    group = Group("align", 1, "?", texts, [9.0, 0.0, 1.0, 4.0, 3.0], [0.0, 0.0, 0.125, 0.5, 0.375])
    cards = group_cards([group], {"loss": loss})
    found = re.findall(
        r'<div class="who[^>]*>([^<]*)</div><div class="text"><span class="(\w+)" '
        r'style="--pull:([0-9.]+)">&lt;text',
        cards,
    )
    assert {who: f"{way} {pull}" for who, way, pull in found} == expected
    assert cards.count('<div class="text">&lt;text') == 5 - len(expected)


def test_a_reward_that_failed_is_said_on_the_page(tmp_path):
    with RunLog(tmp_path) as log:
        log.step("align", 1, {"score/failed": 1.0}, seconds=1.0, tokens=1)
    save(evaluation("aligned", 1), tmp_path)
    told = write(tmp_path).read_text(encoding="utf-8")
    assert "<li>the reward failed on 100% of the responses of 1 alignment step," in told
