"""A soft prompt fitted to the preferences of one user, with every weight of the model frozen.

The idea is latent embedding adaptation's (arXiv 2503.18347), which fits the latent of a frozen
diffusion planner to a few preferences; virtual tokens before a language model's prompt in its place
(Lester et al., 2021), and DPO as what is fitted, are ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from pujax.config.functions import build_loss
from pujax.config.settings import DataConfig
from pujax.config.tool_settings import AdaptConfig, own_names
from pujax.errors import DataError, NonFiniteError, require
from pujax.evaluation.ranking import accuracy, normalized_accuracy
from pujax.evaluation.waiting import waited
from pujax.files import weights
from pujax.files.chat import Chat
from pujax.files.led import require_plain
from pujax.files.locate import at_home
from pujax.files.soft_prompt import (
    Fitted,
    load_fitted,
    require_fit,
    require_place,
    save_soft_prompt,
)
from pujax.method import labels, scoring
from pujax.method.needs import needs_of
from pujax.method.optimizer import make_optimizer
from pujax.method.prompt_diffusion import learn_prompts, sample_prompt, within
from pujax.method.step import Recipe, assemble, make_train_step
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.models.logps import response_logps
from pujax.models.sharding import fetched, make_mesh, put, put_batch, tree_shardings
from pujax.models.soft_prompt import SoftPrompt, init_soft_prompt, led
from pujax.records import Sampling
from pujax.run.agreement import check_part
from pujax.run.batches import batch_at, collate
from pujax.run.data import Dataset, check_apart, make_preferences
from pujax.run.student import new_state
from pujax.text import counted
from pujax.types import Batch, LossFn, Params


@dataclass(frozen=True)
class Ranked:
    """How many of `pairs` a model ranks as its user does: by log-probs, and by those a token."""

    pairs: int
    raw: float
    normalized: float


@dataclass(frozen=True)
class Adapted:
    """A fitted soft prompt, and how the model ranks with what it began as and with it.

    Neither where no preference has two sides.
    """

    vectors: Float[np.ndarray, "N D"]
    before: Ranked | None
    after: Ranked | None


def adapt(
    config: AdaptConfig, source: str, system: str | None, say: Callable[[str], None]
) -> Adapted:
    """Fit a soft prompt to `config.preferences` before the model at `source`, and write it.

    The reference is the same model led by what fitting begins with: tokens of `config.start`, or
    what a diffusion model of the `config.fitted` ones samples for `config.task`. From that no step
    leads further away than those lie from each other. Raises `ConfigError`, `DataError`,
    `PromptError`, `NonFiniteError` and `DiskError`.
    """
    out = at_home(config.out)
    require_place(out)
    others = load_fitted(config.fitted)
    chat = Chat.load(source)
    require_plain(chat)
    loss_fn, said = build_loss(config.loss, config.trusted)
    datasets = recipe = None
    if config.preferences is not None:
        datasets = _datasets(config, chat, system)
        recipe = _recipe(loss_fn, said, datasets[0], chat)
        with own_names():
            check_part(datasets[0], recipe, loss_fn, "preferences", ("batch", config.batch))
    mesh = make_mesh(1, 1, 1)
    with waited("reading the model", say):
        settings, read = weights.load(source)
        base = put(read, tree_shardings(mesh, read))
    settings = replace(settings, eos_ids=chat.eos_ids)
    for other in others:
        require_fit(other.path, other.vectors, other.about, settings, source)
    about = {
        "model": source,
        "width": settings.width,
        "vocab": settings.vocab,
        "task": config.task,
        "seed": config.seed,
    }
    if others:
        say(f"learning from {len(others)} soft prompts")
        start, radius = _sampled(config, others, base, chat)
        about["fitted"] = [other.path for other in others]
    else:
        ids = list(islice(cycle(chat.encode(config.start)), config.tokens))
        start, radius = init_soft_prompt(base, ids), None
        about["start"] = config.start
    before = after = None
    soft = start
    if datasets is not None and recipe is not None:
        count = start["soft_prompt"].shape[0]
        data, heldout = (_led(part, count, settings) for part in datasets)
        _check_positions(config, data, heldout, settings)
        model = LanguageModel(settings)
        before = ranked(model, base, start, heldout, config.batch)
        soft = _fitted(config, model, base, start, data, recipe, loss_fn, radius, mesh, say)
        after = ranked(model, base, soft, heldout, config.batch)
        about |= {"preferences": len(data.examples), "steps": config.steps}
    vectors = np.asarray(fetched(soft)["soft_prompt"], np.float32)
    if not np.isfinite(vectors).all():
        raise NonFiniteError(
            f"the soft prompt is not finite, and {out} is not written: fit the `fitted` ones again"
        )
    save_soft_prompt(out, vectors, about)
    return Adapted(vectors, before, after)


def _recipe(loss_fn: LossFn, said: dict[str, bool], data: Dataset, chat: Chat) -> Recipe:
    """How given responses become a group: nothing is sampled, and no scorer is asked."""
    return Recipe(
        sampling=Sampling(),
        response_size=data.response_size,
        scorer=scoring.token_f1,
        by_policy=False,
        labels=labels.softmax_labels,
        frames=chat.frames,
        needs=needs_of(loss_fn, labels.softmax_labels, data.candidates, **said),
    )


def _fitted(
    config: AdaptConfig,
    model: LanguageModel,
    base: Params,
    start: SoftPrompt,
    data: Dataset,
    recipe: Recipe,
    loss_fn: LossFn,
    radius: float | None,
    mesh: Mesh,
    say: Callable[[str], None],
) -> SoftPrompt:
    """What `start` becomes in `config.steps` steps, within `radius` of it if there is one."""
    optimizer = make_optimizer(
        config.lr, config.steps, b1=0.9, b2=0.99, weight_decay=0.0, clip_norm=1.0, warmup=0.1,
        schedule="cosine",
    )  # fmt: skip
    state = new_state(jax.tree.map(jnp.copy, start), optimizer, mesh)
    step = make_train_step(model, recipe, loss_fn, optimizer, tree_shardings(mesh, state))
    centre, root = start["soft_prompt"], jax.random.key(config.seed)
    with waited("fitting", say) as noted:
        for number in range(config.steps):
            _, batch = batch_at(data, config.batch, (config.seed, 2), number)
            placed = put_batch(mesh, batch, config.batch)
            state, _, metrics = step(state, start, base, placed, root)
            if int(state.skipped):
                raise NonFiniteError(
                    f"step {number + 1} of {config.steps} was not finite; nothing is written: "
                    f"begin again with a lower lr than {config.lr:g}"
                )
            if radius is not None:
                near = within(state.params["soft_prompt"], centre, radius)
                state = replace(state, params={"soft_prompt": near})
            if (number + 1) % 10 == 0 or number + 1 == config.steps:
                say(f"step {number + 1}/{config.steps}  loss {float(metrics['loss']):.3f}")
                noted()
    return state.params


def _sampled(
    config: AdaptConfig, others: Sequence[Fitted], base: Params, chat: Chat
) -> tuple[SoftPrompt, float]:
    """A soft prompt for the task from a diffusion model of others, and how far those lie apart.

    A task is told as the mean of its tokens' embeddings, of variance 1.
    """
    embed = np.asarray(fetched(base["embed"]), np.float32)

    def described(task: str) -> np.ndarray:
        mean = embed[chat.encode(task)].mean(axis=0)
        return (mean - mean.mean()) / max(float(mean.std()), 1e-8)

    prompts = np.stack([other.vectors for other in others])
    tasks = np.stack([described(other.about["task"]) for other in others])
    learn_key, key = jax.random.split(jax.random.key(config.seed))
    learnt = learn_prompts(learn_key, jnp.asarray(prompts), jnp.asarray(tasks))
    made = sample_prompt(key, learnt, jnp.asarray(described(config.task or "")))
    with np.errstate(over="ignore", invalid="ignore"):  # what is made of it is looked at
        apart = prompts - prompts.mean(axis=0)
        radius = float(np.sqrt(2 * np.square(apart).sum(axis=(1, 2)).mean()))
    return {"soft_prompt": made}, radius


def ranked(
    model: LanguageModel, base: Params, soft: SoftPrompt, data: Dataset, size: int
) -> Ranked | None:
    """How the model, led by a soft prompt, ranks the best and the worst response of each prompt."""
    pairs = [
        (i, max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__))
        for i, example in enumerate(data.examples)
        for scores in [{k: given.score for k, given in enumerate(example.given)}]
        if len(set(scores.values())) > 1
    ]
    if not pairs:
        return None
    read = jax.jit(partial(_logps, model))
    found = []
    for begin in range(0, len(data.examples), size):
        rows = [i % len(data.examples) for i in range(begin, begin + size)]
        batch = collate([data.examples[i] for i in rows], data)
        found.append(np.asarray(read(assemble(base, soft), batch))[: len(data.examples) - begin])
    summed = np.concatenate(found)
    at, best, worst = np.array(pairs).T
    chosen, rejected = summed[at, best], summed[at, worst]
    lengths = [
        np.array([len(data.examples[i].given[k].ids) for i, k in zip(at, side, strict=True)])
        for side in (best, worst)
    ]
    return Ranked(
        len(pairs), accuracy(chosen, rejected), normalized_accuracy(chosen, rejected, *lengths)
    )


def _logps(model: LanguageModel, params: Params, batch: Batch) -> jax.Array:
    """The log-prob [B, K] of each given candidate."""
    assert batch.given is not None
    logps = response_logps(model, params, batch.prompts, batch.given.tokens, batch.given.mask)
    return logps.sum(axis=-1)


def _datasets(config: AdaptConfig, chat: Chat, system: str | None) -> tuple[Dataset, Dataset]:
    """What is fitted, and what is ranked before and after: the same where nothing is held out."""
    settings = config.laid_out(system)
    data = _read(config.preferences, chat, settings)
    count = len(data.examples)
    remedy = f"preferences has {counted(count, 'prompt')}: lower it"
    require(config.batch <= count, "batch", config.batch, remedy)
    alike = [len({given.score for given in e.given}) == 1 < len(e.given) for e in data.examples]
    if all(alike):
        raise DataError(
            f"{config.preferences}: in no prompt does one response score more than another, so "
            "nothing is preferred: look at its ratings, and at how dimensions weighs them"
        )
    if config.heldout is None:
        return data, data
    heldout = _read(config.heldout, chat, settings)
    check_apart(data.examples, heldout.examples, config.preferences, config.heldout)
    return data, heldout


def _read(source: Any, chat: Chat, settings: DataConfig) -> Dataset:
    """Preference data; what is wrong with it is told by this command's settings."""
    with own_names():
        return make_preferences(source, chat, settings)


def _led(data: Dataset, count: int, settings: DecoderConfig) -> Dataset:
    """The same prompts with `count` virtual tokens before them."""

    def lead(ids: Sequence[int]) -> tuple[int, ...]:
        return led(ids, count, settings)

    return replace(
        data,
        examples=tuple(
            replace(e, prompt_ids=lead(e.prompt_ids), reference_ids=lead(e.reference_ids))
            for e in data.examples
        ),
        prompt_size=data.prompt_size + count,
        reference_size=data.reference_size + count,
    )


def _check_positions(
    config: AdaptConfig, data: Dataset, heldout: Dataset, settings: DecoderConfig
) -> None:
    longest = max(part.prompt_size + part.response_size for part in (data, heldout))
    require(
        longest <= settings.max_positions,
        "max_prompt_tokens",
        config.max_prompt_tokens,
        f"with the virtual tokens and max_response_tokens={data.response_size} that makes "
        f"{longest} tokens, and the model has {settings.max_positions} positions: lower them",
    )
