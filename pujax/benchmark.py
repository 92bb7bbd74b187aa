"""`pujax benchmark`: what a training step costs here, as a table and a line of JSON."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pujax.config.commands import command
from pujax.config.functions import build_loss, foresee
from pujax.config.tool_settings import BenchmarkConfig, WorkConfig
from pujax.evaluation.waiting import waited
from pujax.files.durable import refuse_unwritable, sweep_files
from pujax.files.weight_files import require_model_files


def run(settings: BenchmarkConfig) -> None:
    """Measure or plan, show a table, and print one JSON object as the last line."""
    # Refused before jax is imported.
    foresee(settings.labels, "labels", settings.trusted)
    foresee(settings.scorer.score, "scorer.score", settings.trusted)
    build_loss(settings.loss, settings.trusted, make=foresee)
    if not settings.benchmark.sweep:  # whose place is looked at first
        require_model_files(settings.model.path)
    if settings.plan:
        planned(settings)
        return
    if settings.benchmark.sweep:
        refuse_unwritable(Path(settings.benchmark.out))
    from pujax.run.benchmarks import HEAD, described, sweep, table, write_sweep

    if settings.benchmark.sweep:
        sweep_files(Path(settings.benchmark.out), HEAD)
        require_model_files(settings.model.path)
    from pujax.run.measure import Benchmark, Cost

    benchmark = Benchmark(settings)

    def measure(shape: WorkConfig) -> Cost:
        with waited("compiling and measuring", say):
            return benchmark.measure(shape)

    console = Console(stderr=False)
    cost = measure(settings.benchmark)
    console.print(table(cost))
    line: dict[str, Any] = described(settings) | asdict(cost)
    if settings.benchmark.sweep:
        line["sweep"], written = [asdict(cost)], list[Path]()
        for key, value, cost in sweep(measure, settings.benchmark):
            console.print(f"{key}={value}: step {cost.step_s:.2f} s")
            line["sweep"].append(asdict(cost))
            # After each, so that a sweep that is cut off leaves what it measured.
            written = write_sweep(line["sweep"], Path(settings.benchmark.out))
        for path in written:
            console.print(path, markup=False)
    print(json.dumps(line))


def say(line: str) -> None:
    """Tell who waits, and not what reads the table."""
    print(f"pujax.benchmark: {line}", file=sys.stderr, flush=True)


def planned(settings: BenchmarkConfig) -> None:
    """Show what a step would take, for each chip whether it fits and how fast it could be."""
    from pujax.run.benchmarks import described, plan_table, verdicts
    from pujax.run.plan import CHIPS, have_devices, plan_step

    have_devices(settings.mesh)
    with waited("compiling the step", say):
        plan = plan_step(settings)
    console = Console(stderr=False)
    console.print(plan_table(plan, settings))
    for said in verdicts(plan):
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    chips = {
        name: {"fits": plan.fits(chip), "step_s": plan.seconds(chip)}
        for name, chip in CHIPS.items()
    }
    line = described(settings) | asdict(plan) | asdict(settings.benchmark) | {"chips": chips}
    print(json.dumps(line))


main = command("benchmark", BenchmarkConfig, run)

if __name__ == "__main__":
    main()
