"""How near an export is to its run: its greedy answers beside those that the run kept."""

from dataclasses import replace
from pathlib import Path

from pujax.errors import PujaxError
from pujax.evaluation.results import load
from pujax.inference.finished import finished_run
from pujax.inference.heldout import evaluate_subject, run_config, subject_of


def nearness(run: Path, out: Path, count: int) -> str:
    """To how many of a run's first `count` held-out prompts the model at `out` says the same.

    A sentence; the reason where nothing can be compared, since what was exported is whole anyway.
    Greedy answers, by pujax's own decoder in float32: of a file of fewer bits its values are what
    they were rounded to.
    """
    directory = finished_run(run).model.parent
    kept = directory / "eval-aligned.jsonl"
    if not kept.exists():
        return "not compared with the run, which has kept no held-out answers"
    try:
        answers = {row.id: row.response for row in load(kept).rows}
        config = run_config(directory)
        asked = min(count, len(answers))
        config = replace(config, eval=replace(config.eval, prompts=asked, samples=0))
        found = evaluate_subject(subject_of(config, str(out)), config, {}, "the export")
    except PujaxError as error:
        return f"not compared with the run ({error})"
    same = sum(answers.get(row.id) == row.response for row in found.rows)
    return f"{same} of {len(found.rows)} greedy answers to held-out prompts are the run's own"
