"""A recipe for the tests' tiny student, and data for it."""

from functools import partial

import numpy as np

from pujax.method import labels, scoring
from pujax.method.step import Recipe
from pujax.records import Example, Prompt, Sampling
from pujax.run.data import Dataset
from pujax.types import Frames

FRAMES = Frames(*(np.array(ids) for ids in ([7, 8], [9], [10], [11, 12, 13, 14, 15])))
SCORER = partial(scoring.blend, scores=[scoring.embedding, scoring.token_f1], weights=[1.0, 1.0])


def recipe(**changes):
    settings = {
        "sampling": Sampling(candidates=3, temperature=0.9),
        "response_size": 5,
        "scorer": SCORER,
        "by_policy": False,
        "labels": partial(labels.softmax_labels, anchor_mass=0.2),
        "frames": FRAMES,
    }
    return Recipe(**settings | changes)


def dataset(count):
    """So many prompts of 10 tokens with anchors of 4, all alike, in batches of 16 and 5."""
    example = Example(
        prompt=Prompt("a", ({"role": "user", "content": "?"},)),
        prompt_ids=(7,) * 10,
        reference_ids=(7,) * 12,
        anchor="!",
        anchor_ids=(8,) * 4,
        anchor_finished=True,
    )
    return Dataset((example,) * count, 16, 18, 5)
