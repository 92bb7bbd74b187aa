"""Held-out evaluation of one set of parameters, and what sets two of them apart."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from pujax.chat import Chat
from pujax.config import DataConfig, EvalConfig
from pujax.data import Example, collate, make_dataset
from pujax.logs import read_jsonl, write_whole
from pujax.models import weights
from pujax.models.decoder import LanguageModel, Prefix, Prompts
from pujax.prompts import Prompt, load_prompts
from pujax.sampling import greedy
from pujax.scoring import mean_logps, packed, response_logps
from pujax.teacher import read_anchors
from pujax.types import Batch, Params, Room

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
RESAMPLES = 10_000


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


@dataclass(frozen=True)
class Difference:
    """A mean difference over `prompts` prompts, with its 95 % interval."""

    mean: float
    low: float
    high: float
    prompts: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def evaluate(
    model: LanguageModel,
    params: Params,
    examples: Sequence[Example],
    *,
    name: str,
    batch: int,
    collate: Callable[[Sequence[Example]], Batch],
    decode: Callable[[Sequence[int]], str],
    room: Room | None = None,
) -> Evaluation:
    """The anchors' mean log-probs under `params`, and greedy answers against them and the truth.

    The last batch is filled up with copies of its last row, which aren't counted: one compilation
    serves every batch and every set of parameters. Where a batch's real tokens fit into `room`, its
    padding is not computed.
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes a second: only who evaluates pays

    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    starts = range(0, len(examples), batch)
    rows = []
    for start in track(starts, description=f"evaluating {name}", transient=True):
        some = list(examples[start : start + batch])
        padded = collate(some + some[-1:] * (batch - len(some)))
        logp_B, tokens_BT, length_B, finished_B = map(
            np.asarray, _read(model, room, params, padded)
        )
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


@partial(jax.jit, static_argnums=(0, 1))
def _read(
    model: LanguageModel, room: Room | None, params: Params, batch: Batch
) -> tuple[Float[Array, " B"], Int[Array, "B T"], Int[Array, " B"], Bool[Array, " B"]]:
    """The anchors' mean log-probs, and greedy responses with their lengths and whether they ended.

    Jitted here, once: the parameters of base, sft and aligned are arguments of one program.
    """
    size = batch.anchors.shape[1]
    tokens = batch.anchors[:, None]
    mask = (jnp.arange(size)[None, :] < batch.anchor_lengths[:, None])[:, None]

    def read(room: Room | None) -> tuple[Prefix, Float[Array, "B 1 T"]]:
        prompts = Prompts(batch.prompts, batch.prompt_lengths)
        prefix = model.prefill(params, prompts, room=room)
        return prefix, response_logps(model, params, prefix, tokens, mask, room=room)

    prefix, logps = packed(room, batch.prompt_lengths, mask, read)
    made = greedy(model, params, prefix, size=size)
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


def evaluate_other(directory: Path, path: str, name: str) -> Evaluation:
    """The model at `path` on the held-out prompts of the run in `directory`, in float32.

    Raises what reading settings, prompts, anchors and weights raises, and ValueError for a `name`
    that the run has.
    """
    if not re.fullmatch(r"[\w.-]+", name) or (directory / f"eval-{name}.jsonl").exists():
        raise ValueError(
            f"--name {name!r}: the run has it, or it can't name a file: choose another"
        )
    settings = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
    assert isinstance(settings, dict)
    data, held = DataConfig(**settings["data"]), EvalConfig(**settings["eval"])
    chat = Chat.load(path)
    anchors = read_anchors(Path(data.anchors))
    dataset = make_dataset(load_prompts(data.heldout), anchors, chat, data)
    config, params = weights.load(path)
    return evaluate(
        LanguageModel(replace(config, eos_ids=chat.eos_ids)),
        params,
        dataset.examples[: held.prompts],
        name=name,
        batch=held.batch,
        collate=lambda examples: collate(examples, dataset),
        decode=chat.decode,
    )


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


def compare(first: Evaluation, second: Evaluation, *, seed: int = 0) -> dict[str, Difference]:
    """How far `second` is above `first` in each metric, prompt by prompt.

    The interval is a percentile bootstrap over prompts (Efron and Tibshirani, 1993, ch. 13), 10,000
    resamples of the paired differences: it says how much other prompts would change the difference,
    not how much another training seed would. Raises ValueError unless both answered the same
    prompts.
    """
    if [row.id for row in first.rows] != [row.id for row in second.rows]:
        raise ValueError(
            f"{first.model} and {second.model} were evaluated on different prompts "
            f"({len(first.rows)} and {len(second.rows)}): evaluate both again"
        )
    differences = {}
    for metric in METRICS:
        pairs = np.subtract(second.values(metric), first.values(metric))
        if len(pairs):
            low, high = np.percentile(_resampled_means(pairs, seed), [2.5, 97.5])
            differences[metric] = Difference(
                float(pairs.mean()), float(low), float(high), len(pairs)
            )
    return differences


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    # A hundred resamples at once: memory stays small however many prompts there are.
    means = [
        values[rng.integers(len(values), size=(100, len(values)))].mean(axis=1)
        for _ in range(RESAMPLES // 100)
    ]
    return np.concatenate(means)


def cells(evaluations: Sequence[Evaluation]) -> tuple[list[str], dict[str, list[str | Difference]]]:
    """The comparison as a grid: column names, and under each metric's title its cells.

    Columns are the models in the order given, then the difference of each to the one before it.
    """
    pairs = list(pairwise(evaluations))
    header = [evaluation.model for evaluation in evaluations]
    header += [f"{second.model} - {first.model}" for first, second in pairs]
    compared = [compare(first, second) for first, second in pairs]
    rows: dict[str, list[str | Difference]] = {}
    for metric in METRICS:
        values = [evaluation.values(metric) for evaluation in evaluations]
        if all(values):
            means: list[str | Difference] = [number(metric, float(np.mean(v))) for v in values]
            rows[metric] = means + [differences[metric] for differences in compared]
    return header, rows


def kind_cells(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Quality by kind of prompt: column names, and rows whose cells read base → sft → aligned."""
    splits = [evaluation.by_kind() for evaluation in evaluations]
    header = ["kind", "prompts", *(METRICS[metric] for metric in QUALITY)]
    rows = []
    for kind, first in splits[0].items():
        row = [kind, str(len(first.rows))]
        for metric in QUALITY:
            values = [split[kind].values(metric) for split in splits]
            means = [f"{np.mean(v):z.2f}" for v in values if v]
            row.append(" → ".join(means))
        rows.append(row)
    return header, rows


def number(metric: str, value: float, *, sign: bool = False) -> str:
    """A metric's value as the tables show it."""
    digits = 1 if metric == "length" else 3
    return f"{value:{'+' if sign else ''}z.{digits}f}"


def interval(metric: str, difference: Difference) -> str:
    """A difference as the tables show it: mean [low, high], with an asterisk if that excludes 0."""
    mean = number(metric, difference.mean, sign=True)
    low, high = number(metric, difference.low), number(metric, difference.high)
    return f"{mean}{'*' if difference.clear else ''} [{low}, {high}]"


def note(evaluations: Sequence[Evaluation]) -> str:
    """What a reader of the tables must know."""
    rows, answers = len(evaluations[0].rows), len(evaluations[0].values("exact"))
    text = f"{rows} held-out prompts, {answers} with a true answer; greedy decoding."
    if len(evaluations) > 1:
        text += " Differences with 95 % intervals (paired bootstrap over prompts); * excludes 0."
    return text


def table(evaluations: Sequence[Evaluation]) -> Table:
    """The comparison for a terminal; clear gains are green, clear losses red."""
    header, rows = cells(evaluations)
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.caption, shown.caption_justify = note(evaluations), "left"
    shown.add_column("held-out", no_wrap=True)
    for name in header:
        shown.add_column(name, justify="right")
    for metric, row in rows.items():
        texts = [METRICS[metric]]
        for cell in row:
            if isinstance(cell, str):
                texts.append(cell)
            else:
                # Without the space, so that a narrow terminal breaks the line before the bracket.
                text = escape(interval(metric, cell).replace(", ", ","))
                colour = {"gain": "green", "loss": "red"}.get(verdict(metric, cell))
                texts.append(f"[{colour}]{text}[/]" if colour else text)
        shown.add_row(*texts)
    return shown


def verdict(metric: str, difference: Difference) -> str:
    """`gain` or `loss` where the interval excludes 0 and the metric has a better end, else ``."""
    if not difference.clear or metric not in HIGHER_IS_BETTER:
        return ""
    return "gain" if difference.mean > 0 else "loss"


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """The comparison as a Markdown table, for a README."""
    header, rows = cells(evaluations)
    lines = [
        "| held-out | " + " | ".join(header) + " |",
        "|---|" + "---:|" * len(header),
    ]
    for metric, row in rows.items():
        # The asterisk is text here, not the start of an emphasis.
        texts = [
            cell if isinstance(cell, str) else interval(metric, cell).replace("*", r"\*")
            for cell in row
        ]
        lines.append(f"| {METRICS[metric]} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", note(evaluations).replace("*", r"\*")])
