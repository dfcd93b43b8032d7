"""DeltaNet (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length").

S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = K^-1/2 S_t^T q_t (equation 4) with b_t = sigmoid(w x_t).
Queries, keys and values are convolved and pass SiLU, queries and keys have unit length, and an RMSNorm per head comes
before the projection out. Twice the b_t lets a state be reflected: eigenvalues in (-1, 1) instead of (0, 1) (Grazzi et
al. 2024, "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues").
"""

from dataclasses import dataclass

from torch import Tensor, nn

from longtrain.core.contracts import Sequence, SequenceMixer
from longtrain.mixers._config import ConvolvedConfig
from longtrain.mixers._decay import exact
from longtrain.mixers._projection import ConvolvedProjection, NormedOutput, unit
from longtrain_kernels.delta_scan import DeltaScan


@dataclass(frozen=True)
class Config(ConvolvedConfig):
    """`conf/mixer/delta_net.yaml`."""

    allow_negative_eigenvalues: bool


class Mixer(SequenceMixer):
    """[B, L, D] -> [B, L, D]."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.qkv = ConvolvedProjection(config, width)
        self.beta = nn.Linear(width, config.num_heads, bias=False)
        self.out = NormedOutput(width, config.channels, config.value_dim)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Scan over the whole sequence."""
        q, k, v = self.qkv(x, sequence)
        beta = exact(self.beta(x)).sigmoid() * (2 if self.config.allow_negative_eigenvalues else 1)
        op = DeltaScan(unit(q) * self.config.key_dim**-0.5, unit(k), v, beta, None, sequence.backend)
        return self.out(sequence.scan(op))

    def flops_per_token(self, context: float) -> float:
        """See `SequenceMixer`: convolution, and correction, update and read-out of the state."""
        return self.qkv.flops_per_token + 6 * self.config.state_size
