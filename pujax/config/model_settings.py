"""Settings of the student: where it is or what shape it has, what it computes in, its adapters."""

import math
import re
from dataclasses import dataclass, field

from omegaconf import MISSING

from pujax.errors import require


@dataclass(frozen=True)
class ShapeConfig:
    """The shape of a random student, for tests and dry runs.

    Attributes:
        layers: decoder layers; 0 is none: the student is what `path` has.
        width: of the residual stream, a multiple of `heads`.
        heads: query heads, a multiple of `kv_heads`.
        kv_heads: key and value heads.
        mlp_width: hidden width of the feed-forward layers.
    """

    layers: int = 0
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 128

    def __post_init__(self) -> None:
        require(self.layers >= 0, "model.shape.layers", self.layers, "must be 0 (none) or positive")
        for key in ("width", "heads", "kv_heads", "mlp_width"):
            require(getattr(self, key) > 0, f"model.shape.{key}", getattr(self, key), "be positive")
        require(
            self.width % self.heads == 0,
            "model.shape.width",
            self.width,
            f"must be a multiple of model.shape.heads={self.heads}",
        )
        require(
            self.heads % self.kv_heads == 0,
            "model.shape.heads",
            self.heads,
            f"must be a multiple of model.shape.kv_heads={self.kv_heads}",
        )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021): scale alpha / rank.

    Attributes:
        rank: of the adapters; 0 is none: every parameter is trained.
        alpha: the adapters' scale times their rank.
        targets: which kernels get one, a regular expression of their names.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: str = "q|k|v|o|gate|up|down"

    def __post_init__(self) -> None:
        require(self.rank >= 0, "model.lora.rank", self.rank, "must be 0 (off) or positive")
        require(
            0 < self.alpha < math.inf, "model.lora.alpha", self.alpha, "must be positive and finite"
        )
        try:
            re.compile(self.targets)
        except re.error as error:
            require(False, "model.lora.targets", self.targets, f"no regular expression: {error}")


@dataclass(frozen=True)
class ModelConfig:
    """The student. With a `shape` of some layers its weights are random, its tokenizer `path`'s.

    Attributes:
        path: a hub id, a Hugging Face directory, a GGUF file, or package://NAME/FILE.
        dtype: what matrices multiply in: float32, bfloat16, or auto (float32 on a CPU, bfloat16
            elsewhere). On a CPU sums, and all that isn't a product, stay float32.
        remat: what the backward pass computes again: none, full (all), or dots (all but matrix
            products and attention).
        shape: of a random student.
        lora: low-rank adapters.
    """

    path: str = MISSING
    dtype: str = "auto"
    remat: str = "dots"
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        require(
            self.dtype in ("auto", "float32", "bfloat16"),
            "model.dtype",
            self.dtype,
            "choose auto, float32 or bfloat16",
        )
        require(
            self.remat in ("none", "dots", "full"),
            "model.remat",
            self.remat,
            "choose none, dots or full",
        )
