"""Kimi Delta Attention (Kimi Team 2025, "Kimi Linear: An Expressive, Efficient Attention Architecture").

S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T, o_t = K^-1/2 S_t^T q_t (equation 1) with a decay for each
channel of the keys, log a_t = -exp(A) softplus(W_2 W_1 x_t + c) of low rank. Queries, keys and values are convolved and
pass SiLU, queries and keys have unit length; an RMSNorm per head and a low-rank sigmoid gate end the layer (section 4).
It takes no positions: decays and convolutions carry them. Twice the b_t allows negative eigenvalues (Grazzi et al.
2024).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longtrain.core.contracts import Sequence, SequenceMixer
from longtrain.mixers._config import GroupedConfig
from longtrain.mixers._decay import DiscretizedDecay, exact
from longtrain.mixers._projection import ConvolvedProjection, GatedOutput, LowRank, unit
from longtrain_kernels.delta_scan import DeltaScan


@dataclass(frozen=True)
class Config(GroupedConfig):
    """`conf/mixer/kda.yaml`; the ranks of decay and gate are `value_dim`, as the authors'."""

    allow_negative_eigenvalues: bool


class Mixer(SequenceMixer):
    """[B, L, D] -> [B, L, D]."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        heads = config.value_heads
        self.qkv = ConvolvedProjection(config, width)
        self.beta = nn.Linear(width, heads, bias=False)
        self.step = LowRank(width, config.value_dim, heads * config.key_dim, bias=False)
        self.decay = DiscretizedDecay(heads, config.key_dim)
        self.out = GatedOutput(width, config.channels, config.value_dim, torch.sigmoid, rank=config.value_dim)

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
