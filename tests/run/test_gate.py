from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from pujax import rewards
from pujax.config.settings import GateConfig
from pujax.errors import ConfigError, DataError
from pujax.records import Example, Given, Prompt
from pujax.run.gate import gated, in_words, near_duplicates
from pujax.run.judged import judged
from pujax.run.rewarding import anchor_check
from pujax.run.workers import Outcome

LONG = "the quick brown fox jumps over the lazy dog and then it sleeps all day"


def example(anchor, answer=None):
    prompt = Prompt(anchor, ({"role": "user", "content": "x"},), answer)
    return Example(prompt, (1,), (1,), anchor, (1,), True)


def left(*anchors, **settings):
    kept, counts = gated([example(*each) for each in anchors], GateConfig(**settings))
    return [each.anchor for each in kept], counts


def test_an_anchor_without_the_true_answer_is_left_out_and_counted():
    anchors = ("7", "7"), ("it is 7", "7"), ("8", "7"), ("anything", None)
    assert left(*anchors) == (["7", "it is 7", "8", "anything"], {})
    wrong = "without the true answer"
    assert left(*anchors, answer="contains") == (["7", "it is 7", "anything"], {wrong: 1})
    assert left(*anchors, answer="exact") == (["7", "anything"], {wrong: 2})


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, I cannot do this.", True),
        ("Sorry, that is not possible.", True),
        ("As an AI language model, I have no opinion.", True),
        ("Unfortunately, I am unable to answer.", True),
        ("I cannot assist with this request.", True),
        ("Dear Sir, I'm sorry to hear of your loss.", False),
        ("I can help with that.", False),
        ("As an airline, we apologise.", False),
        ("I apologize, but I can't do that.", True),
        ("I do not feel comfortable writing this.", True),
        ("As an AI, I have no body.", True),
        ("I won't write that.", True),
        ("I cannot recommend a medicine.", True),
        ("I could not agree more.", False),
        ("I cannot stress enough how this matters.", False),
        ("I can't recommend this book enough!", False),
        ("I won't lie: it is hard.", False),
        ("As an AI researcher, she wrote the paper.", False),
    ],
)
def test_refusals_are_told_by_how_they_begin(text, refused):
    kept, counts = left(("fine",), (text,), refusals=True)
    assert (text not in kept, counts) == (refused, {"refusals": 1} if refused else {})


def test_near_duplicates_share_word_triples_with_an_earlier_anchor():
    # 14 words, 12 triples (two words of "the ... the" differ); one word changed breaks 3 of them.
    other = LONG.replace("lazy", "idle")
    examples = [example(text) for text in (LONG, "yes", other, "yes", LONG + " long")]
    assert near_duplicates(examples, 0.5) == {2, 4}
    assert near_duplicates(examples, 0.9) == {4}
    kept, counts = gated(examples, GateConfig(near_duplicates=0.9))
    assert ([e.anchor for e in kept], counts) == (
        [LONG, "yes", other, "yes"],
        {"near duplicates": 1},
    )


def test_a_weight_keeps_what_is_not_trusted():
    kept, counts = gated(
        [example("7", "7"), example("8", "7")], GateConfig(answer="exact", weight=0.25)
    )
    assert [each.weight for each in kept] == [1.0, 0.25]
    assert sum(counts.values()) == 1


def test_a_gate_that_nothing_passes_is_an_error():
    with pytest.raises(DataError, match=r"data\.gate leaves no anchor \(1 without .* of 1\)"):
        left(("8", "7"), answer="exact")
    with pytest.raises(ConfigError, match=r"data\.gate\.answer='yes': choose off, exact or"):
        GateConfig(answer="yes")
    with pytest.raises(ConfigError, match=r"data\.gate\.weight=2"):
        GateConfig(weight=2.0)


def test_a_checks_number_must_reach_the_least_and_none_says_nothing():
    examples = [example(text) for text in ("good", "bad", "unknown", "broken")]
    checked = [Outcome(4.0), Outcome(2.0), Outcome(None), Outcome(float("nan"), "down")]
    kept, counts = gated(examples, GateConfig(least=3.0), checked)
    assert [each.anchor for each in kept] == ["good", "unknown"]
    assert counts == {"below data.gate.least": 1, "that data.gate.check failed on": 1}
    kept, counts = gated(examples, GateConfig(least=2.0, weight=0.5), checked)
    assert [each.weight for each in kept] == [1.0, 1.0, 1.0, 0.5]


def rated(anchor, **rest):
    prompt = Prompt(anchor, ({"role": "user", "content": "x"},), rest=rest)
    return Example(prompt, (1,), (1,), anchor, (1,), True)


def test_a_judges_scores_are_read_from_the_prompts_lines_and_named_where_they_are_none():
    check = anchor_check(partial(rewards.column, name="judge"), seconds=60.0)
    found = check([rated("a", judge=4), rated("b", judge=1.5), rated("c")])
    assert [outcome.value for outcome in found] == [4.0, 1.5, None]
    with pytest.raises(ConfigError, match=r"^data\.gate\.check: judge='four' in a prompt: write a"):
        check([rated("a", judge="four")])


def test_a_check_that_is_none_is_refused_before_it_is_asked():
    with pytest.raises(ConfigError, match=r"^data\.gate\.check: in_words takes 'counts'"):
        anchor_check(in_words, seconds=1.0)
    wrong: Any = 3
    broken = partial(rewards.json_object, required=wrong)
    with pytest.raises(ConfigError, match=r"data\.gate\.check: json_object failed on all of 1 anc"):
        anchor_check(broken, seconds=60.0)([rated("a")])


def test_answers_are_judged_before_they_are_learnt():
    rows = (
        *(("Account", "billing"), ("Account", "account"), ("it's billing.", "billing")),
        *(("I'm sorry, but I can't.", None), (LONG, None), (LONG + " and night", None)),
    )
    told = judged([(example(anchor, answer).prompt, anchor) for anchor, answer in rows])
    assert told == {
        "right": "exact 1, contains 2 of 3 with a true answer",
        "most frequent": "2 × “Account”",
        "refusals": "1 of 6",
        "near copies": "1 of 6",
    }
    assert judged([(example("yes").prompt, "yes")]) == {}


def test_a_prompt_whose_answers_nobody_called_good_has_no_anchor_to_distrust():
    bad = replace(example("", "7"), anchor_ids=(), given=(Given((1, 2), -1.0),))
    kept, counts = gated([bad, example("8", "7"), example("7", "7")], GateConfig(answer="exact"))
    assert [each.anchor for each in kept] == ["", "7"]
    assert counts == {"without the true answer": 1}
