"""Write the quickstart's prompts: `train.jsonl` (448) and `heldout.jsonl` (160).

Half of each file is short writing and assistance; the other half can be checked by a program and is
split equally between sums, needles, copying and formatting. `answer` is for evaluation alone.
The files are a function of `SEED`: `python experiments/quickstart/make_prompts.py [folder]`.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import compress
from pathlib import Path
from typing import NamedTuple

SEED = 20260120
BLOCKS = {"train": 56, "heldout": 20}  # a block is four writing prompts and one of each other kind


class Task(NamedTuple):
    """A prompt, its kind, and the answer where a program can check it."""

    kind: str
    prompt: str
    answer: str | None = None


# Wordings, then the subjects that fill them.
WRITING = """
Explain in one sentence what {} is.
What is {}? Answer in one short sentence.
- a compass | a recipe | inflation | a haiku | photosynthesis | a thermometer | a password manager

Explain to a six-year-old in one sentence: {}.
Explain for a small child, in at most 25 words: {}.
- rain | gravity | electricity | why we sleep | how magnets work | what a bank does
- what the moon is

Why {}? Answer in one sentence.
In at most 25 words: why {}?
- is the sky blue | do leaves fall in autumn | do cats purr | is the sea salty | does bread rise
- do we yawn | does ice float on water

Give me one tip for {}, in one sentence.
What is your best tip for {}? Keep it under 25 words.
- falling asleep faster | saving money on groceries | learning new words | a first job interview
- packing a suitcase | growing tomatoes | remembering names

{} What should I do? Answer in one sentence.
{} Give me short advice in at most 25 words.
- My neighbour plays loud music at night. | I forgot my friend's birthday.
- My phone battery dies too quickly. | I spilled coffee on my white shirt.
- I feel nervous before giving a talk. | My houseplant has yellow leaves. | I keep losing my keys.

Rewrite politely in one sentence: "{}"
Make this sound friendlier, in one sentence: "{}"
- Send me the report now. | You are late again. | Stop talking during the film.
- Your music is too loud. | I don't want your help. | This soup is cold.
- Move your car, it blocks my gate.

Make this sentence more formal: "{}"
Rewrite for a business letter, in one sentence: "{}"
- Hey, can we meet tomorrow? | Thanks a lot for the quick fix! | Sorry, I can't make it on Friday.
- The new plan looks great to me. | We ran out of money for this. | Let me know what you think.
- Your order got lost somewhere.

Say this in simpler words, in one sentence: "{}"
Rewrite in plain English, in at most 15 words: "{}"
- The venue is inaccessible to vehicles. | Please refrain from feeding the animals.
- Payment is due upon receipt of the goods. | The train will depart with a slight delay.
- Participation in the event is not mandatory. | We endeavour to reply within two days.
- The device ceased to function.

Shorten this to at most eight words: "{}"
Say this in fewer words: "{}"
- Due to the fact that it was raining, we stayed at home.
- At this moment in time we do not have any bread left.
- I would like to ask you whether you could call me back.
- The reason that I am late is that the bus did not come.
- She is a person who really likes to read a lot of books.
- In the event that you get lost, please give us a call.
- The cake that my aunt made was very, very good.

Write a one-sentence e-mail to {}.
Write one polite e-mail line to {}.
- thank a colleague for her help | ask a landlord to repair the heating
- tell my team that I am ill today | move a meeting to Thursday | ask a teacher for more time
- confirm a hotel booking | remind a client about an unpaid bill

Write a subject line of at most eight words for an e-mail about {}.
Suggest an e-mail subject line about {}. Give only the line.
- a summer party at the office | a broken lift | new opening hours | a lost umbrella
- a change of password | free piano lessons | a delayed parcel

Write a one-sentence product description for {}.
Describe {} for an online shop in at most 25 words.
- a folding bicycle | a wool scarf | a desk lamp | a bamboo toothbrush | a waterproof backpack
- a ceramic teapot | a wooden chess set

Write a slogan for {}. Use at most ten words.
Give me one short slogan for {}.
- a village bakery | a bike repair shop | a public library | an ice cream van | a flower shop
- a night bus service | a dog grooming salon

Write a one-sentence story about {}.
Tell a story about {} in at most 30 words.
- a lighthouse keeper | a lost robot | a fox in the snow | a clock that runs backwards
- a girl who talks to birds | a tired wizard | a snail that wins a race

Write the first sentence of a novel about {}.
Write one opening sentence for a story about {}.
- two rival bakers | a missing painting | a town without mirrors | a long train journey
- a haunted supermarket | the last bookshop on Earth | a family of beekeepers

Describe {} in one vivid sentence.
In at most 25 words, describe {}.
- a thunderstorm | a busy market | an old library | a frozen lake | the smell of fresh coffee
- a beach at sunrise | a city seen from a plane

How do I {}? Answer in one or two short sentences.
Tell me how to {} in at most 30 words.
- boil an egg | clean a window without streaks | fix a flat bicycle tyre | wrap a round gift
- sharpen a kitchen knife | stop onions from making me cry | remove a sticker from glass

What is the first step when you want to {}? Answer in one sentence.
I want to {}. Name one good first step, in one sentence.
- learn the guitar | start a small garden | write a book | run a marathon | paint a room
- adopt a dog | plan a birthday party

Summarise in at most ten words: "{}"
Sum up in one short sentence: "{}"
- The shop closes early on Sunday because most staff visit their families.
- Heavy snow blocked the road, so the school stayed shut all week.
- Bees visit many flowers a day and carry pollen from one to another.
- The museum opened a new wing for young artists from the region.
- After years of practice, Lena finally won the town chess cup.
- The old bridge was closed after engineers found cracks in it.
- Ticket prices rose again, and many fans now watch at home.

Give one good reason to {}, in one sentence.
Why should someone {}? Name one reason in at most 20 words.
- walk to work | keep a diary | learn to cook | drink more water | visit a museum
- turn off the phone at dinner | grow herbs at home

Name one advantage and one drawback of {}, in one sentence.
In one sentence, give one good and one bad side of {}.
- working from home | living in a big city | owning a car | buying second-hand clothes
- having a large dog | online shopping | night shifts

Suggest a name for {} and say why in one short sentence.
Invent a name for {}. Give the name and a reason in at most 15 words.
- a grey kitten | a seaside cafe | a school newspaper | a red sailing boat
- a robot vacuum cleaner | a jazz band | a board game about trains

In one sentence, politely decline {}.
Write one friendly sentence to turn down {}.
- an invitation to a wedding | a second slice of cake | a phone sales offer
- a request to work on Saturday | a free trial of a gym | a dinner with the neighbours
- a job offer

Compare {} in one sentence.
What is the main difference between {}? Answer in at most 25 words.
- tea and coffee | a bus and a tram | a novel and a poem | butter and oil | a lake and a river
- a violin and a guitar | paper books and e-books

Which is better for {}? Choose one and give a reason in one sentence.
What would you pick for {}? Answer in one short sentence.
- a picnic, sandwiches or salad | a long trip, a train or a car | a small flat, a cat or a dog
- a rainy day, a film or a book | a beginner, piano or drums | breakfast, porridge or toast
- a weekend away, hills or the coast

Write a one-sentence birthday wish for {}.
In at most 20 words, write a birthday message for {}.
- my grandmother | a colleague who loves cycling | my best friend | a boy who turns seven
- our French teacher | my twin sister | a neighbour who bakes

Write a one-sentence thank-you note for {}.
Thank someone for {} in one warm sentence.
- a lovely dinner | a hand-knitted hat | watering the plants | a lift to the airport | good advice
- repairing the fence | a box of pears

Apologise in one sentence for {}.
Write a sincere one-sentence apology for {}.
- breaking a vase | missing a call | arriving late at a dinner | sending the wrong file
- forgetting a promise | a noisy party | stepping on someone's foot

In one sentence, encourage {}.
Write one kind sentence to cheer up {}.
- a friend before an exam | a runner who came last | a child learning to swim
- a baker whose cake burned | someone who lost a job | a shy new pupil | a writer with no ideas

In one sentence, congratulate {}.
In at most 20 words, congratulate {}.
- a friend on a new house | a couple on their wedding | a student who passed an exam
- a team that won the cup | a colleague on a promotion | my aunt on her first painting
- a cousin on a new baby

Use the word "{}" in one sentence.
Write a short sentence with the word "{}".
- although | umbrella | borrow | curious | whisper | meanwhile | generous

What does "{}" mean? Answer in one sentence.
Explain the saying "{}" in at most 20 words.
- break the ice | a piece of cake | under the weather | better late than never
- to let the cat out of the bag | once in a blue moon | to hit the sack

Complete the sentence in at most 12 more words: {}
Finish this sentence in a natural way, in at most 12 words: {}
- When the lights went out, | The best part of summer is | If I had a boat,
- On the way to the station, | Nobody believed Ida until | The letter was addressed to
- Every morning the baker

Suggest {}. Answer in one sentence.
Suggest {}, in at most 20 words.
- a quick lunch with eggs | a small gift for a host | a game for a long car ride
- a healthy snack for work | a hobby for rainy days | a simple dinner for two
- a weekend activity with children

Ask one good question about {}.
Write one question you could ask an expert about {}.
- volcanoes | old maps | wild mushrooms | the history of bread | deep-sea fish | solar panels
- sleepwalking

Tell me one fact about {} in one sentence.
What is interesting about {}? Answer in at most 20 words.
- penguins | the planet Mars | honey | octopuses | bamboo | the Eiffel Tower | camels

What is {} used for? Answer in one sentence.
In at most 20 words, say what {} is for.
- a whisk | a stapler | a tripod | baking soda | a life jacket | a magnifying glass
- a spirit level

What does {} do at work? Answer in one sentence.
Describe the job of {} in at most 20 words.
- a plumber | a librarian | a judge | a vet | an architect | a beekeeper | a tour guide

Write a short sign that says {}. At most 12 words.
Write the text of a polite sign: {}. One short sentence.
- dogs must stay outside | the floor is wet | visitors should ring the bell
- the lift is out of order | bikes may not be parked here | the pool closes at eight
- the paint is still wet

Write a one-sentence reply to this message: {}
Reply kindly in at most 20 words: {}
- Are you free for lunch on Friday? | I just moved to your street!
- Sorry, I will be ten minutes late. | Did you like the book I lent you?
- Can you feed my cat this weekend? | I got the job! | Your parcel is at my place.

Write a one-sentence review of {}.
Review {} in at most 20 words.
- a cosy noodle bar | a hotel with thin walls | a funny school play | a slow ferry trip
- a very comfortable chair | a boring science film | a tiny jazz club

Answer as a shop assistant, in one sentence: {}
You work at a help desk. Reply in at most 25 words: {}
- Where can I find the batteries? | Can I return these shoes? | My order has not arrived.
- Do you have this coat in blue? | I was charged twice. | The kettle I bought leaks.
- Is there a discount for students?

Compare {} to something surprising, in one sentence.
Write one short simile about {}.
- silence | a busy kitchen | the morning sun | waiting for news | an old friendship | fresh snow
- a sleeping cat

Write a two-line rhyme about {}.
Write a tiny poem of two short lines about {}.
- a rainy Monday | a hungry mouse | the winter moon | a lost sock | warm bread | a paper boat
- a spider in the bath

How can I be safe when {}? Answer in one sentence.
Give one safety rule for {}, in at most 20 words.
- cycling at night | using a ladder | swimming in the sea | frying with hot oil | hiking alone
- driving in fog | lighting candles

In one short line, name three {}.
List three {}, separated by commas, and nothing else.
- things to take to the beach | vegetables that grow underground | animals that live in a forest
- things in a toolbox | musical instruments | warm drinks | games you can play with cards
"""

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


class Relation(NamedTuple):
    """One sort of fact for the needles, and how to ask for either side of it."""

    subjects: str
    values: str
    fact: str
    ask_value: str
    only_value: str
    ask_subject: str


RELATIONS = (
    Relation(
        "names",
        "cities",
        "{s} lives in {v}.",
        "Where does {s} live?",
        "Answer with only the city.",
        "Who lives in {v}?",
    ),
    Relation(
        "names",
        "jobs",
        "{s} is a {v}.",
        "What is {s}'s job?",
        "Answer with only the job.",
        "Who is the {v}?",
    ),
    Relation(
        "names",
        "things",
        "{s} has a {v}.",
        "What does {s} have?",
        "Name only the object.",
        "Who has the {v}?",
    ),
    Relation(
        "things",
        "colours",
        "The {s} is {v}.",
        "What colour is the {s}?",
        "Answer with only the colour.",
        "Which object is {v}?",
    ),
    Relation(
        "things",
        "places",
        "The {s} is in the {v}.",
        "Where is the {s}?",
        "Answer with only the place.",
        "What is in the {v}?",
    ),
    Relation(
        "names",
        "foods",
        "{s} ordered {v}.",
        "What did {s} order?",
        "Answer with only the dish.",
        "Who ordered {v}?",
    ),
    Relation(
        "events",
        "days",
        "The {s} is on {v}.",
        "On which day is the {s}?",
        "Answer with only the day.",
        "What happens on {v}?",
    ),
    Relation(
        "names",
        "pets",
        "{s}'s dog is called {v}.",
        "What is {s}'s dog called?",
        "Answer with only the dog's name.",
        "Whose dog is called {v}?",
    ),
    Relation(
        "names",
        "seats",
        "{s} sits in seat {v}.",
        "Which seat does {s} have?",
        "Answer with only the number.",
        "Who sits in seat {v}?",
    ),
    Relation(
        "names",
        "hobbies",
        "{s} likes {v}.",
        "What does {s} like?",
        "Answer with only the hobby.",
        "Who likes {v}?",
    ),
)
ONLY_SUBJECT = {
    "names": "Answer with only the name.",
    "things": "Name only the object.",
    "events": "Name only the event.",
}

# Days, colours, months and plain adjectives are few: both files use them. The rest is split.
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
SPLIT_POOLS = """
names: Anna Ben Clara David Elif Felix Greta Hugo Irene Jonas Karin Liam Mara Nils Olga Pablo Rosa
 Sami Tessa Viktor Wanda Yusuf Zoe Arlo Bianca Carlos Dana Emil Farah Gavin Hana Ivan
cities: Lisbon Oslo Quito Dublin Nairobi Prague Hanoi Lima Vienna Cairo Denver Kyoto Madrid Toronto
 Athens Warsaw Bogota Zurich Mumbai Boston Geneva
jobs: baker pilot nurse teacher plumber lawyer farmer painter dentist barber singer sailor tailor
 carpenter gardener chef judge waiter
things: lantern kite violin ladder basket teapot camera blanket mirror hammer suitcase pillow bucket
 candle helmet whistle notebook drum tent vase flute rope puzzle telescope jacket bottle lamp
places: attic kitchen garage cellar garden drawer hallway bathroom cupboard office shed library
 bedroom barn closet
foods: soup pasta pizza salad rice pancakes curry lasagne tacos noodles fish dumplings risotto
 sausages beans
events: concert picnic meeting lecture wedding market exam parade party film race dinner
pets: Rex Bella Pepper Biscuit Luna Rocky Daisy Milo Coco Bruno Shadow Ginger Bailey Oscar Ruby
seats: 12 14 15 17 18 19 21 23 24 26 27 28 31 32 34 35 36 38 41 42 43 45 47 48
hobbies: chess hiking sailing knitting painting tennis fishing dancing cycling skiing juggling
 climbing baking rowing golf
plurals: apples marbles shells stamps pencils buttons cookies stickers coins acorns lemons balloons
words: river window orange castle pepper thunder marble button velvet copper meadow puddle falcon
 cactus ribbon walnut saddle glacier compass feather anchor tunnel biscuit planet turtle garlic
 pebble magnet island cotton parrot rocket saffron badger canyon dolphin engine forest ginger hazel
 insect jungle kettle lemon mango napkin onion panther quartz raven salmon timber umbrella violet
 whale yogurt zebra barley spoon
"""


def pools_of(split: str) -> dict[str, list[str]]:
    """Every pool a file draws from, by name; `heldout` keeps a third of each split pool."""
    pools = {}
    for line in SPLIT_POOLS.replace("\n ", " ").strip().splitlines():
        name, words = line.split(": ")
        keep = [(i % 3 == 2) == (split == "heldout") for i in range(len(words.split()))]
        pools[name] = list(compress(words.split(), keep))
    return pools | {"days": list(DAYS), "colours": list(COLOURS)}


def writing_tasks(rng: random.Random) -> dict[str, list[Task]]:
    """All writing prompts by file; two subjects of each family are kept for `heldout`."""
    tasks: dict[str, list[Task]] = {"train": [], "heldout": []}
    for family in WRITING.strip().split("\n\n"):
        wordings = [line for line in family.splitlines() if not line.startswith("- ")]
        rows = [line for line in family.splitlines() if line.startswith("- ")]
        subjects = " | ".join(row.removeprefix("- ") for row in rows).split(" | ")
        for i, subject in enumerate(rng.sample(subjects, len(subjects))):
            wording = wordings[i % len(wordings)]
            tasks["heldout" if i < 2 else "train"].append(Task("writing", wording.format(subject)))
    for some in tasks.values():
        rng.shuffle(some)
    return tasks


def sum_tasks(rng: random.Random) -> dict[str, list[Task]]:
    """Sums by file; half of the held-out ones use pairs that `train` lacks, in either order."""
    pairs = [(low, high) for low in range(1, 10) for high in range(low, 10)]
    rng.shuffle(pairs)
    new, seen = pairs[:10], pairs[10:]
    order = {"train": seen + rng.sample(seen, len(seen)), "heldout": new + rng.sample(seen, 10)}
    tasks: dict[str, list[Task]] = {"train": [], "heldout": []}
    used: set[tuple[int, int, str]] = set()
    for split, some in order.items():
        pools = pools_of(split)
        uses: Counter[str] = Counter()
        for low, high in some[: BLOCKS[split]]:
            wordings = [
                wording
                for wording in (SUMS_PLAIN if low == 1 else SUMS_PLAIN + SUMS_STORY)
                if (low, high, wording) not in used
            ]
            rng.shuffle(wordings)
            wording = min(wordings, key=uses.__getitem__)
            uses[wording] += 1
            used.add((low, high, wording))
            a, b = rng.sample((low, high), 2)
            who, other = rng.sample(pools["names"], 2)
            things = rng.choice(pools["plurals"])
            prompt = wording.format(a=a, b=b, who=who, other=other, things=things)
            tasks[split].append(Task("sum", prompt, str(a + b)))
        rng.shuffle(tasks[split])
    return tasks


def needle_tasks(pools: dict[str, list[str]], rng: random.Random) -> list[Task]:
    """One prompt for each relation and direction of the question."""
    tasks = []
    for relation in RELATIONS:
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


def copy_tasks(pools: dict[str, list[str]], rng: random.Random) -> list[Task]:
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


def format_tasks(pools: dict[str, list[str]], rng: random.Random) -> list[Task]:
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


def rounds(make: Callable[[], list[Task]], rng: random.Random, *, count: int) -> list[Task]:
    """`count` tasks with different prompts: whole rounds of all wordings, each round shuffled."""
    tasks: dict[str, Task] = {}
    while len(tasks) < count:
        some = make()
        rng.shuffle(some)
        for task in some:
            tasks.setdefault(task.prompt, task)
    return list(tasks.values())[:count]


def make_prompts() -> dict[str, list[Task]]:
    """The tasks of both files, in order: every block of eight holds each kind in proportion."""
    rng = random.Random(SEED)
    writing, sums = writing_tasks(rng), sum_tasks(rng)
    files = {}
    for split, blocks in BLOCKS.items():
        pools = pools_of(split)
        kinds = [
            sums[split],
            rounds(lambda pools=pools: needle_tasks(pools, rng), rng, count=blocks),
            rounds(lambda pools=pools: copy_tasks(pools, rng), rng, count=blocks),
            rounds(lambda pools=pools: format_tasks(pools, rng), rng, count=blocks),
        ]
        files[split] = []
        for i in range(blocks):
            block = writing[split][4 * i : 4 * i + 4] + [tasks[i] for tasks in kinds]
            files[split] += rng.sample(block, len(block))
    return files


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
