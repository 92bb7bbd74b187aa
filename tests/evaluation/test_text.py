import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize

from pujax.evaluation.text import contains, exact, rouge_l, words
from pujax.records import Prompt


def prompt(answer):
    return Prompt("p", ({"role": "user", "content": "?"},), answer)


@settings(max_examples=200)
@given(st.text(string.printable))
def test_in_ascii_the_words_are_those_of_rouge_scores_own_tokenizer(text):
    assert words(text) == tokenize(text, None)


WORDS = st.lists(st.sampled_from(["a", "B", "the", "7", "x_y", "it's", "!"])).map(" ".join)


@settings(max_examples=50)
@given(WORDS, WORDS)
def test_in_ascii_rouge_l_is_what_it_was(anchor, response):
    default = RougeScorer(["rougeL"]).score(anchor, response)["rougeL"].fmeasure
    assert rouge_l(anchor, response) == (1.0 if anchor == response != "" else default)


TEXTS = (
    "Москва — столица России.",
    "东京是日本的首都。",
    "東京は日本の首都です",
    "القاهرة عاصمة مصر",
    "दिल्ली भारत की राजधानी है",
    "กรุงเทพเป็นเมืองหลวง",
    "서울은 한국의 수도이다",
    "Ελλάδα",
    "±",
    "👍",
    "crème brûlée",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_any_script_has_rouge_l_1_with_itself(text):
    assert rouge_l(text, text) == 1.0
    assert rouge_l(text, "") == rouge_l("", text) == 0.0


@settings(max_examples=100)
@given(st.text())
def test_every_text_that_is_not_blank_has_rouge_l_1_with_itself(text):
    assert rouge_l(text, text) == float(bool(text.strip()))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("naïve café", ["naïve", "café"]),
        ("cafe\u0301!", ["café"]),
        ("東京に7回", ["東", "京", "に", "7", "回"]),
        ("２０２６年", ["2026", "年"]),
        ("दिल्ली है", ["दिल्ली", "है"]),
        ("กำ", ["ก\u0e4d", "า"]),
        ("可a b", ["可", "a", "b"]),
        ("co\u00adop _ x", ["coop", "x"]),
        ("\u0301", []),
    ],
)
def test_words_are_letters_digits_and_their_marks_or_single_letters(text, found):
    assert words(text) == found


def test_rouge_l_of_chinese_counts_letters():
    # LCS 3 of 4 and 5 letters: 2 * 3 / 9.
    assert rouge_l("我住东京", "我们住在京") == pytest.approx(2 * 3 / 9)


def test_part_of_an_accented_word_is_no_match():
    assert rouge_l("naïve", "na") == 0.0
    assert rouge_l("café crème", "caf crme") == 0.0


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("東京", "私は東京に住んでいます"),
        ("7", "答えは7です"),
        ("Tokyo", "首都はTokyoです"),
        ("북한", "이것은 북한 이다"),
        ("café", "un cafe\u0301 noir"),
        ("ไทย", "ประเทศไทยสวย"),
    ],
)
def test_an_answer_is_found_where_no_spaces_part_the_words(answer, response):
    assert contains(prompt(answer), response)


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("7", "答えは17です"),
        ("7", "答えは7.5です"),
        ("カ", "\u30abキ\u3099".replace("\u30ab", "\u30ad")),
        ("कम", "कमी"),
        ("caf", "café"),
        ("cafe", "cafe\u0301"),
        ("мир", "мирный"),
    ],
)
def test_part_of_a_word_of_any_spaced_script_is_not_the_answer(answer, response):
    assert not contains(prompt(answer), response)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_a_blank_answer_stands_nowhere(answer):
    assert not contains(prompt(answer), "anything")


def test_a_chinese_full_stop_does_not_count_against_an_exact_answer():
    assert exact(prompt("东京"), "东京。")
    assert not exact(prompt("东京"), "东京都")


def test_a_response_of_marks_or_hits_alone_is_gone_through_in_linear_time():
    begun = time.process_time()
    assert exact(prompt("1"), "'1" + "!" * 100_000)
    assert not contains(prompt("1"), "1" * 100_000)
    assert time.process_time() - begun < 1.0
