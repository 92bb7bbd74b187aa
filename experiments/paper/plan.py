"""What there is to do: the arms of arms.yaml as runs, each after what it needs."""

import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.paper import raw
from pujax.config.functions import described, fits
from pujax.errors import ConfigError, one_of, require
from pujax.files.durable import read_jsonl
from pujax.files.settings import SETTINGS, TORN

ROOT = Path(__file__).resolve().parents[2]

CLOCKS = ("processor", "wall")
FIELDS = {"from": "origin", "set": "settings"}  # keys of an arm that are called otherwise here

# Settings that don't touch a result's numbers, so that results made with others stand.
FREE = ("eval.every", "eval.batch", "checkpoint.every", "checkpoint.keep", "checkpoint.clean")


@dataclass(frozen=True)
class Arm:
    """An arm as arms.yaml has it, where it is said what each field means."""

    name: str
    title: str
    group: str
    seeds: int = 1
    test: bool = True
    origin: str | None = None
    like: str | None = None
    as_long_as: str | None = None
    paced_by: str | None = None
    prompts: int | None = None
    after: int = 0
    against: str = "sft_continued"
    needs: str | None = None
    suite: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    choose: Mapping[str, list[Any]] = field(default_factory=dict)
    chosen_by: int = 1


@dataclass(frozen=True)
class Profile:
    """A size of the whole: what all its runs share, its arms in order, and where it is kept.

    `clock` is what `as_long_as` goes by, wall or processor seconds; `suites` has settings of
    suites, by their names.
    """

    name: str
    data: Mapping[str, Any]
    metric: str
    prompts: int
    results: Path
    runs: Path
    guess: Mapping[str, float]
    settings: Mapping[str, Any]
    arms: Mapping[str, Arm]
    clock: str = "processor"
    suites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    accelerator: bool = False


@dataclass(frozen=True)
class Run:
    """One training run; `needs` have to be done before it, `origin` is the one it starts from.

    What its settings were chosen by is `behind` it, and has to be done before it too. Its training
    prompts are those up to number `prompts`, without the first `after`.
    """

    arm: Arm
    seed: int
    point: Mapping[str, Any]
    settings: Mapping[str, Any]
    prompts: int
    after: int
    folder: Path
    origin: "Run | None" = None
    needs: "tuple[Run, ...]" = ()
    behind: frozenset[raw.Key] = frozenset()

    @cached_property
    def name(self) -> str:
        """The arm's name, with what was chosen for it."""
        chosen = [f"{key.rpartition('.')[2]}{value}" for key, value in self.point.items()]
        return "-".join([self.arm.name, *chosen])

    @property
    def key(self) -> raw.Key:
        """What names its result on validation."""
        return self.name, self.seed, "validation"

    @property
    def before(self) -> frozenset[raw.Key]:
        """The results that have to be there before it can begin, with its present settings."""
        return self.behind.union(*({need.key} | need.before for need in self.needs))

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return self.folder / self.name / str(self.seed)

    def steps(self, stage: str) -> int:
        """How many steps a stage, sft or align, has."""
        return int(self.settings.get(f"{stage}.steps", 0))


@dataclass(frozen=True)
class Task:
    """A run to do and to read on `validation`, or one that is done to be read on `test`.

    Or to be asked a suite of `pujax evaluate`, which then is the `split`.
    """

    run: Run
    split: str

    @property
    def key(self) -> raw.Key:
        """What names the task's result."""
        return self.run.name, self.run.seed, self.split

    @property
    def reads(self) -> Run | None:
        """The run whose model it begins with."""
        return self.run.origin if self.split == "validation" else self.run


@dataclass
class Found:
    """What is known: the results by their keys, and the tasks that failed in this process.

    `prompts` is how many training prompts are answered, up to the first that isn't, and `tests`
    whether all test prompts are; what needs more is left out. `kept` says whether a run's model is
    on this machine: results travel, models don't.
    """

    metric: str
    results: dict[raw.Key, raw.Raw]
    prompts: int
    tests: bool
    failed: set[raw.Key] = field(default_factory=set)
    kept: Callable[[Run], bool] = lambda _: True

    def of(self, run: Run) -> raw.Raw | None:
        """A run's result on validation, None as long as there is none."""
        return self.results.get(run.key)

    def score(self, run: Run) -> float | None:
        """What decides over a run; the worst for one that failed, as one that diverges does."""
        result = self.of(run)
        if result is None:
            return float("-inf") if run.key in self.failed else None
        return raw.mean(result, self.metric)

    def ready(self, task: Task) -> bool:
        """Whether all is done that the task needs and that its settings were chosen by."""
        before = task.run.before | (set() if task.split == "validation" else {task.run.key})
        there = task.reads is None or self.kept(task.reads)
        return there and not self.blocked(task) and before <= self.results.keys() | self.failed

    def blocked(self, task: Task) -> bool:
        """Whether the task failed, or something that it needs."""
        needed = [Task(run, "validation") for run in task.run.needs]
        if task.split != "validation":
            needed.append(Task(task.run, "validation"))
        return task.key in self.failed or any(map(self.blocked, needed))


def load_profile(path: Path, name: str) -> Profile:
    """A profile of an arms.yaml. Raises `ConfigError` for one that isn't there, or is wrong."""
    try:
        return _loaded(path, name)
    except (ConfigError, OSError):
        raise
    except (*TORN, OmegaConfBaseException) as error:
        why = " ".join(str(error).split())
        raise ConfigError(
            f"{path}: not the file of arms that the head of experiments/paper/arms.yaml describes "
            f"({type(error).__name__}: {why}): mend it, or leave --arms out"
        ) from error


def _loaded(path: Path, name: str) -> Profile:
    told: Any = OmegaConf.to_container(OmegaConf.load(path))
    one_of("profile", name, told["profiles"])
    own = told["profiles"][name]
    merged: Any = OmegaConf.to_container(
        OmegaConf.merge({"arms": told["arms"]}, {"arms": own.pop("arms", {})})
    )
    entries = {arm: entry for arm, entry in merged["arms"].items() if entry is not None}
    entries |= _curve(entries, own.pop("curve", told.get("curve") or {}))
    arms = {}
    for arm, entry in entries.items():
        named: dict[str, Any] = {str(FIELDS.get(k, k)): v for k, v in entry.items()}
        choose = named.get("choose") or {}
        named["choose"] = {key: values for key, values in choose.items() if values is not None}
        for key, values in named["choose"].items():
            some = isinstance(values, list) and len(values) > 0
            require(some, f"arms.{arm}.choose.{key}", values, "give a list of values")
        try:
            arms[arm] = Arm(name=arm, **named)
        except TypeError as error:
            raise ConfigError(f"{path}: arms.{arm}: {error}") from error
        _check_arm(f"arms.{arm}", arms[arm], {*told["arms"], *entries})
        for key in ("origin", "like", "as_long_as", "paced_by"):
            other = getattr(arms[arm], key)
            require(other is None or other in entries, f"arms.{arm}.{key}", other, "no such arm")
        seen = [arm]
        while (start := entries.get(seen[-1], {}).get("from")) is not None:
            require(start not in seen, f"arms.{arm}.from", start, "starts from itself")
            seen.append(start)
        pacer = arms[arm].paced_by
        both = (arms[arm].as_long_as is None) == (pacer is None)
        require(both, f"arms.{arm}.paced_by", pacer, "goes with as_long_as")
        while pacer is not None:
            pacer = entries.get(pacer, {}).get("from")
            require(
                pacer != arm, f"arms.{arm}.paced_by", arms[arm].paced_by, "starts from this arm"
            )
    folders = {key: path.parent / own.pop(key) for key in ("results", "runs")}
    shared = {"data": told["data"], "metric": told["metric"]}
    profile = Profile(name=name, arms=arms, **folders, **shared, **own)
    _check_types(f"profiles.{name}", profile)
    one_of(f"profiles.{name}.clock", profile.clock, CLOCKS)
    require(profile.prompts > 0, f"profiles.{name}.prompts", profile.prompts, "must be positive")
    for key in ("train", "validation", "test", "store"):
        require(key in profile.data, "data", [*profile.data], f"has no {key}: name the file")
    for arm in arms.values():
        last = prompts_of(profile, arm.name)
        require(arm.after < last, f"arms.{arm.name}.after", arm.after, f"leaves none of {last}")
    return profile


def _check_arm(place: str, arm: Arm, known: Collection[str]) -> None:
    """Raise `ConfigError` for a field of the wrong type, or with a value that means nothing."""
    _check_types(place, arm)
    one_of(f"{place}.group", arm.group, (*raw.GROUPS, raw.PACE))
    require(arm.seeds >= 0, f"{place}.seeds", arm.seeds, "must not be negative")
    require(arm.chosen_by > 0, f"{place}.chosen_by", arm.chosen_by, "must be positive")
    require(arm.after >= 0, f"{place}.after", arm.after, "must not be negative")
    enough = arm.prompts is None or arm.prompts > 0
    require(enough, f"{place}.prompts", arm.prompts, "must be positive")
    one_of(f"{place}.against", arm.against, {*known, Arm.against})
    if arm.suite is not None:
        suites = {file.stem for file in (ROOT / "conf" / "tools" / "suite").glob("*.yaml")}
        one_of(f"{place}.suite", arm.suite, suites)


def _check_types(place: str, record: Arm | Profile) -> None:
    said = {name: key for key, name in FIELDS.items()} if isinstance(record, Arm) else {}
    for name, wanted in get_type_hints(type(record)).items():
        key, value = f"{place}.{said.get(name, name)}", getattr(record, name)
        require(fits(value, wanted), key, value, f"must be {described(wanted)}")


def _curve(arms: Mapping[str, Any], curve: Mapping[str, Any]) -> dict[str, Any]:
    """The arms of `curve`, which has some arms with changes for each number of prompts."""
    for count, some in curve.items():
        for arm in some:
            one_of(f"curve.{count}", arm, arms)
    return {
        f"{arm}-{count}": {
            **arms[arm],
            "title": f"{arms[arm]['title']}, {count} anchors",
            "group": "anchors",
            "prompts": count,
            **{key: f"{arms[arm][key]}-{count}" for key in ("from", "like") if key in arms[arm]},
            **changed,
        }
        for count, some in curve.items()
        for arm, changed in some.items()
    }


def tasks_of(
    profile: Profile, found: Found, only: Sequence[str] = (), seeds: int | None = None
) -> list[Task]:
    """All that there is to do, done or not, each after what it needs.

    That is of all arms, group by group, or of those named in `only`, in that order; of each as many
    seeds as it has, and at most `seeds`. What depends on a choice that isn't made yet stands there
    with the first of its values; so the first task that isn't done never does.
    """
    for name in only:
        one_of("--only", name, profile.arms)
        of_curve = [other for other in profile.arms if other.startswith(f"{name}-")]
        has_seeds = profile.arms[name].seeds > 0
        require(has_seeds, "--only", name, f"has no seeds but as {', '.join(of_curve)}")
    named = [profile.arms[name] for name in only]
    groups = [[arm for arm in profile.arms.values() if arm.group == group] for group in raw.GROUPS]
    tasks: dict[raw.Key, Task] = {}
    for group in [named] if only else groups:
        arms = [arm for arm in group if not left_out(profile, found, arm)]
        for seed in range(min(seeds or sys.maxsize, max((arm.seeds for arm in arms), default=0))):
            for arm in arms:
                if seed < arm.seeds:
                    before, run = way_to(profile, found, arm.name, seed)
                    some = [Task(each, "validation") for each in (*before, run)]
                    if found.tests and arm.test:
                        some.append(Task(run, "test"))
                    if arm.suite and seed == 0:
                        some.append(Task(run, arm.suite))
                    for task in some:  # a run that was chosen is there as one to choose from
                        tasks.setdefault(task.key, task)
    return list(tasks.values())


def whole(found: Found) -> Found:
    """The same with every prompt answered: what there will be to do."""
    return replace(found, prompts=sys.maxsize, tests=True)


def line_of(profile: Profile, name: str) -> list[Arm]:
    """An arm, the one that it is `like`, and so on."""
    line = [profile.arms[name]]
    while line[-1].like:
        line.append(profile.arms[line[-1].like])
        require(line[-1] not in line[:-1], f"arms.{name}.like", line[-2].like, "is like itself")
    return line


def prompts_of(profile: Profile, name: str) -> int:
    """The number of an arm's last training prompt."""
    return next((arm.prompts for arm in line_of(profile, name) if arm.prompts), profile.prompts)


def left_out(profile: Profile, found: Found, arm: Arm) -> str:
    """Why an arm can't be run yet; nothing where it can."""
    for each in line_of(profile, arm.name):
        if each.needs is not None and not (ROOT / "conf" / each.needs).is_file():
            return f"there is no conf/{each.needs}"
    wanted = prompts_of(profile, arm.name)
    if wanted > found.prompts:
        return f"{found.prompts} of its {wanted} training prompts are answered"
    return ""


def way_to(profile: Profile, found: Found, name: str, seed: int) -> tuple[list[Run], Run]:
    """What has to be done before an arm's run with its chosen settings, in order, and that run."""
    tried, point = choice(profile, found, name)
    before, run = made(profile, found, name, seed, point, tried)
    return [*tried, *before], run


def choice(profile: Profile, found: Found, name: str) -> tuple[list[Run], dict[str, Any]]:
    """The runs that are compared to choose an arm's settings, and what validation chooses.

    One setting after another, by the mean over the first seeds, `chosen_by` of them; of equals the
    first stays.
    """
    arm = profile.arms[name]
    tried, point = choice(profile, found, arm.like) if arm.like else ([], {})
    point = {key: value for key, value in point.items() if key not in arm.settings}
    point |= {key: values[0] for key, values in arm.choose.items()}
    for key, values in arm.choose.items():
        decided, scores = tried, []
        for value in values:
            own = []
            for seed in range(arm.chosen_by):
                before, run = made(profile, found, name, seed, {**point, key: value}, decided)
                tried = [*tried, *before, run]
                own.append(found.score(run))
            known = [score for score in own if score is not None]
            scores.append(fmean(known) if len(known) == len(own) else None)
        known = [score for score in scores if score is not None]
        if len(known) == len(scores):
            point[key] = values[known.index(max(known))]
    return tried, point


def made(
    profile: Profile,
    found: Found,
    name: str,
    seed: int,
    point: Mapping[str, Any],
    decided: Iterable[Run],
) -> tuple[list[Run], Run]:
    """What has to be done before an arm's run with the settings `point`, in order, and that run.

    `decided` are the runs that `point` was chosen by.
    """
    line = line_of(profile, name)
    settings = dict(profile.settings)
    for each in reversed(line):
        settings |= each.settings
    settings |= point
    before: list[Run] = []
    needs: list[Run] = []
    origin = None
    if from_ := next((each.origin for each in line if each.origin), None):
        # What only measures takes the model that is there first.
        before, origin = way_to(profile, found, from_, 0 if line[0].group == raw.PACE else seed)
        needs.append(origin)
        settings["model.path"] = str(shown(origin.directory / "export"))
    if line[0].as_long_as:
        first, paces, settings["sft.steps"] = paced(profile, found, line[0])
        before = [*before, *first]
        decided = [*decided, *first]
        needs += paces
    prompts = prompts_of(profile, name)
    run = Run(
        arm=line[0],
        seed=seed,
        point=dict(point),
        settings=settings,
        prompts=prompts,
        after=next((each.after for each in line if each.after), 0),
        folder=profile.runs,
        origin=origin,
        needs=tuple(needs),
        behind=frozenset(each.key for each in decided),
    )
    return [*before, *needs], run


def paced(profile: Profile, found: Found, arm: Arm) -> tuple[list[Run], list[Run], int]:
    """By how many SFT steps an arm goes on, which take as long as another's alignment.

    Before them what has to be done first, and the runs that measure the paces.
    """
    longer, pacer = str(arm.as_long_as), str(arm.paced_by)
    ways = [way_to(profile, found, pacer, seed) for seed in range(profile.arms[pacer].seeds)]
    runs = [run for _, run in ways]
    known = [result for result in map(found.of, runs) if result is not None]
    sft_s, align_s = (
        fmean(
            [result["step_s"][stage][profile.clock] for result in known] or [profile.guess[stage]]
        )
        for stage in ("sft", "align")
    )
    tried, point = choice(profile, found, longer)
    first = [each for before, _ in ways for each in before]
    if "align.steps" in point:
        first += tried
    aligned = made(profile, found, longer, 0, point, ())[1]
    return first, runs, equal_steps(aligned.steps("align"), align_s, sft_s)


def equal_steps(steps: int, align_s: float, sft_s: float) -> int:
    """How many SFT steps of `sft_s` seconds take as long as `steps` of alignment of `align_s`."""
    return max(1, round(steps * align_s / sft_s))


def shown(path: Path) -> Path:
    """A path as the commands are given it: from the repository's root where it lies within."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def next_tasks(
    tasks: list[Task], found: Found, at_work: Collection[raw.Key] = (), together: int = 1
) -> list[Task]:
    """The first task that isn't done or `at_work` and can be; nothing where there is none.

    With it come other seeds of the same run that can be too, at most `together` in all, where none
    of them was begun before. Raises `ConfigError` for a result before it that was made with other
    settings than now.
    """
    again = to_make_again(tasks, found)

    def waits(task: Task) -> bool:
        known = task.key in found.results and task.key not in again
        return not known and task.key not in at_work and found.ready(task)

    def fresh(task: Task) -> bool:
        return task.split == "validation" and not (task.run.directory / SETTINGS).exists()

    for place, task in enumerate(tasks):
        result = found.results.get(task.key)
        if result is not None:
            _refuse_stale(task, result)
        if waits(task):
            others = [other for other in tasks[place + 1 :] if other.run.name == task.run.name]
            seeds = [other for other in others if fresh(other) and waits(other)]
            return [task, *(seeds if fresh(task) else [])][:together]
    return []


def to_make_again(tasks: Iterable[Task], found: Found) -> set[raw.Key]:
    """What has its result, but whose model something that is to be done reads and can't find."""
    again = set()
    for task in tasks:
        if task.key not in found.results and not found.blocked(task):
            run = task.reads
            while run is not None and not found.kept(run):
                again.add(run.key)
                run = run.origin
    return again & found.results.keys()


def _refuse_stale(task: Task, result: raw.Raw) -> None:
    before, now = (
        {key: value for key, value in each.items() if not key.startswith(FREE)}
        for each in (result["settings"], task.run.settings)
    )
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    count = task.run.prompts - task.run.after
    if (result["prompts"]["training"], result.get("after", 0)) != (count, task.run.after):
        differing.append("prompts")
    require(
        not differing,
        "results",
        raw.file_name(task.key),
        f"was made with other settings ({', '.join(differing)}): set them back, or move it and "
        f"{shown(task.run.directory)} away to do it again",
    )


# --- how long it will take ------------------------------------------------------------------------


def seconds_left(profile: Profile, found: Found, task: Task, again: bool = False) -> float:
    """A forecast by the paces measured so far, guessed where there are none.

    Of what is done nothing is left, unless it is to be done `again`.
    """
    if task.key in found.results and not again:
        return 0.0
    prompt = _pace(profile, found, task.run, "prompt")
    if task.split != "validation":
        asked = "test" if task.split == "test" else "validation"
        return prompt * lines_in(ROOT / profile.data[asked])
    at = {"sft": 0, "align": 0}
    metrics = task.run.directory / "metrics.jsonl"
    at |= {
        line["stage"]: line["step"] for line in (read_jsonl(metrics) if metrics.exists() else [])
    }
    training = sum(
        max(0, task.run.steps(stage) - at[stage]) * _pace(profile, found, task.run, stage)
        for stage in ("sft", "align")
    )
    every = task.run.settings.get("eval.every")
    # After each stage, and on the way; what it begins with has been evaluated.
    evaluations = max(1, sum(task.run.steps(stage) > 0 for stage in at))
    if every:
        evaluations += sum(max(0, task.run.steps(stage) - 1) // every for stage in at)
    return training + evaluations * prompt * lines_in(ROOT / profile.data["validation"])


def _pace(profile: Profile, found: Found, run: Run, what: str) -> float:
    """Seconds a step of a stage, or a prompt evaluated: as in the arm's runs, else in all.

    Processor seconds are shared out over the cores that there are, at most as many as the machine
    had that measured them: what else it did does not slow them, and a run may have had one alone.
    """
    own, others = [], []
    for (_, _, split), result in found.results.items():
        if split not in ("validation", "test"):
            continue  # a suite's
        if what == "prompt":
            whole = result["evaluation_s"]
            pace = whole and whole / result["prompts"]["evaluated"]
        else:
            pace = result["step_s"][what][profile.clock]
            if pace is not None and profile.clock == "processor":
                pace /= min(_cores(), result["machine"]["cores"])
        if pace is not None:
            (own if result["arm"] == run.arm.name else others).append(pace)
    return fmean(own or others or [profile.guess[what]])


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def told(
    profile: Profile, found: Found, only: Sequence[str] = (), seeds: int | None = None
) -> Iterator[str]:
    """The plan, a line an arm: what is done, what is left, for how long, and what it waits for."""
    tasks = tasks_of(profile, whole(found), only, seeds)
    again = to_make_again(tasks, found)
    sizes = {split: lines_in(ROOT / profile.data[split]) for split in ("validation", "test")}
    counts = [arm.prompts or profile.prompts for arm in profile.arms.values()]
    yield (
        f"profile {profile.name}: up to {max(counts)} training prompts, {sizes['validation']} to "
        f"choose by, {sizes['test']} for the tables"
        + ("" if found.tests else ", which wait for answers")
    )
    minutes = {
        task.key: seconds_left(profile, found, task, task.key in again) / 60 for task in tasks
    }
    wide = max(map(len, profile.arms))
    yield (
        f"{'':<10} {'arm':<{wide}} {'':<38} {'tasks':>9} {'SFT + align':>13} {'minutes left':>13}"
    )
    for arm in profile.arms.values():
        own = [task for task in tasks if task.run.arm == arm]
        named = f"{arm.group:<10} {arm.name:<{wide}} {arm.title:<38}"
        why = left_out(profile, found, arm)
        if own:
            count = f"{sum(task.key in found.results for task in own)} of {len(own)}"
            steps = f"{own[-1].run.steps('sft')} + {own[-1].run.steps('align')}"
            left = sum(minutes[task.key] for task in own)
            line = f"{named} {count:>9} {steps:>13} {left:>13.0f}"
            lost = sum(task.key in again for task in own)
            yield (
                line
                + (f"  waits: {why}" if why else "")
                + (f"  {lost} to make again: no model here" if lost else "")
            )
        elif why and (not only or arm.name in only):
            yield f"{named} left out: {why}"
    for count, group in enumerate(raw.GROUPS, 1):
        some = [task for task in tasks if task.run.arm.group in (raw.PACE, *raw.GROUPS[:count])]
        if any(task.run.arm.group == group for task in some):
            left = sum(minutes[task.key] for task in some)
            when = time.strftime("%a %H:%M", time.localtime(time.time() + 60 * left))
            yield f"{', '.join(raw.GROUPS[:count])}: {left / 60:.1f} hours left, until {when}"


def lines_in(path: Path) -> int:
    """How many lines a file has."""
    return path.read_bytes().count(b"\n")
