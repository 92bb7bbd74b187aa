import doctest
from functools import partial

import pytest

from pujax.config.settings import CheckpointConfig, EvalConfig, TrainConfig
from pujax.errors import ConfigError
from pujax.evaluation import metrics
from pujax.evaluation.metrics import METRICS, Metric, Shown
from pujax.run import selection
from pujax.run.selection import Criterion, criterion_of


def test_the_examples_in_docstrings_hold():
    failed, tried = doctest.testmod(selection)
    assert (failed, tried) == (0, 4)


def test_a_stage_that_only_gets_worse_hands_on_what_it_began_with():
    values = {0: -1.0, 5: -1.5, 10: None, 15: -1.2}
    criterion = Criterion("anchor_logp", higher=True, patience=3)
    assert criterion.best(values) == 0
    assert criterion.spent(values)
    assert not criterion.spent({0: -1.0, 5: -1.5, 10: None})
    assert not Criterion("anchor_logp", higher=True).spent(values)
    assert criterion.best({0: None, 5: None}) == 0
    assert criterion.best({0: float("nan"), 5: -1.5, 10: float("nan"), 15: -1.2}) == 15


def chosen(best=None, patience=None, every=0, samples=0):
    config = TrainConfig(
        checkpoint=CheckpointConfig(best=best),
        eval=EvalConfig(every=every, patience=patience, samples=samples),
    )
    sampled = Metric(partial(metrics.sampled, metric=metrics.exact), Shown("", 3, "higher"))
    passed = Metric(partial(metrics.pass_at_k, k=4), Shown("", 3, "higher"))
    return criterion_of(config, {**METRICS, "sampled_exact": sampled, "pass_at_4": passed})


def test_the_direction_is_the_metrics_own():
    assert chosen() is None
    assert chosen("exact", 2, 5) == Criterion("exact", higher=True, patience=2)
    assert chosen("sampled_exact", None, 5, 4) == Criterion("sampled_exact", higher=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"best": "bleu", "every": 1}, r"checkpoint\.best='bleu': choose anchor_logp, rouge_l"),
        ({"best": "length", "every": 1}, r"checkpoint\.best='length': choose anchor_logp"),
        ({"best": "pass_at_4", "every": 1}, r"is of sampled answers"),
        ({"best": "sampled_exact", "every": 1}, r"is of sampled answers: set eval\.samples too"),
        ({"best": "exact"}, r"checkpoint\.best='exact': .*eval\.every"),
        ({"patience": 2, "every": 1}, r"eval\.patience=2: .*checkpoint\.best"),
    ],
)
def test_what_cannot_choose_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        chosen(**settings)


def test_a_metric_that_settings_lack_is_refused_before_any_is_built():
    given = {"mine": {"better": "lower"}, "length": {"better": None}}
    for best in ("exact", "length"):
        with pytest.raises(ConfigError, match=rf"checkpoint\.best='{best}': choose mine"):
            TrainConfig(
                checkpoint=CheckpointConfig(best=best), eval=EvalConfig(every=1, metrics=given)
            )


def test_patience_is_positive():
    with pytest.raises(ConfigError, match=r"eval\.patience=0"):
        EvalConfig(patience=0)
