import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments" / "quickstart"
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
)


def read(split: str) -> list[Row]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


def of_kind(kind: str) -> list[Row]:
    return [row for split in ("train", "heldout") for row in read(split) if row["kind"] == kind]


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


def test_script_reproduces_the_files_byte_for_byte(tmp_path: Path):
    subprocess.run([sys.executable, "-B", FOLDER / "make_prompts.py", tmp_path], check=True)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


@pytest.mark.parametrize(("split", "count"), [("train", 448), ("heldout", 160)])
def test_every_eight_lines_are_four_writing_prompts_and_one_of_each_other_kind(
    split: str, count: int
):
    rows = read(split)
    assert len(rows) == count
    for i in range(0, count, 8):
        kinds = Counter(row["kind"] for row in rows[i : i + 8])
        assert kinds == {"writing": 4, "sum": 1, "needle": 1, "copy": 1, "format": 1}


def test_ids_and_prompts_are_unique_and_no_prompt_is_in_both_files():
    rows = read("train") + read("heldout")
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["prompt"].casefold() for row in rows}) == len(rows)


def test_answers_are_given_exactly_where_they_can_be_checked():
    for row in read("train") + read("heldout"):
        assert ("answer" in row) == (row["kind"] != "writing")


def test_prompts_are_short():
    words = [len(row["prompt"].split()) for row in read("train") + read("heldout")]
    assert max(words) <= 35
    assert sum(words) / len(words) < 15


def test_sums_are_right_and_their_answers_are_not_in_the_prompt():
    for row in of_kind("sum"):
        low, high = addends(row)
        assert 1 <= low <= high <= 9
        assert row["answer"] == str(low + high)
        assert occurrences(row) == 0


def test_half_of_the_held_out_sums_are_of_pairs_absent_from_train():
    train, heldout = (
        [tuple(addends(row)) for row in read(split) if row["kind"] == "sum"]
        for split in ("train", "heldout")
    )
    assert sum(pair not in train for pair in heldout) == 10


def test_held_out_sums_put_no_pair_in_a_wording_that_train_puts_it_in():
    script = runpy.run_path(str(FOLDER / "make_prompts.py"))
    wordings = {
        wording: re.sub(r"\\{\w+\\}", r"\\w+", re.escape(wording))
        for wording in script["SUMS_PLAIN"] + script["SUMS_STORY"]
    }
    train, heldout = (
        {
            (*addends(row), wording)
            for row in read(split)
            if row["kind"] == "sum"
            for wording, pattern in wordings.items()
            if re.fullmatch(pattern, row["prompt"])
        }
        for split in ("train", "heldout")
    )
    assert (len(train), len(heldout)) == (56, 20)
    assert not train & heldout


def test_held_out_needles_are_about_other_people_and_things():
    train, heldout = (
        {row["answer"] for row in read(split) if row["kind"] == "needle"}
        for split in ("train", "heldout")
    )
    days_and_colours = r"\w+day|red|blue|green|yellow|black|white|brown|purple|grey|pink"
    assert all(re.fullmatch(days_and_colours, answer) for answer in train & heldout)


def test_needle_answers_share_a_statement_with_the_question_and_occur_once():
    for row in of_kind("needle"):
        assert occurrences(row) == 1
        statements, question = re.findall(r"(.*\.) ([^.]*\?)", row["prompt"])[0]
        [statement] = [s for s in statements.split(". ") if row["answer"] in re.findall(r"\w+", s)]
        others = statements.replace(statement, "")
        clues = set(re.findall(r"\w+", question)) & set(re.findall(r"\w+", statement))
        assert clues - set(re.findall(r"\w+", others))


@pytest.mark.parametrize(("kind", "wordings"), [("copy", COPY), ("format", FORMAT)])
def test_copy_and_format_answers_are_what_the_prompt_asks_for(kind, wordings):
    for row in of_kind(kind):
        assert row["answer"] == asked_for(row, wordings)


def test_format_answers_are_not_in_the_prompt():
    assert not any(occurrences(row) for row in of_kind("format"))
