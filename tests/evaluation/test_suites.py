from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf

from pujax.errors import ConfigError, EvaluationError
from pujax.evaluation import suites
from pujax.evaluation.suites import Subject
from pujax.method import scoring
from pujax.method.labels import softmax_labels
from pujax.records import Example, Prompt
from pujax.run.compose import build, conf_dir
from pujax.types import Batch, Frames, Tokens

PIECE = np.array([7, 8], np.int32)
FRAMES = Frames(PIECE, PIECE, PIECE, np.arange(10, 15, dtype=np.int32))


def words(reading):
    """An oracle that likes many words."""
    return float(len(reading.response.split()))


def collate(examples):
    def padded(rows, size):
        ids = np.zeros((len(rows), size), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        return Tokens(jnp.array(ids), jnp.array([len(row) for row in rows], jnp.int32))

    prompts = padded([e.prompt_ids for e in examples], 7)
    return Batch(
        prompts=prompts,
        anchors=padded([e.anchor_ids for e in examples], 6),
        anchor_finished=jnp.ones(len(examples), bool),
        references=prompts,
    )


def decode(ids):
    return " ".join(f"w{i}" for i in ids)


@pytest.fixture(scope="module")
def subject(model, params):
    examples = [
        Example(
            prompt=Prompt(f"p{i}", ({"role": "user", "content": "?"},), "w8"),
            prompt_ids=(6 + i, 20, 30 + i),
            reference_ids=(),
            anchor="w8",
            anchor_ids=(8 + i, 9, 2),
            anchor_finished=True,
        )
        for i in range(6)
    ]
    # More words that end a response, so that lengths differ.
    model = model.clone(config=replace(model.config, eos_ids=tuple(range(0, 96, 4))))
    return Subject(model, params, examples, 4, collate, decode, FRAMES)


def ask(subject, **changes):
    scorers = {"length": scoring.length, "random": scoring.random}
    settings = {"labels": partial(softmax_labels, tau=0.1), "oracle": words, "samples": 6}
    return suites.signal(subject, scorers=scorers, **settings | changes)


def test_a_scorer_that_is_the_oracle_has_tau_1_and_a_random_one_does_not(subject):
    found = ask(subject)
    rows = {row[0]: row[1:] for row in found.rows}
    assert rows["length"][:3] == ("1.000 [1.000, 1.000]",) * 3
    assert not rows["random"][0].startswith("1.000")
    assert [record["id"] for record in found.records] == [f"p{i}" for i in range(6)]
    for record in found.records:
        assert record["scores"]["length"] == record["oracle"]
        np.testing.assert_allclose(sum(record["labels"]["random"]), 1, rtol=1e-5)


def test_the_same_seed_draws_the_same_candidates(subject):
    assert ask(subject).records == ask(subject).records
    assert ask(subject, seed=1).records != ask(subject).records


def test_prompts_that_the_oracle_does_not_know_are_left_out(subject):
    unknown = [replace(e, prompt=replace(e.prompt, answer=None)) for e in subject.examples[:5]]
    with pytest.raises(EvaluationError, match="1 held-out prompts have what the oracle needs"):
        ask(replace(subject, examples=[*unknown, subject.examples[5]]), oracle=suites.correct)
    with pytest.raises(ConfigError, match=r"suite\.samples=1: needs at least 2"):
        ask(subject, samples=1)


def test_the_suites_file_builds_and_every_scorer_in_it_scores(subject):
    path = Path(conf_dir(), "tools", "suite", "signal.yaml")
    node = OmegaConf.create({"suite": OmegaConf.load(path)}).suite
    suite = build(node, "suite")
    found = suite(subject, oracle=words, samples=3)
    assert {row[0] for row in found.rows} == set(node.scorers)
    assert len(found.rows) == 13
