"""What a finished run left behind, and in which forms it can be had."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pujax.errors import ConfigError, WeightsError
from pujax.files.settings import SETTINGS, kept_settings


@dataclass(frozen=True)
class Finished:
    """A run that has come to its end: the model that it made, and the settings that it had."""

    model: Path
    settings: dict[str, Any]

    @property
    def system(self) -> str | None:
        """The system message that it was trained with; None is the chat template's own."""
        data = self.settings.get("data")
        return data.get("system") if isinstance(data, dict) else None


def finished_run(directory: Path) -> Finished:
    """The run in `directory`, or of a folder of runs the newest that is finished.

    Raises `WeightsError` when there is none, or the run has not come to its end, and `ConfigError`
    for settings that can't be read.
    """
    if _is_run(directory):
        return _finished(directory)
    runs = [path for path in sorted(directory.glob("*")) if _is_run(path)]
    if not runs:
        raise WeightsError(f"run={directory}: no run there: give the directory that it is kept in")
    ended = [path for path in runs if _has_ended(path)]
    if not ended:
        return _finished(runs[-1])  # which says what it lacks
    return _finished(ended[-1])  # they are named by the time


def newest_run(directory: Path) -> Path:
    """`directory`, or where that is a folder of runs its newest one that is finished."""
    if _is_run(directory) or any(directory.glob("eval-*.jsonl")):
        return directory
    ended = (path for path in directory.glob("*") if _is_run(path) and _has_ended(path))
    return max(ended, default=directory)


def model_path(path: str) -> str:
    """Where the model lies that `path` means: a finished run's, or the model at the path itself.

    Raises `WeightsError` for a run that has not come to its end.
    """
    directory = Path(path).expanduser()
    return str(_finished(directory).model) if _is_run(directory) else path


def source_of(run: str | None, model: str | None) -> tuple[str, str | None]:
    """Where the model of a `run` lies, or the one at `model`; and the system message of a run.

    Raises as `finished_run` does.
    """
    if run is None:
        return str(model), None
    finished = finished_run(Path(run).expanduser())
    return str(finished.model), finished.system


def _is_run(directory: Path) -> bool:
    # A model's directory may have a file of that name too.
    return (directory / SETTINGS).is_file() and not (directory / "config.json").is_file()


def _has_ended(directory: Path) -> bool:
    return (directory / "export" / "config.json").is_file()


def _finished(directory: Path) -> Finished:
    if not _has_ended(directory):
        raise WeightsError(
            f"{directory}: this run has not ended: it has not come to its end with a whole export/ "
            "in it; start the command that made it again, and it goes on"
        )
    return Finished(directory / "export", _settings(directory))


def _settings(directory: Path) -> dict[str, Any]:
    """The settings of a run, of the right form as far as a model made of it depends on them."""
    settings, path = kept_settings(directory), directory / SETTINGS
    for key in ("data", "model"):
        if not isinstance(settings.get(key, {}), dict):
            raise ConfigError(f"{path}: {key}={settings[key]!r} holds no settings: restore it")
    system = settings.get("data", {}).get("system")
    if not isinstance(system, str | None):
        raise ConfigError(f"{path}: data.system={system!r} is no text: restore it")
    return settings


def export(
    *,
    out: Path,
    run: Path | None = None,
    model: str | None = None,
    format: str = "hf",
    kind: str = "F16",
    dtype: str = "float32",
    say: Callable[[str], None] = print,
) -> Path:
    """Export a `run`'s model or the one at `model`; the directory or file that was written.

    `say` is told what the form itself can't hold. Raises `ConfigError`, and with it `WeightsError`
    and `ChatError`, for what can't be exported, and `DiskError`.
    """
    from pujax.files import weights
    from pujax.files.chat import Chat
    from pujax.files.export import (
        copy_adapter,
        export_gguf,
        export_hf,
        refuse_foreign_directory,
        refuse_foreign_file,
    )

    _refuse_run(out)
    if format == "gguf" and out.suffix != ".gguf":
        if out.is_file():
            raise ConfigError(f"out={out}: is a file: choose a name that ends in .gguf")
        out = out / f"model-{kind}.gguf"
    source, card, system = str(model), {"student": str(model)}, None
    if run is not None:
        finished = finished_run(run)
        source, card, system = str(finished.model), finished.settings, finished.system
    if format == "peft":
        copy_adapter(Path(source), out)
        return out
    # The exports ask this too; here it is asked before gigabytes are read.
    refuse_foreign_file(out) if format == "gguf" else refuse_foreign_directory(out)
    config, params = weights.load(source)
    chat = Chat.load(source)
    if format == "gguf":
        export_gguf(config, params, chat, out, kind=kind)
        if system is not None:
            say(f"trained with the system message {system!r}: give it in each conversation")
        return out
    export_hf(config, params, chat, out, card, dtype=dtype)
    return out


def _refuse_run(out: Path) -> None:
    """Raise `ConfigError` where `out` is a run's directory or lies in one: its files are results.

    A run's own end writes its export/ without asking here.
    """
    place = out.resolve()
    for directory in (place, *place.parents):
        begun = (directory / "metrics.jsonl").exists() or (directory / "done").exists()
        if begun and (directory / SETTINGS).exists():
            raise ConfigError(
                f"out={out}: lies in the directory of a run, {directory}, whose files are its "
                "results: choose a place outside of it"
            )
