import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from pujax.config.compose import conf_dir, from_hydra, register
from pujax.config.settings import TrainConfig
from pujax.errors import ConfigError, DiskError
from pujax.files.settings import keep_settings, kept_settings
from pujax.run.directory import finished, run_directory, traces

register("train_schema", TrainConfig)


def config_of(*overrides):
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        composed = compose("train", overrides=["+experiment=smoke", *overrides])
    return from_hydra(TrainConfig, composed)


def begun(*overrides):
    """The directory of a run that was begun and left."""
    with run_directory(config_of(*overrides)) as directory:
        return directory


def test_a_run_of_the_same_settings_that_is_not_done_is_gone_on_with(tmp_path):
    first = begun(f"run.root={tmp_path}")
    assert begun(f"run.root={tmp_path}") == first
    (first / "done").touch()
    assert begun(f"run.root={tmp_path}") != first


@pytest.mark.parametrize("name", ["[exp]", "what?", "a*"])
@pytest.mark.parametrize("key", ["run.root", "run.dir"])
def test_a_place_whose_checkpoints_could_not_be_read_again_is_refused(tmp_path, key, name):
    with pytest.raises(ConfigError, match=r"has one of \* \? \[ in it.*choose another place"):
        begun(f"{key}='{tmp_path}/{name}/run'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("data.system=say hush-hush-9 to none", "data.system"),
        ("data.system=${oc.env:THEIR_TOKEN}", "data.system"),
        ("model.path=hf_0123456789abcdefgh", "model.path"),
        ("+labels.api_key=abc", "labels.api_key"),
        ("trusted=[mine,hush-hush-9]", "trusted"),
        ("+scorer.score.of={a: [{b: hush-hush-9}]}", "scorer.score.of.a.b"),
        ("run.name=Hush-Hush-9", "run.name"),
    ],
)
def test_secrets_in_settings_are_refused_unshown_since_a_run_writes_its_settings(
    tmp_path, monkeypatch, given, key
):
    monkeypatch.setenv("THEIR_TOKEN", "hush-hush-9")
    with pytest.raises(ConfigError, match=rf"{key} (holds|takes) .*take it out") as refused:
        begun(f"run.root={tmp_path}/runs", given)
    value = given.partition("=")[2]
    assert "hush-hush-9" not in str(refused.value).lower()
    assert value not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_secret_too_short_to_be_found_in_a_text_is_refused_by_its_variables_name(monkeypatch):
    monkeypatch.setenv("ONCE_TOKEN", "hush4")
    with pytest.raises(ConfigError, match="takes the environment variable ONCE_TOKEN"):
        config_of("data.system='say ${oc.env:ONCE_TOKEN}'")
    monkeypatch.setenv("HOUSE_RULES", "Be brief.")
    assert config_of("data.system=${oc.env:HOUSE_RULES}").data.system == "Be brief."


def test_words_that_a_key_could_begin_with_are_no_secret(tmp_path):
    begun(f"run.root={tmp_path}", "data.system=Basic arithmetic.")


def test_another_seed_begins_another_run(tmp_path):
    first = begun(f"run.root={tmp_path}")
    second = begun(f"run.root={tmp_path}", "seed=1")
    assert first != second


def test_resume_never_begins_another_run(tmp_path):
    first = begun(f"run.root={tmp_path}")
    assert begun(f"run.root={tmp_path}", "resume=never") != first


def test_going_on_with_other_settings_is_refused_by_key(tmp_path):
    where = f"run.dir={tmp_path}/run"
    begun(where)
    with pytest.raises(ConfigError, match=r"align\.lr was 0\.001, is 0\.5"):
        begun(where, "align.lr=0.5")
    begun(where, "eval.every=7")  # touches no number of the training


def test_going_on_with_a_run_that_is_done_is_an_error(tmp_path):
    where = f"run.dir={tmp_path}/run"
    (begun(where) / "done").touch()
    with pytest.raises(ConfigError, match=r"is done: choose another run.dir"):
        begun(where)


def test_who_set_no_directory_is_not_told_to_choose_another(tmp_path):
    first = begun(f"run.root={tmp_path}")
    again = (f"run.root={tmp_path}", f"resume={first}")
    with run_directory(config_of(*again)), pytest.raises(ConfigError) as used:
        begun(*again)
    with pytest.raises(ConfigError) as other:
        begun(*again, "seed=1")
    (first / "done").touch()
    with pytest.raises(ConfigError) as done:
        begun(*again)
    for said in (used, other, done):
        assert str(said.value).endswith("set resume=never for a new run")
        assert "run.dir" not in str(said.value)


def test_resuming_from_where_no_run_is_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no run there .*: choose auto, never or the dir"):
        begun(f"resume={tmp_path}/none")


def test_resuming_from_a_folder_of_runs_names_one_to_go_on_with(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        keep_settings(tmp_path / name, {})
    (tmp_path / "c" / "done").touch()
    with pytest.raises(
        ConfigError, match=rf"no run there.*: 2 unfinished runs in it: give resume={tmp_path}/b"
    ):
        begun(f"resume={tmp_path}")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("eval.prompts=3", "eval.prompts was 8, is 3"),
        ("teacher.model=other", "teacher.model was None, is 'other'"),
        ("data.system=Hi", "data.system was None, is 'Hi'"),
    ],
)
def test_what_changes_numbers_is_refused_on_going_on(tmp_path, override, named):
    begun(f"run.dir={tmp_path}/run")
    with pytest.raises(ConfigError, match=named):
        begun(f"run.dir={tmp_path}/run", override)


@pytest.mark.parametrize(
    "override",
    ["checkpoint.every=7", "eval.every=3", "eval.batch=2", "collect.retries=1", "mesh.data=1"],
)
def test_what_changes_no_number_may_change_and_is_recorded(tmp_path, override):
    directory = begun(f"run.dir={tmp_path}/run")
    begun(f"run.dir={tmp_path}/run", override)
    key, _, value = override.partition("=")
    stored = kept_settings(directory)
    group, name = key.split(".")
    assert stored[group][name] == int(value)
    assert stored == asdict(config_of(f"run.dir={tmp_path}/run", override))


@pytest.mark.parametrize("override", ["eval.every=3", "eval.batch=2", "eval.patience=1"])
def test_what_decides_on_the_best_state_may_not_change_where_one_is_chosen(tmp_path, override):
    where = (f"run.dir={tmp_path}/run", "checkpoint.best=exact", "eval.every=2")
    begun(*where)
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        begun(*where, override)
    with pytest.raises(ConfigError, match=r"checkpoint\.best was 'exact', is None"):
        begun(*where[::2])
    begun(*where, "checkpoint.every=7")


def test_a_run_in_use_is_refused_by_process_and_passed_over_by_auto(tmp_path):
    config = config_of(f"run.root={tmp_path}")
    with run_directory(config) as first:
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}: wait"):
            begun(f"run.dir={first}")
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}: wait"):
            begun(f"resume={first}")
        assert begun(f"run.root={tmp_path}") != first
    (begun(f"run.root={tmp_path}") / "done").touch()  # the newer one, free again
    assert begun(f"run.root={tmp_path}") == first


def test_a_run_that_begins_beside_one_in_use_or_leaves_one_behind_says_so(tmp_path, capsys):
    config = config_of(f"run.root={tmp_path}")
    with run_directory(config) as first:
        assert capsys.readouterr().out == ""
        second = begun(f"run.root={tmp_path}")
        assert capsys.readouterr().out == (
            f"{first} is in use by process {os.getpid()}: a new run begins beside it "
            f"(resume={first} once that one has stopped)\n"
        )
        begun(f"run.root={tmp_path}", "resume=never", "seed=1")  # as it was told, or of others
        begun(f"run.root={tmp_path}", "seed=1")
        assert capsys.readouterr().out == ""
    with run_directory(config) as same:
        assert same == second
        assert capsys.readouterr().out == (
            f"another unfinished run of these settings: {first} (resume={first} goes on with it)\n"
        )
        assert begun(f"run.root={tmp_path}") == first
        assert capsys.readouterr().out == (
            f"{second} is in use by process {os.getpid()}: {first} is gone on with beside it\n"
        )
    (second / "done").touch()
    begun(f"run.root={tmp_path}")
    assert capsys.readouterr().out == ""


def test_a_run_that_begins_for_a_setting_that_was_changed_says_which(tmp_path, capsys):
    first = begun(f"run.root={tmp_path}")
    second = begun(f"run.root={tmp_path}", "align.steps=7", "sft.steps=7", "align.lr=.7", "seed=7")
    told = capsys.readouterr().out
    assert told.startswith(
        f"a new run begins: of other settings is the unfinished one in {first} (align.lr was "
    )
    assert told.endswith("; and 1 more), which goes on where these are set back\n")
    (second / "done").touch()
    with run_directory(config_of(f"resume={first}")):  # somebody is at it
        capsys.readouterr()
        (begun(f"run.root={tmp_path}", "seed=3") / "done").touch()
        assert capsys.readouterr().out == ""
    with run_directory(config_of(f"run.root={tmp_path}", "seed=1"), {"seed": "1"}):  # of a sweep
        assert capsys.readouterr().out == ""
    (first / "done").touch()
    begun(f"run.root={tmp_path}", "seed=1")
    assert "begins" not in capsys.readouterr().out


def test_a_run_whose_lock_file_was_deleted_is_in_use_all_the_same(tmp_path):
    with run_directory(config_of(f"run.dir={tmp_path}/run")) as directory:
        for _ in range(2):
            (directory / ".lock").unlink()
            with pytest.raises(ConfigError, match=r"in use by another process: wait"):
                begun(f"run.dir={directory}")
    begun(f"run.dir={directory}")


def test_a_file_system_that_locks_no_folders_will_do(tmp_path, monkeypatch):
    real = fcntl.flock

    def flock(descriptor, how):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor, how)

    monkeypatch.setattr("pujax.run.directory.fcntl.flock", flock)
    where = f"run.dir={tmp_path}/run"
    held = pytest.raises(ConfigError, match=f"in use by process {os.getpid()}: wait")
    with run_directory(config_of(where)), held:
        begun(where)


def test_a_killed_process_holds_its_run_no_longer(tmp_path):
    code = (
        "import sys, time; sys.path[:0] = ['tests', 'tests/run']\n"
        "from test_directory import config_of, run_directory\n"
        f"with run_directory(config_of('run.dir={tmp_path}/run')):\n"
        "    print('in', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "in\n"
    with pytest.raises(ConfigError, match=f"in use by process {holder.pid}"):
        begun(f"run.dir={tmp_path}/run")
    holder.kill()
    holder.communicate()
    assert begun(f"run.dir={tmp_path}/run") == tmp_path / "run"


def test_twenty_runs_begun_in_one_second_get_twenty_directories(tmp_path):
    config = config_of(f"run.root={tmp_path}", "resume=never")

    def begin(_):
        with run_directory(config) as directory:
            return directory

    with ThreadPoolExecutor(20) as pool:
        made = list(pool.map(begin, range(20)))
    assert len(set(made)) == 20


HUGE = f"seed: 0x{'f' * 5000}"


@pytest.mark.parametrize("content", ["", "a: [1", "- 1\n", "\0\0", "\ud800", "a: &a [*a]", HUGE])
def test_what_is_no_runs_settings_blocks_no_other_run_and_is_named(tmp_path, content):
    sibling = tmp_path / "smoke" / "2999-01-01_00-00-00"
    sibling.mkdir(parents=True)
    (sibling / "config.yaml").write_bytes(content.encode(errors="surrogatepass"))
    first = begun(f"run.root={tmp_path}")
    assert begun(f"run.root={tmp_path}") == first
    with pytest.raises(ConfigError, match=r"config\.yaml: .*: move .* away"):
        begun(f"run.dir={sibling}")


BOMB = "".join(f"{a}: &{a} [{', '.join([f'*{b}'] * 9)}]\n" for b, a in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    "content",
    [
        *(f"a: &a x\n{BOMB}", "a: !!bool x", "a: !!int ''", "a: !!timestamp x"),
        *(r'a: "\UFFFFFFFF"', f"a: {'1:' * 400}1.5", HUGE),
    ],
)
def test_settings_that_no_yaml_of_ours_holds_are_one_line(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml: not settings \(.*\): restore it"):
        kept_settings(tmp_path)


def test_a_disk_that_is_full_at_the_start_leaves_no_settings(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pujax.files.durable.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            begun(f"run.dir={tmp_path}/run")
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert begun(f"run.dir={tmp_path}/run")


def test_never_resuming_on_a_used_directory_says_what_to_do_and_touches_nothing(tmp_path):
    directory = begun(f"run.dir={tmp_path}/run", "seed=3")
    before = (directory / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"resume=never begins one: move it away"):
        begun(f"run.dir={tmp_path}/run", "resume=never")
    assert (directory / "config.yaml").read_bytes() == before


def test_a_setting_that_is_younger_than_the_run_counts_as_its_default(tmp_path):
    directory = begun(f"run.dir={tmp_path}/run")
    stored = yaml.safe_load((directory / "config.yaml").read_text())
    del stored["optim"]["max_skipped"], stored["data"]["on_too_long"]
    (directory / "config.yaml").write_text(json.dumps(stored))
    begun(f"run.dir={directory}")
    (directory / "config.yaml").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"optim\.max_skipped was 3, is 5"):
        begun(f"run.dir={directory}", "optim.max_skipped=5")


def test_a_metric_that_came_later_is_younger_than_the_run_and_another_is_one_more(tmp_path):
    directory = begun(f"run.dir={tmp_path}/run")
    stored = yaml.safe_load((directory / "config.yaml").read_text())
    del stored["eval"]["metrics"]["pair_accuracy"], stored["eval"]["metrics"]["pair_margin"]
    (directory / "config.yaml").write_text(json.dumps(stored))
    begun(f"run.dir={directory}")
    (directory / "config.yaml").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"eval\.metrics\.distinct_2\.\S+ was None"):
        begun(f"run.dir={directory}", "+eval=distinct_2")
    with pytest.raises(ConfigError, match=r"eval\.metrics\.exact\.digits was 3, is 2"):
        begun(f"run.dir={directory}", "eval.metrics.exact.digits=2")
    del stored["eval"]["metrics"]["rouge_l"]  # which was there from the beginning: left out
    (directory / "config.yaml").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"eval\.metrics\.rouge_l\.\S+ was None"):
        begun(f"run.dir={directory}")


@pytest.mark.parametrize("name", ["pujax.losses.dpo", "pujax.method.losses.dpo"])
def test_a_function_that_has_moved_since_the_run_began_is_the_same(tmp_path, name):
    where = f"run.dir={tmp_path}/run", "loss=dpo"
    directory = begun(*where)
    stored = yaml.safe_load((directory / "config.yaml").read_text())
    stored["loss"]["_target_"] = name
    (directory / "config.yaml").write_text(json.dumps(stored))
    begun(*where)
    begun(*where, f"loss._target_={name}")  # as a YAML of the user's own still has it


def test_a_run_that_fails_before_anything_is_in_it_leaves_no_directory(tmp_path):
    def fails(*overrides, leaves=""):
        places = []
        with suppress(KeyError), run_directory(config_of(*overrides), {"seed": "1"}) as directory:
            assert (directory / "config.yaml").exists()
            places.append(directory)
            if leaves:
                (directory / leaves).touch()
            raise KeyError
        return places[0]

    assert not fails(f"run.root={tmp_path}").exists()
    assert not fails(f"run.dir={tmp_path}/run").exists()
    fails(f"run.root={tmp_path}/a/b")
    fails(f"run.dir={tmp_path}/c/run")
    assert list(tmp_path.iterdir()) == []  # nor the folders that it was to lie in
    mine = tmp_path / "mine"
    mine.mkdir()
    fails(f"run.dir={mine}")
    assert list(mine.iterdir()) == []
    begun(f"run.dir={mine}")
    assert (fails(f"run.dir={mine}") / "config.yaml").exists()  # it was there before
    assert fails(f"run.root={tmp_path}", leaves="inputs.json").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "samples.jsonl", "eval-sft.jsonl", "export/notes.txt", "done"),
        *("checkpoints/1/x", "reference.json", "best/x", "table.md", ".lock"),
    ],
)
def test_a_directory_with_files_where_a_run_would_write_is_refused_as_it_is(tmp_path, name):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    (tmp_path / "mine" / "notes.txt").write_text("no matter")
    with pytest.raises(ConfigError, match=rf"has {name.partition('/')[0]} in it.*move it away"):
        begun(f"run.dir={tmp_path}/mine")
    assert path.read_text() == "precious"
    found = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    assert {file.name for file in found} == {path.name, "notes.txt"}
    path.unlink()
    if path.parent == tmp_path / "mine":
        begun(f"run.dir={tmp_path}/mine")


def test_a_failed_start_leaves_the_log_that_its_shell_wrote(tmp_path):
    place, log = tmp_path / "mine", tmp_path / "mine" / "output.log"
    place.mkdir()
    log.write_text("train: no such prompts\n")
    with pytest.raises(DiskError), run_directory(config_of(f"run.dir={place}")):
        raise DiskError("no such prompts")
    assert [path.name for path in place.iterdir()] == ["output.log"]
    assert log.read_text() == "train: no such prompts\n"


def test_no_run_is_begun_over_a_folder_of_runs_which_it_would_hide(tmp_path):
    run = begun(f"run.root={tmp_path}")
    before = sorted(run.parent.rglob("*"))
    with pytest.raises(ConfigError, match=rf"is a folder of runs, {run.name} one of them.*its own"):
        begun(f"run.dir={run.parent}")
    assert sorted(run.parent.rglob("*")) == before
    assert begun(f"run.dir={run.parent}/mine") == run.parent / "mine"


@pytest.mark.parametrize(
    ("key", "place", "why"),
    [
        ("run.dir", "file", "File exists"),
        ("run.root", "file/x", "Not a directory"),
        ("run.root", "x" * 300, "File name too long"),
    ],
)
def test_a_place_where_no_folder_can_be_made_is_told_with_what_to_do(tmp_path, key, place, why):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=rf"can't be written \({why}\): (move away|choose a)"):
        begun(f"{key}={tmp_path}/{place}")


def test_the_lock_that_a_killed_process_left_is_no_file_of_others(tmp_path):
    for pid in ("", "12345"):
        (tmp_path / ".lock").write_text(pid)
        begun(f"run.dir={tmp_path}")
        (tmp_path / "config.yaml").unlink()


def test_whatever_a_run_left_shows_that_it_has_begun(tmp_path):
    begun(f"run.dir={tmp_path}")
    (tmp_path / "notes.txt").touch()
    assert traces(tmp_path) == []
    (tmp_path / "eval-base.jsonl").touch()  # which another run may have made
    assert traces(tmp_path) == []
    for name in ("reference", "checkpoints"):
        (tmp_path / name).mkdir()
    assert traces(tmp_path) == ["checkpoints", "reference"]


def test_a_label_is_part_of_the_name(tmp_path):
    with run_directory(
        config_of(f"run.root={tmp_path}"), {"seed": "1", "data.system": "a/b, ç"}
    ) as directory:
        assert directory.name[19:] == "_seed=1_data.system=a-b-ç"
    with run_directory(config_of(f"run.root={tmp_path}", "seed=1"), {"k": "ç" * 300}) as directory:
        assert directory.name[19:] == "_k=" + "ç" * 74


def test_a_job_of_a_sweep_that_is_done_is_known_by_its_settings_and_by_what_was_swept(tmp_path):
    root = f"run.root={tmp_path}"
    apart = {"seed": "1", "mesh.data": "1"}
    job = config_of(root, "seed=1", "mesh.data=1")
    with run_directory(job, apart) as directory:
        assert json.loads((directory / "swept.json").read_text()) == apart
    assert finished(job, apart) is None
    with run_directory(job, apart) as same:  # a killed one is gone on with
        assert same == directory
    (directory / "done").touch()
    assert finished(job, apart) == directory
    assert finished(config_of(root, "seed=2", "mesh.data=1"), apart | {"seed": "2"}) is None
    other = config_of(root, "seed=1", "mesh.data=8")  # touches no number, but is what was swept
    assert finished(other, apart | {"mesh.data": "8"}) is None
    assert finished(other, {"seed": "1"}) == directory


def test_a_job_of_a_sweep_that_is_being_done_is_not_begun_again(tmp_path):
    config = config_of(f"run.root={tmp_path}", "seed=1")
    with (
        run_directory(config, {"seed": "1"}),
        pytest.raises(ConfigError, match="in use by process"),
        run_directory(config, {"seed": "1"}),
    ):
        pass


@pytest.mark.parametrize("text", ["1e3", "null", "été", "a: b", "${HOME}", "cost ${", "\u2028"])
def test_settings_are_read_as_they_were_kept(tmp_path, text):
    twice = [text, 1.5e38]  # is written twice: an alias would not be read
    settings = {"lr": 1e-5, "data": {"system": text, "prompts": twice, "others": twice}, "n": None}
    keep_settings(tmp_path, settings)
    assert kept_settings(tmp_path) == settings
