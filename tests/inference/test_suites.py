import json
import sys
from dataclasses import replace
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_gguf import toy_chat

from pujax import evaluate
from pujax.config.settings import TrainConfig
from pujax.errors import ConfigError, DiskError, EvaluationError
from pujax.evaluation.results import Evaluation, Row, save
from pujax.evaluation.subjects import Subject
from pujax.inference.generator import Generator
from pujax.inference.local_teacher import LocalTeacher, weighed
from pujax.inference.suites import (
    answered,
    offered_answers,
    offered_judge,
    offered_reference,
)
from pujax.models.decoder import LanguageModel
from pujax.records import Example, Prompt
from pujax.teacher.protocols import Answer
from pujax.teacher.settings import BudgetConfig, CollectConfig, PriceConfig, TeacherConfig


def questions(count):
    return [Prompt(f"p{i}", ({"role": "user", "content": f"A or B, {i}?"},)) for i in range(count)]


class Taker:
    """A judge that takes the first, refuses what has a 3 in it, and counts."""

    asked = 0

    def __init__(self, settings, collect):
        del settings, collect

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def ask(self, messages):
        Taker.asked += 1
        if "3" in messages[-1]["content"]:
            return Answer("", "refusal", "judge")
        return Answer("A", "stop", "judge", {"prompt_tokens": 10, "completion_tokens": 1})


FREE = PriceConfig(0.0, 0.0)
TAKER = TeacherConfig(protocol=Taker, path="judge", model="judge", max_tokens=4, price=FREE)


def test_verdicts_are_asked_once_kept_and_budgeted(tmp_path):
    Taker.asked = 0
    store, said = tmp_path / "verdicts.jsonl", []
    few = CollectConfig(budget=BudgetConfig(requests=2), concurrency=1)
    judge, _ = offered_judge(TAKER, few, store, say=said.append)
    with pytest.raises(EvaluationError, match=r"3 of 5 verdicts are still to be asked: .*budget"):
        judge(questions(5))
    judge, identity = offered_judge(TAKER, CollectConfig(), store, say=said.append)
    assert judge(questions(5)) == {f"p{i}": "A" for i in (0, 1, 2, 4)}
    assert identity["model"] == "judge"
    assert Taker.asked == 5
    assert judge(questions(5)) == {f"p{i}": "A" for i in (0, 1, 2, 4)}
    assert Taker.asked == 5
    with pytest.raises(SystemExit):
        offered_judge(TAKER, CollectConfig(dry_run=True), store, say=said.append)[0](questions(7))
    assert said[-1].startswith("7 verdicts: has 4, would ask 2; about ")
    assert Taker.asked == 5
    alone, _ = offered_judge(TeacherConfig(), CollectConfig(), store)
    assert alone(questions(3)) == {f"p{i}": "A" for i in range(3)}
    with pytest.raises(EvaluationError, match="lacks 2 of 7 verdicts: name a judge to ask"):
        alone(questions(7))


def test_a_local_model_judges_by_the_share_of_the_two_letters(model, monkeypatch, tmp_path):
    chat = toy_chat()
    student = LanguageModel(replace(model.config, vocab=chat.vocab, eos_ids=chat.eos_ids))
    params = jax.tree.map(lambda x: x * 4, student.init_params(jax.random.key(0)))
    monkeypatch.setattr(Generator, "load", lambda path: Generator(student, params, chat))
    teacher = TeacherConfig(protocol=LocalTeacher, path="m", model="m", max_tokens=4, price=FREE)
    asked = questions(2)
    judge, _ = offered_judge(
        teacher, CollectConfig(concurrency=2), tmp_path / "v.jsonl", say=lambda text: None
    )
    said = judge(asked)
    a, b = (chat.encode(letter)[-1] for letter in "AB")
    for question in asked:
        ids = chat.render(list(question.messages))
        # As long as the batch's own, so that rounding is alike.
        logits = student.forward(params, jnp.array([ids]))[0, -1]
        share = 1 / (1 + np.exp(logits[b] - logits[a]))
        letter, _, number = said[question.id].partition("=")
        assert letter == "A"
        np.testing.assert_allclose(float(number), share, atol=1e-5)
        assert 0.01 < float(number) < 0.99
    (answer,) = weighed(Generator(student, params, chat), teacher, [list(asked[0].messages)])
    assert answer.failure is None


def evaluation(model, response):
    rows = [Row(f"p{i}", None, f"question {i}", None, "a", response, {}) for i in range(4)]
    return Evaluation(model, tuple(rows))


def node(**values):
    return {"_target_": "pujax.evaluation.judging.winrate", "_partial_": True, **values}


def offers(store):
    return {
        "answers": lambda: offered_answers([evaluation("old", "no"), evaluation("new", "yes")]),
        "judge": lambda: offered_judge(TAKER, CollectConfig(), store, say=lambda text: None),
    }


def test_what_a_suite_found_is_never_written_over_by_another_question(tmp_path):
    given = offers(tmp_path / "verdicts.jsonl")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    answer, kept = answered(node(), tmp_path / "run", given)
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Winrate</h2>" in report
    assert "<th>lean to the answer shown first</th>" in report
    assert ("lean to the answer shown first", "+0.500") in answer.rows
    header, *records = map(json.loads, kept.read_text().splitlines())
    assert header["asked"]["suite"] == node()
    assert header["asked"]["judge"]["model"] == "judge"
    assert [record["id"] for record in records] == ["p0", "p1", "p2", "p3"]
    assert "2 verdicts failed, their 1 pairs left out" in answer.note
    before = kept.read_bytes()
    assert answered(node(), tmp_path / "run", given)[1] == kept
    _, other = answered(node(prompts=2), tmp_path / "run", given)
    assert other != kept
    assert kept.read_bytes() == before
    assert len(other.read_text().splitlines()) == 3


def test_what_a_reference_drew_is_of_its_weights_and_prompts_and_of_no_one_run(
    model, params, tmp_path, monkeypatch
):
    """A run's own mark is left out, and so is the model that the suite asks about."""
    (tmp_path / "my_suites.py").write_text(
        "def mine(subject, reference, drawn):\n"
        "    from pujax.evaluation.subjects import SuiteAnswer\n"
        "    found = list(drawn.found)\n"
        "    drawn.add([{'id': 'drawn', 'logps': [-1.5]}])\n"
        "    return SuiteAnswer(('found',), (tuple(found) or ('nothing',),), '', ())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = {"_target_": "my_suites.mine", "_partial_": True}
    example = Example(questions(1)[0], (1, 2), (1, 2), "a", (3,), True)

    def found(run, params, example=example, shared=tmp_path / "shared"):
        reference = Subject(model, params, [example], 1, MagicMock(), str, MagicMock())
        monkeypatch.setattr("pujax.inference.heldout.reference_for", lambda *_: reference)
        offers = {
            "subject": lambda: (None, {"prompts": 1, "model": run}),
            "reference": lambda: offered_reference(tmp_path, TrainConfig()),
        }
        folder = tmp_path / run
        answer, _ = answered(mine, folder, offers, shared=shared, trusted=["my_suites"])
        return answer.rows

    assert found("a", params) == (("nothing",),)
    assert found("b", params) == (("drawn",),)
    (kept,) = (tmp_path / "shared").iterdir()
    kept.write_text("{torn\n" + kept.read_text())
    assert found("b", params) == (("nothing",),)
    assert found("b", params) == (("drawn",),)
    kept.write_text(kept.read_text().replace("-1.5", "-7.5"))  # as a disk changes a bit
    assert found("b", params) == (("nothing",),)
    assert found("b", params) == (("drawn",),)
    kept.unlink()
    kept.mkdir()
    assert found("b", params) == found("b", params) == (("nothing",),)
    kept.rmdir()
    assert found("b", params, shared=None) == (("nothing",),)
    assert found("b", params, shared=tmp_path / "my_suites.py" / "no") == (("nothing",),)
    assert found("c", jax.tree.map(lambda x: x + 1, params)) == (("nothing",),)
    assert found("d", params, replace(example, prompt_ids=(2,))) == (("nothing",),)


def test_a_file_of_ones_own_with_a_suites_name_is_refused_before_anything_is_asked(tmp_path):
    theirs = tmp_path / "suite-winrate.json"
    theirs.write_text('{"mine": 1}')
    with pytest.raises(DiskError, match=r"suite-winrate\.json can't be written .*move away"):
        answered(
            node(), tmp_path, {name: lambda: pytest.fail("asked") for name in ("answers", "judge")}
        )
    assert theirs.read_text() == '{"mine": 1}'


def test_what_a_suite_asks_for_and_there_is_not_is_named(tmp_path, monkeypatch):
    (tmp_path / "my_suites.py").write_text("def mine(subject, weather):\n    return None\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = {"_target_": "my_suites.mine", "_partial_": True}
    with pytest.raises(ConfigError, match=r"trusted=\[my_suites\]"):
        answered(mine, tmp_path, {})
    with pytest.raises(
        ConfigError, match="mine asks for 'weather': there are subject, records and "
    ):
        answered(mine, tmp_path, {"subject": lambda: (None, None)}, trusted=["my_suites"])


def test_the_command_tells_what_a_win_rate_would_ask(tmp_path, monkeypatch, capsys):
    for found in (evaluation("sft", "no"), evaluation("aligned", "yes")):
        save(found, tmp_path)
    data = {"prompts": "p", "anchors": "a", "heldout": "h"}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": data, "eval": {}}))
    given = ["suite=winrate", "teacher=local", "teacher.path=m.gguf", "teacher.model=m"]
    words = ["pujax", f"run={tmp_path}", *given, "collect.dry_run=true"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert not ended.value.code
    assert "8 verdicts: has 0, would ask 8; about " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "suite.model=sft", "model=other"])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "model='other': this suite compares what has been evaluated" in capsys.readouterr().err
