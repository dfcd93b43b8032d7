"""Rotary position embedding (Su et al. 2021, "RoFormer", equation 34), in the half-split convention of Llama."""

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate [B, L, H, K] by the angles of `positions` [B, L]; K is even.

    Angles are float64: at a position of millions a float32 product is off by a large part of a turn.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angles = positions.to(torch.float64)[..., None, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
