"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule").

S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = K^-1/2 S_t^T q_t (equation 10), with b_t = sigmoid(w_b x_t)
and log a_t = -exp(A) softplus(w_a x_t + c) as in Mamba-2; queries, keys and values are convolved and pass SiLU, queries
and keys have unit length, and an RMSNorm per head and a SiLU gate end the layer (section 3.4, figure 1). A key head may
serve several value heads. Twice the b_t allows negative eigenvalues (Grazzi et al. 2024).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from longtrain.core.contracts import Sequence, SequenceMixer
from longtrain.mixers._config import GroupedConfig
from longtrain.mixers._decay import DiscretizedDecay, exact
from longtrain.mixers._projection import ConvolvedProjection, GatedOutput, unit
from longtrain_kernels.delta_scan import DeltaScan


@dataclass(frozen=True)
class Config(GroupedConfig):
    """`conf/mixer/gated_delta.yaml`."""

    allow_negative_eigenvalues: bool


class Mixer(SequenceMixer):
    """[B, L, D] -> [B, L, D]."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        heads = config.value_heads
        self.qkv = ConvolvedProjection(config, width)
        self.beta = nn.Linear(width, heads, bias=False)
        self.step = nn.Linear(width, heads, bias=False)
        self.decay = DiscretizedDecay(heads, rates=(0.0, 16.0))  # the authors' range
        self.out = GatedOutput(width, config.channels, config.value_dim)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Scan over the whole sequence."""
        q, k, v = self.qkv(x, sequence)
        beta = exact(self.beta(x)).sigmoid() * (2 if self.config.allow_negative_eigenvalues else 1)
        log_decay = self.decay(self.step(x))
        op = DeltaScan(unit(q) * self.config.key_dim**-0.5, unit(k), v, beta, log_decay, sequence.backend)
        return self.out(sequence.scan(op), x)

    def flops_per_token(self, context: float) -> float:
        """See `SequenceMixer`: convolution, and correction, update and read-out of the state."""
        return self.qkv.flops_per_token + 6 * self.config.state_size
