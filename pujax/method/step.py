"""The functional training step: rollout makes a Group, update learns from it, one jit does both."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from pujax.method.discriminator import learn
from pujax.method.labels import absent_candidates, labels_of
from pujax.method.losses import group_metrics
from pujax.method.needs import Needs
from pujax.method.optimizer import apply, apply_in_place, on_one_cpu
from pujax.method.sampling import sample
from pujax.method.scoring import ScoringContext, members_of, rewards_of
from pujax.models.decoder import LanguageModel, Prefix, packed
from pujax.models.logps import response_logps
from pujax.models.lora import with_adapter
from pujax.models.sharding import spread
from pujax.records import Sampling
from pujax.types import (
    Batch,
    Completions,
    Frames,
    Group,
    Head,
    LabelRule,
    LossAndMetrics,
    LossFn,
    Metrics,
    Params,
    Scorer,
    TrainState,
)

TrainStep = Callable[
    [TrainState, Params, Params | None, Batch, Array], tuple[TrainState, Group, Metrics]
]


ALL = Needs()
GAP = "sampler/logp_gap"  # the largest of a batch, where every other metric is a mean


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
    """A group of the anchors and the batch's given candidates, or of ones that the policy samples.

    Both `params` and `ref_params` are whole models (see `assemble`). The prompts are encoded once
    by each. Where the batch's real tokens fit the model's budget, padding is not scored. Rows that
    fill a mesh are neither in the group nor in the metrics.
    """
    group, metrics, _ = rollout_with(None, model, recipe, params, ref_params, batch, key)
    return group, metrics


def rollout_with(
    head: Head | None,
    model: LanguageModel,
    recipe: Recipe,
    params: Params,
    ref_params: Params,
    batch: Batch,
    key: Array,
) -> tuple[Group, Metrics, Array | None]:
    """The same scored with a trained scorer's `head`, and what that may learn from.

    Those are the responses' last states [B G D], of the model that scores; None without a head, and
    where nobody scores, for scores were given.
    """
    sample_key, score_key = jax.random.split(key)
    prefix = model.unpacked.prefill(params, batch.prompts)
    completions = batch.given
    if completions is None:
        completions = sample_candidates(model, recipe, params, prefix, sample_key)
    group, notes, states = score_group(
        head, model, recipe, params, ref_params, batch, prefix, completions, score_key
    )
    if batch.padding:
        group, completions, states = jax.tree.map(
            lambda x: x[: -batch.padding], (group, completions, states)
        )
    metrics = {"samples/tokens": completions.mask.sum()}
    if completions.scores is None:
        candidates = group.scores[:, 1:]
        metrics |= {
            "score/mean": candidates.mean(),
            "score/std": candidates.std(axis=1).mean(),
            "samples/length": completions.mask.sum(axis=-1).mean(),
            "samples/finished": completions.finished.mean(),
        }
    # What someone gave says nothing of the policy: all of these would be the data's.
    return group, metrics | notes, states


def sample_candidates(
    model: LanguageModel, recipe: Recipe, params: Params, prefix: Prefix, key: Array
) -> Completions:
    """The candidates that the policy samples after prompts it has encoded."""
    choices = recipe.sampling
    return sample(
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


def score_group(
    head: Head | None,
    model: LanguageModel,
    recipe: Recipe,
    params: Params,
    ref_params: Params,
    batch: Batch,
    prefix: Prefix,
    completions: Completions,
    key: Array,
) -> tuple[Group, Metrics, Array | None]:
    """The completions beside their anchors, with reference log-probs, scores and labels.

    `prefix` is the policy's encoding of the prompts. The metrics are what the scorer notes; behind
    them is what a `head` may learn from, see `rollout_with`.
    """
    anchor_tokens, anchor_mask = batch.anchors.ids[:, None], batch.anchors.mask[:, None]
    tokens = jnp.concatenate([anchor_tokens, completions.tokens], axis=1)
    mask = jnp.concatenate([anchor_mask, completions.mask], axis=1)

    def read_by_policy(tokens: Array, mask: Array) -> Array:
        return response_logps(model.unpacked, params, prefix, tokens, mask)

    # What nobody sampled has no old log-probs but the policy's own reading. A group that is learnt
    # from once needs no pass for that: see `update`.
    again = recipe.inner_epochs > 1
    if completions.logps is None:
        old_logps = read_by_policy(tokens, mask) if again else jnp.zeros(mask.shape)
    else:
        anchor_logps = jnp.zeros(anchor_mask.shape)
        if recipe.needs.anchor and again:
            anchor_logps = read_by_policy(anchor_tokens, anchor_mask)
        old_logps = jnp.concatenate([anchor_logps, completions.logps], axis=1)

    rewards = {}
    if batch.rewards:
        functions = [found.keywords["function"] for found in rewards_of(recipe.scorer)]
        rewards = dict(zip(functions, batch.rewards, strict=True))

    def scored(model: LanguageModel) -> tuple[Array, Array, Metrics, Array | None, Array | None]:
        """Scores and log-probs of the reference, notes, a family's scores, and last states.

        They share a pass over the responses.

        What the batch brings is not computed; beside given scores the anchor's is the best.
        """
        wants_logps = recipe.needs.reference and batch.ref_logps is None
        reference = ScoringContext(
            reader=model,
            params=ref_params,
            frames=recipe.frames,
            batch=batch,
            after=batch.prompts,
            tokens=tokens,
            mask=mask,
            key=key,
            wants_logps=wants_logps,
            rewards=rewards,
            head=None if head is None else head.params,
        )
        context = reference
        if recipe.by_policy:
            context = reference.fresh(params=params, after=prefix, wants_logps=False)
        if completions.scores is None:
            members = members_of(recipe.scorer, context)
            scores = recipe.scorer(context) if members is None else members.mean(axis=1)
            states = None if head is None else context.last_states()
        else:
            states = None
            scores, members = _beside_best(completions.scores), None
            if completions.members is not None:
                members = _beside_best(completions.members)
        if wants_logps:
            logps = reference.logps(anchor=recipe.needs.anchor)
            return scores, logps, context.notes, members, states
        known = jnp.zeros(mask.shape) if batch.ref_logps is None else batch.ref_logps
        return scores, known, context.notes, members, states

    scores, ref_logps, notes, members, states = packed(model, batch.prompts.lengths, mask, scored)
    labels, valid = labels_of(recipe.labels, scores, members, key, batch.mix)
    kl = None
    if recipe.needs.kl and completions.logps is None:
        kl = batch_kl(model.unpacked, params, ref_params, batch, prefix, completions)
    group = Group(
        prompts=batch.prompts,
        tokens=tokens,
        mask=mask,
        finished=jnp.concatenate([batch.anchor_finished[:, None], completions.finished], axis=1),
        old_logps=old_logps,
        ref_logps=ref_logps,
        scores=scores,
        labels=labels,
        valid=valid,
        has_old_logps=again or completions.logps is not None,
        members=members,
        kl=kl,
    )
    return jax.lax.stop_gradient(group), notes, states


def _beside_best(given: Array) -> Array:
    """Given scores [..., K], the anchor's before them: the best of them."""
    return jnp.concatenate([given.max(axis=-1, keepdims=True), given], axis=-1)


def batch_kl(
    model: LanguageModel,
    params: Params,
    ref_params: Params,
    batch: Batch,
    prefix: Prefix,
    completions: Completions,
) -> Array:
    """KL(policy || reference) as KTO estimates it from given responses, the same for all B prompts.

    max(0, the mean Delta of the next prompt's responses read after each prompt), without a gradient
    (Ethayarajh et al., 2024: y of x is a poor sample of the policy there, where another prompt's is
    a cheap one). There it is each microbatch's; here the whole batch's, made before the update, so
    that microbatches change nothing, and inner epochs share it. `prefix` is the policy's encoding
    of the prompts. Rows that fill a mesh count for nothing.
    """
    rows = len(batch.anchor_finished)
    real = rows - batch.padding
    at = (jnp.arange(rows) + 1) % real
    tokens, mask = completions.tokens[at], completions.mask[at]
    of_policy = response_logps(model, params, prefix, tokens, mask)
    of_ref = response_logps(model, ref_params, batch.prompts, tokens, mask)
    delta_BK = jnp.sum(of_policy - of_ref, axis=-1, where=mask)[:real]
    mean = delta_BK.mean(where=mask.any(axis=-1)[:real])
    return jnp.full(rows, jnp.maximum(0, mean))


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
    is not computed; `samples/packed` is how often. Old log-probs that a group lacks are this pass's
    own. `on_policy` says that the policy is still the one that sampled: then so are the anchors',
    which no sampling made.

    A loss, a gradient or new parameters that aren't finite leave parameters and optimizer as they
    were and count in `skipped`; finite ones set that count to 0. `in_place` is for one CPU device,
    see `optimizer.apply_in_place`. With a mesh what goes through the gradient at a time is split
    over its devices, and the rows that fill it up count nowhere.
    """

    def mean_loss(trainable: Params, part: Group, model: LanguageModel) -> tuple[Array, Metrics]:
        policy, wide = assemble(base, trainable), spread(model.mesh, part)
        logps = response_logps(
            model, policy, wide.prompts, wide.tokens, wide.mask, anchor=needs.anchor
        )
        logps = logps[: part.mask.shape[0]]
        fixed = jax.lax.stop_gradient(logps)
        old_logps = part.old_logps if part.has_old_logps else fixed
        # The sampler and this pass must agree while the policy is the one that sampled.
        gap = jnp.max(jnp.abs(fixed - old_logps)[:, 1:], where=part.mask[:, 1:], initial=0.0)
        if on_policy:
            old_logps = old_logps.at[:, 0].set(fixed[:, 0])
        part = replace(part, old_logps=old_logps)
        loss, metrics = loss_fn(logps, part)
        metrics = group_metrics(logps, part) | metrics
        metrics |= {GAP: gap, "loss": loss.mean()}
        return loss.mean(), {name: metrics[name] for name in metrics if _was_made(name, needs)}

    def gradients(part: Group) -> tuple[Params, Metrics]:
        budget, wide = model.budget, spread(model.mesh, part)
        lengths, mask = wide.prompts.lengths, wide.mask
        grads, metrics = packed(
            model,
            lengths,
            mask,
            lambda model: jax.grad(mean_loss, has_aux=True)(state.params, part, model),
        )
        if budget is not None:
            metrics["samples/packed"] = budget.fits(lengths, mask).astype(jnp.float32)
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
            grads, metrics = gradients(part)
            summed = jax.tree.map(jnp.add, total, (grads, metrics))
            summed[1][GAP] = jnp.maximum(total[1][GAP], metrics[GAP])
            return summed, None

        # Every prompt counts once in loss and metrics, so equal parts average to the whole; but
        # the largest gap is the largest of theirs.
        zeros = nothing(jax.tree.map(lambda x: x[0], parts))
        total, _ = jax.lax.scan(add, zeros, parts)
        grads, metrics = jax.tree.map(lambda x: x * (microbatch / prompts), total)
        metrics[GAP] = total[1][GAP]

    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
    step_by = apply_in_place if in_place else apply
    params, opt_state, finite = step_by(optimizer, grads, state, finite)
    skipped = jnp.where(finite, 0, state.skipped + 1)
    state = replace(state, step=state.step + 1, params=params, opt_state=opt_state, skipped=skipped)
    return state, metrics | {"grad_norm": norm, "skipped": state.skipped}


def _was_made(metric: str, needs: Needs) -> bool:
    """Whether the log-probs that this metric is made of were computed."""
    if metric in needs.unmade:
        return False
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
    the same group is learnt from that many times, and the metrics are those of the last time. A
    scorer's head scores the group as it is, and then learns from it. What of `kl/ref` is made of
    responses that someone gave is no divergence, and called `log_ratio/ref`.
    """
    in_place = on_one_cpu(shardings)

    def group_and_learn(state, reference, base, batch, root):
        key = jax.random.fold_in(root, state.step)
        step = state.step
        whole = assemble(base, state.params), assemble(base, reference)
        group, sampled, states = rollout_with(state.head, model, recipe, *whole, batch, key)

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
            metrics = jax.tree.map(lambda x: x[-1], later) | {GAP: metrics[GAP]}
        if state.head is not None and states is not None:
            head, learnt = learn(recipe.scorer, state.head, states)
            state, metrics = replace(state, head=head), metrics | learnt
        return replace(state, step=step + 1), group, metrics | sampled

    def train_step(state, reference, base, batch, root):
        rated = batch.given is not None and batch.given.scores is not None
        with absent_candidates(rated):
            state, group, metrics = group_and_learn(state, reference, base, batch, root)
        if rated and "kl/ref" in metrics:  # of the policy's own samples it estimates a divergence
            metrics["log_ratio/ref"] = metrics.pop("kl/ref")
        return state, group, metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None, None))


def make_sampler(
    model: LanguageModel, recipe: Recipe
) -> Callable[[TrainState, Params | None, Batch, Array], Completions]:
    """The first half of `make_train_step`'s step, jitted: (state, base, batch, root) to candidates.

    They are those that the step itself would sample. Given back to it as `Batch.given`, with
    `Batch.rewards` of them, they make the step's second half: for scores that are made on the host.
    """

    def sampled(state: TrainState, base: Params | None, batch: Batch, root: Array) -> Completions:
        params = assemble(base, state.params)
        sample_key, _ = jax.random.split(jax.random.fold_in(root, state.step))
        prefix = model.unpacked.prefill(params, batch.prompts)
        return sample_candidates(model, recipe, params, prefix, sample_key)

    return jax.jit(sampled)


def make_sft_step(
    model: LanguageModel,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    shardings: Params,
) -> Callable[[TrainState, Params | None, Batch], tuple[TrainState, Metrics]]:
    """The supervised step on anchors, jitted: (state, base, batch) to (state, metrics)."""
    in_place = on_one_cpu(shardings)

    def sft_step(state, base, batch):
        batch = batch.counted
        group = anchor_group(batch)

        def weighed(logps: Array, group: Group) -> LossAndMetrics:
            loss_B, metrics = loss_fn(logps, group)
            return loss_B * batch.anchor_weights, metrics

        loss = loss_fn if batch.anchor_weights is None else weighed
        state, metrics = update(model, loss, optimizer, state, base, group, in_place=in_place)
        kept = ("loss", "grad_norm", "skipped", "logps/anchor", "samples/packed")
        return state, {name: metrics[name] for name in kept if name in metrics}

    return jax.jit(sft_step, donate_argnums=0, out_shardings=(shardings, None))
