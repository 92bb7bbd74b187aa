"""The functional training step: rollout makes a Group, update learns from it, one jit does both."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from pujax.method.losses import group_metrics
from pujax.method.needs import Needs
from pujax.method.optimizer import apply, apply_in_place, on_one_cpu
from pujax.method.sampling import sample
from pujax.method.scoring import Scene, Scorer
from pujax.models.decoder import LanguageModel, Prefix, packed
from pujax.models.logps import response_logps
from pujax.models.lora import with_adapter
from pujax.records import Sampling
from pujax.types import (
    Batch,
    Completions,
    Frames,
    Group,
    LabelRule,
    LossFn,
    Metrics,
    Params,
    TrainState,
)

TrainStep = Callable[
    [TrainState, Params, Params | None, Batch, Array], tuple[TrainState, Group, Metrics]
]


ALL = Needs()


@dataclass(frozen=True)
class Recipe:
    """What is chosen once: how candidates are sampled, scored and labelled.

    `inner_epochs` is how often a group is learnt from.
    """

    sampling: Sampling
    response_size: int
    scorer: Scorer
    by_policy: bool
    labels: LabelRule
    frames: Frames
    needs: Needs = ALL
    inner_epochs: int = 1


def assemble(base: Params | None, trainable: Params) -> Params:
    """The model's parameters: the trainable ones, or a frozen base with them as its adapter."""
    return trainable if base is None else with_adapter(base, trainable)


def rollout(
    model: LanguageModel,
    recipe: Recipe,
    params: Params,
    ref_params: Params,
    batch: Batch,
    key: Array,
) -> tuple[Group, Metrics]:
    """Sample candidates, join them with the anchors, and have the student score and label them.

    Both `params` and `ref_params` are whole models (see `assemble`). The prompts are encoded once
    by each. Where the batch's real tokens fit the model's budget, padding is not scored.
    """
    sample_key, score_key = jax.random.split(key)
    prefix, made = explore(model, recipe, params, batch, sample_key)
    group, notes = judge(model, recipe, params, ref_params, batch, prefix, made, score_key)
    candidates = group.scores[:, 1:]
    metrics = {
        "score/mean": candidates.mean(),
        "score/std": candidates.std(axis=1).mean(),
        "samples/length": made.mask.sum(axis=-1).mean(),
        "samples/finished": made.finished.mean(),
        "samples/tokens": made.mask.sum(),
    }
    return group, metrics | notes


def explore(
    model: LanguageModel, recipe: Recipe, params: Params, batch: Batch, key: Array
) -> tuple[Prefix, Completions]:
    """The policy's encoding of the prompts, and the candidates it samples after them."""
    choices = recipe.sampling
    model = model.unpacked
    prefix = model.prefill(params, batch.prompts)
    made = sample(
        model,
        params,
        prefix,
        key,
        size=recipe.response_size,
        candidates=choices.candidates,
        temperature=choices.temperature,
        top_k=choices.top_k,
        top_p=choices.top_p,
    )
    return prefix, made


def judge(
    model: LanguageModel,
    recipe: Recipe,
    params: Params,
    ref_params: Params,
    batch: Batch,
    prefix: Prefix,
    made: Completions,
    key: Array,
) -> tuple[Group, Metrics]:
    """The candidates `made` beside their anchors, with reference log-probs, scores and labels.

    `prefix` is the policy's encoding of the prompts. The metrics are what the scorer notes.
    """
    anchor_tokens, anchor_mask = batch.anchors.ids[:, None], batch.anchors.mask[:, None]
    anchor_logps = jnp.zeros(anchor_mask.shape)
    if recipe.needs.anchor and recipe.inner_epochs > 1:
        # The anchor was never sampled, so its old log-probs are the policy's own reading of it. A
        # group that is learnt from once needs no pass for that: see `update`.
        anchor_logps = response_logps(model.unpacked, params, prefix, anchor_tokens, anchor_mask)
    tokens = jnp.concatenate([anchor_tokens, made.tokens], axis=1)
    mask = jnp.concatenate([anchor_mask, made.mask], axis=1)

    def judged(model: LanguageModel) -> tuple[Array, Array, Metrics]:
        """Scores and reference log-probs, which share a pass over the responses, and notes."""
        seen = (model, ref_params, recipe.frames, batch)
        reference = Scene(
            *seen,
            after=batch.prompts,
            tokens=tokens,
            mask=mask,
            key=key,
            wants_logps=recipe.needs.reference,
        )
        scene = reference
        if recipe.by_policy:
            scene = replace(reference, params=params, after=prefix, wants_logps=False, _memory={})
        scores = recipe.scorer(scene)
        if not recipe.needs.reference:
            return scores, jnp.zeros(mask.shape), scene.notes
        return scores, reference.logps(anchor=recipe.needs.anchor), scene.notes

    scores, ref_logps, notes = packed(model, batch.prompts.lengths, mask, judged)
    labels, valid = recipe.labels(scores)
    group = Group(
        prompts=batch.prompts,
        tokens=tokens,
        mask=mask,
        finished=jnp.concatenate([batch.anchor_finished[:, None], made.finished], axis=1),
        old_logps=jnp.concatenate([anchor_logps, made.logps], axis=1),
        ref_logps=ref_logps,
        scores=scores,
        labels=labels,
        valid=valid,
    )
    return jax.lax.stop_gradient(group), notes


def anchor_group(batch: Batch) -> Group:
    """The anchors alone as a Group (G = 1), so that supervised training is an `update` too."""
    mask = batch.anchors.mask[:, None]
    zeros, ones = jnp.zeros(mask.shape), jnp.ones(mask.shape[:2])
    return Group(
        prompts=batch.prompts,
        tokens=batch.anchors.ids[:, None],
        mask=mask,
        finished=batch.anchor_finished[:, None],
        old_logps=zeros,
        ref_logps=zeros,
        scores=ones,
        labels=ones,
        valid=ones > 0,
    )


def policy_logps(
    model: LanguageModel, params: Params, group: Group, *, anchor: bool = True
) -> Array:
    """The policy's log-probs [B, G, T] of a group's responses, prompts encoded once.

    Without `anchor` those of the anchors are not computed, and 0.
    """
    return response_logps(model, params, group.prompts, group.tokens, group.mask, anchor=anchor)


def update(
    model: LanguageModel,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    base: Params | None,
    group: Group,
    *,
    needs: Needs = ALL,
    on_policy: bool = False,
    microbatch: int | None = None,
    in_place: bool = False,
) -> tuple[TrainState, Metrics]:
    """One gradient step on a group. `microbatch` prompts at a time; the sum is the same.

    Where a batch's real tokens fit the model's budget, or a microbatch's its share of it, padding
    is not computed; `samples/packed` is how often. `on_policy` says that the policy is still the
    one that sampled: the anchors' old log-probs, which no sampling made, are then this pass's own.

    A loss, a gradient or new parameters that aren't finite leave parameters and optimizer as they
    were and count in `skipped`; finite ones set that count to 0. `in_place` is for one CPU device,
    see `optimizer.apply_in_place`.
    """

    def mean_loss(trainable: Params, part: Group, model: LanguageModel) -> tuple[Array, Metrics]:
        logps = policy_logps(model, assemble(base, trainable), part, anchor=needs.anchor)
        fixed = jax.lax.stop_gradient(logps)
        # The sampler and this pass must agree while the policy is the one that sampled.
        gap = jnp.max(jnp.abs(fixed - part.old_logps)[:, 1:], where=part.mask[:, 1:], initial=0.0)
        if on_policy:
            part = replace(part, old_logps=part.old_logps.at[:, 0].set(fixed[:, 0]))
        loss, metrics = loss_fn(logps, part)
        metrics = group_metrics(logps, part) | metrics
        metrics |= {"sampler/logp_gap": gap, "loss": loss.mean()}
        return loss.mean(), {name: metrics[name] for name in metrics if _is_known(name, needs)}

    def gradients(part: Group) -> tuple[Params, Metrics]:
        lengths, budget = part.prompts.lengths, model.budget
        grads, metrics = packed(
            model,
            lengths,
            part.mask,
            lambda model: jax.grad(mean_loss, has_aux=True)(state.params, part, model),
        )
        if budget is not None:
            metrics["samples/packed"] = budget.fits(lengths, part.mask).astype(jnp.float32)
        return grads, metrics

    def nothing(part: Group) -> tuple[Params, Metrics]:
        shapes = jax.eval_shape(gradients, part)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    prompts = group.mask.shape[0]
    if microbatch is None or microbatch == prompts:
        # Nothing is learnt from a group without a token. Asking that first keeps XLA from filling
        # the gradient's buffers with zeros while the sampler still needs its own.
        grads, metrics = jax.lax.cond(group.mask.any(), gradients, nothing, group)
    else:
        if model.budget is not None:
            model = model.clone(budget=model.budget.share(microbatch, prompts))
        parts = jax.tree.map(
            lambda x: x.reshape(prompts // microbatch, microbatch, *x.shape[1:]), group
        )

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradients(part)), None

        # Every prompt counts once in loss and metrics, so equal parts average to the whole.
        zeros = nothing(jax.tree.map(lambda x: x[0], parts))
        total, _ = jax.lax.scan(add, zeros, parts)
        grads, metrics = jax.tree.map(lambda x: x * (microbatch / prompts), total)

    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
    step_by = apply_in_place if in_place else apply
    params, opt_state, finite = step_by(optimizer, grads, state, finite)
    skipped = jnp.where(finite, 0, state.skipped + 1)
    state = TrainState(state.step + 1, params, opt_state, skipped)
    return state, metrics | {"grad_norm": norm, "skipped": state.skipped}


def _is_known(metric: str, needs: Needs) -> bool:
    """Whether what this metric is made of was computed."""
    if metric == "logps/anchor":
        return needs.anchor
    return needs.reference or not metric.startswith(("kl/", "reward/"))


def make_train_step(
    model: LanguageModel,
    recipe: Recipe,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    shardings: Params,
    *,
    microbatch: int | None = None,
) -> TrainStep:
    """The alignment step, jitted: (state, reference, base, batch, root) to (state, group, metrics).

    `shardings` is where the state lies, before a step and after it. `reference` is what the policy
    was when this stage began: whole parameters, or an adapter of `base`. The step's randomness is
    `fold_in(root, step)`, so a resumed run repeats it. The state is donated. With more inner epochs
    the same group is learnt from that many times, and the metrics are those of the last time.
    """
    in_place = on_one_cpu(shardings)

    def train_step(state, reference, base, batch, root):
        key = jax.random.fold_in(root, state.step)
        step = state.step
        group, sampled = rollout(
            model, recipe, assemble(base, state.params), assemble(base, reference), batch, key
        )

        def once(state: TrainState) -> tuple[TrainState, Metrics]:
            return update(
                model,
                loss_fn,
                optimizer,
                state,
                base,
                group,
                needs=recipe.needs,
                on_policy=recipe.inner_epochs == 1,
                microbatch=microbatch,
                in_place=in_place,
            )

        state, metrics = once(state)
        if recipe.inner_epochs > 1:
            state, later = jax.lax.scan(
                lambda state, _: once(state), state, length=recipe.inner_epochs - 1
            )
            gap = metrics["sampler/logp_gap"]
            metrics = jax.tree.map(lambda x: x[-1], later) | {"sampler/logp_gap": gap}
        return replace(state, step=step + 1), group, metrics | sampled

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None, None))


def make_sft_step(
    model: LanguageModel,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    shardings: Params,
) -> Callable[[TrainState, Params | None, Batch], tuple[TrainState, Metrics]]:
    """The supervised step on anchors, jitted: (state, base, batch) to (state, metrics)."""
    in_place = on_one_cpu(shardings)

    def sft_step(state, base, batch):
        group = anchor_group(batch)
        state, metrics = update(model, loss_fn, optimizer, state, base, group, in_place=in_place)
        kept = ("loss", "grad_norm", "skipped", "logps/anchor", "samples/packed")
        return state, {name: metrics[name] for name in kept if name in metrics}

    return jax.jit(sft_step, donate_argnums=0, out_shardings=(shardings, None))
