"""A score's control: with another prompt's anchor in view, does it rank as well?"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
from groups import make_group
from recipes import recipe

from pujax.evaluation.signal import Control
from pujax.method import scoring
from pujax.method.discriminator import discriminator
from pujax.models.sharding import make_mesh, put_batch
from pujax.records import Example, Prompt
from pujax.run.batches import collate
from pujax.run.control import make_control
from pujax.run.data import Dataset
from pujax.run.stages import Run, Stage
from pujax.run.symptoms import Symptoms

WORDS = 8 + 4 * np.arange(4)  # the first token of what each of four anchors says


def said(*ids):
    return " ".join(f"word{n}" for n in ids if n != 2)


def example(n):
    """The teacher says two words; prompt 3 has a true answer, which neither candidate has."""
    ids = (int(WORDS[n]), int(WORDS[n]) + 1, 2)
    truth = "something else" if n == 3 else None
    prompt = Prompt(str(n), ({"role": "user", "content": "?"},), truth)
    return Example(prompt, (7, 6 + n), (7, 6 + n, 8), said(*ids), ids, True)


DATA = Dataset(tuple(map(example, range(4))), 4, 6, 4)


def group():
    """The first candidate says the anchor's first word, the second no word of any anchor."""
    tokens, mask = np.zeros((4, 3, 4), np.int32), np.zeros((4, 3, 4), bool)
    for b, each in enumerate(DATA.examples):
        rows = (each.anchor_ids, (each.anchor_ids[0], 90, 2), (91, 92, 2))
        tokens[b, :, :3], mask[b, :, :3] = rows, True
    return replace(make_group(np.zeros(mask.shape), mask=mask), tokens=jnp.asarray(tokens))


def control_of(model, scorer, data=DATA):
    return make_control(
        recipe(scorer=scorer),
        model,
        lambda trainable: trainable,
        data,
        mesh=make_mesh(1, 1, 1),
        decode=lambda ids: said(*ids),
        seed=0,
    )


def test_a_score_is_held_against_other_anchors_where_candidates_differ_in_worth(model, params):
    batch = put_batch(make_mesh(1, 1, 1), collate(DATA.examples, DATA), 4)
    given = (1, params, batch, DATA.examples, group())
    by_anchor = control_of(model, scoring.token_f1)
    assert by_anchor is not None
    # Three tell in each step, and wait until there are as many as it has.
    found = [by_anchor(*given) for _ in range(4)]
    known = Control(4, 1.0, 0.5)  # no other anchor has a word of these
    assert found == [Control(), known, known, known]
    assert by_anchor(*given) == Control()
    alone = control_of(model, scoring.self_likelihood)
    assert alone is not None
    alone(*given)
    found = alone(*given)
    assert found.groups == 4
    assert found.pairs == found.shuffled


def test_there_is_no_control_of_rewards_of_what_is_learnt_or_given_or_of_one_anchor(model):
    own = partial(scoring.reward, function=print)
    assert control_of(model, own) is None
    assert control_of(model, partial(discriminator)) is None
    assert control_of(model, scoring.token_f1, replace(DATA, candidates=2)) is None
    alike = tuple(replace(each, anchor_ids=(8, 2)) for each in DATA.examples)
    assert control_of(model, scoring.token_f1, replace(DATA, examples=alike)) is None


def test_a_run_looks_until_it_knows_and_a_resumed_one_by_what_was_written():
    found = Control(20, 0.5, 0.5)
    unused: Any = None
    stage = Stage(*("align", "aligned", ("sft", 4), 9, 4, DATA, 4, 1), unused, lambda *given: found)
    run: Any = SimpleNamespace(symptoms=Symptoms())
    state: Any = SimpleNamespace(params={})
    batch: Any = SimpleNamespace(given=None)

    def looked(stage, step):
        return Run._controlled(run, stage, step, state, batch, (), unused)

    assert looked(replace(stage, steps=7), 1) == {}  # 28 groups would not tell
    assert looked(stage, 31) == {}  # 120 have not told
    for step in (1, 2):
        noted = looked(stage, step)
        assert noted == {
            "signal/groups": 20, "signal/pairs": 0.5, "signal/pairs_shuffled": 0.5
        }  # fmt: skip
        warned = run.symptoms.of({"stage": "align", "step": step} | noted)
    assert warned == [f"align step 2: {Control(40, 0.5, 0.5).warning}"]
    assert looked(stage, 3) == {}
