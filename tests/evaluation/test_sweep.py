import json

import pytest

from pujax import report
from pujax.config.settings import default_of
from pujax.errors import ConfigError, DiskError, EvaluationError
from pujax.evaluation.results import Evaluation, Row, save
from pujax.evaluation.sweep import _drawn, gather


def evaluation(rouge, anchor="a"):
    rows = [
        Row(f"p{i}", None, "?", None, anchor, "r", {"rouge_l": rouge + at, "exact": None})
        for i, at in enumerate((-0.1, 0.1))
    ]
    return Evaluation("aligned", tuple(rows))


def begun(directory, *, seed, loss="dpo", swept=True, **settings):
    """A run as one leaves it that was begun."""
    directory.mkdir(parents=True)
    kept = {"seed": seed, "model": {"path": "m"}, "loss": {"_target_": loss}, "align": {"steps": 9}}
    (directory / "config.yaml").write_text(json.dumps(kept | settings))
    if swept:
        (directory / "swept.json").write_text(json.dumps({"loss": loss, "seed": str(seed)}))
    return directory


def done(directory, rouge, **settings):
    save(evaluation(rouge), begun(directory, **settings))
    (directory / "done").touch()
    return directory


@pytest.fixture
def sweep(tmp_path):
    """Two losses; three seeds of one, of the other one seed and another that was killed."""
    for seed, rouge in enumerate((0.2, 0.3, 0.7)):
        done(tmp_path / "smoke" / f"1_seed={seed}", rouge, seed=seed)
    done(tmp_path / "smoke" / "2_seed=0", 0.5, seed=0, loss="grpo")
    killed = begun(tmp_path / "smoke" / "2_seed=1", seed=1, loss="grpo")
    line = {"stage": "align", "step": 4, "loss": 1.0}
    (killed / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "smoke" / "other").mkdir()
    (tmp_path / "smoke" / "other" / "config.yaml").write_text("a: 1")
    return tmp_path


def test_a_row_is_a_setting_and_its_error_that_of_the_mean_over_seeds(sweep):
    first, second = gather(sweep).rows
    assert (first.name, len(first.runs), first.seeds) == ("loss=dpo", 3, 3)
    mean, error = first.mean("rouge_l") or (None, None)
    # Deviations of -0.2, -0.1 and 0.3 from 0.4: sqrt(0.14 / 2 / 3).
    assert (mean, error) == (pytest.approx(0.4), pytest.approx((0.14 / 6) ** 0.5))
    assert (second.name, len(second.runs), second.seeds) == ("loss=grpo", 1, 2)
    assert second.mean("rouge_l") == (pytest.approx(0.5), None)
    assert second.mean("exact") is None


def test_the_command_prints_and_keeps_the_table_and_says_what_is_unfinished(sweep, capsys):
    report.run(report.ReportConfig(sweep=str(sweep)))
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("unfinished")]
    assert "smoke/2_seed=1: align step 4 of 9: the same command goes on with it" in line
    page = (sweep / "sweep.md").read_text()
    assert "| setting | seeds | anchor ROUGE-L |" in page
    assert "| loss=dpo | 3 | 0.400 ± 0.153 |" in page
    assert "| loss=grpo | 1/2 | 0.500 |" in page
    assert line in page
    assert (sweep / "sweep.png").read_bytes().startswith(b"\x89PNG")
    page = (sweep / "sweep.html").read_text(encoding="utf-8")
    assert "4 runs side by side" in page
    assert "<th>loss=grpo - loss=dpo</th>" in page
    assert 'href="smoke/1_seed=0/report.html"' in page


@pytest.mark.parametrize("name", ["sweep.md", "sweep.png", "sweep.html"])
def test_a_file_of_ones_own_of_that_name_is_refused_and_stays(sweep, name):
    (sweep / name).write_text("# Thesis\n")
    with pytest.raises(DiskError, match=rf"{name} can't be written .*move away what is in its way"):
        report.run(report.ReportConfig(sweep=str(sweep)))
    assert [path.read_text() for path in sweep.glob("sweep.*")] == ["# Thesis\n"]


def test_a_sweeps_own_files_are_written_anew_those_of_an_earlier_pujax_too(sweep):
    report.run(report.ReportConfig(sweep=str(sweep)))
    picture = (sweep / "sweep.png").read_bytes()
    assert b"pujax" in picture[:100]
    (sweep / "sweep.png").write_bytes(picture.replace(b"Software\0pujax", b"Software\0Matplotlib"))
    report.run(report.ReportConfig(sweep=str(sweep)))
    assert (sweep / "sweep.png").read_bytes() == picture


def test_of_one_setting_and_seed_the_newest_counts_that_is_finished(sweep):
    done(sweep / "smoke" / "3_seed=1", 0.5, seed=1, loss="grpo", log={"to": []})
    begun(sweep / "smoke" / "4_seed=1", seed=1, loss="grpo")
    done(sweep / "smoke" / "5_seed=0", 0.9, seed=0, loss="grpo")
    found = gather(sweep)
    assert not found.unfinished
    assert found.rows[1].mean("rouge_l") == (pytest.approx(0.7), pytest.approx(0.2))
    assert found.notes == ("3 other runs of the same settings and seed left out.",)


def test_runs_that_no_sweep_made_are_named_by_what_differs(tmp_path):
    for at, steps in enumerate((1, 2)):
        sft = {"steps": steps, "batch": 8}
        done(tmp_path / str(at), 0.5, seed=0, swept=False, sft=sft, run={"name": f"run{at}"})
    assert [row.name for row in gather(tmp_path).rows] == ["sft.steps=1", "sft.steps=2"]
    done(tmp_path / "2", 0.5, seed=0, sft={"steps": 3, "batch": 8})
    done(tmp_path / "3", 0.5, seed=0, sft={"steps": 4, "batch": 8})
    names = [row.name for row in gather(tmp_path).rows[2:]]
    assert names == ["loss=dpo sft.steps=3", "loss=dpo sft.steps=4"]


def test_a_run_from_before_a_setting_had_its_default(tmp_path):
    usual = default_of("align.inner_epochs")
    for seed, align in enumerate(
        ({"steps": 9}, {"steps": 9, "inner_epochs": usual}, {"inner_epochs": 2})
    ):
        done(tmp_path / str(seed), 0.5, seed=seed, swept=False, align=align)
    assert usual == 1
    rows = gather(tmp_path, default_of).rows
    assert [(row.name, row.seeds) for row in rows] == [
        ("align.inner_epochs=1 align.steps=9", 2),
        (f"align.inner_epochs=2 align.steps={default_of('align.steps')}", 1),
    ]
    assert default_of("align.nothing") is None
    assert default_of("align.steps.more") is None


def test_what_was_swept_parts_rows_even_where_it_touches_no_number(tmp_path):
    for size in (1, 4):
        directory = done(tmp_path / str(size), 0.5, seed=0, mesh={"fsdp": size})
        (directory / "swept.json").write_text(json.dumps({"mesh.fsdp": str(size)}))
    assert [row.name for row in gather(tmp_path).rows] == ["mesh.fsdp=1", "mesh.fsdp=4"]


def test_runs_on_other_prompts_are_not_passed_off_as_comparable(sweep):
    other = done(sweep / "smoke" / "3_seed=2", 0.5, seed=2, loss="grpo")
    save(evaluation(0.5, anchor="b"), other)
    assert any("same held-out prompts" in note for note in gather(sweep).notes)
    report.run(report.ReportConfig(sweep=str(sweep)))
    assert not (sweep / "sweep.html").exists()


def test_what_can_not_be_read_is_unfinished_and_costs_no_other_run(sweep):
    (sweep / "smoke" / "1_seed=0" / "eval-aligned.jsonl").write_text("{}\n")
    (sweep / "smoke" / "1_seed=1" / "config.yaml").write_text("[")
    found = gather(sweep)
    assert [len(row.runs) for row in found.rows] == [1, 1]
    assert [job.directory.name for job in found.unfinished] == ["1_seed=0", "1_seed=1", "2_seed=1"]
    assert "not a row of an evaluation" in found.unfinished[0].state
    assert "config.yaml: not settings" in found.unfinished[1].state


def test_a_dollar_and_half_a_character_in_what_was_swept_are_drawn(tmp_path):
    rows = gather(done(tmp_path / "0", 0.5, seed=0, loss="$\\frac{$\ud800")).rows
    assert _drawn(rows).startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["[]", "{", "[" * 5000])
def test_what_no_sweep_gave_a_run_costs_no_other_run(tmp_path, content):
    for seed in (0, 1):
        done(tmp_path / str(seed), 0.5, seed=seed)
    (tmp_path / "0" / "swept.json").write_text(content)
    found = gather(tmp_path)
    assert [len(row.runs) for row in found.rows] == [1]
    assert "swept.json: not what a sweep gave a run" in found.unfinished[0].state


def test_a_folder_without_runs_and_two_questions_at_once_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match="no runs below it"):
        gather(tmp_path)
    with pytest.raises(ConfigError, match="or sweep=DIRECTORY"):
        report.ReportConfig(run="a", sweep="b")
    with pytest.raises(ConfigError, match="set run=DIRECTORY"):
        report.ReportConfig()
