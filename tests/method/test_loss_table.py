"""Each conf/loss/*.yaml as it stands: a value worked out by hand. See `groups` for the numbers."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from groups import LOGPS, STALE, gradient
from omegaconf import OmegaConf

from pujax.config.compose import conf_dir
from pujax.config.functions import build_loss

PATHS = {path.stem: path for path in Path(conf_dir(), "loss").glob("*.yaml")}
GROUP = replace(STALE, members=jnp.asarray([[[9.0, 1.0, 0.0], [0.0, 0.5, 0.0]]]))

VALUES = {
    "sft": 1.0,  # (1 + 1) / 2
    "raft": 1.5,  # candidate 1: (1 + 2) / 2
    "weighted_sft": 1.7,  # 0.2 * 1 + 0.6 * 1.5 + 0.2 * 3
    "dpo": 0.5543552,  # log(1 + exp(-0.1 (2 + 1)))
    "cdpo": 0.5843552,  # 0.9 * 0.5543552 + 0.1 * (0.5543552 + 0.3)
    "dpo_anchor": 1.0485874,  # a token each: log(1 + exp(-2 (0.5 + 1))), and the anchor's 1
    "ipo": 4.0,  # (3 - 5)^2
    "slic": 0.7,  # 1 - 0.1 * 3
    "simpo": 0.1269280,  # means -1.5 and -3: log(1 + exp(1 - 2 * 1.5))
    "orpo": 1.5167568,  # 1.5 + 0.1 log(1 + exp(-1.7014133)), see test_losses
    "gamma_dpo": 0.6209570,  # log(1 + exp(-0.1 * 1.5))
    "spo": 0.6097907,  # of two degrees both parts are DPO's: 1.1 * 0.5543552
    "distill": 0.49,  # (1 - 0.1 * 3)^2
    "e_dpo": 0.04,  # the second member: (0.5 - 0.1 * 3)^2
    # Delta at the old policy 2 - log 1.5 and -1 - log 1.5: weights sigmoid(-3) and sigmoid(3), and
    # KL = -(0.0474259 * 2 - 0.9525741).
    "pessimistic": 0.1257722,
    # Reference points max(0, -1) and 2: (sigmoid(-0.1 * 2) + sigmoid(-0.1 * 3)) / 2.
    "kto": 0.4378618,
    # h = (0.1, 0.2, -0.1): 0.3 * 0.4750208 + (0.5498340 + 0.4750208) / 2 - 0.3 * 0.5249792
    "nnpu": 0.4974399,
    # -0.9502705 - 0.1 * 1.2 + log(exp(0.1) + exp(0.2) + exp(-0.1))
    "listwise": 0.1026484,
    "grpo": -0.33,  # -0.35 and 0.04 / 2, see test_losses
    "grpo_anchor": 0.67,  # and the anchor's 1
    "dr_grpo": -0.175,  # advantages 0.5 and -0.5: (-0.6 - 0.5 + 0.75) / 2
    "dapo": -0.26,  # advantages 1 and -1, the upper clip at 1.28: (-1.28 - 1 + 1.5) / 3
    "gspo": 0.2498,  # ratios sqrt(1.5) and 1.5: (-1.0004 + 1.5) / 2
    "cispo": -1 / 3,  # weights 1.5, 1, 1.5: (1.5 * 1 + 2 - 1.5 * 3) / 3
    # p ~ exp(0.1 (1, 2 - log 1.5, -1 - log 1.5)), A = 3 (q - p); the KL is 3 * 0.5.
    # A = (-0.4535726, 0.6818893, -0.2283167): 2 * 0.4535726 - 2.2 * 0.6818893 + 1.5 * 0.2283167.
    "ldl_grpo": -0.1905362,
    "ldl_grpo_anchor": 0.8094638,
}


def test_every_loss_has_its_value():
    assert set(VALUES) == set(PATHS)


@pytest.mark.parametrize("name", PATHS)
def test_a_loss_as_its_yaml_has_it_is_worth_what_was_worked_out(name):
    loss, _ = build_loss(OmegaConf.load(PATHS[name]))
    value, _ = loss(LOGPS, GROUP)
    np.testing.assert_allclose(value, [VALUES[name]], rtol=1e-5)
    assert jnp.isfinite(gradient(loss, LOGPS, GROUP)).all()  # of a NaN that the mask hides


def test_every_yaml_says_first_what_it_takes_of_whom():
    firsts = {name: path.read_text(encoding="utf-8")[:2] for name, path in PATHS.items()}
    assert {name for name, first in firsts.items() if first != "# "} == set()


def test_what_grpos_yaml_says_makes_it_the_papers_with_a_responses_mean():
    said = PATHS["grpo"].read_text(encoding="utf-8").replace("\n#", " ").partition("loss=gspo ")[2]
    changes = said.partition("\n")[0].replace("loss.", "").split()
    node = OmegaConf.merge(OmegaConf.load(PATHS["gspo"]), OmegaConf.from_dotlist(changes))
    sums, means = (dict(OmegaConf.load(PATHS[name])) for name in ("grpo", "gspo"))
    assert dict(node) == {**sums, "aggregate": means["aggregate"]}
    assert float(build_loss(OmegaConf.merge(node, {"kl_coef": 0.0}))[0](LOGPS, GROUP)[0][0]) == (
        pytest.approx(0.2)  # advantages 1 and -1: ((-1.2 - 1) / 2 + 1.5) / 2
    )


def test_the_page_compares_every_loss():
    page = Path(__file__).parents[2] / "docs" / "method.md"
    assert [name for name in PATHS if f"`{name}`" not in page.read_text(encoding="utf-8")] == []
