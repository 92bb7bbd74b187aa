"""`pujax export`: a run or a model as a Hugging Face directory, GGUF or PEFT adapter."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from pujax.config.commands import command, one_source
from pujax.errors import one_of, require
from pujax.files.locate import at_home, soft_prompt_file
from pujax.inference.finished import export, require_kind, users_of

FILES = {".gguf": "GGUF", ".safetensors": "safetensors"}
"""What a name that ends so is taken for."""


@dataclass(frozen=True)
class ExportConfig:
    """Everything `python -m pujax.export` is told: a `run` or a `model`, and where it goes.

    Attributes:
        run: a run's directory, or a folder of runs: its newest finished one; or
        model: a hub id, a Hugging Face directory, a GGUF file, package://NAME/FILE.
        soft_prompt: a file of `pujax adapt`, which then leads each conversation, or a list of them,
            of which each is chosen by name.
        out: a new or empty directory, or an earlier export's; for gguf a file's name.
        format: hf (a directory, for transformers and vLLM), gguf (a file, for llama.cpp) or peft
            (the adapter of a LoRA run).
        kind: how gguf stores matrices: F16, Q8_0, Q4_1 or Q4_0.
        dtype: how hf stores tensors: float32, bfloat16 or float16.
        push: a model on the hub, OWNER/NAME, that gets it too; a new one is private.
        compare: held-out prompts of the run whose greedy answers are made anew, to say how many are
            the same; 0 makes none. With a soft prompt none are: the run answered without.
    """

    run: str | None = None
    model: str | None = None
    soft_prompt: Any = None
    out: str = MISSING
    format: str = "hf"
    kind: str = "F16"
    dtype: str = "float32"
    push: str | None = None
    compare: int = 32

    def __post_init__(self) -> None:
        one_source(self.run, self.model)
        require(self.out.strip() != "", "out", self.out, "name a directory, or a GGUF file")
        one_of("format", self.format, ("hf", "gguf", "peft"))
        suffix = Path(self.out).suffix
        if self.format == "gguf":
            small = suffix == ".gguf" or suffix.lower() not in FILES
            require(small, "out", self.out, "a GGUF file's name ends in .gguf, in small letters")
        else:
            kind = FILES.get(suffix.lower())
            remedy = f"names a {kind} file, and format={self.format} is a directory: name one"
            if kind == "GGUF":
                remedy = "names a GGUF file: choose format=gguf, or a directory"
            require(kind is None, "out", self.out, remedy)
        require_kind(self.kind)
        one_of("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        # What is left out of an export unsaid is found on the disk, or by who downloads it.
        for key, form, unset in (("kind", "gguf", "F16"), ("dtype", "hf", "float32")):
            value = getattr(self, key)
            fits = self.format == form or value == unset
            require(fits, key, value, f"is of format={form}: set that, or leave it out")
        require(self.compare >= 0, "compare", self.compare, "must not be negative")
        require(
            self.format != "peft" or self.run is not None,
            "format",
            self.format,
            "an adapter is a LoRA run's: set run=DIRECTORY",
        )
        users = users_of(self.soft_prompt)
        require(
            not users or self.format != "peft",
            "format",
            self.format,
            "holds no soft prompt: choose hf or gguf",
        )


def run(settings: ExportConfig) -> None:
    """Export as told, print where to, and say how near that is to the run."""
    place, users = at_home(settings.out), users_of(settings.soft_prompt)
    for path in users.values():  # refused before jax is imported, as what `export` looks at first
        soft_prompt_file(path)

    def say(text: str) -> None:
        print(f"pujax.export: {text}", file=sys.stderr, flush=True)

    run = None if settings.run is None else at_home(settings.run)
    out = export(
        out=place,
        run=run,
        model=settings.model,
        format=settings.format,
        kind=settings.kind,
        dtype=settings.dtype,
        push=settings.push,
        users=users,
        say=say,
    )
    print(out, flush=True)
    if run is None or not settings.compare or settings.format == "peft" or settings.soft_prompt:
        return  # an adapter alone answers nothing
    from pujax.inference.nearness import nearness

    say(nearness(run, out, settings.compare))


# In a folder of its own, where `model` is a key and not the group of conf/model/.
main = command("export", ExportConfig, run, folder="tools")

if __name__ == "__main__":
    main()
