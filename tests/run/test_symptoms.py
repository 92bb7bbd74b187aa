import numpy as np
import pytest
from groups import make_group

from pujax.run.symptoms import FEWEST, WINDOW, Course, Symptoms, group_notes


def test_the_notes_of_a_group_by_hand():
    """Lengths 1, 2, 3 and 3, 2, 1; scores go with them in the first group, and half back after."""
    lengths = np.array([[3, 1, 2, 3], [3, 3, 2, 1]])
    group = make_group(
        np.zeros((2, 4, 3)),
        mask=np.arange(3) < lengths[..., None],
        scores=[[9, 10, 20, 30], [9, 5, 0, 5]],
        q=[[0, 1, 0, 0], [0.1, 0.3, 0.3, 0.3]],
    )
    notes = group_notes(group)
    # Centred: scores (-10, 0, 10), (5/3, -10/3, 5/3); lengths (-1, 0, 1), (1, 0, -1).
    r = 20 / np.sqrt((200 + 150 / 9) * 4)
    assert notes["score/length_correlation"] == pytest.approx(r)
    assert notes["label/entropy_share"] == pytest.approx(0.5)
    equal = make_group(np.zeros((1, 3, 2)))
    assert group_notes(equal)["score/length_correlation"] == 0
    assert group_notes(equal)["label/entropy_share"] == pytest.approx(1)


def lines(metric, values):
    own = {"stage": "align", "score/mean": 0.5}  # which candidates have that the run itself scores
    return [{**own, "step": step, metric: value} for step, value in enumerate(values, 1)]


def told(symptoms, some):
    return [said for line in some for said in symptoms.of(line)]


HEALTHY = {
    "score/length_correlation": 0.2,
    "label/entropy_share": 0.6,
    "logps/chosen": -9.0,
    "samples/finished": 0.9,
    "kl/ref": 0.05,
}


def test_ratings_that_go_with_length_are_the_datas_and_no_scorers():
    given = [
        {name: value for name, value in line.items() if name != "score/mean"}
        for line in lines("score/length_correlation", [0.7] * 3 * WINDOW)
    ]
    (line,) = told(Symptoms(), given)
    assert "ratings go with length (correlation 0.70" in line
    assert line.endswith("read samples.jsonl, or take loss=simpo or another by mean log-probs")


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        (
            "score/length_correlation",
            0.7,
            "write longer answers: read samples.jsonl, or take anoth",
        ),
        ("score/length_correlation", -0.7, "write shorter answers"),
        ("label/entropy_share", 0.01, "raise labels.tau"),
        ("label/entropy_share", 0.99, "nearly uniform"),
        ("samples/finished", 0.5, "of the responses are cut off: raise data.max_response"),
        ("kl/ref", 2.0, "runs away from its reference (KL 0."),
    ],
)
def test_a_symptom_is_told_once_when_it_has_lasted(metric, value, said):
    symptoms = Symptoms()
    assert told(symptoms, lines(metric, [HEALTHY[metric]] * 2 * WINDOW)) == []
    (line,) = told(symptoms, lines(metric, [value] * 3 * WINDOW))
    assert said in line
    assert told(Symptoms(), lines(metric, [value] * (WINDOW - 1))) == []
    assert told(Symptoms(), lines(metric, [None] * 3 * WINDOW)) == []


@pytest.mark.parametrize(("steps", "said"), [(FEWEST - 1, 0), (FEWEST, 1), (12, 1)])
def test_all_of_a_short_stage_is_looked_at_at_its_end(steps, said):
    symptoms = Symptoms(steps)
    *before, last = lines("kl/ref", [2.0] * steps)
    assert told(symptoms, before) == []
    assert len(told(symptoms, [last])) == said
    assert told(Symptoms(steps), lines("kl/ref", [0.4] * steps)) == []


def test_a_correlation_of_few_candidates_is_told_apart_from_chance():
    """Of groups of two it is 1 or -1 a step."""
    by_chance = [1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, -1.0]
    assert told(Symptoms(8), lines("score/length_correlation", by_chance)) == []
    assert len(told(Symptoms(8), lines("score/length_correlation", [1.0] * 8))) == 1


def test_other_prompts_in_a_short_stage_are_no_sinking_of_the_chosen():
    """Means of eight anchors' log-probs by step in a run that stayed 0.02 nats a token away."""
    chosen = [-9.4, -2.1, -1.3, -1.0, -12.8, -11.2, -10.2, -13.4]
    assert told(Symptoms(8), lines("logps/chosen", chosen)) == []


def test_chosen_responses_that_sink_are_told_apart_from_noise():
    rng = np.random.default_rng(0)
    noise = list(-9 + 4 * rng.normal(size=10 * WINDOW))
    assert told(Symptoms(), lines("logps/chosen", noise)) == []
    sinking = [value - 0.05 * step for step, value in enumerate(noise)]
    (line,) = told(Symptoms(), lines("logps/chosen", sinking))
    assert "the log-prob of chosen responses sinks (-10.2 at first" in line


def evaluated(model, step, value):
    return {"stage": "eval", "model": model, "step": step, "eval/anchor_logp": value}


def test_sft_that_makes_its_own_validation_loss_worse_is_told():
    symptoms = Symptoms()
    good = [evaluated("base", 0, -2.0), evaluated("sft", 5, -1.2), evaluated("sft", 10, -1.21)]
    assert told(symptoms, good) == []
    (line,) = told(symptoms, [evaluated("sft", 15, -1.25), evaluated("sft", 20, -1.4)])
    assert line.startswith("sft step 15: held-out anchor log-prob -1.250, and it was -1.200 at ")
    assert "step 5: SFT has gone too far: checkpoint.best=anchor_logp" in line
    (line,) = told(Symptoms(), [evaluated("base", 0, -1.0), evaluated("sft", 40, -1.5)])
    assert "it was -1.000 before it" in line
    assert told(Symptoms(), [evaluated("base", 0, -1.0), evaluated("aligned", 40, -1.5)]) == []


def test_lines_that_a_resumed_run_had_are_not_told_again():
    resumed = Symptoms()
    before = lines("kl/ref", [2.0] * WINDOW)
    assert told(resumed, before) != []
    assert told(resumed, lines("kl/ref", [2.0] * WINDOW)) == []


def course_of(*lines):
    course = Course()
    for step, line in enumerate(lines, 1):
        course.take({"stage": "align", "step": step} | line)
    return course


def test_a_surrogate_of_either_sign_is_no_sign_and_the_distance_to_the_reference_is():
    """Advantages of rewards in hundreds: the loss swings, and the policy stays where it is."""
    swings = [{"loss": value, "kl/ref": 0.1} for value in (0.1, *[90.0] * 20, *[-90.0] * 5)]
    assert course_of(*swings).astray == 0
    alone = [{"loss": value, "policy/clip_fraction": 0.0} for value in (0.1, *[90.0] * 20)]
    assert course_of(*alone).astray == 0  # GRPO without a KL
    gone = [{"loss": 0.0, "log_ratio/ref": value} for value in (0.1, 0.2, *[-6.0, 7.0] * 5)]
    assert course_of(*gone).why.endswith("7 nats a token from its reference")
    gone = [{"loss": 0.0, "kl/ref": value} for value in (0.1, 0.2, *[-6.0, 7.0] * 5)]
    course = course_of(*gone)
    assert (course.good, course.astray) == (2, 10)
    assert course.diverged(steps=100)
    assert course.why == "the policy is 7 nats a token from its reference"
    assert not course_of(*gone[:-1]).diverged(steps=100)
    assert course_of({"loss": 0.1, "kl/ref": 0.1}, {"loss": 9.0, "kl/ref": None}).astray == 1


def test_a_noisy_loss_a_falling_one_and_one_that_is_not_finite_are_not_astray():
    rng = np.random.default_rng(0)
    falling = [{"loss": 2.6 * 0.99**n * np.exp(0.3 * rng.normal())} for n in range(300)]
    assert course_of(*falling).astray == 0
    assert course_of({"loss": 1.0}, *[{"loss": None}] * 20).astray == 0
    # By twice the best and no less than 2 nats: 0.3 to 2.2 is overfitting, 2.6 to 8 is not.
    assert course_of({"loss": 0.3}, *[{"loss": 2.2}] * 20).astray == 0
    assert course_of({"loss": 2.6}, *[{"loss": 7.7}] * 9).astray == 0
    assert course_of({"loss": 2.6}, *[{"loss": 7.9}] * 9).astray == 9


def test_how_often_a_reward_failed_is_kept_for_the_end():
    symptoms = Symptoms()
    told(symptoms, [*lines("score/failed", [1.0, 0.5]), *lines("loss", [1.0])])
    assert symptoms.failed == [1.0, 0.5]
