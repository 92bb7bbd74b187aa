"""What a finished run left behind, and in which forms it can be had."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pujax.config.commands import listed
from pujax.errors import ConfigError, EvaluationError, WeightsError, one_of, require
from pujax.files.locate import at_home, here
from pujax.files.settings import SETTINGS, kept_settings
from pujax.files.weight_files import require_model_files
from pujax.run.compilation import compile_once


@dataclass(frozen=True)
class Finished:
    """A run that has come to its end: the model that it made, and the settings that it had."""

    model: Path
    settings: dict[str, Any]

    @property
    def system(self) -> str | None:
        """The system message that it was trained with; None is the chat template's own."""
        return self._section("data").get("system")

    def card(self) -> dict[str, Any]:
        """What the model card of an export tells: the settings, and what the run's own card has."""
        from pujax.run.provenance import carded_licence, teachers_in

        table = self.model.parent / "table.md"
        named = self._section("teacher").get("model")
        store = Path(str(self._section("data").get("anchors", "")))
        return self.settings | {
            "results": table.read_text(encoding="utf-8").strip() if table.is_file() else "",
            "answers_by": [named] if named else teachers_in(store),
            "licence": carded_licence(self.model / "README.md"),
        }

    def _section(self, name: str) -> dict[str, Any]:
        section = self.settings.get(name)
        return section if isinstance(section, dict) else {}


_GO_ON = "start the command that made it again, and it goes on"

KINDS = ("F16", "Q8_0", "Q4_1", "Q4_0")
"""How a GGUF file can store matrices: what there is a quantiser for."""


def require_kind(kind: str) -> None:
    """Raise `ConfigError` for a kind that is not written, with the way to it where it has one."""
    if kind not in KINDS and re.fullmatch(r"(I?Q|TQ)\d\w*", kind):
        raise ConfigError(
            f"kind={kind!r}: choose {', '.join(KINDS)}, or let llama.cpp make it: export kind=F16, "
            f"then llama-quantize model-F16.gguf model-{kind}.gguf {kind}"
        )
    one_of("kind", kind, KINDS)


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


def newest_runs(runs: Sequence[str]) -> list[Path]:
    """Each directory, or where that is a folder of runs its newest one that is finished.

    Raises `ConfigError` for what looks like several in one text, and is none, and for a run that is
    named twice, which would count as two seeds; and `WeightsError` for what is nowhere and a folder
    of runs of which none is finished: each of these may be given by itself.
    """
    for run in runs:
        one = "," not in run or at_home(run).exists()
        require(one, "run", run, "nothing there: several runs are a list, run=[A,B]")
    found = [_newest_run(at_home(run)) for run in runs]
    resolved = [directory.resolve() for directory in found]
    twice = [str(one) for at, one in enumerate(found) if resolved[at] in resolved[:at]]
    require(not twice, "run", list(runs), f"name each run once: {', '.join(twice)} is there twice")
    return found


def _newest_run(directory: Path) -> Path:
    if _is_run(directory) or any(directory.glob("eval-*.jsonl")):
        return directory
    runs = [path for path in sorted(directory.glob("*")) if _is_run(path)]
    ended = [path for path in runs if _has_ended(path)]
    if not directory.exists():
        raise WeightsError(f"run={directory}: no run there: give the directory that it is kept in")
    if runs and not ended:
        raise WeightsError(
            f"run={directory}: no run in it has ended: give {runs[-1]} for what it has so "
            f"far, or {_GO_ON}"
        )
    return max(ended, default=directory)


def model_path(path: str) -> str:
    """Where the model lies that `path` means: a finished run's, or the model at the path itself.

    Of a folder of runs it is the newest finished one's. Raises `WeightsError` for one that has not
    come to its end.
    """
    directory = at_home(path)
    return str(finished_run(directory).model) if _has_run(directory) else path


def refuse_name(directory: Path, path: str, name: str) -> None:
    """Raise `EvaluationError` where the model at `path` can't be called that beside a run's own.

    Going on, the run would take another's evaluation for its own.
    """
    from pujax.evaluation.results import OWN  # numpy with it

    if not re.fullmatch(r"[\w.-]+", name) or (directory / f"eval-{name}.jsonl").exists():
        raise EvaluationError(
            f"name={name!r}: the run has it, or it can't name a file: choose another"
        )
    own = name == "aligned" and Path(model_path(path)).resolve() == (directory / "export").resolve()
    if name.lower() in OWN and not own:
        raise EvaluationError(
            f"name={name!r}: what a run calls its own models, which {path} is not: choose another"
        )


def source_of(run: str | None, model: str | None) -> tuple[str, str | None]:
    """Where the model of a `run` lies, or the one at `model`; and the system message of a run.

    Raises as `finished_run` does, and `WeightsError` for a model that is not there.
    """
    if run is None:
        require_model(str(model))
        return str(model), None
    finished = finished_run(at_home(run))
    return str(finished.model), finished.system


def require_model(path: str) -> None:
    """Raise `WeightsError` where nothing lies at `path`, or what is no model."""
    local = here(path)
    if local is not None and _has_run(local):
        raise WeightsError(f"model={path}: a run, or a folder of runs: give it as run={path}")
    require_model_files(path)


def users_of(soft_prompt: Any) -> dict[str, str]:
    """The files that a setting `soft_prompt` names, one or a list, by what each user is called.

    That is the file's name without its end. Raises `ConfigError` for a name that is no word, and
    for two that are the same.
    """
    users: dict[str, str] = {}
    for path in listed("soft_prompt", soft_prompt):
        name = at_home(path).stem
        word = re.fullmatch(r"[\w.-]+", name) is not None
        require(word, "soft_prompt", path, "its user is called by the file's name: take one word")
        require(name not in users, "soft_prompt", path, f"another is called {name} too: rename one")
        users[name] = path
    return users


def _is_run(directory: Path) -> bool:
    # A model's directory may have a file of that name too.
    return (directory / SETTINGS).is_file() and not (directory / "config.json").is_file()


def _has_run(directory: Path) -> bool:
    """Whether it is a run, or a folder of runs and no model."""
    if (directory / "config.json").is_file():
        return False
    return _is_run(directory) or any(map(_is_run, directory.glob("*")))


def _has_ended(directory: Path) -> bool:
    return (directory / "export" / "config.json").is_file()


def _finished(directory: Path) -> Finished:
    if not _has_ended(directory):
        raise WeightsError(
            f"{directory}: this run has not ended: it has not come to its end with a whole export/ "
            f"in it; {_GO_ON}"
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
    push: str | None = None,
    users: Mapping[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Export a `run`'s model or the one at `model`; the directory or file that was written.

    A GGUF file gets a Modelfile for Ollama and its model card beside it. What was written goes to
    the hub too where `push` names a model there. `users` are soft prompts that go into the model
    (see `led_model`). `say` is told what the form itself can't hold.
    Raises `ConfigError`, and with it `WeightsError` and `ChatError`, for what can't be exported,
    and `DiskError`.
    """
    # What needs no more than these is refused before jax is imported.
    from pujax.files.hub import require_hub

    out = place_of(out, format, kind)
    if push is not None:
        require_hub(push)
    finished = None if run is None else finished_run(run)
    source = str(model if finished is None else finished.model)
    if finished is None:
        require_model(source)

    compile_once()
    from pujax.files import weights
    from pujax.files.card import model_card
    from pujax.files.chat import Chat
    from pujax.files.durable import write_whole
    from pujax.files.export import copy_adapter, export_gguf, export_hf
    from pujax.files.led import led_model, load_users
    from pujax.files.ollama import modelfile
    from pujax.run.provenance import licence_of

    system = None
    card: dict[str, Any] = {"student": source}
    if finished is not None:
        card, system = finished.card(), finished.system
    else:
        card["licence"] = licence_of(source)
    card["soft_prompts"] = sorted(users or ())
    if format == "peft":
        copy_adapter(Path(source), out)
        return _pushed(push, out, say)
    vectors = load_users(users, weights.read_config(source), source) if users else {}
    config, params = weights.load(source)
    chat = Chat.load(source)
    if vectors:
        config, params, chat = led_model(config, params, chat, vectors)
    if format == "gguf":
        beside, told = out.with_suffix(".Modelfile"), out.with_suffix(".md")
        export_gguf(config, params, chat, out, kind=kind)
        write_whole(beside, modelfile(chat, out.name, system).encode())
        write_whole(told, model_card(config, card, library="gguf").encode())
        if system is not None:
            say(f"trained with the system message {system!r}: give it in each conversation")
        return _pushed(push, out, say, {"Modelfile": beside, "README.md": told})
    export_hf(config, params, chat, out, card, dtype=dtype)
    return _pushed(push, out, say)


def place_of(out: Path, format: str, kind: str) -> Path:
    """The directory or file that an export to `out` writes, once it is known that it may.

    Raises `ConfigError` and `DiskError` where it may not: writing asks too, but gigabytes later.
    """
    from pujax.files.card import refuse_foreign_card
    from pujax.files.durable import refuse_unwritable
    from pujax.files.exported import refuse_foreign_directory, refuse_foreign_file
    from pujax.files.ollama import refuse_foreign_modelfile

    refuse_run(out)
    if format != "gguf":
        last = "adapter_config.json" if format == "peft" else "config.json"
        refuse_foreign_directory(out, last)
        refuse_unwritable(out)
        return out
    if out.suffix != ".gguf":
        if out.is_file():
            raise ConfigError(f"out={out}: is a file: choose a name that ends in .gguf")
        out = out / f"model-{kind}.gguf"
    refuse_foreign_file(out)
    refuse_foreign_modelfile(out.with_suffix(".Modelfile"))
    refuse_foreign_card(out.with_suffix(".md"))
    refuse_unwritable(out.parent)
    return out


def _pushed(
    name: str | None,
    out: Path,
    say: Callable[[str], None],
    beside: Mapping[str, Path] | None = None,
) -> Path:
    """`out`, which is on the hub if there is a `name`: what the export wrote, and `beside`."""
    from pujax.files.exported import recorded
    from pujax.files.hub import push

    if name is not None:
        ours = recorded(out) if out.is_dir() else {}
        files = {file: out / file for file in sorted(ours or ())} or {out.name: out}
        say(f"pushed to {push(name, {**files, **(beside or {})})}")
    return out


def refuse_run(out: Path) -> None:
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
