"""Linear attention with a data-dependent scalar decay per head, and a short convolution.

S_t = a_t S_{t-1} + k_t v_t^T, o_t = K^-1/2 S_t^T q_t with log a_t = logsigmoid(w_a x_t + c) / 16: the scalar gate of
Mamba-2 (Dao & Gu 2024, section 2) in the layer of gated linear attention (Yang et al. 2023, section 4.4, also the 16).
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.core.contracts import Sequence, SequenceMixer
from longtrain.mixers._config import ConvolvedConfig
from longtrain.mixers._decay import exact
from longtrain.mixers._projection import ConvolvedProjection, GatedOutput
from longtrain_kernels.diagonal_scan import DiagonalScan

GATE_NORMALIZER = 16  # Yang et al. 2023, section 4.4: keeps decays near one at initialisation


@dataclass(frozen=True)
class Config(ConvolvedConfig):
    """`conf/mixer/simple_gla.yaml`."""


class Mixer(SequenceMixer):
    """[B, L, D] -> [B, L, D]."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.qkv = ConvolvedProjection(config, width)
        self.decay = nn.Linear(width, config.num_heads)
        self.out = GatedOutput(width, config.channels, config.value_dim)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Scan over the whole sequence."""
        q, k, v = self.qkv(x, sequence)
        log_decay = F.logsigmoid(exact(self.decay(x))) / GATE_NORMALIZER
        op = DiagonalScan(q * self.config.key_dim**-0.5, k, v, log_decay, sequence.backend)
        return self.out(sequence.scan(op), x)

    def flops_per_token(self, context: float) -> float:
        """See `SequenceMixer`: convolution, update and read-out of the state."""
        return self.qkv.flops_per_token + 4 * self.config.state_size
