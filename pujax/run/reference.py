"""The reference's log-probs of given responses: computed once, kept on disk, read by each step."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pujax.evaluation.waiting import waited
from pujax.files.durable import write_whole
from pujax.models.decoder import LanguageModel
from pujax.models.logps import response_logps
from pujax.models.sharding import fetched, put_batch
from pujax.records import canonical
from pujax.run.batches import collate
from pujax.run.checkpoint import checksums
from pujax.run.data import Dataset
from pujax.run.processes import told
from pujax.types import Batch, Params

_SHA256 = hashlib.sha256().digest_size


def with_reference(
    data: Dataset,
    model: LanguageModel,
    params: Params,
    *,
    folder: Path,
    mesh: Mesh,
    size: int,
    steps: int,
    say: Callable[[str], None],
    pause: Callable[[], None],
) -> Dataset:
    """The data, its given responses with `reference_logps` where `steps` of `size` repeat them."""

    def read(part: Dataset, share: float) -> Dataset:
        if not part.candidates or share * steps * size <= len(part.examples):
            return part
        made = reference_logps(
            part, model, params, folder=folder, mesh=mesh, size=size, say=say, pause=pause
        )
        return replace(part, ref_logps=made)

    if data.other is None:
        return read(data, 1.0)
    return replace(data, other=read(data.other, data.share))


def reference_logps(
    data: Dataset,
    model: LanguageModel,
    params: Params,
    *,
    folder: Path,
    mesh: Mesh,
    size: int,
    say: Callable[[str], None],
    pause: Callable[[], None],
) -> np.ndarray:
    """Log-probs [N G T] in float32 of the anchors and given candidates, under whole `params`.

    They lie in `folder` under a name that is made of the parameters and the tokens, so any run
    with the same reference and the same data finds them, followed by the SHA-256 of their file: one
    that can't be read, or that the disk has changed, is made again.
    `size` examples at once are read, and `pause` is called before. Raises `DiskError`, and what
    `pause` raises, with nothing kept.
    """
    shape = (len(data.examples), data.candidates + 1, data.response_size)
    path = folder / f"{_key(data, model, params)}.npy"

    def kept() -> np.ndarray | None:
        if not path.exists():
            return None
        try:
            whole = np.memmap(path, np.uint8, "r")
            if hashlib.sha256(whole[:-_SHA256].data).digest() != whole[-_SHA256:].tobytes():
                raise ValueError("its checksum differs")
            found = np.load(path, mmap_mode="r")  # which reads no further than the array
            if found.shape == shape and found.dtype == np.float32:
                return found
            raise ValueError(f"it has {found.dtype} {found.shape}, not float32 {shape}")
        except (ValueError, EOFError, OSError) as error:
            say(f"{path}: can't be read ({error}): making it again")
            return None

    if (found := told(kept)) is not None:
        return found
    say(f"reading {shape[0]} prompts' given responses with the reference, once")
    read = jax.jit(partial(_read, model))
    made = np.zeros(shape, np.float32)
    start = 0
    with waited("reading given responses", lambda line: say(f"{line}, {start} of {shape[0]}")):
        for start in range(0, shape[0], size):
            pause()
            rows = [i % shape[0] for i in range(start, start + size)]  # the last batch begins anew
            batch = collate([data.examples[i] for i in rows], data)
            made[rows] = fetched(read(params, put_batch(mesh, batch, size)))[:size]

    def keep() -> None:
        content = io.BytesIO()
        np.save(content, made)
        content.write(hashlib.sha256(content.getbuffer()).digest())
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getvalue())

    told(keep)
    return made


def _read(model: LanguageModel, params: Params, batch: Batch) -> jax.Array:
    assert batch.given is not None
    tokens = jnp.concatenate([batch.anchors.ids[:, None], batch.given.tokens], axis=1)
    mask = jnp.concatenate([batch.anchors.mask[:, None], batch.given.mask], axis=1)
    return response_logps(model, params, batch.prompts, tokens, mask)


def _key(data: Dataset, model: LanguageModel, params: Params) -> str:
    tokens = [[e.prompt_ids, e.anchor_ids, [r.ids for r in e.given]] for e in data.examples]
    sizes = [data.prompt_size, data.candidates, data.response_size]
    named = [tokens, sizes, repr(model.config), str(model.dtype), checksums(params)]
    return hashlib.sha256(canonical(named)).hexdigest()[:32]
