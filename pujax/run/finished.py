"""What a finished run left behind, and in which forms it can be had."""

import shutil
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from pujax.errors import WeightsError
from pujax.files import weights
from pujax.files.chat import Chat
from pujax.files.export import ADAPTER, export_gguf, export_hf
from pujax.run.settings import ExportConfig


def export(settings: ExportConfig) -> Path:
    """Export as `settings` say; the directory or file that was written.

    Raises `ConfigError`, and with it `WeightsError` and `ChatError`, for what can't be exported.
    """
    out = Path(settings.out).expanduser()
    source, card = str(settings.model), {"student": str(settings.model)}
    if settings.run is not None:
        source, card = finished_run(Path(settings.run).expanduser())
    if settings.format == "peft":
        adapter = Path(source) / ADAPTER
        if not adapter.is_dir():
            raise WeightsError(
                f"{source}: no adapter in it, the run trained the whole model (model.lora.rank=0): "
                "choose format=hf or format=gguf"
            )
        shutil.copytree(adapter, out, dirs_exist_ok=True)
        return out
    config, params = weights.load(source)
    chat = Chat.load(source)
    if settings.format == "gguf":
        out = out if out.suffix == ".gguf" else out / f"model-{settings.kind}.gguf"
        export_gguf(config, params, chat, out, kind=settings.kind)
        return out
    export_hf(config, params, chat, out, card, dtype=settings.dtype)
    return out


def finished_run(directory: Path) -> tuple[str, dict[str, Any]]:
    """Where the model lies that a run ended with, and the settings for its card.

    Raises `WeightsError` when the run has not come to its end.
    """
    exported, settings = directory / "export", directory / "config.yaml"
    if not (exported / "config.json").is_file():
        raise WeightsError(
            f"{directory}: no whole export/ in it: the run has not come to its end; start the "
            "command that made it again, and it goes on"
        )
    card: dict[str, Any] = {"run": str(directory)}
    if settings.is_file():
        card |= cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(settings)))
    return str(exported), card
