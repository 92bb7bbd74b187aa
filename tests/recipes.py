"""A recipe for the tests' tiny student."""

from functools import partial

import numpy as np

from pujax.method import labels, scoring
from pujax.method.step import Recipe
from pujax.records import Sampling
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
