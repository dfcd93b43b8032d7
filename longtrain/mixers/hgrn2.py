"""HGRN2 (Qin et al. 2024, "HGRN2: Gated Linear RNNs with State Expansion").

S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T, o_t = S_t^T q_t: the forget gate's complement is the key. The
gate f_t = b + (1 - b) sigmoid(W x_t) has a lower bound b that grows with depth, so that upper layers remember longer
(Qin et al. 2023, "Hierarchically Gated Networks for Sequence Modeling"). The bound of layer l of n is l / n: the
authors learn increments shared by all layers, which start at these values; here a layer owns all that it learns.
Queries pass SiLU, and an RMSNorm over all heads comes before the projection out, as in the authors' code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.core.contracts import Sequence, SequenceMixer
from longtrain.mixers._config import HeadsConfig
from longtrain.mixers._decay import exact
from longtrain.mixers._projection import NormedOutput, split_heads
from longtrain_kernels.diagonal_scan import DiagonalScan


@dataclass(frozen=True)
class Config(HeadsConfig):
    """`conf/mixer/hgrn2.yaml`; `key_dim` is the expansion of the state."""


class Mixer(SequenceMixer):
    """[B, L, D] -> [B, L, D]."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        keys = config.num_heads * config.key_dim
        self.sizes = [keys, keys, config.channels]
        self.input = nn.Linear(width, sum(self.sizes), bias=False)
        self.out = NormedOutput(width, config.channels, config.channels)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Scan over the whole sequence."""
        q, forget, v = self.input(x).split(self.sizes, -1)
        k, log_decay = self.gates(forget)
        q, k, log_decay = (split_heads(part, self.config.key_dim) for part in (F.silu(q), k.to(v.dtype), log_decay))
        op = DiagonalScan(q, k, split_heads(v, self.config.value_dim), log_decay, sequence.backend)
        return self.out(sequence.scan(op))

    def gates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """1 - f and log f of the forget gate."""
        logits, bound = exact(logits), self.layer / self.num_layers
        keys = (1 - bound) * torch.sigmoid(-logits)
        # Without a bound the gate may underflow to zero, and its logarithm must stay finite.
        return keys, torch.log1p(-keys) if bound else F.logsigmoid(logits)

    def flops_per_token(self, context: float) -> float:
        """See `SequenceMixer`: update and read-out of the state."""
        return 4 * self.config.state_size
