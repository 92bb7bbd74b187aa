import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import pujax
from pujax.evaluation.results import Evaluation, Row, save

ROOT = Path(pujax.__file__).parent
COMMANDS = (
    *("train", "collect", "generate", "chat", "serve", "export", "evaluate", "report"),
    *("benchmark", "adapt"),
)
# A room imports from itself and from earlier lines alone.
FLOORS = [
    {"errors"},
    {"types", "records", "text"},
    {"models"},
    {"method", "files"},
    {"teacher"},
    {"evaluation"},
    {"schemas"},
    {"rewards"},
    {"config"},
    {"run"},
    {"inference"},
    set(COMMANDS),
]


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room(name):
    return name.split(".")[0]


FILES = {
    module(path): path for path in ROOT.rglob("*.py") if path.stem not in ("__init__", "__main__")
}


def imported(path):
    """The pujax modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pujax"):
            base = (node.module or "").removeprefix("pujax").removeprefix(".")
            inside = [f"{base}.{alias.name}".removeprefix(".") for alias in node.names]
            names.update([name for name in inside if name in FILES] or [base])
    return names - {""}  # the package itself, which imports nothing


def test_rooms_import_one_way():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    assert {room(name) for name in FILES} == set(floor)
    for name, path in FILES.items():
        for other in imported(path):
            down = floor[room(other)] < floor[room(name)]
            assert down or (room(other) == room(name) and "." in name), f"{name} imports {other}"


README = (ROOT.parent / "README.md").read_text(encoding="utf-8")
MAP = README.partition("## The code")[2].split("```")[1]


def mapped():
    """Every module that the map names: a room's after its colon, else a line's first words."""
    for entry in re.split(r"\n  (?=\w)", MAP.partition("conf/")[0])[1:]:
        name, _, told = entry.partition("  ")
        if name.endswith("/"):
            yield from (f"{name[:-1]}.{inner}" for inner in told.partition(": ")[2].split())
        else:
            yield from name.split()


def test_the_readmes_map_names_the_files_that_there_are_room_by_room():
    assert sorted(mapped()) == sorted(FILES)


def test_the_readmes_map_lists_the_lowest_floor_first():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    order = [floor[room(name)] for name in mapped()]
    assert order == sorted(order)


def test_no_two_files_import_each_other():
    graph = {name: imported(path) for name, path in FILES.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_only_models_know_flax_modules():
    for path in ROOT.rglob("*.py"):
        if path.parent.name != "models":
            assert "flax.linen" not in path.read_text(encoding="utf-8"), path


def loads(code, *heavy):
    """Which of the `heavy` packages a process has loaded after `code`."""
    code += f"; import sys; print(*sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_neither_jax_nor_transformers(command):
    code = f"import sys; sys.argv = ['x']; import pujax.{command}"
    assert loads(code, "jax", "transformers", "torch", "datasets", "matplotlib") == []


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_run_that_is_not_there_is_refused_without_jax(command):
    call = f"import sys, pujax.{command} as told; sys.argv = ['x', 'run=nowhere']"
    assert loads(f"{call}\ntry: told.main()\nexcept SystemExit: pass\nimport sys", "jax") == []


WRONG = {
    "train +experiment=smoke labels.tau=-1": "labels.tau=-1: must be positive",
    "train +experiment=smoke eval.samples=2": "eval.samples=2: pass@4 needs at least 4",
    "train +experiment=smoke data.heldout=h.txt": "449 prompts have no anchor (“Hi” in h.txt): c",
    "train +experiment=smoke sft.batch=999": "sft.batch=999: there are 448 training prompts: lower",
    "train +experiment=smoke data.prompts=x.csv": "x.csv:1: the columns are ['question']",
    "train +experiment=smoke model.path=x.csv": "x.csv: not a GGUF file, it starts with b'ques'",
    "train +experiment=smoke model.path=done": "no config.json in it: a run, or a folder of runs",
    "benchmark benchmark.sweep=true benchmark.out=/dev/null/x": "/dev/null/x can't be written (Not",
    "benchmark loss=dpo loss.beta=nan": "loss.beta=nan: must be positive",
    "adapt model=m.gguf out=a.safetensors preferences=x.csv loss.beta=0": "loss.beta=0: must be",
    "adapt model=m.gguf out=a.safetensors preferences=p.jsonl": "batch=4: preferences has 1 prompt",
    "adapt model=m.gguf out=a.safetensors task=x fitted=[b.st,b.st]": "b.st has no task: fit it wi",
    "evaluate run=run eval.temperature=0": "eval.temperature=0.0: must be positive",
    "evaluate run=run data.heldout=h.txt data.anchors=s.jsonl": "1 prompt has no anchor (“Hi” in h",
    "evaluate run=far suite=ranking": "gone.jsonl: no such file in ",
    "evaluate run=run out=/dev/null/x": "/dev/null/x can't be written (Not a dir",
    "evaluate run=run name=mine": "name='mine': a run alone shows its stages: take it out",
    "evaluate run=run suite=costs suite.prompts=0": "suite.prompts=0: must be positive",
    "evaluate run=run suite=[costs,signal]": "suite=[costs,signal]: choose one, or go through them",
    "evaluate run=run eval=[foo]": "no such choice (eval has anchor_logp, anchors, co",
    "evaluate run=run suite=winrate suite.model=x": "suite.model='x': has no answers here: choose",
    "export model=m.gguf out=a push=mine": "push='mine': write OWNER/NAME",
    "export model=run out=a": "model=run: a run, or a folder of runs: give it as run=run",
    "export model=m.gguf out=theirs": "out=theirs: holds files that no such export wrote (x)",
    "export model=m.gguf format=gguf out=x.gguf": "out=x.gguf: a file that this export did not wr",
    "export model=m.gguf out=": "out='': name a directory, or a GGUF file",
    "generate model=theirs prompt=x": "theirs: no config.json in it: not a model",
    "generate model=done/export prompt=x": "done/export: no tokenizer.json in it: copy the tok",
    "generate model=x.csv prompt=x": "x.csv: not a GGUF file, it starts with b'ques': give one, or",
    "generate run= prompt=x": "run='': name a directory",
    "generate model=m.gguf prompt=???": "prompt=???: ??? alone says that a value is missing",
    "generate model=m.gguf prompt=": "prompt='': is empty: write what to answer",
    "generate model=m.gguf soft_prompt=none": "none: no such file: `pujax adapt` makes one",
    "generate model=m.gguf soft_prompt=x.csv prompt=x": "x.csv: Error while deserializing header",
    "chat model=m.gguf system=@none": "system=@none: No such file",
    "serve model=m.gguf host=": "host='': give an address",
}
"""What a command says; each takes a third of a second, so functions' settings are in `UNFIT`."""

PRIOR = {"_target_": "pujax.method.losses.nnpu", "_partial_": True, "prior": 2}
UNFIT = [
    ("losses.ldl_grop", {}, "no ldl_grop, did you mean ldl_grpo?"),
    ("labels.softmax", {}, "no softmax, did you mean "),  # it speaks of jax.nn's
    ("losses.grpo", {"nosuch": 1}, "grpo has no ['nosuch']; it takes ['advantage'"),
    ("losses.grpo", {"clip": "token_clip"}, "mine.clip='token_clip': write a function"),
    ("losses.grpo", {"clip_low": "abc"}, "mine.clip_low='abc': write a number"),
    ("losses.grpo", {"clip_low": 2}, "mine.clip_low=2: must lie in (0, 1]"),
    ("losses.nnpu", {"prior": float("nan")}, "mine.prior=nan: must lie in (0, 1)"),
    ("pair_losses.kto", {"desirable_weight": -1}, "mine.desirable_weight=-1: must be finite"),
    ("labels.mixed_labels", {"weights": [0.5, -1]}, "mine.weights=[0.5, -1]: none may be neg"),
    ("labels.softmax_labels", {"anchor_mass": 1}, "mine.anchor_mass=1: must lie in [0, 1)"),
    ("scoring.blend", {"scores": []}, "mine: blend also needs ['weights']"),
    ("scoring.blend", {"scores": [], "weights": []}, "mine.scores=[]: give one"),
    ("scoring.embedding", {"depth": 66}, "mine.depth=66: must lie in (0, 1]"),
    ("discriminator.discriminator", {"lr": 1}, "mine.lr=1: must lie in (0, 1)"),
    ("latent.latent", {"heads": 0}, "mine: latent also needs ['score']"),
    ("losses.beside_anchor", {"loss": PRIOR}, "mine.loss.prior=2: must lie in (0, 1)"),
]


def test_wrong_values_are_refused_before_what_takes_seconds(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "x.csv").write_text("question\nWhy?\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi", "chosen": "Hi!", "rejected": "No."}\n')
    (tmp_path / "s.jsonl").touch()
    (tmp_path / "h.txt").write_text("Hi\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("data: {}\neval: {}\n")
    save(Evaluation("base", (Row("1", None, "Hi", None, "Hi!", "Ho", {}),)), tmp_path / "run")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "config.yaml").write_text("data: {heldout: gone.jsonl}\neval: {}\n")
    (tmp_path / "done" / "export").mkdir(parents=True)
    (tmp_path / "done" / "export" / "config.json").write_text("{}")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x").touch()
    (tmp_path / "x.gguf").touch()
    save_file({"soft_prompt": np.zeros((1, 2), np.float32)}, tmp_path / "b.st")
    heavy = {"jax", "flax", "optax", "transformers", "matplotlib", "rouge_score"}
    code = f"""if True:
        import importlib, sys
        def refused():
            print(*{heavy!r} & set(sys.modules), file=sys.stderr)
        for words in {list(WRONG)!r}:
            command, *words = words.split()
            sys.argv = [command, *words]
            try: importlib.import_module(f"pujax.{{command}}").main()
            except SystemExit: refused()
        from pujax.config.functions import foresee
        from pujax.errors import ConfigError
        nan = float("nan")
        for name, settings, _ in {UNFIT!r}:
            named = {{"_target_": f"pujax.method.{{name}}", "_partial_": True}}
            try: foresee(named | settings, "mine")
            except ConfigError as error: print(error, file=sys.stderr); refused()
    """
    called = [sys.executable, "-c", code]
    done = subprocess.run(called, capture_output=True, text=True, cwd=tmp_path)
    told = done.stderr.splitlines()
    assert told[1::2] == [""] * (len(WRONG) + len(UNFIT))
    for said, line in zip([*WRONG.values(), *(u[2] for u in UNFIT)], told[::2], strict=True):
        assert said in line


def test_the_front_door_is_quick():
    assert loads("import pujax; dir(pujax)", "jax", "numpy", "transformers", "hydra") == []
    assert loads("import pujax; pujax.load_prompts", "jax", "transformers") == []


def loaded(code):
    """The packages that a process has loaded after `code`, Python's own left out."""
    shown = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {shown}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split()) - sys.stdlib_module_names


FIELD = {"jax", "flax", "optax", "numpy", "jaxtyping"}


def test_the_method_loads_what_jax_flax_and_optax_load_and_nothing_else():
    theirs = loaded("import jax.experimental.multihost_utils, flax.linen, optax, jaxtyping")
    assert {"jax", "flax", "optax"} <= theirs
    assert loaded("import pujax.method.step") - theirs == {"pujax"}


def test_the_method_and_all_below_it_import_no_package_but_the_fields():
    """Even one that flax happens to load, as it does rich and yaml."""
    graph, below = {name: imported(path) for name, path in FILES.items()}, {"method.step"}
    while more := set().union(*(graph[name] for name in below)) - below:
        below |= more
    assert {"types", "errors", "models.decoder", "method.losses"} <= below
    for name in below:
        tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            packages = {each.partition(".")[0] for each in names}
            assert packages - sys.stdlib_module_names <= FIELD | {"pujax"}, name


def test_rewards_and_their_workers_need_neither_jax_nor_numpy():
    heavy = ("jax", "numpy", "transformers", "hydra", "rouge_score")
    assert loads("import pujax.rewards, pujax.run.workers", *heavy) == []


def test_the_teacher_needs_no_jax_and_its_command_no_numpy():
    assert loads("import pujax.teacher.anchors", "jax", "flax", "transformers") == []
    assert loads("import pujax.collect, pujax.teacher.asking", "jax", "numpy") == []


def test_a_mesh_axis_is_named_in_the_table_of_parameters_alone():
    for name, path in FILES.items():
        literals = {
            n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)
        }
        assert name == "models.parameters" or not literals & {"fsdp", "tensor"}, name
