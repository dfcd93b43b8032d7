"""Mamba-2 (Dao & Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through SSD", section 7).

S_t = a_t S_{t-1} + B_t (s_t x_t)^T, y_t = S_t^T C_t + D_h x_t with step s_t = softplus(w x_t + c) and log a_t =
-exp(A_h) s_t. In the terms of attention B are the keys, C the queries and x the values; each of `num_heads` groups of
B and C serves several heads of x. All three are convolved (section 7.1); the gate comes before the norm over the heads
of a group, as in the authors' code. Their convolution's bias is left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.core.contracts import Sequence, SequenceMixer
from longtrain.mixers._config import GroupedConfig
from longtrain.mixers._decay import DiscretizedDecay
from longtrain.mixers._projection import ConvolvedProjection, NormedOutput
from longtrain_kernels.diagonal_scan import DiagonalScan


@dataclass(frozen=True)
class Config(GroupedConfig):
    """`conf/mixer/mamba2.yaml`: `num_heads` groups, `key_dim` the state's size N, `value_dim` a head's width P."""


class Mixer(SequenceMixer):
    """[B, L, D] -> [B, L, D]."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        heads = config.value_heads
        self.qkv = ConvolvedProjection(config, width)
        self.step = nn.Linear(width, heads, bias=False)
        self.gate = nn.Linear(width, config.channels, bias=False)
        self.decay = DiscretizedDecay(heads)
        self.skip = nn.Parameter(torch.ones(heads))
        self.out = NormedOutput(width, config.channels, config.channels // config.num_heads)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Scan over the whole sequence."""
        q, k, v = self.qkv(x, sequence)
        step = self.decay.step(self.step(x))
        op = DiagonalScan(q, k, (v * step.unsqueeze(-1)).to(v.dtype), self.decay.log_decay(step), sequence.backend)
        mixed = sequence.scan(op) + self.skip.unsqueeze(-1) * v
        return self.out(mixed * F.silu(self.gate(x)).view_as(mixed))

    def flops_per_token(self, context: float) -> float:
        """See `SequenceMixer`: convolution, update and read-out of the state."""
        return self.qkv.flops_per_token + 4 * self.config.state_size
