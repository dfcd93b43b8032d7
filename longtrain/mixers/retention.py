"""Multi-scale retention (Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large Language Models").

S_t = g_h S_{t-1} + k_t v_t^T, o_t = K^-1/2 S_t^T q_t with g_h = 1 - 2^(-5-h) of head h = 0, 1, ... and rotated queries
and keys (equations 5 and 8); then a norm per head and a swish gate (equation 8; RMSNorm, as in the authors' code).
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from longtrain.core.contracts import Sequence, SequenceMixer
from longtrain.mixers._config import HeadsConfig
from longtrain.mixers._decay import head_index
from longtrain.mixers._projection import GatedOutput, Projection
from longtrain.mixers._rotary import rotate
from longtrain_kernels.diagonal_scan import DiagonalScan


@dataclass(frozen=True)
class Config(HeadsConfig):
    """`conf/mixer/retention.yaml`; the authors' value heads are twice as wide as their key heads."""

    rope_theta: Annotated[float, Field(gt=1)]

    def __post_init__(self) -> None:
        if self.key_dim % 2:
            raise ValueError(f"key_dim={self.key_dim} is odd; rotary positions need pairs, use {self.key_dim + 1}")


class Mixer(SequenceMixer):
    """[B, L, D] -> [B, L, D]."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.qkv = Projection(config, width)
        self.out = GatedOutput(width, config.channels, config.value_dim)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Scan over the whole sequence."""
        q, k, v = self.qkv(x, sequence)
        q, k = (rotate(part, sequence.positions, self.config.rope_theta) for part in (q, k))
        log_decay = torch.log1p(-torch.exp(-math.log(2) * (5 + head_index(self.config.num_heads, v))))
        op = DiagonalScan(q * self.config.key_dim**-0.5, k, v, log_decay, sequence.backend)
        return self.out(sequence.scan(op), x)

    def flops_per_token(self, context: float) -> float:
        """See `SequenceMixer`: update and read-out of the state."""
        return 4 * self.config.state_size
