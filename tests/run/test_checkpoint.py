import errno
import json
import logging
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh
from split_step import begun, laid, steps

from pujax.errors import CheckpointError, DiskError
from pujax.models.parameters import AXES
from pujax.models.sharding import make_mesh, tree_shardings
from pujax.run.checkpoint import Checkpoints, Place
from pujax.run.student import placed
from pujax.types import TrainState

MODEL = {"family": "llama", "width": 8}


def make_state(value=1.0, devices=None) -> Any:
    params = {"embed": jnp.full((8, 4), value), "layers": {"q": jnp.full((2, 4, 8), value)}}
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    state = TrainState(step, params, optax.adam(1e-3).init(params), skipped)
    if devices is not None:
        return jax.device_put(state, tree_shardings(make_mesh(*devices), state))
    return state


@flax.struct.dataclass
class Headless:
    """A `TrainState` of before there were heads, which is how one without a head is stored."""

    step: Any
    params: Any
    opt_state: Any
    skipped: Any


def headless(state):
    return Headless(state.step, state.params, state.opt_state, state.skipped)


@pytest.fixture
def said():
    return []


@pytest.fixture
def checkpoints(tmp_path, said) -> Any:
    opened = Checkpoints(tmp_path, keep=2, model=MODEL, say=said.append)
    yield opened
    opened.close()


def assert_same(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_newest_state_comes_back_bit_for_bit_with_its_place(checkpoints):
    assert checkpoints.newest(make_state()) is None
    checkpoints.save(10, Place("sft", 10), make_state(1 / 3))
    checkpoints.save(12, Place("align", 2), make_state(2 / 3))
    place, state = checkpoints.newest(make_state())
    assert place == Place("align", 2)
    assert_same(state, make_state(2 / 3))


def test_a_checkpoint_of_before_there_were_heads_is_read(checkpoints):
    now = make_state(1 / 3)
    checkpoints.save(1, Place("sft", 1), headless(now))
    place, state = checkpoints.newest(make_state())
    assert (place, state.head) == (Place("sft", 1), None)
    assert_same(state, now)


def test_only_the_newest_are_kept(checkpoints, tmp_path):
    for number in (1, 2, 3):
        checkpoints.save(number, Place("sft", number), make_state(number))
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"2", "3"}


def test_saving_the_same_step_again_is_no_error(checkpoints):
    checkpoints.save(1, Place("sft", 1), make_state(1.0))
    checkpoints.save(1, Place("sft", 1), make_state(1.0))


@pytest.mark.parametrize(("saved", "restored"), [((8, 1, 1), (2, 2, 2)), ((2, 4, 1), (1, 8, 1))])
def test_a_state_saved_on_one_mesh_is_restored_on_another(checkpoints, saved, restored):
    checkpoints.save(1, Place("sft", 1), make_state(0.5, saved))
    target = make_state(0.0, restored)
    _, state = checkpoints.newest(target)
    assert_same(state, make_state(0.5))
    assert state.params["embed"].sharding == target.params["embed"].sharding


def test_a_checkpoint_of_another_model_is_refused_by_name(checkpoints, tmp_path):
    checkpoints.save(1, Place("sft", 1), make_state())
    other = Checkpoints(tmp_path, keep=2, model=MODEL | {"width": 16})
    with pytest.raises(CheckpointError, match=r"another model .width 8 there, 16 here"):
        other.newest(make_state())
    other.close()


def test_a_damaged_checkpoint_is_named_with_what_to_do(checkpoints, tmp_path):
    checkpoints.save(1, Place("sft", 1), make_state())
    for path in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"checkpoints/1 can't be read.*remove that folder"):
        checkpoints.newest(make_state())


def test_a_full_disk_is_said_before_writing_and_the_last_good_one_survives(
    checkpoints, monkeypatch
):
    checkpoints.save(1, Place("sft", 1), make_state(1.0))
    full = type("Usage", (), {"free": 100})
    monkeypatch.setattr("pujax.run.checkpoint.shutil.disk_usage", lambda path: full)
    with pytest.raises(CheckpointError, match=r"MiB are free; the last good one is 1: make room"):
        checkpoints.save(2, Place("sft", 2), make_state(2.0))
    assert_same(checkpoints.newest(make_state())[1], make_state(1.0))


def test_a_write_that_fails_halfway_leaves_the_last_good_one(checkpoints, tmp_path, monkeypatch):
    checkpoints.save(1, Place("sft", 1), make_state(1.0))

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.raises(CheckpointError, match=r"checkpoint 2 could not be written.*No space left"):
        checkpoints.save(2, Place("sft", 2), make_state(2.0))
    reopened = Checkpoints(tmp_path, keep=2, model=MODEL)
    found = reopened.newest(make_state())
    assert found is not None
    place, state = found
    assert place == Place("sft", 1)
    assert_same(state, make_state(1.0))
    reopened.close()


@pytest.mark.parametrize("name", ["absl", "asyncio"])
def test_what_orbax_logs_of_a_failure_stands_above_no_line(name, caplog):
    log = logging.getLogger(name)
    caplog.set_level(logging.WARNING, logger=name)
    log.addHandler(caplog.handler)  # absl's hands nothing on
    log.error("Thread 1 raised an exception: No space left on device")
    log.error("Task exception", exc_info=OSError(28, "No space left on device"))
    log.warning("something else")
    log.removeHandler(caplog.handler)
    assert set(caplog.messages) == {"something else"}


def test_the_reference_is_written_once_and_comes_back(checkpoints):
    params = make_state(0.25).params
    checkpoints.save_reference(params)
    checkpoints.save_reference(make_state(9.0).params)
    assert_same(checkpoints.restore_reference(make_state().params), params)


def test_of_several_runs_in_threads_one_at_a_time_is_at_its_disk(tmp_path, monkeypatch):
    at_work, most, counted = set[int](), set[int](), threading.Lock()

    def watched(method):
        def call(*arguments, **named):
            me = threading.get_ident()
            with counted:
                at_work.add(me)
                most.add(len(at_work))
            time.sleep(0.02)
            try:
                return method(*arguments, **named)
            finally:
                with counted:
                    at_work.discard(me)

        return call

    for owner, names in (
        (ocp.StandardCheckpointer, ("save", "restore", "close")),
        (ocp.CheckpointManager, ("save", "restore", "close")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, watched(getattr(owner, name)))

    def use(run):
        state = make_state(float(run))
        (tmp_path / str(run)).mkdir()
        checkpoints = Checkpoints(tmp_path / str(run), keep=2, model=MODEL)
        for number in range(2):
            checkpoints.save(number, Place("sft", number), state)
        checkpoints.save_reference(state.params)
        assert_same(checkpoints.restore_reference(make_state().params), state.params)
        found = checkpoints.newest(make_state())
        assert found is not None
        assert_same(found[1], state)
        checkpoints.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    assert most == {1}


def test_a_missing_reference_is_named(checkpoints):
    with pytest.raises(CheckpointError, match=r"reference can't be read.*resume=never"):
        checkpoints.restore_reference(make_state().params)


def flip(folder):
    """Flip one bit of the largest file under `folder`: where its numbers are."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewrite(path, tree):
    """Put `tree` in place of what Orbax wrote at `path`: whole, but not what was saved."""
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, tree, force=True)


def test_a_checkpoint_whose_numbers_changed_is_said_and_the_one_before_it_taken(
    checkpoints, said, tmp_path
):
    checkpoints.save(1, Place("sft", 1), make_state(1.0))
    checkpoints.save(2, Place("align", 1), make_state(2.0))
    rewrite(tmp_path / "checkpoints" / "2" / "state", headless(make_state(2.5)))
    place, state = checkpoints.newest(make_state())
    assert place == Place("sft", 1)
    assert_same(state, make_state(1.0))
    (line,) = said
    assert "checkpoints/2 is damaged" in line
    assert "going on from the one before it, 1" in line
    checkpoints.save(2, Place("align", 1), make_state(2.0))  # the same number again
    place, state = checkpoints.newest(make_state())
    assert place == Place("align", 1)
    assert_same(state, make_state(2.0))


@pytest.mark.parametrize("what", ["state", "meta", ""])
def test_flipped_bits_and_lost_files_never_pass_for_what_was_saved(
    checkpoints, said, tmp_path, what
):
    checkpoints.save(1, Place("sft", 1), make_state(1.0))
    checkpoints.save(2, Place("sft", 2), make_state(2.0))
    if what:
        flip(tmp_path / "checkpoints" / "2" / what)
    else:
        shutil.rmtree(tmp_path / "checkpoints" / "2" / "state")
    place, state = checkpoints.newest(make_state())
    if place == Place("sft", 2):  # a bit that means nothing
        assert_same(state, make_state(2.0))
    else:
        assert_same(state, make_state(1.0))
        assert len(said) == 1


def test_a_place_that_is_not_the_saved_one_is_damage(checkpoints, said, tmp_path):
    checkpoints.save(1, Place("sft", 1), make_state(1.0))
    checkpoints.save(2, Place("sft", 2), make_state(2.0))
    (path,) = (p for p in (tmp_path / "checkpoints" / "2" / "meta").iterdir() if "meta" in p.name)
    path.write_text(
        path.read_text().replace('"step": 2', '"step": 8').replace('"step":2', '"step":8')
    )
    assert checkpoints.newest(make_state())[0] == Place("sft", 1)
    assert "place" in said[0]


def test_a_checkpoint_of_a_pujax_without_checksums_is_taken(checkpoints, monkeypatch):
    monkeypatch.setattr("pujax.run.checkpoint.checksums", lambda tree: {})
    monkeypatch.setattr("pujax.run.checkpoint._sealed", lambda place: {})
    checkpoints.save(1, Place("sft", 1), make_state(1.0))
    monkeypatch.undo()
    assert checkpoints.newest(make_state()) is not None


def test_a_reference_whose_numbers_changed_is_refused_with_what_to_do(checkpoints, tmp_path):
    checkpoints.save_reference(make_state(0.25).params)
    rewrite(tmp_path / "reference", make_state(0.5).params)
    with pytest.raises(CheckpointError, match=r"reference can't be read .*damaged.*resume=never"):
        checkpoints.restore_reference(make_state().params)


def test_a_reference_whose_checksums_are_gone_is_said(checkpoints, said, tmp_path):
    checkpoints.save_reference(make_state(0.25).params)
    (tmp_path / "reference.json").unlink()
    checkpoints.restore_reference(make_state().params)
    (line,) = said
    assert "reference.json is not there" in line


def meta_of(directory, number):
    return directory / "checkpoints" / str(number) / "meta" / "metadata"


@pytest.mark.parametrize(
    ("was", "is_"),
    [
        ('"width": 8', '"width": 9'),
        ("llama", "lmama"),
        ('"width"', '"vidth"'),
        ('"checksum"', '"bhecksum"'),
        ('"checksums"', '"bhecksums"'),
        ('"stage"', '"rtage"'),
        ('"align"', '"blign"'),
    ],
)
def test_a_bit_changed_anywhere_in_the_meta_is_damage(checkpoints, said, tmp_path, was, is_):
    checkpoints.save(1, Place("sft", 1), make_state(1.0))
    checkpoints.save(2, Place("align", 1), make_state(2.0))
    text = meta_of(tmp_path, 2).read_text()
    assert text.count(was) == 1
    meta_of(tmp_path, 2).write_text(text.replace(was, is_))
    place, state = checkpoints.newest(make_state())
    assert place == Place("sft", 1)
    assert_same(state, make_state(1.0))
    assert "checkpoints/2" in said[0]


@pytest.mark.parametrize("had", [["checksums"], []])
def test_a_checkpoint_of_a_pujax_without_a_checksum_of_its_meta_is_taken(
    checkpoints, said, tmp_path, had
):
    checkpoints.save(1, Place("sft", 1), make_state(1.0))
    meta = json.loads(meta_of(tmp_path, 1).read_text())
    kept = {key: meta[key] for key in ("stage", "step", "model", *had)}
    meta_of(tmp_path, 1).write_text(json.dumps(kept))
    place, state = checkpoints.newest(make_state())
    assert place == Place("sft", 1)
    assert_same(state, make_state(1.0))
    assert said == []


def words(text):
    return ValueError(f'Error opening "zarr" driver: Failed to open "x": {text}')


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EACCES, "x"), "Permission denied"),
        (OSError(errno.ESTALE, "x"), "Stale file handle"),
        (words("Input/output error"), "Input/output error"),
        (words("Too many open files"), "Too many open files"),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_at_the_moment_stays(
    checkpoints, said, tmp_path, monkeypatch, error, told
):
    checkpoints.save(1, Place("sft", 1), make_state(1.0))
    checkpoints.save(2, Place("align", 1), make_state(2.0))

    def fail(*_, **__):
        raise ValueError("can't restore") from error

    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, "restore", fail)
        with pytest.raises(CheckpointError, match=rf"checkpoints/2 .*at the moment .{told}"):
            checkpoints.newest(make_state())
    assert said == []
    assert checkpoints.newest(make_state())[0] == Place("align", 1)


def test_a_file_that_the_system_does_not_give_is_no_damage(checkpoints, tmp_path, monkeypatch):
    """Whatever the libraries make of it."""
    checkpoints.save(1, Place("sft", 1), make_state(1.0))
    checkpoints.save(2, Place("align", 1), make_state(2.0))

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    meta_of(tmp_path, 2).write_text("{")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CheckpointError, match=r"at the moment .Permission denied"):
        checkpoints.newest(make_state())
    monkeypatch.undo()
    assert checkpoints.newest(make_state())[0] == Place("sft", 1)


def test_what_is_damaged_is_moved_aside_with_all_that_is_left_of_it(checkpoints, said, tmp_path):
    for _ in range(2):
        checkpoints.save(1, Place("sft", 1), make_state(1.0))
        checkpoints.save(2, Place("align", 1), make_state(2.0))
        meta_of(tmp_path, 2).write_text("{")
        assert checkpoints.newest(make_state())[0] == Place("sft", 1)
        assert checkpoints.numbers() == [1]
    assert {path.name for path in (tmp_path / "damaged").iterdir()} == {"2", "2-again"}
    for name, line in zip(("2", "2-again"), said, strict=True):
        assert line.endswith(f"what is left of it is in {tmp_path}/damaged/{name}")
        assert (tmp_path / "damaged" / name / "meta" / "metadata").read_text() == "{"
        assert any((tmp_path / "damaged" / name / "state").iterdir())


def test_what_stands_in_the_place_of_checkpoints_is_named_and_not_taken_for_none(
    tmp_path, monkeypatch
):
    def opened(place):
        return Checkpoints(place, keep=2, model=MODEL)

    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "checkpoints").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file/checkpoints: no folder.*move it away"):
        opened(tmp_path / "file").newest(make_state())
    (tmp_path / "closed" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may do what it likes
    with pytest.raises(CheckpointError, match=r"closed/checkpoints: can't be read and written"):
        opened(tmp_path / "closed").newest(make_state())
    (tmp_path / "file" / "best").write_text("mine")
    with pytest.raises(DiskError, match=r"best/sft-1 can't be written.*move away"):
        opened(tmp_path / "file").save_best("sft", 1, make_state().params)


def test_who_reads_what_alignment_started_from_leaves_the_run_as_it_was(checkpoints, tmp_path):
    checkpoints.save_reference(make_state(1 / 3).params)
    before = sorted(path.name for path in tmp_path.iterdir())
    reading = Checkpoints(tmp_path, keep=1, model={})
    reading.restore_reference(make_state().params)
    reading.close()
    assert (
        sorted(path.name for path in tmp_path.iterdir())
        == before
        == ["reference", "reference.json"]
    )


def test_what_another_run_saved_is_not_taken_for_a_runs_own(tmp_path):
    def saved(name):
        made = Checkpoints(tmp_path / name, keep=2, model=MODEL, mark=name, say=said.append)
        made.save(3, Place("sft", 3), make_state())
        made.save_reference(make_state().params)
        return made

    said: list[str] = []
    ours, theirs = saved("ours"), saved("theirs")
    theirs.save(4, Place("sft", 4), make_state())
    shutil.copytree(
        tmp_path / "theirs" / "checkpoints" / "4", tmp_path / "ours" / "checkpoints" / "4"
    )
    again = Checkpoints(tmp_path / "ours", keep=2, model=MODEL, mark="ours")
    with pytest.raises(CheckpointError, match=r"ours/checkpoints/4 was saved by another run: move"):
        again.newest(make_state())
    shutil.rmtree(tmp_path / "ours" / "reference")
    shutil.copytree(tmp_path / "theirs" / "reference", tmp_path / "ours" / "reference")
    shutil.copy(tmp_path / "theirs" / "reference.json", tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"ours/reference was saved by another run"):
        again.restore_reference(make_state().params)
    # Whoever has no mark, as a run of a pujax before, asks for none.
    unmarked = Checkpoints(tmp_path / "ours", keep=2, model=MODEL)
    found = unmarked.newest(make_state())
    assert found is not None
    assert found[0] == Place("sft", 4)
    for opened in (ours, theirs, again, unmarked):
        opened.close()
    assert said == []


def mesh_of(*sizes) -> Mesh:
    """A mesh over the first devices alone."""
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=jax.devices()[: prod(sizes)])


def test_a_run_goes_on_with_four_devices_and_then_two_step_by_step_as_with_one(tmp_path):
    """Whole on one, split by rows and by heads over four, whole on each of two."""
    one = mesh_of(1, 1, 1)
    last, expected = steps(one, laid(one, begun()), range(3))
    found = []
    for number, sizes in enumerate([(1, 1, 1), (1, 2, 2), (2, 1, 1)]):
        mesh, checkpoints = mesh_of(*sizes), Checkpoints(tmp_path, keep=1, model=MODEL)
        at, state = checkpoints.newest(placed(begun(), mesh)) or (None, laid(mesh, begun()))
        assert at == (Place("align", number) if number else None)
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {prod(sizes)}
        state, told = steps(mesh, state, range(number, number + 1))
        checkpoints.save(number + 1, Place("align", number + 1), state)
        checkpoints.close()
        found += told
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (state, last)), strict=True):
        scale = max(1.0, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * scale)
