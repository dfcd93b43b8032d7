"""Gated linear attention (Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training").

S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = K^-1/2 S_t^T q_t with a decay for each channel of the keys,
log a_t = logsigmoid(W_2 W_1 x_t + c) / 16 of low rank; then an RMSNorm per head and a swish gate (section 4.4).
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from longtrain.core.contracts import Sequence, SequenceMixer
from longtrain.mixers._config import HeadsConfig, Positive
from longtrain.mixers._decay import exact
from longtrain.mixers._projection import GatedOutput, LowRank, Projection, split_heads
from longtrain_kernels.diagonal_scan import DiagonalScan

GATE_NORMALIZER = 16  # section 4.4: keeps decays near one at initialisation


@dataclass(frozen=True)
class Config(HeadsConfig):
    """`conf/mixer/gla.yaml`; the authors' key heads are half as wide as their value heads."""

    gate_rank: Positive
    """Rank of the decay's projection."""


class Mixer(SequenceMixer):
    """[B, L, D] -> [B, L, D]."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.qkv = Projection(config, width)
        self.decay = LowRank(width, config.gate_rank, config.num_heads * config.key_dim)
        self.out = GatedOutput(width, config.channels, config.value_dim)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Scan over the whole sequence."""
        q, k, v = self.qkv(x, sequence)
        log_decay = split_heads(F.logsigmoid(exact(self.decay(x))) / GATE_NORMALIZER, self.config.key_dim)
        op = DiagonalScan(q * self.config.key_dim**-0.5, k, v, log_decay, sequence.backend)
        return self.out(sequence.scan(op), x)

    def flops_per_token(self, context: float) -> float:
        """See `SequenceMixer`: update and read-out of the state."""
        return 4 * self.config.state_size
