"""Ask a judge whose test answers are better, an arm's or those of the arm it is compared with.

python -m experiments.paper.judge MODEL.gguf [--profile cpu] [--only ARM[,ARM]] [--prompts 100]

The judge is a model on this disk that weighs the letters A and B, both orders asked. What is judged
are writing prompts, which have no true answer, as the results hold their answers; so nothing is
trained or sampled here. A verdict is asked once and kept in `runs/verdicts.jsonl`; what came of it
in `results/judged`, of which `tables.md` is made too.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.paper import raw, tables
from experiments.paper.plan import ROOT, Profile, load_profile
from pujax.errors import EvaluationError, PujaxError, one_of, require
from pujax.evaluation.judging import winrate
from pujax.evaluation.results import Evaluation, Row
from pujax.evaluation.subjects import Judge
from pujax.files.durable import write_whole
from pujax.inference.local_teacher import LocalTeacher
from pujax.inference.suites import offered_judge
from pujax.teacher.prompts import load_prompts
from pujax.teacher.settings import CollectConfig, TeacherConfig

HERE = Path(__file__).resolve().parent

KIND = "writing"


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit status is 1 where something is wrong with what it was told."""
    parser = argparse.ArgumentParser(prog="judge", description="Which arm's answers are better?")
    parser.add_argument("model", help="the judge, a GGUF file or a Hugging Face directory")
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--only", metavar="ARM[,ARM]", help="these arms alone, in this order")
    parser.add_argument("--prompts", metavar="N", type=int, default=100, help="writing prompts")
    parser.add_argument("--arms", type=Path, default=HERE / "arms.yaml")
    options = parser.parse_args(words)
    try:
        require(options.prompts > 0, "--prompts", options.prompts, "give one or more")
        profile = load_profile(options.arms.resolve(), options.profile)
        judge = judge_of(options.model, profile.runs / "verdicts.jsonl")
        arms = options.only.split(",") if options.only else list(profile.arms)
        for arm in arms:
            one_of("--only", arm, profile.arms)
        found = list(pairs(raw.read_all(profile.results), arms))
        if not found:
            raise EvaluationError(
                f"{profile.results}: no test result of {options.only or 'any arm'} and what that "
                "is compared with: make reproduce comes first"
            )
        for one, other in found:
            judged(profile, one, other, judge, Path(options.model).name, options.prompts)
            tables.build(profile.results)
    except (PujaxError, OSError) as error:
        print(f"judge: {error}", file=sys.stderr)
        return 1
    return 0


def judge_of(model: str, store: Path) -> Judge:
    """The model at `model` as a judge whose verdicts are kept in `store`."""
    name = Path(model).stem
    teacher = TeacherConfig(LocalTeacher, path=model, model=name, temperature=0.0, max_tokens=1)
    store.parent.mkdir(parents=True, exist_ok=True)
    return offered_judge(teacher, CollectConfig(), store)[0]


def pairs(
    results: dict[raw.Key, raw.Raw], arms: Sequence[str]
) -> Iterator[tuple[raw.Raw, raw.Raw]]:
    """The test results of arms, each with that of what its arm is compared with, seed by seed.

    Where the other has no such seed it is the first that it has; of several choices of settings
    each is the one that validation likes best.
    """
    tested = [result for (_, _, split), result in results.items() if split == "test"]
    lines = (tables.lines_of(results, split) for split in ("test", "validation"))
    best = {arm: line.first["name"] for arm, line in tables.chosen_of_arms(*lines).items()}
    for seed in sorted({result["seed"] for result in tested}):
        for arm in arms:
            one = results.get((best.get(arm, ""), seed, "test"))
            if one is None or one["against"] == arm:
                continue
            others = [other for other in tested if other["name"] == best.get(one["against"])]
            others.sort(key=lambda other: (other["seed"] != seed, other["seed"]))
            if others:
                yield one, others[0]


def judged(
    profile: Profile, one: raw.Raw, other: raw.Raw, judge: Judge, name: str, prompts: int
) -> None:
    """Keep what the judge finds of one result against another, unless that is there already.

    What it found on another number of prompts, against another, or of other answers makes room.
    """
    path = profile.results / "judged" / f"{one['name']}-seed{one['seed']}-{Path(name).stem}.json"
    against = {key: other[key] for key in ("title", "seed", "name")}
    asked = {
        p.id: p.messages[-1]["content"] for p in load_prompts(str(ROOT / profile.data["test"]))
    }
    compared = [answers_of(result, asked) for result in (other, one)]
    if path.exists():
        before = raw.read_judged(path)
        # The first verdicts lack the name: an arm was there with one choice of settings alone.
        same = before["prompts"] == prompts and against | before["against"] == against
        if same and all(_judged_of(each, before["records"]) for each in compared):
            return
    print(f"\n== {one['name']}, seed {one['seed']}, against {other['title']}", flush=True)
    answer = winrate(compared, judge, prompts=prompts, kinds=[KIND])
    told = {
        "arm": one["arm"],
        "title": one["title"],
        "seed": one["seed"],
        "against": against,
        "judge": name,
        "prompts": prompts,
        "rows": answer.rows,
        "note": answer.note,
        "records": answer.records,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(told, ensure_ascii=False, indent=1) + "\n").encode())


def _judged_of(answers: Evaluation, records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether it is these answers that the records of a judge hold."""
    now = {row.id: row.response for row in answers.rows}
    return all(record.get(answers.model) == now.get(record["id"]) for record in records)


def answers_of(result: raw.Raw, asked: dict[str, str]) -> Evaluation:
    """The answers that a result holds, to the prompts `asked`."""
    rows = zip(result["id"], result["kind"], result["answer"], result["response"], strict=True)
    return Evaluation(
        f"{result['name']}, seed {result['seed']}",
        tuple(Row(i, kind, asked[i], answer, "", text, {}) for i, kind, answer, text in rows),
    )


if __name__ == "__main__":
    sys.exit(main())
