"""Suites: larger questions to a model than what a metric asks of each answer.

A suite is a function, its settings keywords, and a YAML in `conf/tools/suite/`. Its other
parameters are named for what it asks for, and get it (`pujax.inference.suites`): `subject`, a model
with its prompts; `reference`, what a run's alignment started from; `answers`, the evaluations
there are; `judge`; `records`, in which a long one keeps what it has; and `drawn`, in which it keeps
what of this the reference decides, for the other runs that started from there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pujax.errors import EvaluationError, require
from pujax.evaluation import ranking as ranks
from pujax.evaluation.candidates import (
    Candidates,
    check_enough,
    drawing,
    given_with,
    regarding,
    stacked,
)
from pujax.evaluation.judging import first_is_better, question
from pujax.evaluation.metrics import MetricFn, correct
from pujax.evaluation.signal import SHUFFLED, Signal, signal_of
from pujax.evaluation.statistics import Difference, few, interval_of_mean
from pujax.evaluation.subjects import Judge, Records, SharedRecords, Subject, SuiteAnswer
from pujax.evaluation.text import shown
from pujax.evaluation.waiting import through
from pujax.method.scoring import ScoringContext
from pujax.models.logps import response_logps
from pujax.records import Example, check_temperature
from pujax.types import Batch, LabelRule, Params, Scorer, Tokens

# ------------------------------------------------------------------------------------------ signal


def signal(
    subject: Subject,
    judge: Judge | None = None,
    records: Records | None = None,
    *,
    scorers: Mapping[str, Any],
    labels: LabelRule,
    oracle: MetricFn = correct,
    otherwise: MetricFn | None = None,
    judged: bool = False,
    samples: int = 8,
    temperature: float = 0.7,
    margin: float = 0.0,
    seed: int = 0,
) -> SuiteAnswer:
    """How well each scorer ranks the model's own candidates, held against an oracle.

    Candidates are drawn once, and all scorers see the same; each scores them again with another
    prompt's anchor in view, and where that changes its scores it has a second row, its control.
    Prompts that nothing orders are left out. Groups in which all candidates are equally good count
    for entropy and mass alone. The last column is of the groups whose best candidate the oracle
    puts above the anchor: there a ranking by the anchor can mislead. Raises `EvaluationError` when
    fewer than two prompts are left.

    Settings:
        scorers: by name, functions or settings as in conf/scorer/.
        labels: from scores to labels, for their entropy and mass.
        oracle: a metric of texts: what truly orders the candidates.
        otherwise: what orders those of prompts that the oracle does not know; null leaves them out.
        judged: order those by how much the judge prefers each to the anchor, in both orders.
        samples: candidates a prompt.
        temperature: at which they are drawn.
        margin: from the oracle's best, within which a candidate counts as near it.
        seed: of what is drawn.
    """
    require(samples >= 2, "suite.samples", samples, "needs at least 2")
    check_temperature("suite.temperature", temperature)
    require(0 <= margin < math.inf, "suite.margin", margin, "must be finite and not negative")
    require(0 <= seed < 2**63, "suite.seed", seed, "must lie in [0, 2**63)")
    records = Records() if records is None else records
    functions = {name: s["score"] if isinstance(s, Mapping) else s for name, s in scorers.items()}

    regard = regarding(oracle, otherwise)
    kept = [
        example
        for example in subject.examples
        if regard(example, "")[0] is not None or (judged and judge is not None)
    ]
    check_enough(len(kept))
    others = _other_anchors(kept, seed)
    if any(example.prompt.id not in records.found for example in kept):
        groups, draw = [], drawing(subject, samples, temperature, seed)
        starts = range(0, len(kept), subject.batch)
        for drawn in (
            each
            for start in through(starts, "sampling", len(kept))
            for each in draw(kept[start : start + subject.batch], start)
        ):
            told = [regard(drawn.example, text) for text in drawn.texts]
            values = tuple(value for value, _ in told if value is not None)
            by = told[0][1] if len(values) == samples else ""
            worth = regard(drawn.example, drawn.example.anchor)[0]
            groups.append(replace(drawn, oracle=values if by else (), by=by, anchor=worth))
        if judged and judge is not None:
            groups = _judged(groups, judge, oracle)
        _score(subject, groups, others, functions, labels, records, seed)
    found = [records.found[e.prompt.id] for e in kept if records.found[e.prompt.id]["oracle"]]
    check_enough(len(found))
    return _signal_answer(found, list(functions), margin, samples, temperature)


def _other_anchors(examples: Sequence[Example], seed: int) -> dict[str, Example]:
    """By each prompt's id another prompt, whose anchor is another text where there is such."""
    order = np.random.default_rng(seed).permutation(len(examples))
    found = {}
    for place, index in enumerate(order):
        following = [*order[place + 1 :], *order[:place]]
        example = examples[index]
        different = (examples[i] for i in following if examples[i].anchor != example.anchor)
        found[example.prompt.id] = next(different, examples[following[0]])
    return found


def _judged(groups: Sequence[Candidates], judge: Judge, oracle: MetricFn) -> list[Candidates]:
    """The groups with what the judge thinks of the candidates that `oracle` does not know.

    A candidate's worth is how surely it is preferred to the anchor, over both orders. A group with
    a verdict that failed has none.
    """
    asked, knows = {}, regarding(oracle, None)
    for group in groups:
        example = group.example
        if knows(example, "")[0] is None:
            for text in set(group.texts):
                asked[example.prompt.id, text] = (
                    question(example.prompt.id, shown(example.prompt), text, example.anchor),
                    question(example.prompt.id, shown(example.prompt), example.anchor, text),
                )
    said = judge([each for pair in asked.values() for each in pair])
    worth = {}
    for key, (first, second) in asked.items():
        shares = [first_is_better(said.get(each.id, "")) for each in (first, second)]
        if shares[0] is not None and shares[1] is not None:
            worth[key] = (shares[0] + 1 - shares[1]) / 2
    found = []
    for group in groups:
        keys = [(group.example.prompt.id, text) for text in group.texts]
        if keys[0] in asked:
            values = tuple(worth[key] for key in keys if key in worth)
            values = values if len(values) == len(keys) else ()
            group = replace(group, oracle=values, by="judge", anchor=0.5)  # as good as itself
        found.append(group)
    return found


def _score(
    subject: Subject,
    groups: Sequence[Candidates],
    others: Mapping[str, Example],
    scorers: Mapping[str, Scorer],
    labels: LabelRule,
    records: Records,
    seed: int,
) -> None:
    """Record each group with its scores and labels, by every scorer and by its control.

    Groups of like lengths go together, in batches cut to the longest response in them: of three
    lengths, so that no more programs are compiled.
    """
    whole = subject.collate([groups[0].example]).anchors.ids.shape[-1]
    sizes = sorted({-(-whole // 4), -(-whole // 2), whole})
    longest = [
        max(map(len, (*g.ids, g.example.anchor_ids, others[g.example.prompt.id].anchor_ids)))
        for g in groups
    ]
    order = sorted(range(len(groups)), key=lambda i: (longest[i], i))
    batches = [order[at : at + subject.batch] for at in range(0, len(order), subject.batch)]
    filled = [
        [groups[i] for i in [*places, *places[-1:] * (subject.batch - len(places))]]
        for places in batches
    ]
    collated = [subject.collate([group.example for group in some]) for some in filled]
    prompts = max(int(batch.prompts.lengths.max()) for batch in collated)
    references = max(int(batch.references.lengths.max()) for batch in collated)

    @jax.jit
    def scored(params: Params, batch: Batch, made: Tokens, anchors: Tokens, key: Array) -> Any:
        """By name, the scores and the labels of the candidates [B K], control behind scorer."""
        # One for all scorers: they share its passes over the responses.
        context = ScoringContext(
            reader=subject.model,
            params=params,
            frames=subject.frames,
            batch=batch,
            after=subject.model.prefill(params, batch.prompts),
            tokens=jnp.concatenate([batch.anchors.ids[:, None], made.ids], axis=1),
            mask=jnp.concatenate([batch.anchors.mask[:, None], made.mask], axis=1),
            key=key,
        )
        found = {name: scorer(context) for name, scorer in scorers.items()}
        control = context.with_anchors(anchors)
        found |= {f"{name}{SHUFFLED}": scorer(control) for name, scorer in scorers.items()}
        shares = {name: labels(scores)[0][:, 1:] for name, scores in found.items()}
        return {
            name: (found[name][:, 1:], q / jnp.maximum(q.sum(-1, keepdims=True), 1e-9))
            for name, q in shares.items()
        }

    starts = range(0, len(order), subject.batch)
    for number, _ in enumerate(through(starts, "scoring candidates", len(order))):
        places, some = batches[number], filled[number]
        if all(group.example.prompt.id in records.found for group in some):
            continue
        size = next(size for size in sizes if size >= longest[places[-1]])
        batch = _cut(collated[number], prompts, references, size)
        made = stacked([group.ids for group in some], size)
        anchors = subject.collate([others[group.example.prompt.id] for group in some]).anchors
        anchors = Tokens(anchors.ids[:, :size], anchors.lengths)
        key = jax.random.fold_in(jax.random.key(seed), len(groups) + number)
        found = jax.device_get(scored(subject.params, batch, made, anchors, key))
        records.add(
            [
                {
                    "id": group.example.prompt.id,
                    "candidates": list(group.texts),
                    "oracle": list(group.oracle),
                    "by": group.by,
                    "anchor": group.anchor,
                    "scores": {name: s[b].tolist() for name, (s, _) in found.items()},
                    "labels": {name: q[b].tolist() for name, (_, q) in found.items()},
                }
                for b, group in enumerate(some[: len(places)])
            ]
        )


def _cut(batch: Batch, prompts: int, references: int, responses: int) -> Batch:
    """The batch with no more padding than that many tokens ask for."""

    def to(tokens: Tokens, size: int) -> Tokens:
        return Tokens(tokens.ids[:, :size], tokens.lengths)

    return Batch(
        prompts=to(batch.prompts, prompts),
        anchors=to(batch.anchors, responses),
        anchor_finished=batch.anchor_finished,
        references=to(batch.references, references),
    )


def _signal_answer(
    records: Sequence[Mapping[str, Any]],
    scorers: Sequence[str],
    margin: float,
    samples: int,
    temperature: float,
) -> SuiteAnswer:
    """The table, a row a scorer and a control; of two oracles one block after the other."""
    rows, notes = [], []
    parts = dict.fromkeys(record["by"] for record in records)
    for by in parts:
        part = [record for record in records if record["by"] == by]
        of_oracle = f" ({by})" if len(parts) > 1 else ""
        ordered = sum(len(set(record["oracle"])) > 1 for record in part)
        beaten = [_beats_anchor(record) for record in part]
        told = f"{len(part)} prompts by {by}, which orders {ordered} groups"
        if not ordered:
            told += " (give more prompts, or more suite.samples: nothing is known of any score)"
        notes.append(told + (f", {sum(beaten)} of them over the anchor" if any(beaten) else ""))
        weak = []
        for name in scorers:
            control = f"{name}{SHUFFLED}"
            groups = _groups(part, name, margin)
            row = _row(f"{name}{of_oracle}", groups)
            over = _cell([one.pairs for one, is_so in zip(groups, beaten, strict=True) if is_so])
            if all(each["scores"][name] == each["scores"][control] for each in part):
                rows.append((*row, "", over))
                continue
            controls = _groups(part, control, margin)
            gains = [
                one.tau - other.tau
                for one, other in zip(groups, controls, strict=True)
                if one.tau is not None and other.tau is not None
            ]
            gain = _interval(gains)
            rows.append((*row, "–" if gain is None else _told(gain), over))
            rows.append((*_row(f"{control}{of_oracle}", controls), "", ""))
            if gain is not None and gain.low <= 0:
                weak.append(name)
        if weak:
            notes.append(f"no better than their shuffled anchor: {', '.join(weak)}")
    header = ("scorer", "Kendall τ-b", "top-1", "pairs", "label entropy", "q near best")
    note = "; ".join(notes)
    return SuiteAnswer(
        (*header, "τ over shuffled", "pairs, anchor beaten"),
        tuple(rows),
        f"{note}. {samples} candidates each at temperature {temperature}. 95 % intervals: BCa "
        "bootstrap over groups, of τ over shuffled over the paired differences. An oracle that "
        "looks at the anchor, as rouge_l, favours scorers that compare words with it.",
        tuple(dict(record) for record in records),
    )


def _groups(records: Sequence[Mapping[str, Any]], name: str, margin: float) -> list[Signal]:
    return [
        signal_of(each["scores"][name], each["oracle"], each["labels"][name], margin=margin)
        for each in records
    ]


def _row(name: str, groups: Sequence[Signal]) -> tuple[str, ...]:
    columns = ("tau", "top", "pairs", "entropy", "near")
    return (name, *(_cell([getattr(group, column) for group in groups]) for column in columns))


def _cell(values: Sequence[float | None]) -> str:
    found = _interval([value for value in values if value is not None])
    return "–" if found is None else _told(found)


def _beats_anchor(record: Mapping[str, Any]) -> bool:
    """Whether the oracle orders the candidates and puts the best of them above the anchor.

    A record of before the anchor's worth was kept says nothing of that.
    """
    anchor, oracle = record.get("anchor"), record["oracle"]
    return anchor is not None and min(oracle) < max(oracle) > anchor


def _interval(values: Sequence[float]) -> Difference | None:
    if not values or not np.isfinite(values).all():
        return None
    return interval_of_mean(values)


def _told(found: Difference) -> str:
    return f"{found.mean:z.3f} [{found.low:z.3f}, {found.high:z.3f}]"


# ----------------------------------------------------------------------------------------- ranking


def ranking(
    subject: Subject,
    reference: Subject,
    records: Records | None = None,
    drawn: SharedRecords | None = None,
    *,
    oracle: MetricFn = correct,
    otherwise: MetricFn | None = None,
    samples: int = 8,
    temperature: float = 0.7,
    beta: float = 0.1,
    preference: float = ranks.CERTAIN,
    seed: int = 0,
) -> SuiteAnswer:
    """How often a model finds the better of two responses likelier (Chen et al., 2024).

    The pairs are those of the held-out prompts' rated responses, where they have such, and else all
    that the oracle orders among candidates that the reference draws for a prompt, so that every
    model that came of it is asked about the same. Beside the model stand the reference itself,
    where that is another, and the optimum of DPO's objective from there. Each is the mean over
    prompts of the share of its pairs. Raises `EvaluationError` when the oracle orders fewer than
    two prompts, and for a model that reads them as other tokens than the reference.

    Settings:
        oracle: a metric of texts: what truly orders the candidates.
        otherwise: what orders those of prompts that the oracle does not know; null leaves them out.
        samples: candidates a prompt.
        temperature: at which they are drawn.
        beta: DPO's, for the optimum.
        preference: the share that prefers the better response, for the optimum.
        seed: of what is drawn.
    """
    require(samples >= 2, "suite.samples", samples, "needs at least 2")
    check_temperature("suite.temperature", temperature)
    require(0 < beta < math.inf, "suite.beta", beta, "must be positive and finite")
    require(0 < preference < 1, "suite.preference", preference, "must lie between 0 and 1")
    require(0 <= seed < 2**63, "suite.seed", seed, "must lie in [0, 2**63)")
    records = Records() if records is None else records
    drawn = SharedRecords() if drawn is None else drawn
    regard = regarding(oracle, otherwise)
    rated = [example for example in reference.examples if example.given]
    kept = rated or [e for e in reference.examples if regard(e, "")[0] is not None]
    check_enough(len(kept))
    _refuse_other_tokens(subject, kept)
    draw = given_with if rated else drawing(reference, samples, temperature, seed)
    most = max(len(example.given) for example in kept) or samples
    policy_sums, reference_sums = (_summing(each, most) for each in (subject, reference))

    def begun(some: Sequence[Example], start: int) -> list[dict[str, Any]]:
        """What the reference decides of each prompt's record, made where it isn't there yet."""
        if not all(example.prompt.id in drawn.found for example in some):
            groups = draw(some, start)
            drawn.add(
                [
                    {
                        "id": group.example.prompt.id,
                        "candidates": list(group.texts),
                        "oracle": list(group.oracle)
                        or [regard(group.example, text)[0] for text in group.texts],
                        "ids": [list(ids) for ids in group.ids],
                        "ref_logps": sums,
                    }
                    for group, sums in zip(groups, reference_sums(groups), strict=True)
                ]
            )
        return [drawn.found[example.prompt.id] for example in some]

    for start in through(range(0, len(kept), subject.batch), "reading pairs", len(kept)):
        some = kept[start : start + subject.batch]
        if all(example.prompt.id in records.found for example in some):
            continue
        begin = begun(some, start)
        groups = [
            Candidates(example, tuple(map(tuple, each["ids"])), tuple(each["candidates"]))
            for example, each in zip(some, begin, strict=True)
        ]
        sums = [each["ref_logps"] for each in begin]
        of_policy = sums if reference is subject else policy_sums(groups)
        records.add(
            [
                {
                    **{name: each[name] for name in ("id", "candidates", "oracle")},
                    "lengths": [len(ids) for ids in each["ids"]],
                    "logps": policy,
                    "ref_logps": each["ref_logps"],
                }
                for each, policy in zip(begin, of_policy, strict=True)
            ]
        )
    found = [records.found[example.prompt.id] for example in kept]
    shares = [each for each in (_shares(record, beta, preference) for record in found) if each]
    if len(shares) < 2:
        by = "their ratings order" if rated else "the oracle orders"
        remedy = "" if rated else ", or more suite.samples"
        raise EvaluationError(
            f"{by} the candidates of {len(shares)} prompts: give more prompts{remedy}"
        )
    whose = "by the ratings of the responses given with them"
    if not rated:
        sampled = f"({samples} of the reference at temperature {temperature})"
        whose = f"whose candidates {sampled} the oracle orders"
    rows = []
    before = [("the reference", ("reference raw", "reference per token"))]
    for name, cells in (
        ("the model", ("raw", "per token")),
        *([] if reference is subject else before),
        ("DPO's optimum", ("idealised", None)),
    ):
        values = [
            "–" if cell is None else _told(interval_of_mean([each[cell] for each in shares]))
            for cell in cells
        ]
        rows.append((name, *values))
    return SuiteAnswer(
        ("pairs ranked rightly", "by log-prob", "by log-prob a token"),
        tuple(rows),
        f"{len(shares)} of {len(found)} prompts, {whose}; β = {beta}. 95 % intervals: BCa "
        "bootstrap over prompts." + few(len(shares)),
        tuple(dict(record) for record in found),
    )


def _refuse_other_tokens(subject: Subject, asked: Sequence[Example]) -> None:
    """Raise `EvaluationError` where the subject reads otherwise what the reference was `asked`."""

    def read(example: Example) -> list[tuple[int, ...]]:
        return [example.prompt_ids, *(given.ids for given in example.given)]

    own = {example.prompt.id: read(example) for example in subject.examples}
    for example in asked:
        if own.get(example.prompt.id) != read(example):
            raise EvaluationError(
                f"prompt {example.prompt.id!r} or its responses are other tokens to the model than "
                "to the reference, whose candidates say nothing to it: name one of the same "
                "tokenizer and chat template"
            )


def _summing(subject: Subject, most: int) -> Callable[[Sequence[Candidates]], list[list[float]]]:
    """What reads at most a batch of groups, of at most so many candidates each.

    It gives the log-prob of each under the subject, summed over its tokens, in nats.
    """

    @jax.jit
    def summed(params: Params, prompts: Tokens, made: Tokens) -> Array:
        logps = response_logps(subject.model, params, prompts, made.ids, made.mask)
        return logps.sum(axis=-1)

    def read(some: Sequence[Candidates]) -> list[list[float]]:
        filled = [*some, *[some[-1]] * (subject.batch - len(some))]
        batch = subject.collate([group.example for group in filled])
        ids = [[*group.ids, *[()] * (most - len(group.ids))] for group in filled]
        sums = summed(subject.params, batch.prompts, stacked(ids, batch.anchors.ids.shape[-1]))
        return [
            row[: len(group.ids)].tolist()
            for group, row in zip(some, np.asarray(jax.device_get(sums), float), strict=False)
        ]

    return read


def _shares(record: Mapping[str, Any], beta: float, preference: float) -> dict[str, float]:
    """The shares of a prompt's ordered pairs that are ranked rightly; empty where there is none."""
    oracle, lengths, policy, before = (
        np.asarray(record[key], float) for key in ("oracle", "lengths", "logps", "ref_logps")
    )
    better, worse = np.nonzero(oracle[:, None] > oracle[None, :])
    if not len(better):
        return {}
    sizes = lengths[better], lengths[worse]
    found = {}
    for name, sums in (("", policy), ("reference ", before)):
        chosen, rejected = sums[better], sums[worse]
        found[f"{name}raw"] = ranks.accuracy(chosen, rejected)
        found[f"{name}per token"] = ranks.normalized_accuracy(chosen, rejected, *sizes)
    found["idealised"] = ranks.idealized_accuracy(
        before[better], before[worse], beta=beta, preference=preference
    )
    return found
