"""Causal depthwise convolution over the last W tokens of the same document."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain_kernels.backend import Backend

__all__ = ["short_convolution"]


def short_convolution(
    rows: Tensor,
    weight: Tensor,
    positions: Tensor,
    activation: Literal["silu"] | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """y_t = f(sum_w weight[:, W-1-w] x_{t-w}) over the taps w that lie in the document of t.

    Args:
        rows: [B, W-1 + L, D], the segment preceded by the W-1 rows before it (their content does not matter where
            they belong to another document).
        weight: [D, W]; the last column multiplies the token itself, as in torch.nn.Conv1d.
        positions: [B, L], position of each token in its document.
        activation: f, applied to the sum; None: the identity.
        backend: None: by the device.

    Returns:
        [B, L, D].
    """
    length, taps = positions.shape[1], weight.shape[1]
    if rows.shape[1] != length + taps - 1:
        raise ValueError(f"rows hold {rows.shape[1]} tokens, expected {length} + {taps} - 1")
    output = rows[:, taps - 1 :] * weight[:, taps - 1]
    for back in range(1, taps):
        inside = (positions >= back).unsqueeze(-1)
        begin = taps - 1 - back
        output = output + torch.where(inside, rows[:, begin : begin + length], 0.0) * weight[:, begin]
    return F.silu(output) if activation == "silu" else output
