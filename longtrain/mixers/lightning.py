"""Lightning attention as in TransNormerLLM and MiniMax-01 (Qin et al. 2024, "Various Lengths, Constant Speed").

S_t = e^(-s) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, with SiLU on queries, keys and values. The slope s = 2^(-8 (h+1) / H)
(1 - l / (n - 1)) falls with head h = 0 ... H-1 and with layer l of n, as in the authors' released models: the last
layer forgets nothing. Then an RMSNorm over all heads and a sigmoid gate (MiniMax 2025, "MiniMax-01", section 2.2).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain.core.contracts import Sequence, SequenceMixer
from longtrain.mixers._config import HeadsConfig
from longtrain.mixers._decay import head_index
from longtrain.mixers._projection import GatedOutput, Projection
from longtrain_kernels.diagonal_scan import DiagonalScan


@dataclass(frozen=True)
class Config(HeadsConfig):
    """`conf/mixer/lightning.yaml`."""


class Mixer(SequenceMixer):
    """[B, L, D] -> [B, L, D]."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.qkv = Projection(config, width)
        self.out = GatedOutput(width, config.channels, config.channels, activation=torch.sigmoid)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Scan over the whole sequence."""
        q, k, v = (F.silu(part) for part in self.qkv(x, sequence))
        return self.out(sequence.scan(DiagonalScan(q, k, v, self.log_decay(v), sequence.backend)), x)

    def log_decay(self, like: Tensor) -> Tensor:
        """[H], on the device of `like`."""
        heads = self.config.num_heads
        slopes = torch.exp(-8 * math.log(2) / heads * (head_index(heads, like) + 1))
        return -slopes * (1 - self.layer / max(self.num_layers - 1, 1))

    def flops_per_token(self, context: float) -> float:
        """See `SequenceMixer`: update and read-out of the state."""
        return 4 * self.config.state_size
