"""`pujax export`: a run or a model as a Hugging Face directory, GGUF or PEFT adapter."""

import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from pujax.errors import require
from pujax.run.commands import command


@dataclass(frozen=True)
class ExportConfig:
    """Everything `python -m pujax.export` is told: a `run`'s directory or a `model`'s path.

    `format` is hf (a directory for transformers and vLLM), gguf (a file for llama.cpp, its matrices
    in `kind`) or peft (the adapter of a LoRA run). `dtype` is what hf's tensors are stored in.
    """

    run: str | None = None
    model: str | None = None
    out: str = MISSING
    format: str = "hf"
    kind: str = "F16"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require(
            (self.run is None) != (self.model is None),
            "run",
            self.run,
            "set either run=DIRECTORY or model=PATH",
        )
        for key, choices in (
            ("format", ("hf", "gguf", "peft")),
            ("kind", ("F16", "Q8_0")),
            ("dtype", ("float32", "bfloat16", "float16")),
        ):
            value = getattr(self, key)
            require(value in choices, key, value, f"choose {', '.join(choices)}")
        require(
            self.format != "peft" or self.run is not None,
            "format",
            self.format,
            "an adapter is a LoRA run's: set run=DIRECTORY",
        )


def run(settings: ExportConfig) -> None:
    """Export as told, and print where to."""
    from pujax.run.finished import export

    print(
        export(
            out=Path(settings.out).expanduser(),
            run=None if settings.run is None else Path(settings.run).expanduser(),
            model=settings.model,
            format=settings.format,
            kind=settings.kind,
            dtype=settings.dtype,
            say=lambda text: print(f"pujax.export: {text}", file=sys.stderr),
        )
    )


# In a folder of its own, where `model` is a key and not the group of conf/model/.
main = command("export", ExportConfig, run, folder="tools")

if __name__ == "__main__":
    main()
