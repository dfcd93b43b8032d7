"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule").

S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = K^-1/2 S_t^T q_t (equation 10), with queries and keys of
unit length, b_t = sigmoid(w_b x_t) and log a_t = -exp(A) softplus(w_a x_t + c), initialised as Mamba-2 does.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.core.contracts import Sequence, SequenceMixer
from longtrain.mixers import simple_gla
from longtrain.mixers._projection import ConvolvedProjection, GatedOutput
from longtrain_kernels.delta_scan import DeltaScan


@dataclass(frozen=True)
class Config(simple_gla.Config):
    """`conf/mixer/gated_delta.yaml`."""


class Mixer(SequenceMixer):
    """[B, L, D] -> [B, L, D]."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.qkv = ConvolvedProjection(width, config.num_heads, config.key_dim, config.value_dim, config.conv_width)
        self.beta = nn.Linear(width, config.num_heads, bias=False)
        self.decay = nn.Linear(width, config.num_heads, bias=False)
        # Mamba-2: A uniform in [1, 16], time step log-uniform in [1e-3, 1e-1], stored before the softplus.
        self.log_rate = nn.Parameter(torch.empty(config.num_heads).uniform_(1, 16).log())
        step = torch.empty(config.num_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.out = GatedOutput(width, config.num_heads, config.value_dim)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Scan over the whole sequence."""
        q, k, v = self.qkv(x, sequence)
        q, k = F.normalize(q, dim=-1) * self.config.key_dim**-0.5, F.normalize(k, dim=-1)
        log_decay = -self.log_rate.exp() * F.softplus(self.decay(x) + self.step_bias)
        op = DeltaScan(q, k, v, self.beta(x).sigmoid(), log_decay, sequence.backend)
        return self.out(sequence.scan(op), x)

    def flops_per_token(self, context: float) -> float:
        """See `SequenceMixer`: correction, update and read-out of the state."""
        return 6 * self.config.num_heads * self.config.key_dim * self.config.value_dim
