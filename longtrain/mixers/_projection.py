"""Parts that recurrent mixers share: projections to queries, keys and values, and the norm, gate and projection out."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.core.contracts import Sequence
from longtrain.mixers._config import ConvolvedConfig, HeadsConfig
from longtrain_kernels.affine import accumulator_dtype
from longtrain_kernels.short_convolution import short_convolution

NORM_EPSILON = 1e-6


class Projection(nn.Module):
    """Queries, keys and values: [B, L, D] -> [B, L, G, K], [B, L, G, K], [B, L, H, V]."""

    def __init__(self, config: HeadsConfig, width: int) -> None:
        super().__init__()
        self.key_dim, self.value_dim = config.key_dim, config.value_dim
        keys = config.num_heads * config.key_dim
        self.sizes = [keys, keys, config.channels]
        self.input = nn.Linear(width, sum(self.sizes), bias=False)

    def forward(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        q, k, v = self.mix(self.input(x), sequence).split(self.sizes, -1)
        return split_heads(q, self.key_dim), split_heads(k, self.key_dim), split_heads(v, self.value_dim)

    def mix(self, projected: Tensor, sequence: Sequence) -> Tensor:
        """What happens to the projected rows [B, L, sum of sizes] before they are split into heads."""
        return projected


class ConvolvedProjection(Projection):
    """A projection, a short causal convolution per channel, and SiLU (Yang et al. 2024, "Gated Delta Networks",
    figure 1; Dao & Gu 2024, section 7.1)."""

    def __init__(self, config: ConvolvedConfig, width: int) -> None:
        super().__init__(config, width)
        bound = 1 / math.sqrt(config.conv_width)  # torch.nn.Conv1d's own for a depthwise convolution
        self.conv_weight = nn.Parameter(torch.empty(sum(self.sizes), config.conv_width).uniform_(-bound, bound))

    def mix(self, projected: Tensor, sequence: Sequence) -> Tensor:
        """See `Projection`."""
        positions, backend = sequence.positions, sequence.backend
        parts = [
            short_convolution(rows, self.conv_weight, positions[:, part], activation="silu", backend=backend)
            for part, rows in sequence.halo(projected, self.conv_weight.shape[1] - 1)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @property
    def flops_per_token(self) -> int:
        """Of the convolution."""
        return 2 * self.conv_weight.numel()


class LowRank(nn.Module):
    """A projection through `rank` channels: [B, L, D] -> [B, L, `channels`]."""

    def __init__(self, width: int, rank: int, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.up(self.down(x))


class GroupNorm(nn.RMSNorm):
    """RMSNorm over groups of channels, such as heads, that share its weights: [B, L, H, V] -> [B, L, H V]."""

    def __init__(self, group: int) -> None:
        super().__init__(group, eps=NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """See the class; in the precision of the weights."""
        return super().forward(split_heads(x.flatten(2), self.weight.numel()).to(self.weight.dtype)).flatten(2)


class NormedOutput(nn.Module):
    """RMSNorm over groups of `group` channels, then the projection out: [B, L, H, V] -> [B, L, D]."""

    def __init__(self, width: int, channels: int, group: int) -> None:
        super().__init__()
        self.norm = GroupNorm(group)
        self.output = nn.Linear(channels, width, bias=False)

    def forward(self, mixed: Tensor) -> Tensor:
        """See the class."""
        return self.output(self.norm(mixed))


class GatedOutput(nn.Module):
    """RMSNorm, times the activation of a gate, then the projection out: [B, L, H, V] and [B, L, D] -> [B, L, D]."""

    def __init__(
        self,
        width: int,
        channels: int,
        group: int,
        activation: Callable[[Tensor], Tensor] = F.silu,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(width, channels, bias=False) if rank is None else LowRank(width, rank, channels)
        self.norm = GroupNorm(group)
        self.output = nn.Linear(channels, width, bias=False)

    def forward(self, mixed: Tensor, x: Tensor) -> Tensor:
        """See the class."""
        return self.output(self.norm(mixed) * self.activation(self.gate(x)))


def split_heads(x: Tensor, dim: int) -> Tensor:
    """[..., H dim] -> [..., H, dim]."""
    return x.unflatten(-1, (x.shape[-1] // dim, dim))


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖ along the last dimension, in float32 at least; zero stays zero."""
    wide = x.to(accumulator_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + NORM_EPSILON)).to(x.dtype)
