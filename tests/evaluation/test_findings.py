from dataclasses import replace

from pujax.evaluation import findings, tables
from pujax.evaluation.metrics import Shown
from pujax.evaluation.results import Evaluation, Row
from pujax.evaluation.signal import Control


def evaluation(model, responses, *, anchors=None, kind=None, logp=-1.0, rouge=0.5, truths=None):
    anchors = anchors or [f"truth {i}" for i in range(len(responses))]
    truths = truths or [None] * len(responses)
    rows = [
        Row(
            f"p{i}",
            kind,
            f"prompt {i}",
            truth,
            anchor,
            response,
            {"anchor_logp": logp, "rouge_l": rouge},
        )
        for i, (response, anchor, truth) in enumerate(zip(responses, anchors, truths, strict=True))
    ]
    return Evaluation(model, tuple(rows))


def different(model, count, **values):
    return evaluation(model, [f"answer {i}" for i in range(count)], **values)


def test_a_model_that_says_the_same_to_everything_is_no_success_however_high_its_scores():
    before = different("sft", 40, rouge=0.1)
    after = evaluation("aligned", ["I'm sorry, but I can't."] * 40, rouge=0.9)
    found = findings.verdict_on([before, after])
    assert found.style == "loss"
    assert "says the same to 40 of 40 prompts, “I'm sorry, but I can't.”" in found.sentence
    assert "(1 distinct answer; the most frequent anchor is to 1)" in found.sentence
    assert any("read the answers" in told for told in findings.warnings([before, after]))


def test_a_collapse_in_all_is_not_said_again_of_a_kind_that_has_no_other():
    rows = [
        evaluation("m", [said] * 6, anchors=list("abcdef"), kind=said) for said in ("yes", "no")
    ]
    more = evaluation("m", ["yes"] * 6, anchors=list("abcdef"), kind="more")
    whole = Evaluation("m", tuple(row for one in (*rows, more) for row in one.rows))
    told = [said.partition(", “")[0] for said in findings.collapses(whole)]
    assert told == [
        "m says the same to 12 of 18 prompts",
        "m says the same to 6 of 6 prompts of kind no",
    ]


def test_an_answer_of_white_space_is_not_quoted():
    (told,) = findings.collapses(evaluation("m", ["\n\n \n"] * 6, anchors=["a", "b"] * 3))
    assert told.startswith("m says the same to 6 of 6 prompts, nothing that can be seen (1 dist")


def test_a_collapse_within_a_kind_is_found():
    tickets = evaluation("m", ["billing"] * 6, anchors=["billing", "account"] * 3, kind="ticket")
    letters = different("m", 20, kind="letter")
    both = Evaluation("m", tickets.rows + letters.rows)
    (told,) = findings.collapses(both)
    assert told.startswith("m says the same to 6 of 6 prompts of kind ticket, “billing”")


def test_answers_that_the_teacher_repeats_too_are_no_collapse():
    same = evaluation("m", ["yes"] * 20 + ["no"] * 20, anchors=["yes"] * 19 + ["no"] * 21)
    assert findings.collapses(same) == []
    assert findings.repetitions(same) == []
    teacher = evaluation("m", ["yes"] * 40, anchors=["yes"] * 40)
    assert findings.collapses(teacher) == []
    (told,) = findings.repetitions(teacher)
    assert told == "40 of 40 prompts have the same anchor, “yes”"


def test_one_answer_to_everything_is_a_collapse_though_the_teacher_repeats_itself():
    anchors, truths = ["billing"] * 32 + ["account"] * 8, ["billing", "account"] * 20
    one = evaluation("aligned", ["Billing"] * 40, anchors=anchors)
    (told,) = findings.collapses(one)
    assert told.endswith("(1 distinct answer; the most frequent anchor is to 32)")
    (told,) = findings.collapses(
        evaluation("m", ["billing"] * 37 + ["x"] * 3, anchors=["billing"] * 40, truths=truths)
    )
    assert told == (
        "m says the same to 37 of 40 prompts, “billing” (2 distinct answers; the most "
        "frequent anchor is to 40, the most frequent true one to 20 of 40)"
    )
    found = findings.verdict_on([different("sft", 40, rouge=0.1), one])
    assert (found.style, found.sentence.split(":")[0]) == (
        "loss",
        "Not a success, whatever the averages say",
    )
    said = " ".join(findings.remarks([different("sft", 40, rouge=0.1), one]))
    assert said.count("aligned says the same to 40 of 40 prompts") == 1
    # Nine in ten tickets are about billing indeed, and the model tells some others apart.
    rare = ["billing"] * 37 + ["account"] * 3
    assert findings.collapses(evaluation("m", rare, anchors=rare, truths=rare)) == []
    less = ["billing"] * 35 + ["account"] * 5
    assert findings.collapses(evaluation("m", less, anchors=anchors, truths=truths)) == []


def test_the_verdict_says_what_is_better_and_what_is_not_clear():
    found = findings.verdict_on(
        [different("sft", 40, rouge=0.1), different("aligned", 40, rouge=0.2)]
    )
    assert found.style == "gain"
    assert found.sentence == (
        "aligned against sft on 40 held-out prompts: better in anchor ROUGE-L +0.100 "
        "[0.100, 0.100]; no clear difference in anchor log-prob."
    )
    found = findings.verdict_on(
        [different("sft", 40, rouge=0.2), different("aligned", 40, rouge=0.1)]
    )
    assert found.style == "loss"
    assert "worse in anchor ROUGE-L" in found.sentence


def test_a_run_that_ends_worse_than_it_began_is_no_success_though_its_last_stage_gains():
    def with_exact(model, logp, exact):
        found = different(model, 40, logp=logp)
        rows = [replace(r, values=dict(r.values) | {"exact": exact}) for r in found.rows]
        return Evaluation(model, tuple(rows))

    base, sft, aligned = (
        with_exact(*one)
        for one in (("base", -2.0, 1.0), ("sft", -2.0, 0.0), ("aligned", -1.0, 0.0))
    )
    found = findings.verdict_on([base, sft, aligned])
    assert found.style == "loss"
    assert found.sentence.startswith(
        "Not a success: aligned is worse than base in exact answer -1.000 [-1.000, -1.000]. "
        "aligned against sft on 40 held-out prompts: better in anchor log-prob"
    )
    assert findings.verdict_on([base, sft]).style == "loss"
    won_back = with_exact("aligned", -1.0, 1.0)
    assert findings.verdict_on([base, sft, won_back]).style == "gain"


def test_telling_rated_responses_apart_is_what_their_losses_are_for():
    def told_apart(model, logp, margin):
        found = different(model, 40, logp=logp)
        rows = [replace(r, values=dict(r.values) | {"pair_margin": margin}) for r in found.rows]
        shown = {**found.shown, "pair_margin": Shown("pair margin", better="higher")}
        return Evaluation(model, tuple(rows), shown)

    base, sft = told_apart("base", -2.0, 0.0), told_apart("sft", -1.0, 0.0)
    found = findings.verdict_on([base, sft, told_apart("aligned", -3.0, 2.0)])
    assert found.sentence.startswith("aligned against sft on 40 held-out prompts: better in pair m")
    assert "worse in anchor log-prob -2.000" in found.sentence
    assert found.style == ""
    assert findings.verdict_on([base, sft, told_apart("aligned", -3.0, 0.0)]).style == "loss"


def test_what_a_model_said_reaches_no_terminal_as_a_control_character():
    (told,) = findings.collapses(evaluation("m", ["\x1b[31mRED \u202eevil"] * 6))
    assert told.startswith(r"m says the same to 6 of 6 prompts, “\x1b[31mRED \u202eevil” (1 dist")
    (told,) = findings.repetitions(evaluation("m", ["x"] * 6, anchors=["Ab " * 40] * 6))
    assert told.endswith("“" + "Ab " * 20 + "…”")


def test_a_value_that_is_no_number_is_no_success():
    before, after = different("sft", 40, logp=-2.0), different("aligned", 40, logp=-1.0)
    rows = list(after.rows)
    rows[3] = replace(rows[3], values=dict(rows[3].values) | {"anchor_logp": float("nan")})
    found = findings.verdict_on([before, Evaluation("aligned", tuple(rows))])
    assert found.style == "loss"
    assert "aligned's anchor log-prob is not a number on 1 prompt of 40" in found.sentence


def test_that_the_tables_own_prompts_chose_the_model_is_said():
    models = [different("base", 40), different("aligned", 40)]
    assert findings.warnings(models) == []
    (told,) = findings.warnings(models, chosen_by="exact")
    assert told.startswith("checkpoint.best=exact chose each stage's state on these same prompts")
    assert findings.remarks(models, chosen_by="exact")[1] == f"warning: {told}"


def test_what_alignment_has_to_beat_is_said_with_its_steps():
    def took(stage, *seconds):
        return [{"stage": stage, "step": i, "time/step_s": s} for i, s in enumerate(seconds, 1)]

    # Medians of 2 and 4 s, what compiled apart: three steps of alignment are six of SFT.
    lines = [*took("sft", 9.0, 2.0, 2.0, 1.0), *took("align", 30.0, 4.0, 4.0)]
    told = findings.sft_for_as_long([*lines, {"stage": "eval", "step": 4, "model": "sft"}])
    assert told is not None
    assert "about 6 steps more, which is what alignment has to beat" in told
    assert "sft.steps=10 and align.steps=0" in told
    short = findings.sft_for_as_long([*took("sft", 9.0, 2.0), *took("align", 30.0, 4.0)])
    assert short is not None
    assert "about 4 steps more" in short
    assert findings.sft_for_as_long([*took("sft", 9.0, 2.0), *took("align", 30.0)]) is None
    assert findings.sft_for_as_long(took("sft", 2.0, 2.0)) is None
    assert findings.sft_for_as_long([*took("sft", 1, 1e-320), *took("align", 2.0, 2.0)]) is None
    assert findings.sft_for_as_long(took("align", 2.0)) is None


def test_few_prompts_decide_nothing_and_are_warned_of():
    both = [different("sft", 12, rouge=0.1), different("aligned", 12, rouge=0.9)]
    found = findings.verdict_on(both)
    assert found.style == ""
    assert "12 held-out prompts, too few to call any difference clear (at least 30)" in (
        found.sentence
    )
    assert any("rests on 12 prompts" in told for told in findings.warnings(both))


def test_an_sft_that_is_worse_than_the_base_by_its_own_loss_is_warned_of():
    worse = [different("base", 40, logp=-2.0), different("sft", 40, logp=-3.0)]
    (told,) = findings.warnings(worse)
    assert told.startswith("SFT is worse than the base by its own loss (anchor log-prob -3.000")
    assert findings.warnings([different("base", 40, logp=-3.0), different("sft", 40)]) == []


def test_few_true_answers_among_many_prompts_are_warned_of():
    truths: list = ["x"] * 5 + [None] * 35
    (told,) = findings.warnings([different("base", 40, truths=truths)])
    assert told == "exact and contains rest on 5 prompts with a true answer"


def test_verdict_and_warnings_are_told_line_by_line():
    first, *others = findings.remarks([different("base", 12)])
    assert first == "Only base has been evaluated, on 12 prompts."
    (other,) = others
    assert other.startswith("warning: the table rests on 12 prompts")


def test_one_model_has_a_sentence_too():
    assert findings.verdict_on([different("base", 40)]).sentence == (
        "Only base has been evaluated, on 40 prompts."
    )


def test_a_stage_that_changed_nothing_is_said_and_not_compared():
    base, sft = (replace(different(m, 40, rouge=r), of=m) for m, r in (("base", 0.1), ("sft", 0.2)))
    aligned = replace(sft, model="aligned")
    found = findings.verdict_on([base, sft, aligned])
    assert found.style == "gain"
    assert found.sentence.startswith("sft against base on 40 held-out prompts: better in")
    assert found.sentence.endswith(". aligned is sft, unchanged.")
    made = [base, sft, aligned]
    assert tables.markdown(made) == tables.markdown(made[:2])  # no column and no difference of it
    assert [one.model for one in tables.changed(made)] == ["base", "sft"]
    unknown = [replace(one, of=None) for one in made]  # an earlier pujax's, which said nothing
    assert tables.changed(unknown) == unknown
    found = findings.verdict_on([base, replace(base, model="aligned")])
    assert found.sentence == (
        "Only base has been evaluated, on 40 prompts. aligned is base, unchanged."
    )


def test_the_teacher_is_measured_by_the_truth():
    anchors = ["Athens", "It is Athens.", "Rome", "nothing"]
    found = evaluation("m", ["x"] * 4, anchors=anchors, truths=["Athens", "Athens", "Athens", None])
    assert findings.teacher(found) == {"exact": 1 / 3, "contains": 2 / 3}
    assert findings.teacher(different("m", 4)) == {}


def test_a_model_put_beside_a_run_is_spoken_of_after_the_runs_own():
    own = [different(name, 40, rouge=r) for name, r in (("base", 0.1), ("sft", 0.2))]
    own.append(different("aligned", 40, rouge=0.3))
    found = findings.verdict_on([*own, different("zeta", 40, rouge=0.1)])
    assert found.style == "gain"
    first, rest = found.sentence.split(". ", 1)
    assert first.startswith("aligned against sft on 40 held-out prompts: better in")
    assert rest.startswith("zeta against aligned on 40 held-out prompts: worse in")
    same = evaluation("zeta", ["no"] * 40)
    (told,) = findings.warnings([*own, same])
    assert told.startswith("zeta says the same to 40 of 40 prompts")


def test_a_score_that_its_control_equals_is_what_a_reader_is_told_first():
    few, control = different("aligned", 12), Control(32, 0.5, 0.5)
    first, second = findings.warnings([few], control)
    assert first == control.warning
    assert "rests on 12 prompts" in second
    assert findings.remarks([few], control)[1] == f"warning: {control.warning}"
    assert len(findings.warnings([few], Control(32, 0.8, 0.5))) == 1


def test_a_model_that_no_longer_stops_by_itself_is_warned_of():
    def ending(model, finished):
        rows = different(model, len(finished)).rows
        values = [
            dict(row.values) | {"finished": end} for row, end in zip(rows, finished, strict=True)
        ]
        return Evaluation(
            model, tuple(replace(r, values=v) for r, v in zip(rows, values, strict=True))
        )

    base, sft = ending("base", [1, 1, 0, 0]), ending("sft", [1, 1, 1, 1])
    (told,) = findings.endless([base, sft, ending("aligned", [1, 0, 0, 0])])
    assert told.startswith("aligned ends 25% of its answers by itself, sft 100%: ")
    assert told in findings.warnings([base, sft, ending("aligned", [1, 0, 0, 0])])
    found = findings.verdict_on([base, sft, ending("aligned", [1, 0, 0, 0])])
    assert (found.style, told in found.sentence) == ("loss", True)
    assert findings.endless([base, sft, ending("aligned", [1, 1, 1, 0])]) == []
    assert findings.endless([ending("base", [0] * 4), ending("sft", [0] * 4)]) == []
    assert findings.endless([different("base", 4), different("sft", 4)]) == []  # not measured


def test_of_which_steps_a_chosen_model_is_is_said_from_the_end():
    told = findings.chosen({"sft": 4, "align": 0}, {"sft": 9, "align": 24})
    assert told == "the model is that of align step 0 of 24, begun from that of sft step 4 of 9"
