"""Run the arms of arms.yaml one after another, until none is left to do.

python -m experiments.paper.reproduce [--profile cpu] [--only ARM] [--jobs N] [--plan]

Every run is a command of pujax's own in a directory of its own, so one that was cut off goes on
where it was; one whose JSON is in results/raw is done, and run again only for its model, where
another needs it and it isn't on this machine: the result stays. SIGTERM and Ctrl-C go to
the command at work, which saves its state, and then all ends.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

import hydra

from experiments.paper import raw
from experiments.paper.plan import (
    ROOT,
    Found,
    Profile,
    Run,
    Task,
    load_profile,
    next_tasks,
    shown,
    tasks_of,
    told,
    whole,
)
from pujax.config.compose import conf_dir, from_hydra, register
from pujax.config.settings import TrainConfig
from pujax.errors import ConfigError, PujaxError, require
from pujax.files.durable import write_whole

HERE = Path(__file__).resolve().parent

Call = Callable[[list[str]], int]
"""Runs python with these words and returns its exit status."""


@dataclass
class Children:
    """Runs commands and passes on the signals that come meanwhile.

    They keep the file `held` open, and so locked, should this process be killed.
    """

    held: int
    wished: int = 0
    at_work: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def __post_init__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _: object) -> None:
        self.wished = number
        for child in [*self.at_work]:  # threads take away those that end
            child.send_signal(number)

    def call(self, words: list[str]) -> int:
        """The exit status of `python WORDS`; SystemExit once a signal has asked to stop."""
        print(f"\n$ python {' '.join(words)}", flush=True)
        status = 0
        if not self.wished:
            # In a session of its own, so that a Ctrl-C reaches it once, through here.
            child = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, pass_fds=[self.held], start_new_session=True
            )
            self.at_work.append(child)
            if self.wished:  # between the question and now
                child.send_signal(self.wished)
            status = child.wait()
            self.at_work.remove(child)
        if self.wished:
            print("stopped: the same command goes on from here", flush=True)
            raise SystemExit(128 + self.wished)
        return status


def main(words: list[str] | None = None) -> int:
    """The command; its exit status is 1 when something failed."""
    parser = argparse.ArgumentParser(prog="reproduce", description="Run the arms of arms.yaml.")
    parser.add_argument("--profile", default="cpu")
    parser.add_argument(
        "--only",
        metavar="ARM[,ARM]",
        type=lambda text: text.split(","),
        default=[],
        help="these arms alone, in this order, and what they need",
    )
    parser.add_argument("--seeds", metavar="N", type=int, help="at most so many seeds of an arm")
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=1, help="that many runs at a time, on one machine"
    )
    parser.add_argument(
        "--together",
        metavar="N",
        type=int,
        default=1,
        help="up to N seeds of an arm in one program: on an accelerator hardly slower than one",
    )
    parser.add_argument("--plan", action="store_true", help="say what there is to do, and end")
    parser.add_argument("--arms", type=Path, default=HERE / "arms.yaml")
    options = parser.parse_args(words)
    try:
        require(options.jobs > 0, "--jobs", options.jobs, "give one or more")
        require(options.together > 0, "--together", options.together, "give one or more")
        require(options.seeds is None or options.seeds > 0, "--seeds", options.seeds, "give some")
        some = options.only, options.seeds
        profile = load_profile(options.arms.resolve(), options.profile)
        found = look(profile)
        print("\n".join(told(profile, found, *some)), flush=True)
        check(profile, tasks_of(profile, whole(found), *some))
        device = accelerator() if profile.accelerator and not options.plan else ""
        if options.plan or (profile.accelerator and not device):
            return 0
        if options.jobs > 1:  # else the first takes most of an accelerator's memory
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        with locked(profile.runs) as held:
            call = Children(held.fileno()).call
            return work(profile, some, call, options.jobs, device, options.together)
    except (PujaxError, OSError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 1


def check(profile: Profile, tasks: list[Task]) -> None:
    """Compose every arm's settings, so that what is wrong with one shows before all the others run.

    Raises `ConfigError`.
    """
    register("train_schema", TrainConfig)
    runs = {task.run.arm.name: task.run for task in tasks}
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        for name, run in runs.items():
            words = command_of(profile, Task(run, "validation"))[2:]
            try:
                from_hydra(TrainConfig, hydra.compose("train", overrides=words))
            except Exception as error:  # Hydra's and OmegaConf's have no base in common
                raise ConfigError(f"arms.{name}: {' '.join(str(error).split())}") from error
    print(f"the settings of {len(runs)} arms compose")


def accelerator() -> str:
    """What jax calls the one that it finds; nothing, and a line that says so, where it doesn't.

    Raises `ConfigError` where jax can't start.
    """
    code = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if asked.returncode:
        why = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"jax finds no device ({why}): see what JAX_PLATFORMS says, if anything")
    backend, _, kind = asked.stdout.strip().partition(" ")
    if backend == "cpu":
        print("this profile is for accelerators and there is none here: that was its plan")
        return ""
    return kind


def locked(folder: Path) -> TextIO:
    """A file in `folder`, open and locked for this process and its children."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            file.seek(0)
            process = file.read() or "?"
        raise ConfigError(
            f"{folder}: process {process}, or a run that it left behind, is at work here: wait for "
            "it, or stop it with SIGTERM"
        ) from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def look(profile: Profile) -> Found:
    """What is known by now."""
    store = ROOT / profile.data["store"]
    train = raw.answered([ROOT / path for path in profile.data["train"]], store)
    tests = raw.answered([ROOT / profile.data["test"]], store)
    answered = [*train, False].index(False)
    results = raw.read_all(profile.results)
    return Found(profile.metric, results, answered, all(tests), kept=has_model)


def has_model(run: Run) -> bool:
    """Whether the model that a run ended with is on this machine."""
    return (run.directory / "export").is_dir()


def require_validation(profile: Profile) -> None:
    """Raise `ConfigError` unless the prompts that decide are all answered."""
    path, store = profile.data["validation"], ROOT / profile.data["store"]
    known = raw.answered([ROOT / path], store)
    require(
        all(known),
        "data.validation",
        path,
        f"{shown(store)} answers {sum(known)} of {len(known)}: collect the others "
        "(experiments/quickstart/collect.sh)",
    )


def work(
    profile: Profile,
    some: tuple[Sequence[str], int | None],
    call: Call,
    jobs: int = 1,
    device: str = "",
    together: int = 1,
) -> int:
    """Do one task after another, `jobs` of them at a time: of `some` arms, so many seeds of each.

    Up to `together` seeds of a run are one of these, done in one program.
    What failed, and what needs it, is left out and told of.
    """
    require_validation(profile)
    raw.put_in_order(profile.results, list(profile.arms))
    failed: set[raw.Key] = set()
    at_work: dict[Future[list[bool]], list[Task]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            found = replace(look(profile), failed=failed)
            tasks = tasks_of(profile, found, *some)
            busy = {task.key for group in at_work.values() for task in group}
            begun = next_tasks(tasks, found, busy, together) if len(at_work) < jobs else []
            if begun:
                left = sum(other.key not in found.results for other in tasks)
                seeds = ", ".join(str(task.run.seed) for task in begun)
                title = f"{begun[0].run.name}, seed {seeds}, {begun[0].split}"
                print(f"\n== {title}: {left} left", flush=True)
                at_work[pool.submit(done, profile, begun, call, device)] = begun
                continue
            if not at_work:
                break
            for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                for task, well in zip(at_work.pop(future), future.result(), strict=True):
                    if not well:
                        failed.add(task.key)
                        print(f"failed: the others go on without {task.run.name}", flush=True)
            make_room(profile, look(profile), [t.run for some in at_work.values() for t in some])
            # Tables take as long as many a run on an accelerator, so several don't wait for them.
            if not at_work or jobs == 1:
                folder = str(shown(profile.results))
                if call(["-m", "experiments.paper.tables", folder]):
                    print("no tables: the runs go on, and make them again")
    for name, seed, split in sorted(failed):
        print(f"failed: {name}, seed {seed}, {split}")
    left = [task for task in tasks if task.key not in found.results and not found.blocked(task)]
    for task in left:  # of which something is behind that is no task: a fault of the plan
        print(f"not begun: {task.run.name}, seed {task.run.seed}, {task.split}")
    return 1 if failed or left else 0


def command_of(profile: Profile, task: Task) -> list[str]:
    """What does a task, after `python`."""
    run, directory = task.run, shown(task.run.directory)
    if task.split == "test":
        words = ["-m", "pujax.evaluate", f"run={directory}"]
        words += [f"data.heldout={profile.data['test']}", f"out={directory / 'test'}"]
        return words
    if task.split != "validation":
        told = profile.suites.get(task.split, {})
        words = ["-m", "pujax.evaluate", f"run={directory}", f"suite={task.split}"]
        return [*words, *(f"{key}={value}" for key, value in told.items())]
    settings = {
        "run.name": "paper",
        "run.dir": directory,
        "seed": run.seed,
        "data.prompts": shown(prompts_file(run)),
        "data.heldout": profile.data["validation"],
        "data.anchors": profile.data["store"],
        **run.settings,
    }
    return ["-m", "pujax.train", *(f"{key}={value}" for key, value in settings.items())]


def prompts_file(run: Run) -> Path:
    """The file of a run's training prompts."""
    numbers = [run.prompts] if not run.after else [run.after, run.prompts]
    return run.folder / f"prompts-{'-'.join(map(str, numbers))}.jsonl"


def write_prompts(profile: Profile, run: Run) -> None:
    """Write that file."""
    lines = b"".join((ROOT / path).read_bytes() for path in profile.data["train"])
    path = prompts_file(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, b"".join(lines.splitlines(keepends=True)[run.after : run.prompts]))


def done(profile: Profile, tasks: list[Task], call: Call, device: str = "") -> list[bool]:
    """Do tasks and keep their results, made on `device`; False where a command failed.

    Several are seeds of one run, done in one program; what that leaves undone each does by itself.
    A result that is there stays, and its task is done for the model alone.
    """
    for task in tasks:
        prepare(profile, task)
    if len(tasks) > 1:
        words = ["-m", "experiments.paper.together"]
        for task in tasks:
            words += ["--", *command_of(profile, task)[2:]]
        call(words)
    return [kept(profile, task, call, device, len(tasks)) for task in tasks]


def has_result(profile: Profile, task: Task) -> bool:
    """Whether a task's result is there, so that it is done for its model alone."""
    return (profile.results / "raw" / raw.file_name(task.key)).exists()


def prepare(profile: Profile, task: Task) -> None:
    """Lay out what a task reads, and remove a run whose result is there and whose model isn't."""
    run = task.run
    if has_result(profile, task) and (run.directory / "done").exists():
        shutil.rmtree(run.directory)
    if task.split == "validation" and not (run.directory / "eval-base.jsonl").exists():
        # What it starts from has been evaluated, and a run reads what it finds on the disk.
        origin = profile.runs / "base" / "0" if run.origin is None else run.origin.directory
        if (origin / "eval-aligned.jsonl").exists():
            run.directory.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin / "eval-aligned.jsonl", run.directory / "eval-base.jsonl")
    write_prompts(profile, run)


def kept(profile: Profile, task: Task, call: Call, device: str, together: int) -> bool:
    """Do a task, unless it was done `together` with others, and keep its result."""
    run, words = task.run, command_of(profile, task)
    again = has_result(profile, task)
    end, answers, seconds = run.directory / "done", run.directory / "eval-aligned.jsonl", None
    if task.split not in ("validation", "test"):
        end = run.directory / f"suite-{task.split}.json"
    elif task.split == "test":
        end = answers = run.directory / "test" / "eval-aligned.jsonl"
    if not end.exists():
        together = 1
        begun = time.monotonic()
        if call(words):
            # A device or a lack of memory may have failed it, which shall choose no setting.
            print(f"again, from what it saved: {run.name}, seed {run.seed}", flush=True)
            if call(words):
                return False
        seconds = time.monotonic() - begun if task.split == "test" else None
    if again:
        return True
    about = {
        "arm": run.arm.name,
        "title": run.arm.title,
        "group": run.arm.group,
        "place": list(profile.arms).index(run.arm.name),
        "profile": profile.name,
        "metric": profile.metric,
        "against": run.arm.against,
        "after": run.after,
        "origin": run.origin and run.origin.name,
        "chosen": dict(run.point),
        "commit": raw.commit(ROOT),
        "command": " ".join(["python", *words]),
        **({"device": device} if device else {}),
        **({"together": together} if together > 1 else {}),
    }
    if task.split not in ("validation", "test"):
        asked = {"training": run.prompts - run.after}
        told = {"settings": dict(run.settings), "prompts": asked, **json.loads(end.read_text())}
        name, seed, suite = task.key
        raw.write(profile.results, {"name": name, "seed": seed, "split": suite, **about, **told})
        return True
    result = raw.result(
        key=task.key,
        about=about,
        settings=run.settings,
        directory=run.directory,
        answers=answers,
        prompts=prompts_file(run),
        store=ROOT / profile.data["store"],
        evaluation_s=seconds,
    )
    raw.write(profile.results, result)
    return True


def make_room(profile: Profile, found: Found, at_work: Sequence[Run] = ()) -> None:
    """Remove what no run needs any more: three gigabytes each while it is at work.

    The models stay that others start from, and those of the main table. A run `at_work` keeps all,
    also one that has its result and is done again for its model.
    """
    busy = {run.key for run in at_work}
    tasks = tasks_of(profile, found)
    origins = {arm.origin for arm in profile.arms.values()}
    last = [task for task in tasks if task.split != "validation"]
    final = {task.key[:2] for task in last}
    # Until all of an arm's runs have been evaluated it may be another choice that is the best.
    undone = {t.run.arm.name for t in tasks if t.split == "validation" and not found.of(t.run)}
    settled = {task.run.arm.name for task in last if task.key in found.results} - undone
    unread = {task.key[:2] for task in last if task.key not in found.results}
    for run in (task.run for task in tasks if task.split == "validation"):
        if found.of(run) is None or run.key in busy:
            continue
        spare = ["checkpoints"]
        if run.key[:2] not in unread:  # a suite may compare with what the run started from
            spare.append("reference")
        lost = run.key[:2] not in final and run.arm.name in settled
        kept = run.arm.group == "main" or run.arm.name in origins
        if lost or (run.key[:2] in final - unread and not kept):
            spare.append("export")
        for name in spare:
            shutil.rmtree(run.directory / name, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
