"""The last words of a run, and what it takes of the disk."""

from shlex import split

from pujax.run.ending import amount, ending, size_of


def finished(directory):
    for name, size in (("checkpoints/9/state", 3 << 20), ("reference/x", 2 << 20), ("done", 0)):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    return directory


def test_a_run_says_what_it_takes_and_what_of_that_is_needed_no_more(tmp_path):
    run = finished(tmp_path)
    assert ending(run, clean=False).splitlines() == [
        f"run: {run}",
        f"report: {run}/report.html",
        f"model: {run}/export",
        f"disk: 5 MiB, 3 MiB of it {run}/checkpoints, which is needed no more: remove it, or set "
        "checkpoint.clean=true",
        f"next: pujax chat run={run}, or serve, export, evaluate",
    ]
    assert size_of(run) == 5 << 20
    last = ending(tmp_path / "müller's run", clean=False).splitlines()[-1]
    assert split(last)[:4] == ["next:", "pujax", "chat", f"run={tmp_path}/müller's run,"]


def test_a_run_that_cleans_up_keeps_its_reference(tmp_path):
    run = finished(tmp_path)
    (run / "damaged" / "8").mkdir(parents=True)
    (run / "damaged" / "8" / "state").write_bytes(bytes(1 << 20))
    assert f"1 MiB of it {run}/damaged, which is needed no more" in ending(run, clean=False)
    assert "disk: 2 MiB\n" in ending(run, clean=True)
    assert not (run / "checkpoints").exists()
    assert not (run / "damaged").exists()
    assert size_of(run / "reference") == 2 << 20
    assert amount(3 << 29) == "1.5 GiB"


def test_a_model_that_is_no_success_is_read_before_it_is_used(tmp_path):
    (*_, last) = ending(tmp_path, clean=False, success=False).splitlines()
    assert last == (
        f"next: pujax chat run={tmp_path}, or the report, to see why: not yet serve or export"
    )
