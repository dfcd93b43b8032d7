"""Linear attention with a data-dependent scalar decay per head, and a short convolution.

S_t = a_t S_{t-1} + k_t v_t^T, o_t = K^-1/2 S_t^T q_t with log a_t = logsigmoid(w_a x_t + c) / 16: the scalar gate of
Mamba-2 (Dao & Gu 2024, section 2) in the layer of gated linear attention (Yang et al. 2023, section 4.4, also the 16).
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.core.contracts import Sequence, SequenceMixer
from longtrain.mixers._projection import ConvolvedProjection, GatedOutput
from longtrain_kernels.diagonal_scan import DiagonalScan

GATE_NORMALIZER = 16  # Yang et al. 2023, section 4.4: keeps decays near one at initialisation

Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Config:
    """`conf/mixer/simple_gla.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    num_heads: Positive
    key_dim: Positive
    """K, of one head."""
    value_dim: Positive
    """V, of one head."""
    conv_width: Positive
    """W, taps of the convolution; 1 is none."""


class Mixer(SequenceMixer):
    """[B, L, D] -> [B, L, D]."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.qkv = ConvolvedProjection(width, config.num_heads, config.key_dim, config.value_dim, config.conv_width)
        self.decay = nn.Linear(width, config.num_heads)
        self.out = GatedOutput(width, config.num_heads, config.value_dim)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Scan over the whole sequence."""
        q, k, v = self.qkv(x, sequence)
        log_decay = F.logsigmoid(self.decay(x)) / GATE_NORMALIZER
        scaled = q * self.config.key_dim**-0.5
        return self.out(sequence.scan(DiagonalScan(scaled, k, v, log_decay, sequence.backend)), x)

    def flops_per_token(self, context: float) -> float:
        """See `SequenceMixer`: update and read-out of the state."""
        return 4 * self.config.num_heads * self.config.key_dim * self.config.value_dim
