"""Settings that would silently do nothing are refused by name, before the first step."""

from dataclasses import replace
from functools import partial

import pytest
from recipes import SCORER, recipe

from pujax.config.settings import AlignConfig, DataConfig, TrainConfig
from pujax.errors import ConfigError
from pujax.method import labels, losses, pair_losses, scoring
from pujax.method.discriminator import discriminator
from pujax.method.needs import Needs
from pujax.records import Example, Given, Prompt
from pujax.run.agreement import check_given, check_settings
from pujax.run.data import Dataset

PLAIN = partial(labels.softmax_labels)
FAMILY = partial(scoring.family, scores=[scoring.embedding, scoring.token_f1])
MIXED = partial(labels.mixed_labels, weights=[1.0, 2.0])
SEVERAL = Needs(members=True)
GIVEN = DataConfig(prompts=None, anchors=None, preferences="p.jsonl")


def check(loss, data=None, align=None, **choices):
    """Whether the settings are refused: None, or with which words."""
    data = DataConfig(prompts="p.jsonl", anchors="a.jsonl") if data is None else data
    config = TrainConfig(data=data, align=align or AlignConfig())
    try:
        check_settings(config, recipe(**{"labels": PLAIN} | choices), loss)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("loss", [pair_losses.e_dpo, partial(pair_losses.e_dpo, pessimism=0.1)])
def test_a_loss_of_a_family_is_refused_one_score(loss):
    said = check(loss, needs=SEVERAL)
    assert said
    assert said.startswith("loss: e_dpo learns from several scores of a response")
    assert "scorer.score=blend gives one: take scorer=family" in said
    assert "distill" in said
    assert check(loss, needs=SEVERAL, scorer=FAMILY) is None
    assert check(loss, needs=SEVERAL, align=AlignConfig(steps=0)) is None


def test_labels_of_several_scores_are_refused_one_and_another_number():
    said = check(losses.listwise, labels=MIXED)
    assert said
    assert said.startswith("labels: mixed_labels learns from several scores")
    assert check(losses.listwise, labels=MIXED, scorer=FAMILY) is None
    three = partial(labels.mixed_labels, weights=[1.0, 2.0, 3.0])
    said = check(losses.listwise, labels=three, scorer=FAMILY)
    assert said
    assert said.startswith("labels.weights=3: scorer.score=family has 2 dimensions")


@pytest.mark.parametrize("data", [GIVEN, DataConfig(prompts="p", anchors="a", degrees=2)])
def test_a_scorer_that_nobody_asks_is_refused(data):
    assert check(pair_losses.dpo, data, scorer=SCORER) is None  # the default
    said = check(pair_losses.dpo, data, scorer=partial(discriminator))
    assert said
    assert said.startswith("scorer.score=discriminator: it learns from candidates that")
    for scorer, name in (
        (scoring.rouge, "rouge"),
        (FAMILY, "family"),
        (partial(scoring.blend, scores=[partial(scoring.reward, function=max)]), "blend"),
    ):
        said = check(pair_losses.dpo, data, scorer=scorer)
        assert said
        assert said.startswith(f"scorer.score={name}: no scorer is asked")
    both = DataConfig(prompts="p", anchors="a", preferences="q")
    assert check(pair_losses.dpo, both, scorer=partial(discriminator)) is None


def test_labels_that_a_loss_does_not_learn_from_are_refused():
    sharp = partial(labels.softmax_labels, tau=0.25)
    said = check(pair_losses.dpo, labels=sharp)
    assert said
    assert said.startswith("labels: dpo learns from scores and not from labels")
    assert check(losses.listwise, labels=sharp) is None
    assert check(pair_losses.dpo, labels=partial(labels.softmax_labels, tau=0.5)) is None


def test_a_mixture_whose_labels_are_another_thing_is_refused():
    mixture = partial(scoring.mixture, scores=[scoring.token_f1] * 2, weights=[1.0, 1.0])
    said = check(losses.listwise, scorer=mixture)
    assert said
    assert "labels.tau=1 labels.standardized=false" in said
    as_they_are = partial(labels.softmax_labels, tau=1.0, standardized=False)
    assert check(losses.listwise, scorer=mixture, labels=as_they_are) is None
    assert check(pair_losses.dpo, scorer=mixture) is None  # it ranks by scores


# What the data must have.

ROW = Example(
    Prompt("1", ({"role": "user", "content": "x"},)), (1,), (1,), "a", (1,), True,
    given=(Given((1,), 1.0), Given((2,), 0.0)),
)  # fmt: skip
PAIRS = Dataset((ROW,), 4, 4, 4, candidates=2)


def given(loss, data, needs=None, prompts=2, steps=4, rule=PLAIN):
    config = TrainConfig(data=GIVEN, align=AlignConfig(prompts=prompts, steps=steps))
    check_given(config, recipe(labels=rule, needs=needs or Needs()), loss, data)


def rated(*names):
    return Dataset((ROW,), 4, 4, 4, candidates=2, dimensions=names)


def test_given_responses_need_the_ratings_that_are_learnt_from():
    for data in (PAIRS, rated("x")):
        with pytest.raises(
            ConfigError, match=r"loss: e_dpo .* data\.preferences gives one: .*two d"
        ):
            given(pair_losses.e_dpo, data, SEVERAL)
        with pytest.raises(ConfigError, match=r"labels: mixed_labels learns from several scores"):
            given(losses.listwise, data, rule=MIXED)
    given(pair_losses.e_dpo, rated("x", "y"), SEVERAL)
    given(losses.listwise, rated("x", "y"), rule=MIXED)
    with pytest.raises(ConfigError, match=r"labels\.weights=2: data\.preferences has 3 dimensions"):
        given(losses.listwise, rated("x", "y", "z"), rule=MIXED)


def test_a_kl_of_other_prompts_needs_other_prompts():
    with pytest.raises(ConfigError, match=r"align\.prompts=1: kto takes its reference point from"):
        given(pair_losses.kto, PAIRS, Needs(kl=True), prompts=1)
    given(pair_losses.kto, PAIRS, Needs(kl=True))


def alike(*scores, ratings=((), ())):
    """A prompt whose responses have these scores, and another of the first alone."""
    both = tuple(Given((i,), s, r) for i, (s, r) in enumerate(zip(scores, ratings, strict=False)))
    rows = [replace(ROW, given=both)] + [replace(ROW, given=both[:1])] * (len(both) == 1)
    names = tuple(map(str, ratings[0]))
    return Dataset(tuple(rows), 4, 4, 4, candidates=len(both), dimensions=names)


def test_responses_of_which_none_is_preferred_are_refused_to_whom_they_teach_nothing():
    refused = r"data\.preferences: no response is preferred to another, so {} has nothing to learn"
    with pytest.raises(ConfigError, match=refused.format("dpo")):
        given(pair_losses.dpo, alike(2.0, 2.0))
    given(losses.weighted_sft, alike(2.0, 2.0))  # learns all of them
    kto = partial(pair_losses.kto, sides=labels.flags)
    with pytest.raises(ConfigError, match=refused.format("kto")):
        given(kto, alike(1.0), Needs(kl=True))
    good, bad = (alike(flag).examples[0] for flag in (1.0, -1.0))
    given(kto, Dataset((good, bad), 4, 4, 4, candidates=1), Needs(kl=True))


def test_ratings_whose_mean_is_tied_prefer_by_dimension():
    tied = alike(2.0, 2.0, ratings=((1.0, 3.0), (3.0, 1.0)))
    given(losses.listwise, tied, rule=MIXED)
    with pytest.raises(ConfigError, match="no response is preferred"):
        given(pair_losses.dpo, tied)


def test_a_share_that_gives_one_part_no_step_is_refused():
    own = Dataset((ROW,), 4, 4, 4)
    for share, taken in ((0.2, 0), (1 - 1e-10, 4)):
        both = Dataset((ROW,), 4, 4, 4, other=PAIRS, share=share)
        with pytest.raises(
            ConfigError, match=rf"preference_share=.* gives data\.preferences {taken}"
        ):
            given(pair_losses.dpo, both)
    given(pair_losses.dpo, Dataset(own.examples, 4, 4, 4, other=PAIRS, share=0.5))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dimensions": {"x": 1.0}}, r"data\.dimensions=\{'x': 1\.0\}: .*data\.preferences"),
        ({"weightings": [[1.0, 0.0]]}, r"data\.weightings=.*data\.preferences"),
        ({"preference_share": 0.3}, r"data\.preference_share=0\.3: .* give both"),
        ({"degrees": -1}, r"data\.degrees=-1"),
        ({"preferences": "q", "weightings": [1, 0]}, r"data\.weightings=\[1, 0\]: give a list"),
        ({"preferences": "q", "weightings": "even"}, r"data\.weightings='even': give a list"),
    ],
)
def test_settings_of_data_that_is_not_there_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        DataConfig(prompts="p", anchors="a", **settings)
    if "dimensions" in settings:
        DataConfig(prompts=None, anchors=None, preferences="p", **settings)
    with pytest.raises(ConfigError, match=r"data\.degrees=2: .* of the anchors of data\.prompts"):
        DataConfig(prompts=None, anchors=None, preferences="p", degrees=2)
