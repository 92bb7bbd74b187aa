"""Experiment trackers, which are told what a run writes to its metrics.jsonl.

That file stays the truth: a tracker that fails is told no more, and the run goes on. None sends
anything off this machine unless its own environment variables say so.
"""

import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pujax.config.settings import TrainConfig
from pujax.errors import ConfigError
from pujax.run.processes import first

Tell = Callable[[str, int, Mapping[str, Any]], None]
"""What a run log calls with a stage's name, or eval- and a model's, a step of it, and metrics."""


@dataclass(frozen=True)
class Tracker:
    """One tracker: `log` takes metrics and the run's step, `close` ends it."""

    log: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of a run: names that stay the same when it goes on, and settings."""

    project: str
    name: str
    id: str
    directory: Path
    settings: dict[str, Any]


def require_trackers(names: list[str]) -> None:
    """Raise `ConfigError` for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"log.to={names}: {name} is not installed: pip install 'pujax[{name}]'"
            )


@contextmanager
def telling(config: TrainConfig, directory: Path, say: Callable[[str], None]) -> Iterator[Tell]:
    """What tells the trackers that `config` names, as long as each of them can be told."""
    settings = asdict(config)
    for key in (
        "teacher",
        "collect",
        "run",
        "resume",
        "log",
        "distributed",
    ):  # no business of a tracker's
        del settings[key]
    place = directory.resolve()
    run = Tracked(
        project=place.parent.name,
        name=place.name,
        id=hashlib.sha256(str(place).encode()).hexdigest()[:16],
        directory=place,
        settings=settings,
    )
    told: dict[str, Tracker] = {}
    furthest = 0

    def tried(name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # theirs may be any
            told.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            say(f"{name}: {reason}: it is told no more, {directory}/metrics.jsonl has it all")

    def begin(name: str) -> None:
        told[name] = OPENERS[name](importlib.import_module(name), run)

    def tell(place: str, step: int, metrics: Mapping[str, Any]) -> None:
        nonlocal furthest
        at = step + (config.sft.steps if place in ("align", "eval-aligned") else 0)
        # An earlier state that is handed on is told of where its stage ended: wandb drops what goes
        # back.
        at = furthest = max(at, furthest)
        prefix = "" if place.startswith("eval-") else f"{place}/"
        values = {f"{prefix}{name}": float(value) for name, value in metrics.items()}
        for name, tracker in list(told.items()):
            tried(name, lambda tracker=tracker: tracker.log(values, at))

    for name in config.log.to if first() else ():
        tried(name, lambda name=name: begin(name))
    try:
        yield tell
    finally:
        for name, tracker in list(told.items()):
            tried(name, tracker.close)


def _trackio(trackio: Any, run: Tracked) -> Tracker:
    """Trackio keeps runs on this machine; `trackio show` draws them."""
    begun = trackio.init(
        project=run.project, name=run.name, config=run.settings, resume="allow", embed=False
    )
    return Tracker(lambda metrics, step: begun.log(metrics, step=step), begun.finish)


def _wandb(wandb: Any, run: Tracked) -> Tracker:
    """Weights & Biases writes into the run's directory; `wandb sync` or WANDB_MODE=online sends."""
    os.environ.setdefault("WANDB_SILENT", "true")
    begun = wandb.init(
        project=run.project,
        name=run.name,
        id=run.id,
        resume="allow",
        config=run.settings,
        dir=str(run.directory),
        mode=os.environ.get("WANDB_MODE", "offline"),
    )
    return Tracker(lambda metrics, step: begun.log(metrics, step=step), begun.finish)


def _mlflow(mlflow: Any, run: Tracked) -> Tracker:
    """MLflow keeps runs in mlflow.db beside them, or where MLFLOW_TRACKING_URI says."""
    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{run.directory.parent / 'mlflow.db'}")
    mlflow.set_experiment(run.project)
    known = mlflow.search_runs(
        filter_string=f"tags.pujax = '{run.id}'", output_format="list", max_results=1
    )
    if known:
        mlflow.start_run(run_id=known[0].info.run_id)
    else:
        mlflow.start_run(run_name=run.name, tags={"pujax": run.id})
        mlflow.log_params(dict(_flat(run.settings)))
    return Tracker(lambda metrics, step: mlflow.log_metrics(metrics, step=step), mlflow.end_run)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)[:500]  # what MLflow takes


OPENERS: Mapping[str, Callable[[Any, Tracked], Tracker]] = {
    "trackio": _trackio,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
"""By the names of their packages and of our extras."""
