"""A run on preference data, from the file to the exported model."""

import json

import jax
import numpy as np
from hydra import compose, initialize_config_dir
from jax.sharding import Mesh
from rich.console import Console

from pujax.config.compose import conf_dir, from_hydra, register
from pujax.config.settings import TrainConfig
from pujax.run.fit import fit

register("train_schema", TrainConfig)


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_learns_from_given_responses_alone(tmp_path, monkeypatch):
    axes = ("data", "fsdp", "tensor")
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), axes)
    monkeypatch.setattr("pujax.run.fit.make_mesh", lambda **sizes: one)
    pairs = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": "No."} for n in "abcd"]
    rated = {"prompt": "Say e.", "responses": ["e", "f", "g"], "ratings": [5, 1, 3]}
    overrides = [
        "+experiment=smoke",
        "data=preferences",
        f"data.preferences={jsonl(tmp_path / 'train.jsonl', *pairs, rated)}",
        f"data.heldout={jsonl(tmp_path / 'heldout.jsonl', pairs[0] | {'prompt': 'Say z.'})}",
        "data.prompts=null",
        "data.anchors=null",
        f"data.reference_cache={tmp_path / 'kept'}",
        "data.max_prompt_tokens=64",
        "data.max_response_tokens=6",
        "loss=dpo",
        "loss.beta=1.0",
        "sft={steps: 0, batch: 4, lr: 1e-3}",
        "align={steps: 6, prompts: 2, lr: 1e-2}",
        "checkpoint.every=6",
        "eval={prompts: 1, batch: 1}",
    ]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = from_hydra(TrainConfig, compose("train", overrides=overrides))
    fit(config, tmp_path, console=Console(quiet=True))
    steps = [line for line in lines(tmp_path / "metrics.jsonl") if line["stage"] == "align"]
    np.testing.assert_allclose(steps[0]["loss"], np.log(2), rtol=1e-3)  # policy = reference
    assert steps[-1]["reward/margin"] > steps[0]["reward/margin"] + 0.1
    assert not {"score/mean", "samples/length"} & steps[0].keys()  # those of the data, not learnt
    assert "log_ratio/ref" in steps[0].keys() - {"kl/ref"}  # over what the policy did not sample
    groups = {group["prompt"]: group for group in lines(tmp_path / "samples.jsonl")}
    assert groups["Say a."]["candidates"] == ["a", "No."]
    assert groups["Say a."]["scores"] == [1, 1, -1]
    assert groups["Say e."]["candidates"] == ["e", "f", "g"]
    assert groups["Say e."]["anchor"] == "e"
    (row,) = lines(tmp_path / "eval-aligned.jsonl")[-1:]
    assert row["anchor"] == "a"
    base, aligned = (lines(tmp_path / f"eval-{name}.jsonl")[-1] for name in ("base", "aligned"))
    assert aligned["values"]["pair_margin"] > base["values"]["pair_margin"]
    assert (tmp_path / "done").exists()
    assert len(list((tmp_path / "kept").iterdir())) == 1
