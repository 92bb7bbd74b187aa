"""The wrapper of every command: what it says, and with which exit status."""

import errno
import importlib
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import cast

import cloudpickle  # joblib's, as Hydra's launchers use it
import jax
import pytest
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from omegaconf import OmegaConf
from rich.console import Console

from pujax import __version__, benchmark, chat, evaluate, export, generate, report
from pujax.__main__ import COMMANDS
from pujax.__main__ import main as entry
from pujax.config import commands, endings
from pujax.config.commands import command, secrets_hidden, swept
from pujax.config.compose import SILENT, WaryLoader, refuse_calls
from pujax.config.overrides import text_or_file
from pujax.config.settings import TrainConfig
from pujax.config.sweeps import note_done
from pujax.errors import ConfigError, DataError, StopRequested
from pujax.files.locate import locate
from pujax.inference.finished import model_path, source_of
from pujax.inference.serving import to_serve
from pujax.models.sharding import make_mesh
from pujax.run import beginning


def called(monkeypatch, act, *arguments, name="train"):
    """The exit status of a command that does `act` on train's settings."""
    monkeypatch.setattr(sys, "argv", [f"pujax {name}", *arguments])
    main = command(name, TrainConfig, act)
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "+loss.pattern=[a-",
            "loss.pattern: '[a-': close its brackets, as in [A,B] or {A: B}; a text with some in "
            "it is quoted twice, as in '+loss.pattern=\"[a-\"'",
        ),
        ("data.dimensions={x: [}", "data.dimensions: '{x: [}': close its brackets, as in [A,B] or"),
        (
            "data.heldout={dataset: json, data_files: [~/x, b]}",
            "quote the texts in it, as in 'data.heldout={dataset: json, data_files: [\"~/x\", b]}'",
        ),
        ("data.dimensions={x: two}", "data.dimensions.x: write a number, such as 0.5"),
        ("data.dimensions=[a]", "data.dimensions=[a]: a mapping is wanted, as in {NAME: VALUE}"),
        ("eval.metrics=exact", "eval.metrics=exact: a mapping is wanted, as in {NAME: VALUE}"),
        ("checkpoint.clean=maybe", "checkpoint.clean=maybe: write true or false"),
        ("sft=off", "sft=off: holds settings of its own: set those, as in sft.steps"),
        ("sft=null", "sft=null: holds settings of its own: set those, as in sft.steps"),
        ("sft=[3]", "sft=[3]: holds settings of its own: set those, as in sft.steps"),
        ("sft=${align}", "sft: holds settings of its own: set those, as in sft.steps"),
        ("data.gate=${seed}", "data.gate: holds settings of its own: set those, as in data.gate."),
        ("trusted=${seed}", "trusted: a list is wanted, as in [A] or [A,B]"),
        ("teacher.headers=${seed}", "teacher.headers: a mapping is wanted, as in {NAME: VALUE}"),
        ("~sft", "~sft: a setting can't be taken out: give it another value"),
        ("~sft.steps", "~sft.steps: a setting can't be taken out"),
        ("~sft.stepz", "sft.stepz: no such setting, did you mean sft.steps?"),
        ("loss=[[dpo]]", "loss=[[dpo]]: a choice is a name, see --help: give one"),
        ("loss=[null]", "loss=[null]: a choice is a name, see --help: give one"),
        ("align.steps=2.5", "align.steps=2.5: write a whole number in digits"),
        ("run.dir=", "run.dir='': name a folder"),
        ("align.stepz=3", "align.stepz: no such setting, did you mean align.steps?"),
        ("modle=smollm2_135m", "modle: no such setting, did you mean model?"),
        ("loss.betta=1", "loss.betta: no such setting, did you mean loss.beta?"),
        ("teacher.retries=3", "teacher.retries: no such setting, did you mean collect.retries?"),
        ("scorer.score.function._target_=mine.f", "_target_: no such setting: only a reward has a"),
        ("eval=nosuch", "no such choice (eval has anchor_logp, anchors,"),
        ("model=my-model", "; a folder, a file or a hub's name is model.path=my-model"),
        ("teacher.price.output=1,5", "write teacher.price.output=1.5"),
        ("+align.speed=1", "align.speed: no such setting: take it out"),
        ("loss=gpro", "loss=gpro: no such choice, did you mean grpo? (loss has cdpo, "),
        ("experiment=quikstart", "experiment=quikstart: no such choice, did you mean quickstart?"),
        ("align.steps=many", "align.steps=many: write a whole number in digits"),
        ("align.steps=3 align.steps=two", "align.steps=two: write a whole number"),
        ("align.steps=null", "align.steps=null: is never null: give it a value"),
        ("align", "'align': write it as KEY=VALUE"),
        ("+loss.x=étude", "+loss.x: can't read its value: quote it twice, as in '+loss.x=\"ét"),
        (
            'loss.x={"type": object}',
            "its names stand without quotes, as in 'loss.x={type: object}'",
        ),
        ("align.steps=1,2", "align.steps: a value with a comma: write 'align.steps=\"1,2\"'"),
        ("model.path=${oc.env:PUJAX_NONE}", "Environment variable 'PUJAX_NONE' not found: set it"),
        ("align.steps=-1", "align.steps=-1: must not be negative"),
        ("sampling.temperature=inf", "sampling.temperature=inf: must be positive and finite"),
        ("sampling.temperature=1e-40", "sampling.temperature=1e-40: must be positive and finite"),
        (
            "eval.temperature=1e-7",
            "eval.temperature=1e-07: must be positive and finite, 1e-06",
        ),
        ("sampling.top_p=1e-40", "sampling.top_p=1e-40: must lie in [1e-06, 1]: 1 is all tokens"),
        ("eval.temperature=inf", "eval.temperature=inf: must be positive and finite"),
    ],
)
def test_what_does_not_compose_is_one_line_with_the_nearest_that_does(
    monkeypatch, capsys, override, said
):
    words = override.split() if override.startswith("align.steps=3") else [override]
    status = called(monkeypatch, lambda _: pytest.fail("ran"), "+experiment=smoke", *words)
    assert status == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pujax.train: ")
    assert said in line
    assert not re.search(r"ydra|Config\b|Dict|Optional", line)


@pytest.mark.parametrize(
    ("function", "name", "said"),
    [
        ("pujax.rewards.regex", "pattern", "is not set yet: write +{key}="),
        (
            "pujax.rewards.regex",
            "patern",
            "no such setting, did you mean scorer.score.function.pat",
        ),
        ("pujax.rewards.exact", "pattern", "no such setting: take it out"),
        ("mine.f", "least", "is not set yet: write +{key}="),
        ("${nosuch}", "least", "is not set yet: write +{key}="),
        (f"pujax.{'a' * 300}.f", "least", "is not set yet: write +{key}="),
    ],
)
def test_a_functions_setting_that_its_file_lacks_is_added_with_a_plus(
    monkeypatch, capsys, function, name, said
):
    key = f"scorer.score.function.{name}"
    words = ["scorer=reward", f"scorer.score.function._target_={function}", f"{key}=3"]
    assert called(monkeypatch, lambda _: pytest.fail("ran"), "+experiment=smoke", *words) == 1
    assert f"{key}: {said.format(key=key)}" in capsys.readouterr().err


def test_what_is_unknown_in_a_whole_mapping_is_named(monkeypatch, capsys):
    for given, said in (
        (
            "scorer.score.function={_target_: pujax.rewards.regex, _partial_: true, pattern: x}",
            "scorer.score.function.pattern: is not set yet: write +scorer.score.function.pattern=",
        ),
        ("align={stepz: 1}", "align.stepz: no such setting, did you mean align.steps?"),
        ("model.lora={rnk: 1}", "model.lora.rnk: no such setting, did you mean model.lora.rank?"),
    ):
        words = ("scorer=reward", given)
        assert called(monkeypatch, lambda _: pytest.fail("ran"), "+experiment=smoke", *words) == 1
        assert said in capsys.readouterr().err


def test_a_setting_that_is_written_as_an_option_is_told_as_one(monkeypatch, capsys):
    for words, said in (
        (("--seed", "3"), "no option --seed: a setting is written seed=3: --hydra-help"),
        (("--max-steps=3",), "a setting is written max_steps=3"),
        (("--experiment", "x"), "no option --experiment: a setting is written experiment=x"),
        (("--resolve",), "--resolve: goes with --cfg job or --help"),
    ):
        assert called(monkeypatch, lambda _: pytest.fail("ran"), *words) in (1, 2)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (DataError("p.jsonl:3: no"), 1, "p.jsonl:3: no"),
        (StopRequested("stopped at 3", signal.SIGTERM), 143, "stopped at 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x"),
            1,
            "runs/x: No space left on device: make room and start the same command again",
        ),
    ],
)
def test_what_ends_a_command_gives_one_line_and_a_status(monkeypatch, capsys, error, status, said):
    def act(_):
        raise error

    assert called(monkeypatch, act, "experiment=smoke") == status
    assert capsys.readouterr().err == f"pujax.train: {said}\n"


@pytest.mark.parametrize(
    "act",
    [
        lambda path: locate(path),
        lambda path: text_or_file("prompt", f"@{path}"),
        lambda path: source_of(path, None),
        lambda path: model_path(path),
        lambda path: to_serve(path, None, kind="q8_0", say=print),
        lambda path: report.run(report.ReportConfig(run=path)),
        lambda path: export.run(export.ExportConfig(run=path, out="x")),
        lambda path: export.run(export.ExportConfig(model="x", out=path)),
        lambda path: generate.run(generate.GenerateConfig(run=path, prompt="x")),
        lambda path: evaluate.run(evaluate.EvaluateConfig(run=path)),
    ],
)
def test_the_home_of_nobody_is_one_line(monkeypatch, act):
    monkeypatch.setattr(generate, "compile_once", lambda: None)
    monkeypatch.setattr(evaluate, "compile_once", lambda: None)
    with pytest.raises(ConfigError, match=r"~nobody-at-all/x: no home directory .* the whole path"):
        act("~nobody-at-all/x")


def test_every_path_is_led_home_by_the_one_function():
    package = Path(commands.__file__).parents[1]
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if re.search(r"expanduser|Path\.home\(", file.read_text(encoding="utf-8"))
    }
    assert found == {"files/locate.py"}


@pytest.mark.parametrize("option", [["--cfg", "job", "--resolve"], ["--cfg", "all"], ["-i"]])
def test_settings_that_are_shown_hide_what_is_secret(monkeypatch, capsys, option):
    monkeypatch.setenv("ONCE_TOKEN", "out-of-the-env")
    words = [
        "data.reference_cache=${oc.env:ONCE_TOKEN}",
        "run.name=shown",
        "+run.password=typed-in",
    ]
    assert called(monkeypatch, print, "experiment=smoke", *option, *words) == 0
    said = capsys.readouterr().out
    assert "shown" in said
    assert "out-of-the-env" not in said
    assert "typed-in" not in said


CALLS = "{_target_: shutil.copyfile, src: %s, dst: %s}"
TRUNCATES = "{f: {class: logging.FileHandler, filename: %s, mode: w}}"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ("callbacks: {mine: CALLS}", "hydra.callbacks (mine)"),
        ("callbacks: '${loss}'", "hydra.callbacks"),
        ("job_logging: {handlers: TRUNCATES}", "hydra.job_logging"),
        ("hydra_logging: {formatters: {f: {(): shutil.copyfile, src: a}}}", "hydra.hydra_logging"),
        ("sweeper: {params: {mine: CALLS}}", "hydra.sweeper.params.mine._target_"),
        ("run: {dir: FOLDER}, output_subdir: '.'", "hydra.output_subdir"),
        ("job: {env_set: {LD_PRELOAD: FOLDER}}", "hydra.job.env_set (LD_PRELOAD): a command's env"),
        ("job: {env_copy: [A_TOKEN]}", "hydra.job.env_copy (A_TOKEN): a command's environment is"),
        ("job: {env_copy: [A_NONE]}", "hydra.job.env_copy (A_NONE): a command's environment is"),
        ("job: {chdir: true}", "hydra.job.chdir: a command works where it was started"),
        ("run: {dir: FOLDER}", "hydra.run.dir, hydra.job.chdir: a command works where it was st"),
    ],
)
def test_hydra_calls_and_writes_nothing_that_a_strangers_file_names(
    monkeypatch, capsys, tmp_path, settings, key
):
    """`hydra.callbacks._target_` was called before any check of ours, and handlers open files."""
    monkeypatch.setenv("A_TOKEN", "out-of-the-env")
    (tmp_path / "experiment").mkdir()
    source, thesis = tmp_path / "source", tmp_path / "config.yaml"
    for path in (source, thesis):
        path.write_text(path.name)
    written = settings
    for name, text in {
        "CALLS": CALLS % (source, thesis),
        "TRUNCATES": TRUNCATES % thesis,
        "FOLDER": str(tmp_path),
    }.items():
        written = written.replace(name, text)
    (tmp_path / "experiment" / "theirs.yaml").write_text(
        f"# @package _global_\ndefaults: [smoke]\nhydra: {{{written}}}\n"
    )
    given = ("+experiment=theirs", "--config-dir", str(tmp_path))
    for sweep in [(), *([("-m", "seed=0,1")] if "CALLS" in settings else [])]:
        assert called(monkeypatch, lambda _: pytest.fail("ran"), *given, *sweep) == 1
        said = capsys.readouterr().err
        assert key in said
        assert "out-of-the-env" not in said
    assert thesis.read_text() == "config.yaml"


def test_hydra_calls_nothing_that_is_typed(monkeypatch, capsys, tmp_path):
    made = tmp_path / "made"
    for word in (
        f"+hydra.callbacks.mine={CALLS % (__file__, made)}",
        f"+hydra.job_logging.handlers={TRUNCATES % made}",
        "hydra/job_logging=default",
        f"hydra.output_subdir={tmp_path}",
        "+hydra.job.env_set.LD_PRELOAD=x",
        "hydra.job.env_copy=[PUJAX_NONE]",
        f"hydra.run.dir={tmp_path / 'x'}",
    ):
        assert called(monkeypatch, lambda _: pytest.fail("ran"), "+experiment=smoke", word) == 1
        assert "take it out" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("hydra.searchpath=[pkg://mine]", "give the folder of your own YAML by --config-dir"),
        ("hydra.searchpath=[nope://mine]", "give the folder of your own YAML by --config-dir"),
        ("hydra.mode=MULTIRUN", "hydra.mode: add -m for a sweep, and leave it out for one run"),
    ],
)
def test_what_hydra_has_words_of_its_own_for_is_said(monkeypatch, capsys, word, said):
    assert called(monkeypatch, lambda _: pytest.fail("ran"), "+experiment=smoke", word) == 1
    assert said in capsys.readouterr().err


def test_no_file_makes_a_sweep_of_a_run(monkeypatch, tmp_path):
    """Hydra would write all settings below the working directory, and this masks none of them."""
    (tmp_path / "experiment").mkdir()
    theirs = tmp_path / "experiment" / "theirs.yaml"
    theirs.write_text("# @package _global_\ndefaults: [smoke]\nhydra: {mode: MULTIRUN}\n")
    monkeypatch.chdir(tmp_path)
    seen = []
    given = ("+experiment=theirs", "--config-dir", str(tmp_path))
    assert called(monkeypatch, lambda _: seen.append(swept()), *given) == 0
    assert seen == [{}]
    assert os.listdir(tmp_path) == ["experiment"]


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGED = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("data: &a\n  prompts: *a\n", ":1: has an alias (*name) within what it stands for"),
        ("seed: 1\nloss: &a {x: [1, *a]}\n", ":2: has an alias (*name) within what it stands for"),
        (BOMB, ":5: its aliases (*name) stand for 20503 values or more: write out"),
        (MERGED, ":9: its aliases (*name) stand for "),
        ("[" * 2000, ": nested too deep: take that out"),
    ],
)
def test_aliases_that_would_fill_the_memory_are_one_line(
    monkeypatch, capsys, tmp_path, content, said
):
    """OmegaConf writes out what each stands for: an alias bomb hung, and one in itself recursed."""
    (tmp_path / "experiment").mkdir()
    mine = tmp_path / "experiment" / "mine.yaml"
    mine.write_text(content)
    words = ("+experiment=mine", "--config-dir", str(tmp_path))
    assert called(monkeypatch, lambda _: pytest.fail("ran"), *words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"pujax.train: {mine}{said}" in line


def test_aliases_as_people_write_them_are_taken(monkeypatch, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [smoke]\nsft: &same {lr: 0.5, steps: 3}\n"
        "align: {<<: *same, steps: 4}\n"
    )
    seen = []
    words = ("+experiment=mine", "--config-dir", str(tmp_path))
    assert called(monkeypatch, seen.append, *words) == 0
    assert [(part.lr, part.steps) for part in (seen[0].sft, seen[0].align)] == [(0.5, 3), (0.5, 4)]


def test_hydras_own_help_is_shown_and_nothing_called_that_is_typed_beside_it(
    monkeypatch, capsys, tmp_path
):
    command = [sys.executable, "-m", "pujax.train", "--hydra-help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "== Flags ==" in shown.stdout
    word = f"+hydra.job_logging.handlers={TRUNCATES % (tmp_path / 'made')}"
    assert called(monkeypatch, lambda _: pytest.fail("ran"), word, "--hydra-help") == 1
    assert "take it out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_launcher_would_call_is_found_behind_a_reference():
    plugin = {"_target_": "hydra_plugins.x", "parameters": {"a": [1, "${loss}"]}}
    silent = {"callbacks": {}, "hydra_logging": SILENT, "job_logging": SILENT}
    silent |= {"job": {"env_copy": [], "env_set": {}, "chdir": False}, "run": {"dir": "."}}
    hydra = silent | {"launcher": plugin, "sweeper": {"_target_": "y"}, "output_subdir": None}
    with pytest.raises(
        ConfigError, match=r"hydra\.launcher\.parameters\.a\.1\._target_: Hydra wou"
    ):
        refuse_calls(OmegaConf.create({"loss": {"_target_": "z"}, "hydra": hydra}).hydra)
    refuse_calls(OmegaConf.create({"loss": {"z": "z"}, "hydra": hydra}).hydra)


def test_a_job_of_a_sweep_is_held_to_it_in_whichever_process(monkeypatch, capsys, tmp_path):
    (tmp_path / "loss").mkdir()
    made = tmp_path / "made"
    logging = f"hydra: {{job_logging: {{handlers: {TRUNCATES % made}}}}}"
    (tmp_path / "loss" / "theirs.yaml").write_text(f"# @package _global_\n{logging}\n")
    given = ("-m", "+experiment=smoke", "--config-dir", str(tmp_path), "loss=dpo,theirs")
    assert called(monkeypatch, lambda _: None, *given) == 1
    assert "hydra.job_logging" in capsys.readouterr().err
    assert not made.exists()
    loader = WaryLoader(ConfigSearchPathImpl())
    assert type(pickle.loads(cloudpickle.dumps(loader))) is WaryLoader


def test_what_a_terminals_encoding_lacks_is_printed_as_an_escape(monkeypatch, tmp_path, model):
    """As PYTHONIOENCODING=ascii or LC_ALL=C has it; each of these was a UnicodeEncodeError."""
    out, err = (TextIOWrapper(BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def act(config):
        for line in beginning.place(config, tmp_path, model.config, make_mesh()):
            Console().print(line, markup=False, highlight=False)
        print("é", file=sys.stderr)
        raise DataError("no café")

    assert called(monkeypatch, act, "+experiment=smoke") == 1
    for stream in (out, err):
        stream.flush()
    assert "device: 8 \\xd7 cpu" in out.buffer.getvalue().decode()
    said = err.buffer.getvalue().decode()
    assert said == "\\xe9\npujax.train: no caf\\xe9\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
@pytest.mark.parametrize("unbuffered", [False, True])
def test_an_output_that_takes_no_more_is_named(monkeypatch, capsys, unbuffered):
    """Under PYTHONUNBUFFERED too, which keeps nothing for a second try."""
    with Path("/dev/full").open("wb", buffering=0 if unbuffered else -1) as raw:
        full = TextIOWrapper(cast(BytesIO, raw), write_through=unbuffered)
        monkeypatch.setattr(sys, "stdout", full)
        assert called(monkeypatch, lambda _: print("answer", flush=True), "experiment=smoke") == 1
        said = "pujax.train: standard output: No space left on device: make room and start the same"
        assert capsys.readouterr().err.startswith(said)
        with nullcontext() if unbuffered else pytest.raises(OSError, match="No space"):
            full.close()


def test_a_working_directory_that_is_gone_is_one_line(monkeypatch, tmp_path):
    before = os.getcwd()
    os.chdir(tmp_path)
    tmp_path.rmdir()
    try:
        said = called(monkeypatch, print, "experiment=smoke")
    finally:
        os.chdir(before)
    assert said == "pujax.train: the working directory is gone: cd to one that is there"


@pytest.mark.parametrize(
    ("module", "code", "name", "said"),
    [
        ("matplotlib", "raise ValueError('no such')", "MPLBACKEND", "begin with that (no such): "),
        (
            "jax._src.config",
            "raise ValueError('odd\\nx')",
            "JAX_DEBUG_NANS",
            "that (odd): unset it",
        ),
        (
            "jax._src.xla_bridge",
            "def backends(): assert False",
            "JAX_PLATFORMS",
            "jax can't begin with that: unset it, or give it another value",
        ),
    ],
)
def test_a_variable_that_a_library_can_not_begin_with_is_named(
    monkeypatch, capsys, module, code, name, said
):
    def act(_):
        of_library = {"__name__": module}
        exec(code, of_library)
        of_library["backends"]()

    for variable in [each for each in os.environ if each.startswith(("JAX_", "MPL"))]:
        monkeypatch.delenv(variable)
    with pytest.raises((ValueError, AssertionError)):  # of which no variable can be why
        called(monkeypatch, act, "experiment=smoke")
    monkeypatch.setenv(name, "banana")
    assert called(monkeypatch, act, "experiment=smoke") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pujax.train: {name}=banana: ")
    assert said in line


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def act(_):
        return [][1]

    with pytest.raises(IndexError):
        called(monkeypatch, act, "experiment=smoke")


def test_an_experiment_needs_no_plus_and_its_settings_arrive(monkeypatch):
    seen = []
    for spelling in ("experiment=smoke", "+experiment=smoke"):
        assert called(monkeypatch, seen.append, spelling, "align.steps=7") == 0
    assert seen[0] == seen[1]
    assert (seen[0].run.name, seen[0].align.steps) == ("smoke", 7)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("data.weightings=[[1,0],[0.5,0.5],[0,1]]", [[1, 0], [0.5, 0.5], [0, 1]]),
        ("data.dimensions={x: 1}", {"x": 1.0}),
        ("data.dimensions.x=1", {"x": 1.0}),
        ("+data.dimensions={x: 1}", {"x": 1.0}),
        ("teacher.extra_body={a: {b: 1}}", {"a": {"b": 1}}),
        ("teacher.headers.user-agent=me, 1", {"user-agent": "me, 1"}),
    ],
)
def test_a_mapping_of_any_names_takes_them_without_a_plus_and_a_number_may_be_whole(
    monkeypatch, given, value
):
    seen = []
    assert called(monkeypatch, seen.append, "experiment=smoke", "data.preferences=p", given) == 0
    record, key = given.lstrip("+").partition("=")[0].split(".")[:2]
    assert getattr(getattr(seen[0], record), key) == value


def test_whatever_a_model_reads_may_stand_in_a_file(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, text in (("a", "Say ${seed}, 'so' \\\\${x}:\n\né\n"), ("b", "@@two")):
        Path(name).write_text(text, encoding="utf-8")
    got = []
    words = ("+experiment=smoke", "data.system=@a", "teacher.system=@@b", "run.name=@a")
    called(monkeypatch, lambda config: got.append(config), *words)
    assert got[0].data.system == "Say ${seed}, 'so' \\\\${x}:\n\né"
    assert (got[0].teacher.system, got[0].run.name) == ("@b", "@a")
    called(monkeypatch, lambda config: got.append(config), "-m", words[0], "data.system=@a,@b")
    assert [each.data.system for each in got[1:]] == [got[0].data.system, "@@two"]
    assert called(monkeypatch, print, words[0], "teacher.system=@none") == 1
    assert "teacher.system=@none: No such file or directory: name a" in capsys.readouterr().err


def test_no_shell_writes_out_the_home_that_a_path_begins_with(monkeypatch):
    monkeypatch.setenv("HOME", "/home/${zoe}")
    got = []
    words = (
        *("data.prompts=[~/a.jsonl,b~/~c.jsonl]", "data.heldout={dataset: csv, data_files: '~/x'}"),
        *("data.anchors=~/s.jsonl", "run.root=~/runs", "run.name=~x", "teacher.model=~/m"),
    )
    assert called(monkeypatch, got.append, "experiment=smoke", *words) == 0
    (seen,) = got
    assert seen.data.prompts == ["/home/${zoe}/a.jsonl", "b~/~c.jsonl"]
    assert seen.data.heldout["data_files"] == "/home/${zoe}/x"
    assert (seen.data.anchors, seen.run.root) == ("/home/${zoe}/s.jsonl", "/home/${zoe}/runs")
    assert (seen.run.name, seen.teacher.model) == ("~x", "~/m")


def test_each_job_of_a_sweep_knows_what_sets_it_apart(monkeypatch, tmp_path):
    seen = []

    def act(config):
        apart = "_".join(f"{key}={value}" for key, value in swept().items())
        seen.append((config.seed, config.data.system, apart))

    sweep = ("-m", "experiment=smoke", f"run.root={tmp_path}", "seed=0,1", "data.system=Be brief.")
    assert called(monkeypatch, act, *sweep) == 0
    assert seen == [(0, "Be brief.", "seed=0"), (1, "Be brief.", "seed=1")]
    assert called(monkeypatch, act, "-m", "experiment=smoke", "loss=dpo,grpo", "seed=3,4") == 0
    assert [apart for *_, apart in seen[2:]] == [
        "loss=dpo_seed=3",
        "loss=dpo_seed=4",
        "loss=grpo_seed=3",
        "loss=grpo_seed=4",
    ]
    assert called(monkeypatch, act, "experiment=smoke", "seed=5") == 0
    assert seen[-1] == (5, None, "")


def test_options_may_stand_anywhere(monkeypatch, tmp_path):
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "hinge.yaml").write_text("_target_: mine.hinge\n_partial_: true\n")
    seen = []
    words = ("+experiment=smoke", "--config-dir", str(tmp_path), "loss=hinge")
    assert called(monkeypatch, seen.append, *words) == 0
    assert seen[0].loss["_target_"] == "mine.hinge"
    sweep = ("+experiment=smoke", f"run.root={tmp_path}", "-m", "seed=0,1")
    assert called(monkeypatch, seen.append, *sweep) == 0
    assert [config.seed for config in seen[1:]] == [0, 1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--foo", "align.steps=1"), "no option --foo"),
        (("align.steps=1", "--config-dir"), "argument --config-dir/-cd: expected one argument"),
        (("--cfg", "all-of-it"), "argument --cfg/-c: invalid choice: 'all-of-it'"),
        (("--experimental-rerun", "x.pickle"), "no option --experimental-rerun"),
    ],
)
def test_an_option_that_is_none_is_one_line(monkeypatch, capsys, words, said):
    assert called(monkeypatch, lambda _: pytest.fail("ran"), "+experiment=smoke", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pujax.train: {said}")


@pytest.mark.parametrize(
    ("file", "content", "words", "said"),
    [
        (
            "loss/mine.yaml",
            "_target_: mine.hinge\n  margin: 1\n",
            ["loss=mine"],
            "loss/mine.yaml:2: no YAML: mapping values are not allowed here: mend that line",
        ),
        (
            "scorer/mine.yaml",
            "_target_: mine.near\n_partial_: true\n",
            ["scorer=mine"],
            "scorer/mine.yaml: its function stands under `score:`, and beside that `by: reference`",
        ),
        (
            "eval/mine.yaml",
            "title: polite\nfunction: {_target_: mine.polite, _partial_: true}\n",
            ["eval=[exact,mine]"],
            "eval/mine.yaml: begin it with the line `# @package eval.metrics.mine`",
        ),
        (
            "loss/mine.yaml",
            '_target_: "mine\\0hinge"\n',
            ["loss=mine"],
            "loss._target_: has a NUL character, which no path or text may: take it out",
        ),
        ("loss/mine.yaml", "a: \0", ["loss=mine"], "mine.yaml"),
        ("loss/mine.yaml", "a: \0", ["loss=mine"], "special characters are not allowed at pos"),
        ("loss/mine.yaml", "a: \udcff", ["loss=mine"], "of the settings is not UTF-8 (byte 3 of"),
        ("x.yaml", "", ["run.dir=r/\udcff"], "run.dir: not all of it is UTF-8: give it, or the f"),
        ("x.yaml", "", ["run.name=${oc.env:ODD_BYTES}"], "run.name: not all of it is UTF-8: give"),
        (
            "x.yaml",
            "",
            [f"align.steps={'9' * 3000}"],
            "align.steps: a whole number of more",
        ),
        ("x.yaml", "", [f"seed=-{2**63 + 1}"], "seed: a whole number of more than 64 bits: give"),
        ("x.yaml", "", ["trusted=mine"], "trusted=mine: a list is wanted, as in [A] or [A,B]"),
        (
            "x.yaml",
            "",
            ["data.prompts=[a.jsonl,", "b.jsonl]", "seed=1"],
            "data.prompts: '[a.jsonl,' has no end: write no space after a comma, or quote the "
            "whole, as in 'data.prompts=[a.jsonl, b.jsonl]'",
        ),
    ],
)
def test_a_slip_of_ones_own_is_one_line_that_says_what_to_write(
    monkeypatch, capsys, tmp_path, file, content, words, said
):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content, errors="surrogateescape")
    monkeypatch.setenv("ODD_BYTES", "r\udcff")
    given = ("+experiment=smoke", "--config-dir", str(tmp_path), *words)
    assert called(monkeypatch, lambda _: pytest.fail("ran"), *given) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "Config" not in line


def test_a_file_that_does_not_fit_is_named_with_the_reason(monkeypatch, capsys, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nalign: {speed: 1}\n")
    words = ("+experiment=mine", "--config-dir", str(tmp_path))
    assert called(monkeypatch, lambda _: pytest.fail("ran"), *words) == 1
    said = capsys.readouterr().err
    assert said.startswith("pujax.train: align.speed: In 'experiment/mine': ")
    assert "Key 'speed' not in 'AlignConfig'" in said


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("-m seed=0,1 --cfg job", 2, "--multirun and --cfg: one at a time"),
        ("-m seed=0,1 --info all", 2, "--multirun and --info: one at a time"),
        ("--run --multirun", 2, "--run and --multirun: one at a time"),
        ("loss=null", 1, "loss=null: a choice is a name, see --help"),
        ("-m seed=range(0,0)", 1, "seed=range(0,0): goes through no value at all, so nothing was"),
        ("-m loss=glob(zzz*)", 1, "loss=glob(zzz*): goes through no value at all"),
        ("seed=range(0,2)", 1, "seed=range(0,2): goes through several values: add -m, or give"),
        ("loss=dpo,grpo", 1, "loss=dpo,grpo: choose one, or go through them with -m loss=dpo,grpo"),
        ("+experiment=grpo_smollm2", 1, "experiment: is given twice (+experiment=smoke +experimen"),
        ("--config-dir /none", 1, "--config-dir /none: no such folder: name the one that your own"),
        ("+loss@x=5", 1, "+loss@x=5: a choice is a name"),
        ("hydra=null", 1, "hydra=null: a choice is a name"),
        ("-m hydra.sweeper.max_batch_size=0 seed=0,1", 1, "hydra.sweeper.max_batch_size=0: can't"),
        ("-m hydra.sweeper.params={seed:5}", 1, "hydra.sweeper.params={seed:5}: can't be composed"),
        ("--config-name nope", 1, "--config-path, --config-name: no such folder, or file in it"),
    ],
)
def test_what_hydra_falls_over_is_one_line_with_the_word(monkeypatch, capsys, words, status, said):
    given = ("experiment=smoke", *words.split())
    assert called(monkeypatch, lambda _: pytest.fail("ran"), *given) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pujax.train: {said}")


@pytest.mark.parametrize(
    "text",
    [
        *("data: {system: !!timestamp x}", "seed: !!int ''", "seed: !!bool x", "null: 3", "5"),
        *(f"seed: {'1:' * 400}1.5", f"seed: 0x{'f' * 5000}", r'x: "\UFFFFFFFF"'),
        *("defaults: 5", "defaults: [{a: [1, {b: c}]}]", "defaults: [{5: a}]"),
    ],
)
def test_a_file_that_can_not_be_read_is_named_whatever_the_fault(
    monkeypatch, capsys, tmp_path, text
):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "e.yaml").write_text(f"# @package _global_\n{text}\n")
    words = ("+experiment=e", "--config-dir", str(tmp_path))
    assert called(monkeypatch, lambda _: pytest.fail("ran"), *words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"pujax.train: {tmp_path}/experiment/e.yaml: not settings \(.+\): mend", line)


def test_a_file_that_holds_itself_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("data: &a\n  prompts: *a\n")
    words = ("+experiment=mine", "--config-dir", str(tmp_path))
    assert called(monkeypatch, lambda _: pytest.fail("ran"), *words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "alias (*name) within what it stands for" in line


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        (
            "train",
            "data distributed eval experiment labels loss mesh model "
            "scorer teacher teacher/protocol",
        ),
        ("benchmark", "labels loss mesh model scorer"),
        ("collect", "teacher teacher/protocol"),
        ("evaluate", "suite eval teacher teacher/protocol"),
        ("generate", ""),
        ("report", ""),
    ],
)
def test_help_lists_the_groups_that_the_command_takes(monkeypatch, capsys, name, groups):
    monkeypatch.setattr(sys, "argv", ["pujax", "--help"])
    importlib.import_module(f"pujax.{name}").main()
    said = capsys.readouterr().out.partition("Settings")[0]
    assert re.findall(r"^  ([a-z/]+)=", said, re.M) == groups.split()


def test_what_a_command_does_not_take_is_not_proposed(monkeypatch, capsys):
    for main, given, said in (
        (generate.main, "suite=signal", "suite: no such setting: take it out"),
        (chat.main, "prompt=hi", "prompt: no such setting, `pujax generate` takes one"),
        (benchmark.main, "experiment=smoke", "experiment: train alone takes one"),
        (benchmark.main, "teacher=openai", "teacher: no such setting"),
    ):
        monkeypatch.setattr(sys, "argv", ["pujax", given])
        with pytest.raises(SystemExit):
            main()
        assert said in capsys.readouterr().err


def test_a_sweep_keeps_no_file_of_what_it_was_given(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    given = ("-m", "+experiment=smoke", "seed=0,1", "teacher.api_key=sk-1234")
    assert called(monkeypatch, lambda _: None, *given) == 1
    assert called(monkeypatch, lambda _: None, *given[:-1]) == 0
    assert list(tmp_path.rglob("*")) == []


def test_a_sweep_ends_when_it_is_told_to_stop(monkeypatch, tmp_path):
    seen = []

    def act(config):
        seen.append(config.seed)
        raise StopRequested("stopped", signal.SIGTERM)

    given = ("-m", "+experiment=smoke", f"run.root={tmp_path}", "seed=0,1")
    assert called(monkeypatch, act, *given) == 143
    assert seen == [0]


def test_a_job_that_fails_says_so_and_costs_a_sweep_no_other_job(monkeypatch, capsys):
    seen = []

    def act(config):
        seen.append(config.seed)
        if config.seed == 0:
            raise DataError("p.jsonl:3: no")
        return [][1] if config.seed == 1 else None

    assert called(monkeypatch, act, "-m", "+experiment=smoke", "seed=0,1,2") == 1
    assert seen == [0, 1, 2]
    first, *traced, second, last = capsys.readouterr().err.splitlines()
    assert first == "pujax.train: seed=0: p.jsonl:3: no"
    assert traced[-1] == "IndexError: list index out of range"
    assert second == "pujax.train: seed=1: ended by a fault of pujax"
    assert last == (
        "pujax.train: 2 jobs of the sweep failed (seed=0, seed=1): mend it, and give the same "
        "command again"
    )


def test_a_sweep_ends_with_the_command_that_compares_its_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def act(config):
        if config.seed == 1:
            raise DataError("no")
        note_done(Path("runs", f"it's {config.run.name}", "seed"))

    sweep = ("-m", "+experiment=smoke", "seed=0,1")
    assert called(monkeypatch, act, *sweep, "run.name=a") == 1  # of which a part failed
    said, error = capsys.readouterr()
    assert said == """pujax report 'sweep=runs/it'"'"'s a'  compares the runs that are done\n"""
    assert "failed (seed=1)" in error
    assert called(monkeypatch, act, "-m", "+experiment=smoke", "seed=0", "run.name=a,b") == 0
    assert capsys.readouterr().out == "pujax report sweep=runs  compares the runs that are done\n"
    assert called(monkeypatch, act, "-m", "+experiment=smoke", "seed=1,1") == 1
    assert capsys.readouterr().out == ""


def test_a_setting_that_sets_a_job_apart_and_is_wrong_is_said_once(monkeypatch, capsys):
    assert called(monkeypatch, lambda _: None, "-m", "+experiment=smoke", "seed=0,-1") == 1
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == "pujax.train: seed=-1: must lie in [0, 2**63)"


def test_a_job_of_a_sweep_can_be_sent_to_another_process(monkeypatch):
    sent = []
    monkeypatch.setattr(commands, "hold_begun", lambda *_: None)
    monkeypatch.setattr(
        commands.hydra, "main", lambda **_: lambda job: lambda: sent.append(cloudpickle.dumps(job))
    )
    assert called(monkeypatch, print, "-m", "+experiment=smoke", "seed=0,1") == 0
    assert pickle.loads(sent[0]).__module__ == "pujax.train"


def test_a_launcher_that_is_not_installed_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(endings.LAUNCHERS, "nobodys", "mine")
    given = ("-m", "+experiment=smoke", "seed=0,1", "hydra/launcher=nobodys")
    assert called(monkeypatch, lambda _: pytest.fail("ran"), *given) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "pujax.train: hydra/launcher=nobodys: not installed: pip install 'pujax[mine]'"


def test_the_version_is_ours(monkeypatch, capsys):
    assert called(monkeypatch, lambda _: None, "--version") == 0
    assert capsys.readouterr().out == f"pujax {__version__}\n"


@pytest.mark.parametrize("module", ["pujax", "pujax.report"])
def test_who_can_not_be_answered_is_not_told_that_all_is_well(module):
    words = f"exec {sys.executable} -m {module} --version"
    for streams, status in ((">&-", 1), (">&- 2>&-", 1), ("<&-", 0), ("2>&-", 0)):
        done = subprocess.run(f"{words} {streams}", shell=True, capture_output=True, text=True)
        assert done.returncode == status, (streams, done)
        if streams == ">&-":
            assert done.stderr.startswith(f"{module}: standard output is closed: ")
            assert done.stderr.count("\n") == 1


def test_where_nobody_reads_on_richs_silent_exit_gets_its_line(monkeypatch, capfd):
    def printed(_):
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            Console().on_broken_pipe()

    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert called(monkeypatch, printed, "+experiment=smoke") == 1
    assert capfd.readouterr().err == "pujax.train: the reader of the output went away\n"


def test_no_file_takes_the_number_of_a_closed_stream():
    code = "import sys, pujax.config.streams as s; s.hold('x'); "
    code += "print(open(sys.executable).fileno(), sys.stdin.read() == '')"
    done = subprocess.run(
        f'exec {sys.executable} -c "{code}" <&- 2>&-', shell=True, capture_output=True, text=True
    )
    assert done.stdout == "3 True\n"


@pytest.mark.parametrize(
    "given",
    [
        "teacher.api_key=sk-1234",
        "+x.authorization=sk-1234",
        "a.b=sk-1234",
        "u=http://h/?key=sk-1234",
    ],
)
def test_a_value_that_looks_secret_is_never_said(monkeypatch, capsys, given):
    assert "sk-1234" not in secrets_hidden(f"can't take {given}", [given])
    assert called(monkeypatch, lambda _: None, "+experiment=smoke", given) == 1
    shown = capsys.readouterr()
    assert "sk-1234" not in shown.out + shown.err


@pytest.mark.parametrize(
    "given",
    [
        "+teacher.headers.Cookie=session=hush4",
        "+teacher.headers.Cookie='hush4'",
        "teacher.headers={Cookie: hush4}",
        "teacher.base_url=http://h/v1?sig=hush4",
        "teacher.base_url='http://h/v1?anything=hush4'",
        "teacher.base_url='http://me:hush4@h/v1'",
        "teacher.base_url='http://me:x/hush4@h/v1'",
        'teacher.api_key=a"hush4=b',
        "collect.retries=${oc.env:SECOND}",
        "+teacher.base_url=${oc.env:SECOND}/v1=",
        "data.on_too_long=${oc.env:SECOND}",
        "align.steps=${model.path}",
        "align.steps=of-the-house-hush4",
        "teacher.Headers={X-Of-Mine: hush4",
        "TEACHER.HEADERS.Cookie=hush4",
        "Teacher.BASE_URL=http://h/v1?sig=hush4",
        "+teacher.extra_body={a: {b: 1}, Api_Key: hush4",
    ],
)
def test_no_message_holds_what_came_from_elsewhere_or_goes_to_a_server(monkeypatch, capsys, given):
    monkeypatch.setenv("SECOND", "hush4")
    monkeypatch.setenv("HOUSE_TOKEN", "of-the-house-hush4")
    override = ["model.path=${oc.env:SECOND}"] if "model.path" in given else []
    status = called(monkeypatch, lambda _: None, "+experiment=smoke", *override, given)
    shown = capsys.readouterr()
    assert "hush4" not in shown.out + shown.err
    if "teacher.headers.Cookie='" not in given and "base_url='" not in given:
        assert status == 1
        assert given.lstrip("+").split("=")[0] in shown.err
    called(monkeypatch, lambda _: None, "+experiment=smoke", *override, given, "align.steps=-1")
    called(monkeypatch, lambda _: None, "+experiment=smoke", *override, given, "--help")
    shown = capsys.readouterr()
    assert "hush4" not in shown.out + shown.err


def test_no_message_holds_what_a_file_took_from_the_environment(monkeypatch, capsys, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [smoke]\ndata: {on_too_long: '${oc.env:SECOND}'}\n"
    )
    monkeypatch.setenv("SECOND", "hush4")
    words = ("+experiment=mine", "--config-dir", str(tmp_path))
    assert called(monkeypatch, lambda _: None, *words) == 1
    said = capsys.readouterr().err
    assert said.startswith("pujax.train: data.on_too_long='***': choose error, drop or truncate")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("run.root=${ oc.env:MY_PIN_TOKEN}/q", "run.root takes the environment variable MY_PIN_TO"),
        ("run.root=${oc.env:${oc.decode:MY_PIN_TOKEN}}", "run.root takes the environment variable"),
        ("run.root=${run.name}-${oc.env:NONE,${oc.env:MY_PIN_TOKEN}}", "run.root takes the"),
        ("data.on_too_long=${ oc.env:WEBHOOK}/x", "data.on_too_long=***/x: choose error, drop or"),
        ("data.on_too_long=${oc.env:${oc.decode:WEBHOOK}}/x", "data.on_too_long=***/x: choose e"),
    ],
)
def test_a_variable_is_known_by_what_was_read_however_it_is_written(
    monkeypatch, capsys, given, said
):
    monkeypatch.setenv("MY_PIN_TOKEN", "zeb42")
    monkeypatch.setenv("WEBHOOK", "zeb42")
    assert called(monkeypatch, lambda _: None, "+experiment=smoke", "run.name=x", given) == 1
    line = capsys.readouterr().err
    assert said in line.replace("'", "")
    assert "zeb42" not in line


def test_a_value_is_hidden_however_yaml_writes_it(monkeypatch, capsys):
    words = ["+experiment=smoke", "--cfg", "job", "--resolve"]
    secrets = ("of seven words " * 7 + "z", "it's: \"zeb42\ttab", "a'b: c", "\nx\ny")
    for name, secret in zip("abcd", secrets, strict=True):
        monkeypatch.setenv(f"WEBHOOK_{name}", secret)
        words.append(f"+teacher.headers.X{name}=${{ oc.env:WEBHOOK_{name}}}")
    assert called(monkeypatch, lambda _: None, *words) == 0
    (shown,) = re.findall(r"headers:((?:.|\n)*)thoughts:", capsys.readouterr().out)
    assert re.sub(r"[\s'\"|-]+", "", shown) == "Xa:***Xb:***Xc:***Xd:***"


def test_of_a_list_that_a_variable_holds_each_word_is_hidden(monkeypatch, capsys, tmp_path):
    held = "[first-of-them, second-of-them, 7]"
    monkeypatch.setenv("ONCE_LIST", held)
    (tmp_path / "experiment").mkdir()
    mine = "# @package _global_\ntrusted: ${oc.decode:${oc.env:ONCE_LIST}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    words = ["--config-dir", str(tmp_path), "experiment=mine", "run.name=x", "align.steps=7"]
    assert called(monkeypatch, print, *words, "--cfg", "job", "--resolve") == 0
    said = capsys.readouterr().out
    assert "steps: 7" in said
    assert "-of-them" not in said


def test_a_value_that_is_none_is_said():
    given = ["align.steps=3", "teacher.max_tokens=5", "teacher.api_key_env=KEY"]
    assert secrets_hidden(" ".join(given), given) == " ".join(given)


def test_a_command_that_is_none_is_answered_with_the_nearest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pujax", "trian"])
    with pytest.raises(SystemExit, match="no command 'trian', did you mean train\\? there are\n"):
        entry()


def test_every_command_is_listed_with_what_it_is_for():
    done = subprocess.run([sys.executable, "-m", "pujax"], capture_output=True, text=True)
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout
    assert set(COMMANDS) == {
        path.stem
        for path in Path(commands.__file__).parents[1].glob("*.py")
        if path.stem != "__main__" and '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    unknown = subprocess.run(
        [sys.executable, "-m", "pujax", "trian"], capture_output=True, text=True
    )
    assert (unknown.returncode, "no command 'trian'" in unknown.stderr) == (1, True)


def test_a_command_reads_alike_behind_the_one_entry_point():
    shown = [
        subprocess.run([sys.executable, "-m", *start, "--help"], capture_output=True, text=True)
        for start in (["pujax", "export"], ["pujax.export"])
    ]
    assert shown[0].stdout == shown[1].stdout
    assert "format: hf" in shown[0].stdout


def test_a_folder_of_ones_own_is_not_taken_for_a_run(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pujax evaluate", "--config-dir", str(tmp_path), "run=a"])
    commands.in_new_words("evaluate")


@pytest.mark.parametrize("word", ["~suite.scorers.judge", "~suite.scorers.judge=null"])
def test_what_takes_a_setting_out_is_not_taken_for_a_run(monkeypatch, word):
    monkeypatch.setattr(sys, "argv", ["pujax evaluate", "run=a", "suite=signal", word])
    commands.in_new_words("evaluate")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        # As an H200 said it in a step of SFT.
        (
            "INTERNAL: Failed to complete all kernels launched on stream 0x39: CUDA error: Could "
            "not synchronize CUDA stream: CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure",
            "the device failed (INTERNAL: Failed to complete all kernels",
        ),
        ("UNAVAILABLE: TPU initialization failed", "the device failed (UNAVAILABLE: TPU init"),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9663676416 bytes.\nmore",
            "the device has too little memory (RESOURCE_EXHAUSTED: Out of memory while trying to",
        ),
    ],
)
def test_what_an_accelerator_says_as_it_fails_is_one_line(monkeypatch, capsys, said, told):
    def act(config):
        raise jax.errors.JaxRuntimeError(said)

    assert called(monkeypatch, act, "+experiment=smoke") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pujax.train: {told}")
    assert "same command goes on" in line or "align.microbatch=1" in line


def test_a_fault_of_the_program_in_jax_stays_a_traceback(monkeypatch):
    def act(config):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: of ours")

    with pytest.raises(jax.errors.JaxRuntimeError, match="of ours"):
        called(monkeypatch, act, "+experiment=smoke")


def test_a_sigterm_that_comes_while_something_is_deleted_ends_the_command():
    code = """
import os, signal, sys, time
from pujax.config.commands import command
from pujax.config.settings import TrainConfig
class Deleted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
def act(_):
    Deleted()
    time.sleep(30)
sys.argv = ["x", "experiment=smoke"]
command("train", TrainConfig, act)()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (143, "")
