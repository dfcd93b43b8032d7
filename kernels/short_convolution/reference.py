"""The definition of the short convolution, one shifted product a tap; also its form on devices without Triton."""

import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain_kernels.affine import accumulator_dtype


def short_convolution_reference(rows: Tensor, weight: Tensor, positions: Tensor, activation: str | None) -> Tensor:
    """Shapes as in `short_convolution`; sums are float32 at least."""
    length, taps = positions.shape[1], weight.shape[1]
    dtype = accumulator_dtype(rows.dtype)
    x, w = rows.to(dtype), weight.to(dtype)
    output = x[:, taps - 1 :] * w[:, taps - 1]
    for back in range(1, taps):
        inside = (positions >= back).unsqueeze(-1)
        begin = taps - 1 - back
        output = output + torch.where(inside, x[:, begin : begin + length], 0.0) * w[:, begin]
    return (F.silu(output) if activation == "silu" else output).to(rows.dtype)
