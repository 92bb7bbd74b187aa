"""A fault campaign: SIGKILL at many moments of training, export, evaluation and report.

Two processes of one command work side by side in one folder; each is killed at a moment drawn by
chance and started again, until the kills are used up and both end. What they leave must be, byte
for byte and but for clocks, what a run leaves that nothing interrupted; nothing may be there twice,
and what lies beside it must be untouched. `python tests/campaign.py 200` kills two hundred times;
test_campaign.py kills a few.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from event_files import shown
from quick import XLA_FLAGS

from pujax.evaluation.results import load_all
from pujax.evaluation.tables import markdown

ROOT = Path(__file__).parents[1]
OWN = ("base", "sft", "aligned")
SMALL = (
    "+experiment=smoke",
    "sft.steps=3",
    "align.steps=4",
    "checkpoint.every=2",
    "eval.prompts=2",
    "eval.batch=2",
    "eval.every=1",
    "data.max_response_tokens=6",
)
# Kill when something new matches: while a checkpoint is written, behind it, and so on.
MOMENTS = (
    "checkpoints/*tmp*",
    "checkpoints/[0-9]*",
    "reference*",
    ".eval-*.new",
    "eval-*.jsonl",
    "export/*",
    "curves.png",
    "table.md",
    "inputs.json",
    "metrics.jsonl",
    "samples.jsonl",
)


# Of the commands that tests start, kept for the next: each drops what a kill tore. What the tests
# compile themselves is for more devices, and a torn entry among that is a warning, so an error.
CACHE = ROOT / ".pytest_cache" / "commands"


def environment(cache: Path) -> dict[str, str]:
    """For a command on one device: compiled as in quick.py."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "XLA_FLAGS": XLA_FLAGS,
    }


def command(*arguments: str, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "Traceback" not in output, output
    return output


class Killer:
    """Draws moments by chance and kills at them."""

    def __init__(self, seed: int, kills: int) -> None:
        self.chance = random.Random(seed)
        self.left = kills

    def moment(self, root: Path) -> Iterator[bool]:
        """False until the moment has come."""
        begun = time.time()
        until = begun + self.chance.uniform(0.1, 20.0)
        pattern, lines = self.chance.choice(MOMENTS), self.chance.randrange(8)
        at_time = self.chance.random() < 0.25

        def seen() -> bool:
            fresh = [p for p in root.glob(f"*/*/{pattern}") if _newer(p, begun)]
            if pattern.endswith("s.jsonl") and fresh:
                return any(p.read_bytes().count(b"\n") >= lines for p in fresh)
            return bool(fresh)

        while time.time() < until and (at_time or not seen()):
            yield False
        yield True


def _newer(path: Path, than: float) -> bool:
    try:
        return path.stat().st_mtime > than
    except OSError:  # gone, as a temporary name is
        return False


def side_by_side(root: Path, cache: Path, killer: Killer) -> int:
    """Train with two processes at once to the end of both, killed on the way; how often."""

    def start() -> tuple[subprocess.Popen[str], Iterator[bool]]:
        made = command("pujax.train", *SMALL, f"run.root={root}", cache=cache)
        return made, killer.moment(root)

    killed, slots = 0, [start(), start()]
    while slots:
        time.sleep(0.005)
        for slot in list(slots):
            process, moment = slot
            if process.poll() is not None:
                finished(process)
                slots.remove(slot)
            elif killer.left and next(moment, False):
                killer.left -= 1
                killed += 1
                process.kill()
                process.communicate()
                slots[slots.index(slot)] = start()
    return killed


def uninterrupted(run: Path, cache: Path) -> str:
    """Train in the directory `run` to the end; what the command said."""
    return finished(command("pujax.train", *SMALL, f"run.dir={run}", cache=cache))


def killed_at_random(arguments: Sequence[str], cache: Path, killer: Killer, longest: float) -> None:
    """Run a command and kill it at a moment drawn by chance."""
    process = command(*arguments, cache=cache)
    time.sleep(killer.chance.uniform(0.0, longest))
    process.kill()
    process.communicate()


def killed_and_again(arguments: Sequence[str], cache: Path, killer: Killer, longest: float) -> None:
    """Run a command, kill it at a moment drawn by chance, then run it to its end."""
    killed_at_random(arguments, cache, killer, longest)
    finished(command(*arguments, cache=cache))


def metrics(run: Path) -> list[dict[str, object]]:
    """A run's metrics without what a clock made."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def contents(root: Path) -> dict[str, str]:
    """The digest of every file under `root`."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def assert_same_run(run: Path, whole: Path) -> None:
    ours = metrics(run)
    places = Counter((row["stage"], row.get("model"), row["step"]) for row in ours)
    assert max(places.values()) == 1, f"written twice: {places.most_common(3)}"
    assert ours == metrics(whole)
    for name in ("samples.jsonl", "table.md", *(f"eval-{model}.jsonl" for model in OWN)):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    for plotted in (whole / "tensorboard").iterdir():
        plots = shown(run / "tensorboard" / plotted.name)
        assert max(plots.values()) == 1, f"plotted twice: {plots.most_common(3)}"
        assert plots == shown(plotted), plotted.name
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (run / "export" / name).read_bytes() == (whole / "export" / name).read_bytes(), name
    left = [p for pattern in ("*tmp*", ".*.new") for p in run.rglob(pattern)]
    assert not left, left


def campaign(folder: Path, whole: Path, cache: Path, *, kills: int, seed: int) -> None:
    """`kills` times SIGKILL under `folder`, beside a `whole` run that nothing interrupted.

    Raises AssertionError for what differs from it afterwards.
    """
    killer = Killer(seed, kills)
    root = folder / "runs"
    beside = root / "smoke" / "0000-of-another"  # a run of the same name that is done
    beside.mkdir(parents=True)
    for name in ("config.yaml", "done", "metrics.jsonl", "eval-base.jsonl"):
        (beside / name).write_bytes((whole / name).read_bytes())
    torn = root / "smoke" / "9999-torn" / "config.yaml"
    torn.parent.mkdir()
    torn.write_text("run: {na")
    foreign = {
        str(path.parent.relative_to(folder)): contents(path.parent) for path in (beside / "x", torn)
    }

    killed = side_by_side(root, cache, killer)
    runs = [path.parent for path in root.glob("smoke/*/done") if path.parent != beside]
    assert len(runs) == 2, runs
    for run in runs:
        assert_same_run(run, whole)
    for name, before in foreign.items():
        assert contents(folder / name) == before, name

    out = [folder / "export-whole", folder / "export-killed"]
    exporting = [["pujax.export", f"run={runs[0]}", f"out={path}", "compare=0"] for path in out]
    begun = time.monotonic()
    finished(command(*exporting[0], cache=cache))
    took = time.monotonic() - begun
    for _ in range(1 + kills // 10):
        killed_and_again(exporting[1], cache, killer, took)
        assert contents(out[1]).keys() == contents(out[0]).keys()
        for name in ("model.safetensors", "config.json"):
            assert (out[1] / name).read_bytes() == (out[0] / name).read_bytes(), name
    reporting = 1 + kills // 10 if kills > 1 else 0  # of all it writes least, and in a moment
    for _ in range(reporting):
        before = contents(runs[0])
        killed_and_again(["pujax.report", f"run={runs[0]}"], cache, killer, took)
        after = contents(runs[0])
        assert {n for n in after if after[n] != before.get(n)} <= {"report.html", "curves.png"}
        assert before.keys() == after.keys()
    evaluating = [["pujax.evaluate", f"run={run}", f"model={out[0]}", "name=again"] for run in runs]
    finished(command(*evaluating[0], cache=cache))
    killed_at_random(evaluating[1], cache, killer, took)
    if not (runs[1] / "eval-again.jsonl").exists():
        finished(command(*evaluating[1], cache=cache))
    first, second = (markdown(load_all(run)) for run in runs)
    assert first == second
    rows = [(run / "eval-again.jsonl").read_bytes() for run in runs]
    assert rows[0] == rows[1]
    elsewhere = 2 + kills // 10 + reporting
    print(f"{killed} kills in training, {elsewhere} elsewhere: nothing differs")


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        kills, seed = [*map(int, sys.argv[1:]), *(20, 0)[len(sys.argv) - 1 :]]
        whole, cache = Path(name) / "whole", Path(name) / "xla"
        uninterrupted(whole, cache)
        campaign(Path(name), whole, cache, kills=kills, seed=seed)
