"""Linear attention without decay.

S_t = S_{t-1} + f(k_t) v_t^T, o_t = norm(S_t^T f(q_t)) with the feature map f(x) = elu(x) + 1 (Katharopoulos et al.
2020, "Transformers are RNNs", equation 7). The RMSNorm per head replaces their denominator f(q_t)^T sum f(k), whose
gradients are unbounded (Qin et al. 2022, "The Devil in Linear Transformer", NormAttention). The layer has no notion of
position; other layers must bring it.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from longtrain.core.contracts import Sequence, SequenceMixer
from longtrain.mixers._config import HeadsConfig
from longtrain.mixers._projection import NormedOutput, Projection
from longtrain_kernels.diagonal_scan import DiagonalScan


@dataclass(frozen=True)
class Config(HeadsConfig):
    """`conf/mixer/linear_attention.yaml`."""


class Mixer(SequenceMixer):
    """[B, L, D] -> [B, L, D]."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.qkv = Projection(config, width)
        self.out = NormedOutput(width, config.channels, config.value_dim)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Scan over the whole sequence."""
        q, k, v = self.qkv(x, sequence)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return self.out(sequence.scan(DiagonalScan(q, k, v, None, sequence.backend)))

    def flops_per_token(self, context: float) -> float:
        """See `SequenceMixer`: update and read-out of the state."""
        return 4 * self.config.state_size
