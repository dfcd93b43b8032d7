"""Parts that several recurrent mixers share: the convolved projection in, and the gated norm and projection out."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.core.contracts import Sequence
from longtrain_kernels.short_convolution import short_convolution


class ConvolvedProjection(nn.Module):
    """Queries, keys and values: a projection, a short causal convolution per channel, and SiLU.

    [B, L, D] -> [B, L, H, K], [B, L, H, K], [B, L, H, V] (Yang et al. 2024, "Gated Delta Networks", figure 1).
    """

    def __init__(self, width: int, num_heads: int, key_dim: int, value_dim: int, conv_width: int) -> None:
        super().__init__()
        self.sizes = [num_heads * key_dim, num_heads * key_dim, num_heads * value_dim]
        self.num_heads = num_heads
        self.input = nn.Linear(width, sum(self.sizes), bias=False)
        bound = 1 / math.sqrt(conv_width)  # torch.nn.Conv1d's own for a depthwise convolution
        self.conv_weight = nn.Parameter(torch.empty(sum(self.sizes), conv_width).uniform_(-bound, bound))

    def forward(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        rows = sequence.halo(self.input(x), self.conv_weight.shape[1] - 1)
        weight = self.conv_weight.to(rows.dtype)
        mixed = short_convolution(rows, weight, sequence.positions, activation="silu", backend=sequence.backend)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in mixed.split(self.sizes, -1))
        return q, k, v


class GatedOutput(nn.Module):
    """RMSNorm per head, times SiLU of a gate, then the projection out: [B, L, H, V] and [B, L, D] -> [B, L, D]."""

    def __init__(self, width: int, num_heads: int, value_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num_heads * value_dim, bias=False)
        self.norm = nn.RMSNorm(value_dim, eps=1e-6)
        self.output = nn.Linear(num_heads * value_dim, width, bias=False)

    def forward(self, mixed: Tensor, x: Tensor) -> Tensor:
        """See the class."""
        normed = self.norm(mixed.to(self.norm.weight.dtype)).flatten(2)
        return self.output(normed * F.silu(self.gate(x)))
