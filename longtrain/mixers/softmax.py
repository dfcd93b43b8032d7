"""Softmax attention with grouped queries (Ainslie et al. 2023) and rotary positions.

Positions count from the start of each document, so packing changes nothing inside a document.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field
from torch import Tensor, nn

from longtrain.core.contracts import Sequence, SequenceMixer
from longtrain.mixers._config import Positive
from longtrain.mixers._rotary import rotate


@dataclass(frozen=True)
class Config:
    """`conf/mixer/softmax.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    num_heads: Positive
    num_key_value_heads: Positive
    """Divides `num_heads`."""
    head_dim: Positive
    """Even, for the rotation."""
    rope_theta: Annotated[float, Field(gt=1)]

    def __post_init__(self) -> None:
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of {self.num_key_value_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions need pairs")


class Mixer(SequenceMixer):
    """[B, L, D] -> [B, L, D]."""

    window: int | None = None
    keeps_prefix = True

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.sizes = [n * config.head_dim for n in (config.num_heads, *[config.num_key_value_heads] * 2)]
        self.input = nn.Linear(width, sum(self.sizes), bias=False)
        self.output = nn.Linear(self.sizes[0], width, bias=False)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Attend over the whole sequence."""
        parts = self.input(x).split(self.sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, self.config.head_dim)) for part in parts)
        q, k = (rotate(part, sequence.positions, self.config.rope_theta) for part in (q, k))
        return self.output(sequence.attend(q, k, v, window=self.window).flatten(2))

    def flops_per_token(self, context: float) -> float:
        """See `SequenceMixer`: scores and weighted values."""
        return 4 * self.config.num_heads * self.config.head_dim * context
