"""Log-decays of recurrent mixers: float32 at least, whatever autocast makes of the projections around them."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain_kernels.affine import accumulator_dtype


def exact(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is."""
    return x.to(accumulator_dtype(x.dtype))


def head_index(heads: int, like: Tensor) -> Tensor:
    """0 ... H-1, where and as exactly as the decays of `like` are computed."""
    return torch.arange(heads, dtype=accumulator_dtype(like.dtype), device=like.device)


class DiscretizedDecay(nn.Module):
    """log a = -exp(A_h) s with the step s = softplus(x + c): the discretisation of Mamba-2 (Dao & Gu 2024, section 7).

    `channels` steps a head share the head's rate exp(A_h). Initialised as Mamba is (Gu & Dao
    2023, and their code): rates uniform in `rates`, steps at x = 0 log-uniform in [0.001, 0.1].
    """

    def __init__(self, heads: int, channels: int = 1, rates: tuple[float, float] = (1.0, 16.0)) -> None:
        super().__init__()
        low, high = rates
        # The draw is from (low, high]: a rate of zero has no logarithm.
        self.log_rate = nn.Parameter((high - (high - low) * torch.rand(heads)).log())
        step = torch.empty(heads * channels).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def step(self, x: Tensor) -> Tensor:
        """s of [B, L, H channels] logits."""
        return F.softplus(exact(x) + self.step_bias)

    def log_decay(self, step: Tensor) -> Tensor:
        """[B, L, H], or [B, L, H, channels] of several a head."""
        heads = self.log_rate.shape[0]
        rate = self.log_rate.exp()
        return -rate * step if step.shape[-1] == heads else -rate.unsqueeze(-1) * step.unflatten(-1, (heads, -1))

    def forward(self, x: Tensor) -> Tensor:
        """log a of logits."""
        return self.log_decay(self.step(x))
