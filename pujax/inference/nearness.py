"""How near an export is to its run: its greedy answers beside those that the run kept."""

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx

from pujax.config.settings import TrainConfig
from pujax.errors import EvaluationError, PujaxError
from pujax.evaluation.results import load
from pujax.evaluation.waiting import waited
from pujax.files.chat import Chat
from pujax.inference.evaluated import run_config
from pujax.inference.finished import finished_run
from pujax.inference.heldout import evaluate_subject, subject_of
from pujax.inference.serving import served_at
from pujax.run.data import load_heldout, with_system


def nearness(run: Path, out: Path, count: int) -> str:
    """To how many of a run's first `count` held-out prompts the model at `out` says the same.

    A sentence; the reason where nothing can be compared, since what was exported is whole anyway.
    A GGUF file answers by llama.cpp, where that is installed, as it will once it is deployed; what
    else there is by pujax's own decoder in float32: of a file of fewer bits its values are what
    they were rounded to.
    """
    model = finished_run(run).model
    kept = model.parent / "eval-aligned.jsonl"
    if not kept.exists():
        return "not compared with the run, which has kept no held-out answers"
    by_llama = out.suffix == ".gguf" and importlib.util.find_spec("xllamacpp") is not None
    try:
        answers = {row.id: row.response for row in load(kept).rows}
        config = run_config(model.parent)
        asked = min(count, len(answers))
        config = replace(config, eval=replace(config.eval, prompts=asked, samples=0))
        if by_llama:
            found = _by_llama(out, config, model)
        else:
            subject = subject_of(config, str(out))
            rows = evaluate_subject(subject, config, {}, "the export").rows
            found = {row.id: row.response for row in rows}
    except PujaxError as error:
        return f"not compared with the run ({error})"
    same = sum(answers.get(name) == answer for name, answer in found.items())
    said = f"{same} of {len(found)} greedy answers to held-out prompts are the run's own"
    if by_llama:
        said += ", by llama.cpp"
    if out.suffix == ".gguf" and same < len(found) / 2:
        said += ": fewer than half, so try kind=Q8_0 or F16, which keep more of a short training"
    return said


def _by_llama(out: Path, config: TrainConfig, model: Path) -> Mapping[str, str]:
    """What llama.cpp's server answers to each prompt, by its id.

    It is given messages, as whoever deploys it gives it, so a prompt that the run had to cut is
    left out. Raises `EvaluationError` where it doesn't answer.
    """
    data = replace(config.data, on_too_long="drop")
    heldout = load_heldout(replace(config, data=data), Chat.load(str(model)))
    examples = heldout.examples[: config.eval.prompts]
    context = heldout.prompt_size + heldout.response_size
    found = {}
    aloud = partial(print, file=sys.stderr, flush=True)
    with served_at(out, context=context) as address, waited("asking llama.cpp", aloud):
        for example in examples:
            body = {
                "messages": with_system(example.prompt.messages, config.data.system),
                "max_tokens": heldout.response_size,
                "temperature": 0,
                "reasoning_format": "none",  # a thought is part of the answer
            }
            try:
                reply = httpx.post(f"{address}/chat/completions", json=body, timeout=600)
                text = reply.raise_for_status().json()["choices"][0]["message"]["content"]
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                raise EvaluationError(f"{out}: llama.cpp did not answer: {error}") from error
            found[example.prompt.id] = text
    return found
