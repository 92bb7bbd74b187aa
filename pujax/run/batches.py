"""Examples to padded batches. A batch is a function of the seed and the step alone."""

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from pujax.errors import ConfigError
from pujax.records import Example
from pujax.run.data import Dataset
from pujax.types import Batch, Completions, right_padded


def collate(examples: Sequence[Example], dataset: Dataset) -> Batch:
    """Right-pad examples to the dataset's shapes. Padding is 0; lengths tell what is real."""
    return Batch(
        prompts=right_padded([e.prompt_ids for e in examples], dataset.prompt_size),
        anchors=right_padded([e.anchor_ids for e in examples], dataset.response_size),
        anchor_finished=jnp.array([e.anchor_finished for e in examples]),
        references=right_padded([e.reference_ids for e in examples], dataset.reference_size),
        given=_given(examples, dataset) if dataset.candidates else None,
        mix=jnp.array([e.mix for e in examples])
        if dataset.candidates and examples[0].mix
        else None,
        anchor_weights=jnp.array([e.weight for e in examples]) if dataset.weighed else None,
    )


def _given(examples: Sequence[Example], dataset: Dataset) -> Completions:
    """The given candidates; where an example has fewer, empty ones that scored -inf."""
    shape = (len(examples), dataset.candidates, dataset.response_size)
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    finished = np.zeros(shape[:2], bool)
    scores = np.full(shape[:2], -np.inf, np.float32)
    members = np.full((len(examples), len(dataset.dimensions), shape[1]), -np.inf, np.float32)
    for b, example in enumerate(examples):
        for k, response in enumerate(example.given):
            tokens[b, k, : len(response.ids)] = response.ids
            mask[b, k, : len(response.ids)] = True
            finished[b, k] = response.finished
            scores[b, k] = response.score
            if len(dataset.dimensions) > 1:
                members[b, :, k] = response.ratings
    return Completions(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        finished=jnp.asarray(finished),
        logps=None,
        scores=jnp.asarray(scores),
        members=jnp.asarray(members) if len(dataset.dimensions) > 1 else None,
    )


def picks(count: int, size: int, seed: Sequence[int], step: int) -> list[int]:
    """Which `size` of `count` examples step number `step` sees.

    Every epoch is a permutation of its own, made from `seed` and its number; a batch may span two
    and then may hold an example twice. Raises `ConfigError` when there are fewer than `size`.
    """
    if size > count:
        raise ConfigError(f"a batch of {size} prompts needs as many examples; there are {count}")
    positions = range(step * size, (step + 1) * size)
    orders = {
        epoch: np.random.default_rng([*seed, epoch]).permutation(count)
        for epoch in {position // count for position in positions}
    }
    return [int(orders[position // count][position % count]) for position in positions]


def batch_at(
    dataset: Dataset, size: int, seed: Sequence[int], step: int
) -> tuple[list[Example], Batch]:
    """The examples of step number `step`, and as a batch."""
    dataset, step = dataset.at(step)
    chosen = picks(len(dataset.examples), size, seed, step)
    examples = [dataset.examples[i] for i in chosen]
    batch = collate(examples, dataset)
    if dataset.ref_logps is not None:
        batch = replace(batch, ref_logps=jnp.asarray(dataset.ref_logps[chosen]))
    return examples, batch
