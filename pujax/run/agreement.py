"""Settings that must agree with one another and with the data, or would silently do nothing."""

import inspect
from collections.abc import Callable
from functools import partial

from pujax.config.settings import TrainConfig
from pujax.errors import ConfigError, name_of, require
from pujax.method.discriminator import discriminator
from pujax.method.labels import dimensions_of, softmax_labels, takes_members
from pujax.method.needs import ignores_labels, learns_from_ties, needs_of
from pujax.method.scoring import blend, family, found_in, mixture, rewards_of
from pujax.method.step import Recipe
from pujax.run.data import Dataset
from pujax.types import LabelRule, LossFn

_AS_THEY_ARE = partial(softmax_labels, tau=1.0, standardized=False)


def check_settings(config: TrainConfig, recipe: Recipe, loss_fn: LossFn) -> None:
    """Refuse a scorer that nobody asks, one that is not what the loss learns from, idle labels.

    Raises `ConfigError` with the remedy. A run without alignment has no use for any of them.
    """
    if not config.align.steps:
        return
    scorer, candidates = recipe.scorer, config.sampling.candidates
    sampled = config.data.prompts is not None and not config.data.degrees
    bound = scorer.func if isinstance(scorer, partial) else scorer
    if sampled:
        is_family = isinstance(scorer, partial) and bound is family
        several = len(scorer.keywords["scores"]) if is_family else 1
        _check_members(recipe, loss_fn, several, f"scorer.score={_name(bound)}")
    elif found_in(scorer, discriminator):
        raise ConfigError(
            "scorer.score=discriminator: it learns from candidates that the student samples, and "
            "here all are given (data.preferences, data.degrees): leave scorer out, or give "
            "data.prompts"
        )
    elif bound is not blend or rewards_of(scorer):
        raise ConfigError(
            f"scorer.score={_name(bound)}: no scorer is asked, since all candidates are given with "
            "their scores (data.preferences, data.degrees): leave scorer out, or give data.prompts"
        )
    if not _by_default(recipe.labels) and ignores_labels(loss_fn, recipe.labels, candidates):
        raise ConfigError(
            f"labels: {_name(loss_fn)} learns from scores and not from labels, which these "
            "settings are about: leave labels out, or take a loss that does (loss=listwise, "
            "ldl_grpo, weighted_sft, or an advantage from_labels)"
        )
    fitting = takes_members(recipe.labels) or _as_they_are(recipe.labels)
    if bound is mixture and not (fitting or ignores_labels(loss_fn, _AS_THEY_ARE, candidates)):
        raise ConfigError(
            "labels: of scorer=mixture they are the mixture with labels.tau=1 "
            "labels.standardized=false alone: set these, or take scorer=family labels=mixed"
        )


def check_given(config: TrainConfig, recipe: Recipe, loss_fn: LossFn, data: Dataset) -> None:
    """Refuse given candidates that lack what the loss learns from, and a part without a step.

    Raises `ConfigError` with the remedy.
    """
    align = config.align
    if data.other is not None and align.steps:
        taken = int(align.steps * data.share + 1e-9)
        require(
            0 < taken < align.steps,
            "data.preference_share",
            data.share,
            f"of align.steps={align.steps} it gives data.preferences {taken}: raise align.steps, "
            "or leave one of the two out",
        )
    for key, part in data.parts.items():
        if not part.candidates:
            continue
        if part.candidates == 1:  # pairs need two
            needs_of(loss_fn, recipe.labels, 1)
        if align.steps:
            said = " (of good responses alone SFT learns: align.steps=0)"
            check_part(part, recipe, loss_fn, key, ("align.prompts", align.prompts), said)


def check_part(
    part: Dataset,
    recipe: Recipe,
    loss_fn: LossFn,
    key: str,
    prompts: tuple[str, int],
    said: str = "",
) -> None:
    """Refuse given candidates that lack what the loss learns from.

    `key` is the setting that names them, `prompts` the one of how many a step has, and its value.
    `said` follows what is said of candidates that prefer nothing. Raises `ConfigError`.
    """
    _check_members(recipe, loss_fn, len(part.dimensions), key)
    if not part.prefers(by_dimension=takes_members(recipe.labels) or recipe.needs.members) and (
        recipe.needs.kl or not learns_from_ties(loss_fn, recipe.labels, part.candidates)
    ):
        raise ConfigError(
            f"{key}: no response is preferred to another, so {_name(loss_fn)} has nothing to "
            f"learn: look at the ratings or labels, and at how data.dimensions weighs them{said}"
        )
    require(
        not recipe.needs.kl or prompts[1] > 1,
        *prompts,
        f"{_name(loss_fn)} takes its reference point from other prompts' responses: at least "
        "2, or loss.reference_point._target_=pujax.method.pair_losses.no_kl",
    )


def _check_members(recipe: Recipe, loss_fn: LossFn, several: int, source: str) -> None:
    """Refuse a loss or labels of several scores a response where there are not as many."""
    asked = dimensions_of(recipe.labels)
    for key, function, wants in (
        ("loss", loss_fn, recipe.needs.members),
        ("labels", recipe.labels, takes_members(recipe.labels)),
    ):
        if wants and several < 2:
            raise ConfigError(
                f"{key}: {_name(function)} learns from several scores of a response, and "
                f"{source} gives one: take scorer=family (of given responses: a number for each of "
                "at least two dimensions in every row), or another "
                + ("loss, such as distill" if key == "loss" else "choice, such as labels=softmax")
            )
    require(
        asked is None or asked == several,
        "labels.weights",
        asked,
        f"{source} has {several} dimensions: give a weight for each",
    )


def _name(function: Callable[..., object]) -> str:
    return name_of(function).rpartition(".")[2]


def _by_default(labels: LabelRule) -> bool:
    """Whether a label rule is `softmax_labels` with no setting of another value."""
    stated = _settings(labels)
    return stated is not None and stated == _settings(softmax_labels)


def _as_they_are(labels: LabelRule) -> bool:
    """Whether labels are the softmax of the very scores; of a rule of one's own nobody knows."""
    stated = _settings(labels)
    return stated is None or (stated["tau"], stated["standardized"]) == (1, False)


def _settings(labels: LabelRule) -> dict[str, object] | None:
    """The settings of `softmax_labels`, bound or not; None for another rule."""
    bound = labels.keywords if isinstance(labels, partial) else {}
    if (labels.func if isinstance(labels, partial) else labels) is not softmax_labels:
        return None
    parameters = inspect.signature(softmax_labels).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return known | dict(bound)
