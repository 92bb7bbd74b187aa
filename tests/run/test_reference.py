from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import recipe

from pujax.config.settings import TrainConfig
from pujax.errors import StopRequested
from pujax.evaluation.waiting import waited
from pujax.method import losses
from pujax.method.needs import Needs
from pujax.models.logps import response_logps
from pujax.models.sharding import make_mesh
from pujax.records import Example, Given, Prompt
from pujax.run import reference
from pujax.run.batches import batch_at
from pujax.run.data import Dataset
from pujax.run.fit import aligned
from pujax.types import TrainState


def example(i):
    prompt = Prompt(str(i), ({"role": "user", "content": str(i)},))
    best, other = (10 + i, 11, 2), (20 + i, 2)
    given = (Given(best, 1.0), Given(other, -1.0))
    return Example(prompt, (6 + i, 7), (6 + i, 7, 8), "best", best, True, given)


DATA = Dataset(tuple(example(i) for i in range(3)), 4, 6, 4, candidates=2)


@pytest.fixture
def read(model, params, tmp_path):
    said = []

    def reading(data=DATA, params=params, pause=lambda: None):
        mesh = make_mesh(4, 1, 2)  # two rows, filled up to four
        how = {"folder": tmp_path / "kept", "mesh": mesh, "size": 2, "say": said.append}
        how |= {"pause": pause}
        return reference.reference_logps(data, model, params, **how), said

    return reading


def test_log_probs_of_given_responses_are_the_models_and_kept_by_model_and_data(
    model, params, read, tmp_path, monkeypatch
):
    made, said = read()
    tokens = jnp.zeros((3, 3, 4), jnp.int32)
    for i in range(3):
        for g, ids in enumerate([(10 + i, 11, 2), (10 + i, 11, 2), (20 + i, 2)]):
            tokens = tokens.at[i, g, : len(ids)].set(jnp.array(ids))
    mask = np.broadcast_to(np.arange(4) < np.array([3, 3, 2])[:, None], tokens.shape)
    prompts = batch_at(DATA, 3, (0,), 0)[1].prompts
    order = [[int(i) for i in prompts.ids[:, 0]].index(6 + i) for i in range(3)]
    prompts = jax.tree.map(lambda x: x[jnp.array(order)], prompts)
    own = jax.jit(partial(response_logps, model))(params, prompts, tokens, mask)
    np.testing.assert_allclose(made, own, atol=1e-5)
    assert (np.abs(made[mask]) > 0).all()
    (path,) = (tmp_path / "kept").iterdir()

    with monkeypatch.context() as patched:
        patched.setattr(reference, "response_logps", lambda *_: pytest.fail("read again"))
        np.testing.assert_array_equal(read()[0], made)
    path.write_bytes(path.read_bytes()[:200])  # cut off
    np.testing.assert_array_equal(read()[0], made)
    assert "can't be read" in " ".join(said)
    rotten = bytearray(whole := path.read_bytes())
    rotten[-40] ^= 1  # in the last number: of its mantissa
    path.write_bytes(rotten)
    np.testing.assert_array_equal(read()[0], made)
    assert path.read_bytes() == whole
    assert said[-2] == f"{path}: can't be read (its checksum differs): making it again"
    other, _ = read(params=jax.tree.map(lambda x: x * 1.01, params))
    assert np.abs(other - made).max() > 1e-3
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_a_wish_to_stop_is_granted_between_batches_and_nothing_is_kept(read, tmp_path):
    """SIGTERM while the reference read was heard after its last batch, hours later."""
    asked = []

    def pause():
        asked.append(None)
        if len(asked) == 2:
            raise StopRequested("stopped while reading", 15)

    with pytest.raises(StopRequested):
        read(pause=pause)
    assert len(asked) == 2
    assert not (tmp_path / "kept").exists()
    read(pause=lambda: asked.append(None))
    assert len(asked) == 2 + 2  # three examples in batches of two


def test_alignment_has_the_reading_ask_for_a_wish_to_stop(monkeypatch):
    def stopped(where):
        raise StopRequested(f"stopped {where}", 15)

    monkeypatch.setattr("pujax.run.fit.with_reference", lambda *_, pause, **__: pause())
    run: Any = SimpleNamespace(config=TrainConfig(), mesh=make_mesh(), model=None, base=None)
    run.data, run.say, run.pause = DATA, print, stopped
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, {"embed": jnp.zeros((8, 1))}, (), zero)
    needs = Needs(anchor=True, reference=True)
    with pytest.raises(StopRequested, match="while reading with the reference"):
        aligned(run, recipe(needs=needs), losses.grpo, state.params, ("sft", 1), state, 0)


def test_a_step_is_given_the_log_probs_of_its_own_examples(read):
    made, _ = read()
    known = Dataset(**{**vars(DATA), "ref_logps": made})
    examples, batch = batch_at(known, 2, (0,), 0)
    rows = [int(e.prompt.id) for e in examples]
    np.testing.assert_array_equal(batch.ref_logps, made[rows])


def test_no_minute_is_silent_while_given_responses_are_read(read, monkeypatch):
    monkeypatch.setattr(reference, "waited", partial(waited, every=0.01))
    _, said = read()
    first, *later = said
    assert first == "reading 3 prompts' given responses with the reference, once"
    assert later[0] == "reading given responses: still at it, 0:00 by now, 0 of 3"
