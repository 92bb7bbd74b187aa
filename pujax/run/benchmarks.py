"""What a benchmark tells: tables of costs and of plans, and a sweep's with its plot."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from pujax import __version__
from pujax.config.tool_settings import BenchmarkConfig, WorkConfig
from pujax.files.durable import on_disk, sweep_files, write_whole
from pujax.models.parameters import AXES
from pujax.run.measure import Cost
from pujax.run.plan import CHIPS, StepPlan

HEAD = "| K | P | T |"
"""What the table of a sweep begins with, by which it is known again."""

# What a sweep varies, one at a time: the number of candidates and the two lengths in tokens.
SWEPT: Mapping[str, Sequence[int]] = {
    "candidates": (2, 4, 8),
    "prompt_tokens": (64, 128, 256, 512),
    "response_tokens": (32, 64, 128),
}
ROWS = {
    "step_s": ("step", "s"),
    "generate_s": ("sampling", "s"),
    "score_s": ("reference pass and scores", "s"),
    "update_s": ("update", "s"),
    "generate_tokens_per_s": ("sampled", "tokens/s"),
    "tokens": ("prompt and response tokens", ""),
    "mfu": ("update, of the matrix-product peak", ""),
    "step_mfu": ("step, of the matrix-product peak", ""),
    "matmul_gflops_per_s": ("matrix-product peak", "GFLOP/s"),
    "peak_rss_gib": ("peak memory, process", "GiB"),
    "peak_device_gib": ("peak memory, device", "GiB"),
    "compile_cold_s": ("compilation, nothing cached", "s"),
    "compile_warm_s": ("compilation, cached", "s"),
    "load_s": ("loading the weights", "s"),
}


def plan_table(plan: StepPlan, settings: BenchmarkConfig) -> Table:
    """What one device holds, does and is told."""
    shape = settings.benchmark
    mesh = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, plan.mesh, strict=True))
    shown = Table(
        title=f"each of {plan.devices} devices ({mesh}), {plan.dtype}\n"
        f"{shape.prompts} prompts x {shape.candidates} candidates x "
        f"({shape.prompt_tokens} + {shape.response_tokens}) tokens",
        show_header=False,
    )
    shown.add_column()
    shown.add_column(justify="right")
    for title, size in (
        ("parameters", plan.parameters),
        ("reference, frozen base", plan.reference),
        ("optimizer", plan.optimizer),
        ("gradient, activations, caches at most", plan.scratch),
        ("  of that caches while sampling", plan.caches),
        ("everything at the peak", plan.peak),
        *([("this process with it", plan.here)] if plan.here else []),
    ):
        shown.add_row(title, f"{size / 2**30:.2f} GiB")
    shown.add_row("work", f"{plan.flops / 1e12:.3g} TFLOP a step")
    for kind, each in plan.collectives.items():
        shown.add_row(f"{kind}, {each.count} a step", f"{each.bytes / 2**30:.2f} GiB a step")
    return shown


def verdicts(plan: StepPlan) -> Iterator[str]:
    """For each chip whether the step fits, how fast it could be, and what to change."""
    for name, chip in CHIPS.items():
        verdict = "fits" if plan.fits(chip) else "does not fit"
        line = f"{name}: {verdict}; a step takes {plan.seconds(chip):.2g} s at the very best"
        if not plan.fits(chip):
            line += f"; {plan.remedy(chip)}"
        yield line


def described(run: BenchmarkConfig) -> dict[str, Any]:
    """What was measured and with what: the settings' names, versions and the device."""
    return {
        "model": run.model.path,
        "dtype": run.model.dtype,
        "remat": run.model.remat,
        "lora_rank": run.model.lora.rank,
        "loss": run.loss["_target_"].rpartition(".")[2],
        "scorer": run.scorer.score["_target_"].rpartition(".")[2],
        "offline": run.benchmark.offline,
        "mesh": list(vars(run.mesh).values()),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "seed": run.seed,
        "versions": {
            "pujax": __version__,  # which need not be installed
            **{name: version(name) for name in ("jax", "jaxlib", "flax")},
        },
    }


def table(cost: Cost) -> Table:
    """One measurement for a terminal."""
    shown = Table(
        title=f"{cost.prompts} prompts x {cost.candidates} candidates x "
        f"({cost.prompt_tokens} + {cost.response_tokens}) tokens",
        show_header=False,
    )
    shown.add_column()
    shown.add_column(justify="right")
    for key, (title, unit) in ROWS.items():
        value = getattr(cost, key)
        if value is not None:
            shown.add_row(title, f"{_short(value)} {unit}".strip())
    return shown


def sweep(
    measure: Callable[[WorkConfig], Cost], shape: WorkConfig
) -> Iterator[tuple[str, int, Cost]]:
    """The costs around `shape`, one of its sizes changed at a time: which, to what, the cost."""
    for key, values in SWEPT.items():
        for value in values:
            if value != getattr(shape, key):
                yield key, value, measure(replace(shape, **{key: value}))


def write_sweep(costs: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """`sweep.md` and `sweep.png` in `directory`: a table of the costs, and their curves."""
    with on_disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
    names = ("candidates", "prompt_tokens", "response_tokens")
    keys = ("step_s", "generate_s", "score_s", "update_s", "mfu", "compile_cold_s")
    rows = [
        f"{HEAD} " + " | ".join(ROWS[key][0] for key in keys) + " |",
        "|" + "---:|" * (len(names) + len(keys)),
        *("| " + " | ".join(_short(cost[key]) for key in (*names, *keys)) + " |" for cost in costs),
    ]
    text, picture = sweep_files(directory, HEAD)
    write_whole(text, ("\n".join(rows) + "\n").encode())
    write_whole(picture, _drawn(costs, names))
    return [text, picture]


def _drawn(costs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bytes:
    """A panel for each size: stacked phases over it, and the whole step as a line."""
    from matplotlib.figure import Figure

    titles = ("K, candidates a prompt", "P, prompt tokens", "T, response tokens")
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True)
    for axes, name, title in zip(panels, names, titles, strict=True):
        others = [other for other in names if other != name]
        line = sorted(
            (cost for cost in costs if all(cost[o] == costs[0][o] for o in others)),
            key=lambda cost: cost[name],
        )
        sizes = [cost[name] for cost in line]
        phases = {
            ROWS[key][0]: [cost[key] or 0.0 for cost in line]
            for key in ("generate_s", "score_s", "update_s")
        }
        axes.stackplot(sizes, *phases.values(), labels=list(phases), alpha=0.7)
        axes.plot(sizes, [cost["step_s"] for cost in line], "k.-", label="whole step")
        axes.set_xlabel(title)
        axes.set_xticks(sizes)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("seconds a step")
    panels[0].set_ylim(bottom=0)  # of all three, and last: it ends the search for an upper limit
    panels[0].legend(loc="upper left", fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": "pujax"})
    return picture.getvalue()


def _short(value: float | int | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3g}"
