"""The card of costs, and the share of quality that a student keeps."""

import time
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf

from pujax.config.compose import conf_dir
from pujax.config.functions import build
from pujax.errors import ConfigError, EvaluationError
from pujax.evaluation import costs as module
from pujax.evaluation.costs import UNKNOWN, costs, kept, measured_anyway, peak_memory
from pujax.evaluation.results import Evaluation, Row
from pujax.evaluation.suites import Subject
from pujax.records import Anchor, Example, Prompt
from pujax.types import Batch, Frames, right_padded

PIECE = np.array([7, 8], np.int32)


def collate(examples):
    prompts = right_padded([e.prompt_ids for e in examples], 7)
    anchors = right_padded([e.anchor_ids for e in examples], 4)
    return Batch(prompts, anchors, jnp.ones(len(examples), bool), prompts)


@pytest.fixture(scope="module")
def subject(model, params):
    """Four prompts; the teacher is right in each but the last."""
    examples = [
        Example(
            prompt=Prompt(f"p{i}", ({"role": "user", "content": "?"},), "yes"),
            prompt_ids=(6 + i, 20),
            reference_ids=(),
            anchor="yes" if i < 3 else "no",
            anchor_ids=(8, 9, 2),
            anchor_finished=True,
        )
        for i in range(4)
    ]
    frames = Frames(PIECE, PIECE, PIECE, np.arange(10, 15, dtype=np.int32))
    return Subject(model, params, examples, 4, collate, lambda ids: "yes", frames)


def test_a_card_counts_quality_time_tokens_and_money(subject, monkeypatch):
    clock = iter([0, 9, *(t for i in range(4) for t in (10 * i, 10 * i + (1, 1, 1, 5)[i]))])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    found = costs(subject, hour=1.8, input=1.0, output=2.0, latency=0.5)
    monkeypatch.setattr(module.time, "perf_counter", time.perf_counter)
    rows = {name: cells for name, *cells in found.rows}
    assert rows["quality"][0].startswith("1.000")
    assert rows["quality"][1].startswith("0.750")
    assert rows["quality kept"][0].startswith("133% [")
    assert rows["latency, p50 (s)"] == ["1.000", "0.5"]
    assert rows["latency, p95 (s)"][0] == "4.400"  # between 1 and 5, at 2.85 of 3
    tokens = sum(record["tokens"] for record in found.records)
    assert rows["tokens a second"][0] == f"{tokens / 8:.1f}"
    # Two seconds an answer at 1.8 an hour; two tokens at 1 and three at 2 a million.
    assert rows["money, 1000 answers"] == ["1", "0.008"]
    assert [record["id"] for record in found.records] == ["p0", "p1", "p2", "p3"]


def test_what_nobody_told_is_unknown(subject):
    suite = build(
        OmegaConf.create(
            {"suite": OmegaConf.load(Path(conf_dir(), "tools", "suite", "costs.yaml"))}
        ).suite,
        "suite",
    )
    rows = {name: cells for name, *cells in suite(subject).rows}
    assert rows["money, 1000 answers"] == [UNKNOWN, UNKNOWN]
    with pytest.raises(ConfigError, match=r"suite\.hour=-1.0: must be finite"):
        suite(subject, hour=-1.0)
    unknown = [replace(e, prompt=replace(e.prompt, answer=None)) for e in subject.examples]
    with pytest.raises(EvaluationError, match="give them an `answer`"):
        suite(replace(subject, examples=unknown), prompts=1)


def timed(subject):
    """The same prompts, the teacher's answers as a store keeps them; of the last no seconds."""
    took = [(1.0, 10, 0.002), (2.0, 40, 0.004), (3.0, None, 0.003), (None, 50, None)]
    examples = [
        replace(e, asked=Anchor(e.anchor, "stop", "t", seconds=seconds, tokens=tokens, cost=cost))
        for e, (seconds, tokens, cost) in zip(subject.examples, took, strict=True)
    ]
    return replace(subject, examples=examples)


def test_what_the_teacher_took_is_what_its_store_kept(subject):
    rows = {name: cells for name, *cells in costs(timed(subject)).rows}
    assert rows["latency, p50 (s)"][1] == "2.000"
    assert rows["latency, p95 (s)"][1] == "2.900"  # between 2 and 3, at 1.9 of 2
    assert rows["tokens a second"][1] == "16.7"  # 10 + 40 in 1 + 2
    assert rows["money, 1000 answers"][1] == "3"  # the mean of three
    told = costs(timed(subject), input=1.0, output=2.0, latency=0.5)
    rows = {name: cells for name, *cells in told.rows}
    assert rows["latency, p50 (s)"][1] == "0.5"
    assert rows["money, 1000 answers"][1] == "0.008"


def test_a_store_without_times_or_prices_says_so_in_a_word(subject):
    examples = [replace(e, asked=Anchor(e.anchor, "stop", "t")) for e in subject.examples]
    found = costs(replace(subject, examples=examples))
    rows = {name: cells for name, *cells in found.rows}
    for name in ("latency, p50 (s)", "latency, p95 (s)", "tokens a second"):
        assert float(rows[name][0]) > 0
        assert rows[name][1] == "not stored"
    assert rows["money, 1000 answers"] == [UNKNOWN, "no price"]
    assert "does not say how long its answers took" in found.note
    told = {name: cells[1] for name, *cells in costs(subject).rows}  # who has no store at all
    assert told["latency, p50 (s)"] == told["money, 1000 answers"] == UNKNOWN


def test_a_run_knows_quality_size_and_teacher_without_measuring(subject):
    examples = timed(subject).examples
    # Right alone, contained, wrong; the teacher, "yes" of the first three, is right in all.
    said = ["yes", "oh yes", "no"]
    rows = [
        Row(e.prompt.id, None, "?", "yes", e.anchor, response, {})
        for e, response in zip(examples[:3], said, strict=True)
    ]
    weights = {"w": np.broadcast_to(np.float32(0), 2**27)}
    card = measured_anyway(Evaluation("aligned", tuple(rows)), examples, weights)
    assert {name: cells for name, *cells in card.rows} == {
        "quality": ["0.500 [0.000, 1.000]", "1.000 [1.000, 1.000]"],
        "quality kept": ["50% [0%, 100%]", ""],
        "latency, p50 (s)": [UNKNOWN, "2.000"],
        "latency, p95 (s)": [UNKNOWN, "2.900"],
        "tokens a second": [UNKNOWN, "16.7"],
        "weights (GiB)": ["0.50", UNKNOWN],
        "money, 1000 answers": [UNKNOWN, "3"],
    }
    assert "suite=costs" in card.note
    rows = [replace(row, answer=None) for row in rows]
    card = measured_anyway(Evaluation("aligned", tuple(rows)), subject.examples, {})
    assert [name for name, *_ in card.rows] == ["weights (GiB)"]


def test_the_share_that_is_kept_is_a_ratio_of_means():
    assert kept([1, 1, 0, 0], [1, 1, 1, 1]).startswith("50% [0%, 100%]")
    assert kept([0.5, 0.5], [1, 1]) == "50% [50%, 50%]"
    assert kept([1, 1], [0, 0]) == UNKNOWN


def test_a_processs_memory_is_told_in_gib():
    peak = peak_memory()
    assert peak is not None
    assert 0.1 < peak < 64
