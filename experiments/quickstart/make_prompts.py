"""Write the quickstart's prompts: five files, whose sizes `SHAPES` gives.

`train` (448) and `heldout` (160) came first and never change. `train_more` (1,184) is for training
as well; settings are chosen on `validation` (200), and `test` (500) is for the end. Part of each is
short writing and assistance; the rest can be checked by a program and is split equally between
sums, needles, copying and formatting. `answer` is for evaluation alone.
No two files fill a wording in the same way: what can fill it (`pools/`) is divided between them.
The files are a function of the seeds: `python experiments/quickstart/make_prompts.py [folder]`.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
SEED, SEED_MORE = 20260120, 20261128  # the longest prompt has 80 of SmolLM2's tokens


class Shape(NamedTuple):
    """How many blocks a file has, and of what: every block holds the kinds in proportion."""

    blocks: int
    writing: int
    each: int  # of every other kind


SHAPES = {
    "train": Shape(56, writing=4, each=1),
    "heldout": Shape(20, writing=4, each=1),
    "train_more": Shape(148, writing=4, each=1),
    "validation": Shape(8, writing=9, each=4),
    "test": Shape(20, writing=9, each=4),
}
# Whose turn it is to get the next word of a pool, in the first half of `words.txt` and the second.
TURNS = (
    ("train", "train", "heldout"),
    ("train_more", "train_more", "validation", "test", "test"),
)


class Task(NamedTuple):
    """A prompt, its kind, and the answer where a program can check it."""

    kind: str
    prompt: str
    answer: str | None = None


Pools = dict[str, list[str]]
Pair = tuple[int, int]

SUMS_PLAIN = (
    "What is {a} + {b}?",
    "Add {a} and {b}.",
    "What is {a} plus {b}? Answer with only the number.",
    "Calculate {a} + {b}. Give only the result.",
    "{a} + {b} = ?",
    "Find the sum of {a} and {b}. Reply with only the number.",
    "How much is {a} and {b} together? Just the number, please.",
    "Which number do you get when you add {b} to {a}?",
)
SUMS_STORY = (  # plural nouns: both numbers are at least two
    "{who} has {a} {things} and gets {b} more. How many {things} does {who} have now?",
    "There are {a} big {things} and {b} small {things} in a box. How many {things} are in the box? "
    "Answer with only the number.",
    "{who} read {a} pages in the morning and {b} in the evening. How many pages is that in total?",
    "{a} people are on a bus and {b} more get on. How many people are on the bus now? "
    "Answer with only the number.",
    "{who} walked {a} km on Monday and {b} km on Tuesday. How many km is that in total? "
    "Give only the number.",
    "{who} found {a} {things} and {other} found {b}. How many {things} did they find together?",
)
SUMS_PLAIN_MORE = (
    *SUMS_PLAIN,
    "Work out {a} + {b} and give only the number.",
    "What is the total of {a} and {b}? Answer with only the number.",
    "{a} plus {b} equals what? Give only the number.",
)
SUMS_STORY_MORE = (
    *SUMS_STORY,
    "A shop sold {a} {things} before lunch and {b} after lunch. How many {things} did it sell? "
    "Answer with only the number.",
    "{who} has {a} {things} and {other} has {b}. How many {things} do they have together?",
    "{who} saved {a} dollars last week and {b} this week. How many dollars is that in total?",
    "{a} birds sit in a tree and {b} more arrive. How many birds are in the tree now? "
    "Give only the number.",
    "{who} scored {a} points in the first game and {b} in the second. How many points is that in "
    "total? Give only the number.",
)


class Relation(NamedTuple):
    """One sort of fact for the needles, and how to ask for either side of it."""

    subjects: str
    values: str
    fact: str
    ask_value: str
    only_value: str
    ask_subject: str


class Wordings(NamedTuple):
    """What the prompts of a file may look like, other than the writing."""

    sums_plain: tuple[str, ...]
    sums_story: tuple[str, ...]
    relations: list[Relation]
    copy: Callable[[Pools, random.Random], list[Task]]
    format: Callable[[Pools, random.Random], list[Task]]


ONLY_SUBJECT = {
    "names": "Answer with only the name.",
    "things": "Name only the object.",
    "events": "Name only the event.",
}

# Days, colours, months and plain adjectives are few: every file uses them. The rest is split.
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "purple", "grey", "pink")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
ADJECTIVES = ("small", "new", "red", "broken", "silver", "lost", "heavy", "plain", "huge", "clean")
UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def paragraphs(name: str) -> list[list[str]]:
    """The lines of each paragraph of a file of `pools`; a line that starts with a space goes on."""
    text = (HERE / "pools" / name).read_text(encoding="utf-8").replace("\n ", " ")
    return [paragraph.splitlines() for paragraph in text.split("\n\n")]


def pools_of(split: str) -> Pools:
    """Every pool a file draws from, by name; `train_more` has what `train` has and more."""
    takers = {"train", "train_more"} if split == "train_more" else {split}
    pools: Pools = defaultdict(list)
    for rows, turns in zip(paragraphs("words.txt"), TURNS, strict=True):
        for row in rows:
            name, words = row.split(": ")
            turn = zip(words.split(), cycle(turns), strict=False)
            pools[name] += [word for word, taker in turn if taker in takers]
    return pools | {"days": list(DAYS), "colours": list(COLOURS), "months": list(MONTHS)}


def families(name: str) -> Iterator[tuple[list[str], list[str]]]:
    """Wordings and the subjects that fill them, family by family."""
    for rows in paragraphs(name):
        wordings = [row for row in rows if not row.startswith("- ")]
        subjects = " | ".join(row.removeprefix("- ") for row in rows if row.startswith("- "))
        yield wordings, subjects.split(" | ")


def writing_tasks(name: str, turns: list[str], rng: random.Random) -> dict[str, list[Task]]:
    """Writing prompts by split; `turns` says whose each subject is, family after family."""
    tasks: dict[str, list[Task]] = {split: [] for split in SHAPES if split in turns}
    turn = iter(turns)
    for wordings, subjects in families(name):
        shuffled = rng.sample(subjects, len(subjects))
        for i, (subject, split) in enumerate(zip(shuffled, turn, strict=False)):
            wording = wordings[i % len(wordings)]
            tasks[split].append(Task("writing", wording.format(subject)))
    for some in tasks.values():
        rng.shuffle(some)
    return tasks


def spread(counts: dict[str, int]) -> list[str]:
    """Every name as often as its count says, the names evenly mixed."""
    places = [((i + 0.5) / count, name) for name, count in counts.items() for i in range(count)]
    return [name for _, name in sorted(places)]


def of_each(split: str) -> int:
    """How many tasks of every kind but writing a file has."""
    return SHAPES[split].blocks * SHAPES[split].each


def in_rounds(pairs: list[Pair], count: int, rng: random.Random) -> list[Pair]:
    """`count` pairs: all of them in some order, again and again."""
    rounds = (rng.sample(pairs, len(pairs)) for _ in range(count))
    return list(islice(chain.from_iterable(rounds), count))


def sum_tasks(
    pairs: list[Pair],
    wordings: Wordings,
    pools: Pools,
    rng: random.Random,
    used: set[tuple[int, int, str]],
) -> list[Task]:
    """A sum of each pair, in a wording that `used` does not have for it yet."""
    tasks = []
    uses: Counter[str] = Counter()
    for low, high in pairs:
        free = [
            wording
            for wording in wordings.sums_plain + (() if low == 1 else wordings.sums_story)
            if (low, high, wording) not in used
        ]
        rng.shuffle(free)
        wording = min(free, key=uses.__getitem__)
        uses[wording] += 1
        used.add((low, high, wording))
        a, b = rng.sample((low, high), 2)
        who, other = rng.sample(pools["names"], 2)
        things = rng.choice(pools["plurals"])
        prompt = wording.format(a=a, b=b, who=who, other=other, things=things)
        tasks.append(Task("sum", prompt, str(a + b)))
    rng.shuffle(tasks)
    return tasks


def needle_tasks(relations: list[Relation], pools: Pools, rng: random.Random) -> list[Task]:
    """One prompt for each relation and direction of the question."""
    tasks = []
    for relation in relations:
        for about_subject in (False, True):
            count = rng.choice((3, 3, 4))
            count = min(count, len(pools[relation.subjects]), len(pools[relation.values]))
            subjects = rng.sample(pools[relation.subjects], count)
            values = rng.sample(pools[relation.values], count)
            pairs = list(zip(subjects, values, strict=True))
            facts = " ".join(relation.fact.format(s=s, v=v) for s, v in pairs)
            subject, value = rng.choice(pairs)
            if about_subject:
                question, answer = relation.ask_subject.format(v=value), subject
                only = ONLY_SUBJECT[relation.subjects]
            else:
                question, answer = relation.ask_value.format(s=subject), value
                only = relation.only_value
            frames = (f"{facts} {question} {only}",) * 3 + (
                f"{facts} {question}",
                f"Read this: {facts} {question} {only}",
            )
            tasks.append(Task("needle", rng.choice(frames), answer))
    return tasks


def copy_tasks(pools: Pools, rng: random.Random) -> list[Task]:
    """One prompt for each wording."""
    w = rng.sample(pools["words"], 11)
    things, adjectives = rng.sample(pools["things"], 6), rng.sample(ADJECTIVES, 5)
    code = "".join(rng.sample("ABCDEFGHKLMNPQRSTVWXZ", 2)) + f"-{rng.randint(100, 999)}"
    number = str(rng.randint(10000, 99999))
    letters = " ".join(rng.sample("bcdfghjkmnpqrstvwxz", 4))
    phrase, quote = f"{adjectives[0]} {things[0]}", f"the {adjectives[1]} {things[1]}"
    first, second, third = rng.sample(pools["places"], 3)
    sentence = f"{rng.choice(pools['names'])} has a {adjectives[2]} {things[2]}"
    other_sentence = f"The {things[3]} is in the {first}"
    bracketed = f"The {adjectives[3]} [{things[4]}] is in the {second}."
    plain = f"The {adjectives[4]} {things[5]} is in the {third}."
    pairs = (
        (f"Repeat this word exactly: {w[0]}", w[0]),
        (f"Copy this code exactly: {code}", code),
        (f"Say this phrase and nothing else: {phrase}", phrase),
        (
            f"What is the last item in this list: {w[1]}, {w[2]}, {w[3]}? "
            "Answer with only that item.",
            w[3],
        ),
        (
            f"What is the first item in this list: {w[4]}, {w[5]}, {w[6]}? Reply with one word.",
            w[4],
        ),
        (f"Repeat only the second word: {w[7]} {w[8]} {w[9]}", w[8]),
        (f"Write this number again, with nothing else: {number}", number),
        (f"Copy these letters exactly: {letters}", letters),
        (f'Copy the text between the quotes: "{quote}"', quote),
        (f"Write the word {w[10]} twice, with a space between.", f"{w[10]} {w[10]}"),
        (f"Which word is in brackets? {bracketed} Answer with only the word.", things[4]),
        (
            f"What is the third word of this sentence? {plain} Answer with only the word.",
            things[5],
        ),
        (f"Please repeat after me: {sentence}", sentence),
        (f"Repeat the sentence word for word: {other_sentence}", other_sentence),
    )
    return [Task("copy", prompt, answer) for prompt, answer in pairs]


def copy_tasks_more(pools: Pools, rng: random.Random) -> list[Task]:
    """One prompt for each wording, old and new."""
    w = rng.sample(pools["words"], 13)
    capital = rng.choice(w[10:13])
    some = " ".join(word.upper() if word == capital else word for word in w[10:13])
    name, other, third = rng.sample(pools["names"], 3)
    number = rng.choice(pools["numbers"])
    date = f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1990, 2030)}"
    mail = f"{third.lower()}@example.com"
    pairs = (
        (f"Repeat only the first word: {w[0]} {w[1]} {w[2]}", w[0]),
        (f"Repeat only the last word: {w[3]} {w[4]} {w[5]}", w[5]),
        (f"Say the word {w[6]} and nothing else.", w[6]),
        (
            f"Which word comes after {w[8]} in this list: {w[7]}, {w[8]}, {w[9]}? "
            "Answer with only the word.",
            w[9],
        ),
        (
            f"Copy only the number from this sentence: {name} has {number} "
            f"{rng.choice(pools['plurals'])}.",
            number,
        ),
        (
            f"Copy only the name from this sentence: The {rng.choice(pools['things'])} belongs to "
            f"{other}.",
            other,
        ),
        (f"Copy this date exactly: {date}", date),
        (f"Which word is in capital letters: {some}? Answer with only that word.", capital.upper()),
        (f"Copy this e-mail address exactly: {mail}", mail),
    )
    return copy_tasks(pools, rng) + [Task("copy", prompt, answer) for prompt, answer in pairs]


def format_tasks(pools: Pools, rng: random.Random) -> list[Task]:
    """One prompt for each wording; no answer is part of its prompt as it stands."""
    w = rng.sample(pools["words"], 15)
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1990, 2030)
    hour, minute = rng.randint(1, 11), rng.choice((5, 10, 15, 20, 30, 40, 45))
    tens, units = rng.randint(2, 9), rng.randint(1, 9)
    price = rng.randint(11, 99)
    colour = rng.choice(COLOURS)
    name = rng.choice(pools["names"])
    city = rng.choice(pools["cities"])
    pairs = (
        (f"Write the word {w[0]} in capital letters.", w[0].upper()),
        (f"Write {w[1].upper()} in lower case. Answer with only the word.", w[1]),
        (
            f"Join these words with hyphens: {w[2]} {w[3]} {w[4]}. Give only the result.",
            f"{w[2]}-{w[3]}-{w[4]}",
        ),
        (
            f"Write {day} {MONTHS[month - 1]} {year} as YYYY-MM-DD. Answer with only the date.",
            f"{year}-{month:02}-{day:02}",
        ),
        (
            f"Write these words with a comma and a space between them: {w[5]} {w[6]} {w[7]}",
            f"{w[5]}, {w[6]}, {w[7]}",
        ),
        (f"Put the word {w[8]} in square brackets. Give only the result.", f"[{w[8]}]"),
        (f"Write the name {name.lower()} with a capital first letter.", name),
        (
            f"Join the words {w[9]} and {w[10]} with an underscore. Give only the result.",
            f"{w[9]}_{w[10]}",
        ),
        (
            f"Write the number {TENS[tens - 2]}-{UNITS[units - 1]} in digits. "
            "Answer with only the number.",
            f"{10 * tens + units}",
        ),
        (
            f"Write {hour}:{minute:02} pm in 24-hour time. Answer with only the time.",
            f"{hour + 12}:{minute:02}",
        ),
        (
            f"Write the key colour and the value {colour} as key=value. Give only the result.",
            f"colour={colour}",
        ),
        (f"Write {price} dollars with a dollar sign in front. Give only the result.", f"${price}"),
        (
            f"Replace the comma with a slash and remove the space: {w[11]}, {w[12]}",
            f"{w[11]}/{w[12]}",
        ),
        (
            f"Put the city {city.lower()} in capital letters. Answer with only the word.",
            city.upper(),
        ),
        (f"Write {w[13]} {w[14]} as one word, without the space.", f"{w[13]}{w[14]}"),
    )
    return [Task("format", prompt, answer) for prompt, answer in pairs]


def format_tasks_more(pools: Pools, rng: random.Random) -> list[Task]:
    """One prompt for each wording, old and new; no answer is part of its prompt as it stands."""
    w = rng.sample(pools["words"], 9)
    hours, minutes, percent = rng.randint(1, 12), rng.randint(11, 59), rng.randint(11, 99)
    key, pool = rng.choice(
        (("city", "cities"), ("job", "jobs"), ("food", "foods"), ("pet", "pets"))
    )
    value = rng.choice(pools[pool])
    first, last = rng.sample(pools["names"], 2)
    pairs = (
        (f"Put the word {w[0]} in round brackets. Give only the result.", f"({w[0]})"),
        (
            f"Write the word {w[1]} with an exclamation mark at the end. Give only the result.",
            f"{w[1]}!",
        ),
        (
            f"Join the words {w[2]} and {w[3]} with a plus sign. Give only the result.",
            f"{w[2]}+{w[3]}",
        ),
        (
            f"Write {w[4].upper()} {w[5].upper()} in lower case. Give only the result.",
            f"{w[4]} {w[5]}",
        ),
        (f"Write {percent} percent with a percent sign. Give only the result.", f"{percent}%"),
        (
            f"Write {hours} hours and {minutes} minutes as H:MM. Answer with only the time.",
            f"{hours}:{minutes}",
        ),
        (
            f"Put a colon between these words, without spaces: {w[6]} {w[7]}",
            f"{w[6]}:{w[7]}",
        ),
        (
            f"Write the key {key} and the value {value} as key=value. Give only the result.",
            f"{key}={value}",
        ),
        (
            f"Write the name {first} {last} with the last name first, then a comma and a space.",
            f"{last}, {first}",
        ),
        (f"Put the word {w[8]} in quotation marks. Give only the result.", f'"{w[8]}"'),
    )
    return format_tasks(pools, rng) + [Task("format", prompt, answer) for prompt, answer in pairs]


def rounds(
    make: Callable[[], list[Task]], rng: random.Random, used: set[str], *, count: int
) -> list[Task]:
    """`count` tasks that no file has: whole rounds of all wordings, each round shuffled."""
    tasks: list[Task] = []
    while len(tasks) < count:
        some = make()
        rng.shuffle(some)
        for task in some:
            if task.prompt.casefold() not in used:
                used.add(task.prompt.casefold())
                tasks.append(task)
    return tasks[:count]


class Used(NamedTuple):
    """What the files hold already: sums as pair and wording, and prompts whatever their case."""

    sums: set[tuple[int, int, str]]
    prompts: set[str]


def fill(
    writing: dict[str, list[Task]],
    pairs: dict[str, list[Pair]],
    wordings: Wordings,
    rng: random.Random,
    used: Used,
) -> dict[str, list[Task]]:
    """The files of `writing` with all kinds in them, block after block."""
    sums = {
        split: sum_tasks(some, wordings, pools_of(split), rng, used.sums)
        for split, some in pairs.items()
    }
    files = {}
    for split in writing:
        pools, shape = pools_of(split), SHAPES[split]
        makers = (
            partial(needle_tasks, wordings.relations, pools, rng),
            partial(wordings.copy, pools, rng),
            partial(wordings.format, pools, rng),
        )
        checked = [sums[split]]
        checked += [rounds(make, rng, used.prompts, count=of_each(split)) for make in makers]
        files[split] = []
        for i in range(shape.blocks):
            block = writing[split][shape.writing * i : shape.writing * (i + 1)]
            for tasks in checked:
                block += tasks[shape.each * i : shape.each * (i + 1)]
            files[split] += rng.sample(block, len(block))
    return files


def make_prompts() -> dict[str, list[Task]]:
    """The tasks of all files, in order."""
    first, more = (
        [Relation(*row.split(" | ")) for row in rows] for rows in paragraphs("relations.txt")
    )
    used = Used(set(), set())

    rng = random.Random(SEED)
    turns = (["heldout"] * 2 + ["train"] * 5) * len(paragraphs("writing.txt"))
    writing = writing_tasks("writing.txt", turns, rng)
    pairs = [(low, high) for low in range(1, 10) for high in range(low, 10)]
    rng.shuffle(pairs)
    unseen, seen = pairs[:10], pairs[10:]  # training sums are of seen pairs, half of the others not
    twice = seen + rng.sample(seen, len(seen))
    sums = {"train": twice[: of_each("train")], "heldout": unseen + rng.sample(seen, 10)}
    wordings = Wordings(SUMS_PLAIN, SUMS_STORY, first, copy_tasks, format_tasks)
    files = fill(writing, sums, wordings, rng, used)

    rng = random.Random(SEED_MORE)
    splits = ("train_more", "validation", "test")
    turns = spread({split: SHAPES[split].blocks * SHAPES[split].writing for split in splits})
    writing = writing_tasks("writing_more.txt", turns, rng)
    sums = {"train_more": in_rounds(seen, of_each("train_more"), rng)}
    for split in ("validation", "test"):
        half = of_each(split) // 2
        sums[split] = in_rounds(unseen, half, rng) + in_rounds(seen, half, rng)
    wordings = Wordings(
        SUMS_PLAIN_MORE, SUMS_STORY_MORE, first + more, copy_tasks_more, format_tasks_more
    )
    return files | fill(writing, sums, wordings, rng, used)


def lines(split: str, tasks: Iterable[Task]) -> str:
    """The tasks as JSON lines."""
    rows = []
    for i, task in enumerate(tasks, start=1):
        row = {"id": f"{split}-{i:04}", "kind": task.kind, "prompt": task.prompt}
        rows.append(json.dumps(row | ({} if task.answer is None else {"answer": task.answer})))
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().folder
    for split, tasks in make_prompts().items():
        (folder / f"{split}.jsonl").write_text(lines(split, tasks), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
