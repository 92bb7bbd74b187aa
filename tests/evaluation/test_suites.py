from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from pujax.config.compose import conf_dir, from_hydra, offered
from pujax.config.functions import build
from pujax.errors import ConfigError, EvaluationError
from pujax.evaluate import GROUPS, EvaluateConfig
from pujax.evaluation import suites
from pujax.evaluation.signal import SHUFFLED
from pujax.evaluation.subjects import Records, SharedRecords, Subject
from pujax.method import scoring
from pujax.method.labels import softmax_labels
from pujax.method.scoring import ScoringContext
from pujax.records import Example, Given, Prompt
from pujax.types import Batch, Frames, right_padded

PIECE = np.array([7, 8], np.int32)
FRAMES = Frames(PIECE, PIECE, PIECE, np.arange(10, 15, dtype=np.int32))


def words(reading):
    """An oracle that likes many words."""
    return float(len(reading.response.split()))


def collate(examples):
    prompts = right_padded([e.prompt_ids for e in examples], 7)
    return Batch(
        prompts=prompts,
        anchors=right_padded([e.anchor_ids for e in examples], 6),
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


def of_file(name):
    where = f"{conf_dir()}/tools"
    with offered(GROUPS), initialize_config_dir(where, version_base="1.3"):
        composed = compose("evaluate", overrides=["run=r", f"suite={name}"])
    return from_hydra(EvaluateConfig, composed).suite


def test_the_suites_file_builds_and_every_scorer_of_the_settings_scores_beside_its_control(subject):
    node = of_file("signal")
    files = {path.stem for path in Path(conf_dir(), "scorer").glob("*.yaml")}
    # The control is made here, rewards are no scores of the model's own, and nobody trains a head.
    others = {"shuffled", "reward", "reward_blend", "discriminator"}
    assert set(node["scorers"]) == files - others
    found = build(node, "suite")(subject, oracle=words, samples=3)
    names = [row[0] for row in found.rows]
    blind = {"self_likelihood", "length", "random"}
    assert {name for name in names if SHUFFLED not in name} == set(node["scorers"])
    seeing = {name.removesuffix(SHUFFLED) for name in names if SHUFFLED in name}
    # No candidate here shares a token with any anchor, so that overlap has nothing to see.
    assert seeing == set(node["scorers"]) - blind - {"rouge", "token_f1"}
    assert "no better than their shuffled anchor: " in found.note


def test_what_was_read_of_candidates_is_right_beside_other_anchors_too(subject):
    examples = list(subject.examples[:4])
    batch = subject.collate(examples)
    others = subject.collate(examples[1:] + examples[:1]).anchors
    made = jax.random.randint(jax.random.key(0), (4, 2, 6), 6, 96)
    seen = [partial(scoring.embedding, depth=0.7), scoring.pmi, scoring.likelihood]

    @jax.jit
    def scored(params):
        context = ScoringContext(
            reader=subject.model,
            params=params,
            frames=FRAMES,
            batch=batch,
            after=batch.prompts,
            tokens=jnp.concatenate([batch.anchors.ids[:, None], made], axis=1),
            mask=jnp.ones((4, 3, 6), bool).at[:, 0].set(batch.anchors.mask),
            key=jax.random.key(0),
        )
        before = [score(context) for score in seen]
        other = context.with_anchors(others)
        return before, [score(other) for score in seen], [score(other.fresh()) for score in seen]

    before, found, anew = scored(subject.params)
    for one, first, second in zip(before, found, anew, strict=True):
        np.testing.assert_allclose(first, second, atol=2e-5)
        assert np.abs(np.asarray(one - first)).max() > 1e-3


def test_a_scorer_that_does_not_look_at_the_anchor_has_no_control_and_one_that_copies_it_wins():
    records = [
        {
            "id": f"p{i}",
            "by": "words",
            "oracle": [0.0, 1.0, 2.0],
            "scores": {
                "good": [0.0, 1.0, 2.0],
                "good, shuffled anchor": [0.0, 2.0, 1.0],
                "bad": [1.0, 0.0, 2.0],
                "bad, shuffled anchor": [1.0, 0.0, 2.5],
                "blind": [2.0, 1.0, 0.0],
                "blind, shuffled anchor": [2.0, 1.0, 0.0],
            },
            "labels": {
                f"{name}{of}": [1 / 3] * 3
                for name in ("good", "bad", "blind")
                for of in ("", SHUFFLED)
            },
        }
        for i in range(5)
    ]
    found = suites._signal_answer(records, ["good", "bad", "blind"], 0.0, 3, 0.7)
    rows = {row[0]: row for row in found.rows}
    assert list(rows) == [
        "good",
        "good, shuffled anchor",
        "bad",
        "bad, shuffled anchor",
        "blind",
    ]
    assert rows["good"][1] == "1.000 [1.000, 1.000]"
    assert rows["good"][-2] == "0.667 [0.667, 0.667]"
    assert rows["bad"][-2] == "0.000 [0.000, 0.000]"
    assert rows["good"][-1] == "–"  # nothing is known of the anchors
    assert rows["blind"][1] == "-1.000 [-1.000, -1.000]"
    assert "no better than their shuffled anchor: bad." in found.note
    # Where the oracle orders no group nothing is known of any score.
    level = [record | {"oracle": [1.0] * 3} for record in records]
    found = suites._signal_answer(level, ["good", "bad", "blind"], 0.0, 3, 0.7)
    assert found.note.startswith(
        "5 prompts by words, which orders 0 groups (give more prompts, or more suite.samples: "
        "nothing is known of any score). 3 candidates"
    )


def test_pairs_of_groups_whose_anchor_a_candidate_beats_are_told_apart():
    def record(number, anchor, oracle, scores):
        names = ("copies", f"copies{SHUFFLED}")
        return {
            "id": f"p{number}",
            "by": "correct",
            "anchor": anchor,
            "oracle": oracle,
            "scores": dict(zip(names, (scores, [0.0] * 3), strict=True)),
            "labels": {name: [1 / 3] * 3 for name in names},
        }

    records = [
        record(0, 1.0, [0.0, 0.0, 1.0], [0.0, 1.0, 2.0]),  # both pairs right
        record(1, 0.0, [0.0, 0.0, 1.0], [2.0, 0.0, 1.0]),  # one of two
        record(2, 0.0, [0.0, 0.0, 1.0], [2.0, 1.0, 0.0]),  # neither
        record(3, 0.0, [1.0, 1.0, 1.0], [2.0, 1.0, 0.0]),  # nothing to order
        record(4, None, [0.0, 0.0, 1.0], [0.0, 1.0, 2.0]),  # of before that was kept
    ]
    found = suites._signal_answer(records, ["copies"], 0.0, 3, 0.7)
    assert found.header[-1] == "pairs, anchor beaten"
    (row, control) = found.rows
    assert row[3].startswith("0.625 [")  # (1 + 1/2 + 0 + 1) / 4
    assert row[-1].startswith("0.250 [")  # (1/2 + 0) / 2
    assert control[-1] == ""
    assert "5 prompts by correct, which orders 4 groups, 2 of them over the anchor" in found.note


def test_what_the_anchor_is_worth_is_kept_with_its_candidates(subject):
    found = ask(subject)
    worth = {e.prompt.id: len(e.anchor.split()) for e in subject.examples}
    assert {record["id"]: record["anchor"] for record in found.records} == worth


def test_prompts_without_an_answer_are_ordered_by_the_other_oracle_or_by_the_judge(subject):
    examples = [
        e if i % 2 else replace(e, prompt=replace(e.prompt, answer=None))
        for i, e in enumerate(subject.examples)
    ]
    mixed = replace(subject, examples=examples)

    def known(reading):
        return None if reading.prompt.answer is None else words(reading)

    found = ask(mixed, oracle=known, otherwise=words)
    assert [record["by"] for record in found.records] == ["words", "known"] * 3
    assert [row[0] for row in found.rows] == [
        "length (words)",
        "random (words)",
        "length (known)",
        "random (known)",
    ]

    def judge(questions):
        """Prefers the longer answer, and says nothing of the first prompt's."""
        said = {}
        for asked in questions:
            text = asked.messages[0]["content"]
            a, b = (text.split(f"Answer {x}:\n")[1].split("\n\n")[0] for x in "AB")
            if not asked.id.startswith("p0 "):
                said[asked.id] = "A" if len(a.split()) > len(b.split()) else "B"
        return said

    found = suites.signal(
        mixed,
        judge,
        scorers={"length": scoring.length},
        labels=partial(softmax_labels, tau=0.1),
        oracle=known,
        judged=True,
        samples=6,
    )
    worth = {record["id"]: record["anchor"] for record in found.records}
    assert worth["p2"] == 0.5  # of two that are the same neither is preferred
    by = {record["id"]: record["by"] for record in found.records}
    assert by == {"p1": "known", "p2": "judge", "p3": "known", "p4": "judge", "p5": "known"}
    (longest,) = [record["oracle"] for record in found.records if record["id"] == "p2"]
    # Against an anchor of one word: a longer answer wins, one as long is taken for neither.
    assert set(longest) == {0.5, 1.0}


def test_an_interrupted_suite_goes_on_after_what_it_has(subject, tmp_path):
    path = tmp_path / "suite.jsonl"
    whole = ask(subject, records=Records(path, {"seed": 0}))
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 7
    # The second batch is of two prompts.
    path.write_text("".join(lines[:5]) + lines[5][:20])
    again = ask(subject, records=Records(path, {"seed": 0}))
    assert again == whole
    assert sorted(path.read_text().splitlines()) == sorted("".join(lines).splitlines())
    before = path.stat().st_mtime_ns
    unasked = replace(subject, collate=lambda examples: pytest.fail("asked again"))
    assert ask(unasked, records=Records(path, {"seed": 0})) == whole
    assert path.stat().st_mtime_ns == before
    with pytest.raises(EvaluationError, match="is of another question: move it away"):
        Records(path, {"seed": 1})


@pytest.mark.parametrize("line", ["{}", '{"id": ["a"]}'])
def test_records_without_an_id_are_one_line(tmp_path, line):
    (tmp_path / "kept.jsonl").write_text(f'{{"asked": {{}}}}\n{line}\n')
    with pytest.raises(EvaluationError, match="is of another question"):
        Records(tmp_path / "kept.jsonl")


def test_shares_of_pairs_are_of_those_that_the_oracle_orders():
    record = {
        "oracle": [2.0, 1.0, 0.0],
        "logps": [-3.0, -2.0, -4.0],
        "ref_logps": [-30.0, -2.0, -4.0],
        "lengths": [3, 1, 4],
    }
    found = suites._shares(record, beta=0.1, preference=0.9)
    # By sums the first loses to the second; by token -1, -2, -1 the second loses to the third.
    assert found["raw"] == pytest.approx(2 / 3)
    assert found["per token"] == pytest.approx(2 / 3)
    assert found["reference raw"] == pytest.approx(1 / 3)
    # DPO's optimum gains log(9) / .1 = 21.97 nats: too few for the 28 between first and second.
    assert found["idealised"] == pytest.approx(1 / 3)
    assert suites._shares(record | {"oracle": [1.0] * 3}, beta=0.1, preference=0.9) == {}


def test_a_model_that_is_its_own_reference_ranks_as_that(subject):
    found = suites.ranking(replace(subject), subject, oracle=words, samples=4, beta=1e-3)
    rows = {row[0]: row[1:] for row in found.rows}
    assert rows["the model"] == rows["the reference"]
    assert rows["DPO's optimum"] == ("1.000 [1.000, 1.000]", "–")
    for record in found.records:
        assert record["logps"] == record["ref_logps"]
        assert all(logp < 0 for logp in record["logps"])
    alone = suites.ranking(subject, subject, oracle=words, samples=4, beta=1e-3)  # without a run
    assert alone.rows == tuple(row for row in found.rows if row[0] != "the reference")
    assert alone.records == found.records
    build(of_file("ranking"), "suite")
    build(of_file("winrate"), "suite")


def test_what_the_reference_drew_is_there_for_the_next_model(subject, tmp_path):
    ask = partial(suites.ranking, oracle=words, samples=4)
    first = ask(subject, subject, drawn=SharedRecords(Records(tmp_path / "drawn.jsonl")))
    other = replace(subject, params=jax.tree.map(lambda x: x * 1.5, subject.params))
    unasked = replace(subject, collate=lambda examples: pytest.fail("asked again"))
    second = ask(other, unasked, drawn=SharedRecords(Records(tmp_path / "drawn.jsonl")))
    assert second == ask(other, subject)
    for one, two in zip(first.records, second.records, strict=True):
        assert one["logps"] != two["logps"]
        assert one | {"logps": []} == two | {"logps": []}


def test_a_model_of_another_tokenizer_is_not_asked_about_the_references_tokens(subject):
    first, *rest = subject.examples
    rated = [replace(e, given=(Given((5, 2), 1.0), Given((7, 2), 0.0))) for e in (first, *rest)]
    (given, other) = rated[0].given[0], replace(rated[0].given[0], ids=(9, 2))
    for reference, own in (
        (subject.examples, [replace(first, prompt_ids=(9,)), *rest]),
        (subject.examples, rest),
        (rated, [replace(rated[0], given=(other, given)), *rated[1:]]),
    ):
        with pytest.raises(EvaluationError, match=r"prompt 'p0' .* of the same tokenizer and"):
            suites.ranking(
                replace(subject, examples=own), replace(subject, examples=reference), oracle=words
            )


def test_rated_responses_are_the_pairs_where_prompts_have_them(subject, tmp_path):
    first, second, *rest = subject.examples
    ids = ((5, 6, 2), (7, 2), (8, 9, 10, 2))
    rated = [
        replace(
            first,
            given=tuple(
                Given(each, score) for each, score in zip(ids, (3.0, 1.0, 2.0), strict=True)
            ),
        ),
        replace(second, given=(Given(ids[0], -1.0), Given(ids[1], 1.0))),
    ]
    of = replace(subject, examples=[*rated, *rest])
    path = tmp_path / "kept.jsonl"
    found = suites.ranking(of, of, records=Records(path))
    assert [record["oracle"] for record in found.records] == [[3, 1, 2], [-1.0, 1.0]]
    for record, example in zip(found.records, rated, strict=True):
        assert record["lengths"] == [len(given.ids) for given in example.given]
        for given, logp in zip(example.given, record["logps"], strict=True):
            whole = jnp.array([[*example.prompt_ids, *given.ids]])
            logps = jax.nn.log_softmax(subject.model.forward(subject.params, whole))[0]
            start = len(example.prompt_ids)
            alone = sum(logps[start + t - 1, token] for t, token in enumerate(given.ids))
            np.testing.assert_allclose(logp, alone, rtol=1e-4)
    assert "2 of 2 prompts, by the ratings of the responses given with them" in found.note
    assert found.note.endswith("Under 30 prompts an interval is too narrow.")
    # What has been read is not read again.
    unasked = replace(of, collate=lambda examples: pytest.fail("asked again"))
    assert suites.ranking(unasked, unasked, records=Records(path)) == found
    alike = [replace(e, given=tuple(Given(each, 1.0) for each in ids)) for e in rated]
    of = replace(of, examples=alike)
    with pytest.raises(EvaluationError, match="their ratings order the candidates of 0 prompts"):
        suites.ranking(of, of)
