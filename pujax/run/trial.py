"""The functions of a recipe tried on shapes, so that one of the user's own fails before a run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pujax.config.functions import build, build_loss, build_metrics
from pujax.config.settings import TrainConfig
from pujax.errors import ConfigError, PujaxError, name_of, raised_in
from pujax.method.discriminator import new_head
from pujax.method.labels import dimensions_of, labels_of
from pujax.method.scoring import ScoringContext, rewards_of
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.models.sharding import make_mesh
from pujax.run.selection import criterion_of
from pujax.types import Batch, Frames, Group, LabelRule, LossFn, Scorer, Tokens


def try_settings(config: TrainConfig) -> None:
    """Try the mesh, the metrics and the recipe that the settings name, with frames of nobody's own.

    It takes neither a tokenizer nor what a run imports, so that a wrong value is refused at once.
    Raises `ConfigError`.
    """
    make_mesh(**vars(config.mesh))
    trusted = config.trusted
    some = np.zeros(2, np.int32)
    try_recipe(
        build(config.scorer.score, "scorer.score", trusted),
        build(config.labels, "labels", trusted),
        build_loss(config.loss, trusted)[0],
        frames=Frames(some, some, some, np.arange(5, dtype=np.int32)),
        candidates=config.sampling.candidates,
    )
    criterion_of(config, build_metrics(config.eval, trusted))  # ROUGE takes seconds to import


def try_recipe(
    scorer: Scorer, labels: LabelRule, loss_fn: LossFn, *, frames: Frames, candidates: int
) -> None:
    """Trace each function once, on a made-up batch of sizes that all differ; nothing is computed.

    The scorer sees a model of some small shape. Raises `ConfigError` naming the function, what it
    raised or returned, and what is wanted. Values (a NaN) are not seen.
    """
    G = candidates + 1
    B, T, P, R = G + 1, G + 2, G + 3, G + 4
    model = LanguageModel(_any_model(vocab=int(max(map(jnp.max, _ids(frames)))) + 1))

    def floats(*size: int) -> Any:
        return jax.ShapeDtypeStruct(size, jnp.float32)

    def bools(*size: int) -> Any:
        return jax.ShapeDtypeStruct(size, jnp.bool_)

    def ints(*size: int) -> Any:
        return jax.ShapeDtypeStruct(size, jnp.int32)

    def tokens(size: int) -> Any:
        return Tokens(ints(B, size), ints(B))

    score_shape, mask_shape = floats(B, G), bools(B, G, T)
    batch = Batch(tokens(P), tokens(T), bools(B), tokens(R))
    rewards = [found.keywords["function"] for found in rewards_of(scorer)]

    head = new_head(scorer, model.config.width)

    def scored(params: Any, batch: Batch, ids: Array, mask: Array, key: Array, given: Any) -> Any:
        context = ScoringContext(
            reader=model,
            params=params,
            frames=frames,
            batch=batch,
            after=batch.prompts,
            tokens=ids,
            mask=mask,
            key=key,
            rewards=dict(zip(rewards, given, strict=True)),
            head=None if head is None else head.params,
        )
        return scorer(context)

    size = f"{B} prompts of {G} responses"
    _try(
        "scorer.score",
        scorer,
        scored,
        "a context",
        f"one score a response, float32[{B}, {G}] for {size}",
        lambda made: _is(made, (B, G)),
        jax.eval_shape(model.init_params, jax.random.key(0)),
        batch,
        ints(B, G, T),
        mask_shape,
        jax.random.key(0),
        [score_shape for _ in rewards],
    )

    def labelled(scores: Array, members: Array, key: Array) -> Any:
        return labels_of(labels, scores, members, key)

    _try(
        "labels",
        labels,
        labelled,
        "scores",
        f"labels and which are valid, (float32[{B}, {G}], bool[{B}, {G}]) for {size}",
        lambda made: (
            isinstance(made, tuple)
            and len(made) == 2
            and _is(made[0], (B, G))
            and _is(made[1], (B, G), jnp.bool_)
        ),
        score_shape,
        floats(B, dimensions_of(labels) or 2, G),
        jax.random.key(0),
    )
    group = Group(
        prompts=tokens(P),
        tokens=ints(B, G, T),
        mask=mask_shape,
        finished=bools(B, G),
        old_logps=floats(B, G, T),
        ref_logps=floats(B, G, T),
        scores=score_shape,
        labels=floats(B, G),
        valid=bools(B, G),
    )
    _try(
        "loss",
        loss_fn,
        loss_fn,
        "logps, group",
        f"one loss a prompt and metrics, (float32[{B}], {{name: a number}}) for {size}",
        lambda made: (
            isinstance(made, tuple)
            and len(made) == 2
            and _is(made[0], (B,))
            and isinstance(made[1], dict)
            and all(isinstance(name, str) for name in made[1])
            and all(isinstance(v, int | float) or _is(v, (), jnp.number) for v in made[1].values())
        ),
        floats(B, G, T),
        group,
    )


def _try(
    key: str,
    function: Callable[..., Any],
    call: Callable[..., Any],
    taken: str,
    wanted: str,
    fits: Callable[[Any], bool],
    *shapes: Any,
) -> None:
    """Trace `call`, which calls the `function` of the setting `key`. Raises `ConfigError`."""

    def traced(*arguments: Any) -> None:
        try:
            made = call(*arguments)
            right = fits(made)
        except PujaxError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{key}: {raised_in(function, error)}: it takes ({taken}), its settings after a *, "
                f"and returns {wanted}"
            ) from error
        if not right:
            raise ConfigError(f"{key}: {name_of(function)} returned {_told(made)}, want {wanted}")

    jax.eval_shape(traced, *shapes)


def _is(made: Any, shape: tuple[int, ...], kind: Any = jnp.floating) -> bool:
    known = hasattr(made, "shape") and hasattr(made, "dtype")
    return known and made.shape == shape and jnp.issubdtype(made.dtype, kind)


def _told(made: Any) -> str:
    """What something is: its type, and the shape of an array."""
    if isinstance(made, tuple | list):
        return f"({', '.join(map(_told, made))})"
    if isinstance(made, dict):
        return f"{{{', '.join(f'{name}: {_told(value)}' for name, value in made.items())}}}"
    if hasattr(made, "shape") and hasattr(made, "dtype"):
        return f"{made.dtype}{list(made.shape)}"
    return "None" if made is None else type(made).__name__


def _ids(frames: Frames) -> list[Any]:
    parts = (frames.reference_tail, frames.judge_middle, frames.judge_tail, frames.rating_ids)
    return [part for part in parts if len(part)]


def _any_model(vocab: int) -> DecoderConfig:
    """A model that costs nothing to trace, with as many layers as a scorer may ask for."""
    return DecoderConfig(
        family="llama",
        vocab=vocab,
        width=8,
        layers=128,
        heads=2,
        kv_heads=1,
        head_width=4,
        mlp_width=8,
        norm_eps=1e-5,
        rope_base=10_000.0,
        tied=True,
        eos_ids=(0,),
    )
