"""Held-out evaluation of one set of parameters, and what sets two of them apart."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from rich.progress import track

from pujax.files.durable import read_jsonl, write_whole
from pujax.method.sampling import greedy
from pujax.models.decoder import LanguageModel, Prefix, packed
from pujax.models.logps import mean_logps, response_logps
from pujax.records import Example, Prompt
from pujax.types import Batch, Params

METRICS = {
    "anchor_logp": "anchor log-prob",
    "rouge_l": "anchor ROUGE-L",
    "exact": "exact answer",
    "contains": "contains answer",
    "length": "length (tokens)",
    "finished": "finished",
}

QUALITY = ("anchor_logp", "rouge_l", "exact", "contains")

HIGHER_IS_BETTER = (*QUALITY, "finished")

CASED = ("copy", "format")  # kinds of prompts where upper and lower case is part of the answer

PUNCTUATION = frozenset(".,;:!?")

QUOTES = frozenset("\"'`*\u2018\u2019\u201c\u201d")


@dataclass(frozen=True)
class Row:
    """One held-out prompt answered; `exact` and `contains` are None without a true answer."""

    id: str
    kind: str | None
    prompt: str
    answer: str | None
    anchor: str
    response: str
    anchor_logp: float
    rouge_l: float
    exact: float | None
    contains: float | None
    length: float
    finished: float


@dataclass(frozen=True)
class Evaluation:
    """What one model (base, sft, aligned) did on every held-out prompt."""

    model: str
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError(f"evaluation of {self.model}: no held-out prompts (eval.prompts)")

    def values(self, metric: str) -> list[float]:
        """A metric's value on each prompt that has one."""
        values = [getattr(row, metric) for row in self.rows]
        return [value for value in values if value is not None]

    def means(self) -> dict[str, float]:
        """Means by metric name (`eval/...`), without metrics that no prompt has."""
        values = {metric: self.values(metric) for metric in METRICS}
        return {f"eval/{metric}": float(np.mean(v)) for metric, v in values.items() if v}

    def by_kind(self) -> dict[str, "Evaluation"]:
        """The evaluation split by the prompts' kinds, in alphabetical order."""
        kinds = sorted({row.kind for row in self.rows if row.kind is not None})
        return {
            kind: Evaluation(self.model, tuple(row for row in self.rows if row.kind == kind))
            for kind in kinds
        }


def evaluate(
    model: LanguageModel,
    params: Params,
    examples: Sequence[Example],
    *,
    name: str,
    batch: int,
    collate: Callable[[Sequence[Example]], Batch],
    decode: Callable[[Sequence[int]], str],
) -> Evaluation:
    """The anchors' mean log-probs under `params`, and greedy answers against them and the truth.

    The last batch is filled up with copies of its last row, which aren't counted: one compilation
    serves every batch and every set of parameters. Where a batch's real tokens fit the model's
    budget, its padding is not computed.
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes a second: only who evaluates pays

    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    starts = range(0, len(examples), batch)
    rows = []
    for start in track(starts, description=f"evaluating {name}", transient=True):
        some = list(examples[start : start + batch])
        padded = collate(some + some[-1:] * (batch - len(some)))
        logp_B, tokens_BT, length_B, finished_B = map(np.asarray, _read(model, params, padded))
        for b, example in enumerate(some):
            response = decode(tokens_BT[b, : length_B[b]].tolist())
            prompt = example.prompt
            row = Row(
                id=prompt.id,
                kind=prompt.kind,
                prompt=_text(prompt),
                answer=prompt.answer,
                anchor=example.anchor,
                response=response,
                anchor_logp=float(logp_B[b]),
                rouge_l=rouge.score(example.anchor, response)["rougeL"].fmeasure,
                exact=None if prompt.answer is None else float(exact(prompt, response)),
                contains=None if prompt.answer is None else float(contains(prompt, response)),
                length=float(length_B[b]),
                finished=float(finished_B[b]),
            )
            rows.append(row)
    return Evaluation(name, tuple(rows))


@partial(jax.jit, static_argnums=0)
def _read(
    model: LanguageModel, params: Params, batch: Batch
) -> tuple[Float[Array, " B"], Int[Array, "B T"], Int[Array, " B"], Bool[Array, " B"]]:
    """The anchors' mean log-probs, and greedy responses with their lengths and whether they ended.

    Jitted here, once: the parameters of base, sft and aligned are arguments of one program.
    """
    tokens, mask = batch.anchors.ids[:, None], batch.anchors.mask[:, None]

    def read(model: LanguageModel) -> tuple[Prefix, Float[Array, "B 1 T"]]:
        prefix = model.prefill(params, batch.prompts)
        return prefix, response_logps(model, params, prefix, tokens, mask)

    prefix, logps = packed(model, batch.prompts.lengths, mask, read)
    made = greedy(model, params, prefix, size=tokens.shape[-1])
    lengths = made.mask.sum(axis=-1)
    return mean_logps(logps, mask)[:, 0], made.tokens[:, 0], lengths[:, 0], made.finished[:, 0]


def exact(prompt: Prompt, response: str) -> bool:
    """Whether the response is the true answer and nothing else.

    Space, quotes, backticks and asterisks around it and a full stop or the like after it don't
    count, unless the answer itself has them; nor does case, unless the prompt's kind is in CASED.
    """
    assert prompt.answer is not None
    return _cased(prompt, prompt.answer.strip()) in _peeled(_cased(prompt, response))


def contains(prompt: Prompt, response: str) -> bool:
    """Whether the true answer stands in the response as a whole word, phrase or number.

    A response that lists several answers passes as well: read it beside `exact` and the length.
    """
    assert prompt.answer is not None
    answer, response = _cased(prompt, prompt.answer.strip()), _cased(prompt, response)
    before = r"(?<!\w)(?<!\d[.,])" + (r"(?<!-)" if answer[0].isdigit() else "")
    after = r"(?!\w)(?![.,]\d)"
    return re.search(before + re.escape(answer) + after, response) is not None


def _cased(prompt: Prompt, text: str) -> str:
    return text if prompt.kind in CASED else text.casefold()


def _peeled(text: str) -> list[str]:
    """The text, then with one mark around or after it less each time, to the bare words."""
    peels = [text.strip()]
    while (text := peels[-1]) and (text[-1] in PUNCTUATION or {text[0], text[-1]} & QUOTES):
        if text[-1] in PUNCTUATION:
            text = text[:-1]
        else:
            text = text[text[0] in QUOTES : len(text) - (text[-1] in QUOTES)]
        peels.append(text.strip())
    return peels


def _text(prompt: Prompt) -> str:
    """The user's words; with several turns each under its role's name."""
    turns = [turn for turn in prompt.messages if turn["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def save(evaluation: Evaluation, directory: Path) -> Path:
    """Write `eval-<model>.jsonl`, one row a line, and return its path."""
    path = directory / f"eval-{evaluation.model}.jsonl"
    lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in evaluation.rows]
    write_whole(path, "".join(lines).encode(errors="backslashreplace"))
    return path


def load(path: Path) -> Evaluation:
    """Read what `save` wrote. Raises ValueError naming file and line for anything else."""
    rows = []
    for number, line in enumerate(read_jsonl(path), 1):
        try:
            rows.append(Row(**line))
        except TypeError as error:
            raise ValueError(f"{path}:{number}: not a row of an evaluation: {error}") from error
    return Evaluation(path.stem.removeprefix("eval-"), tuple(rows))


def load_all(directory: Path) -> list[Evaluation]:
    """The evaluations that a run's directory has, in the order in which a run makes them."""
    order = {"base": 0, "sft": 1, "aligned": 2}
    found = [load(path) for path in sorted(directory.glob("eval-*.jsonl"))]
    return sorted(found, key=lambda evaluation: order.get(evaluation.model, len(order)))
