"""Causal depthwise convolution over the last W tokens of the same document, optionally with SiLU behind it.

It stands before the scan in Mamba (Gu & Dao 2023, section 3.4) and Gated DeltaNet (Yang et al. 2024, figure 1).
"""

from typing import Literal

from torch import Tensor

from longtrain_kernels.backend import Backend, default_backend
from longtrain_kernels.short_convolution.reference import short_convolution_reference
from longtrain_kernels.short_convolution.triton import MOST_TAPS, short_convolution_triton

__all__ = ["short_convolution"]


def short_convolution(
    rows: Tensor,
    weight: Tensor,
    positions: Tensor,
    activation: Literal["silu"] | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """y_t = act(sum_w weight[:, W-1-w] x_{t-w}) over the taps w that lie in the document of t.

    Args:
        rows: [B, W-1 + L, D], the segment preceded by the W-1 rows before it (their content does not matter where
            they belong to another document). Any strides.
        weight: [D, W]; the last column multiplies the token itself, as in torch.nn.Conv1d. Its dtype may be wider than
            that of the rows.
        positions: [B, L], position of each token in its document.
        activation: what follows; "silu" is x sigmoid(x).
        backend: None: by the device. Reference and chunked are the same shifted products in PyTorch.

    Returns:
        [B, L, D] in the dtype of `rows`; sums are float32 at least. Differentiable in `rows` and `weight`.

    Raises:
        ValueError: shapes that do not fit, or W > 8 with Triton.
    """
    length, (channels, taps) = positions.shape[1], weight.shape
    if rows.shape[1] != length + taps - 1:
        raise ValueError(f"rows hold {rows.shape[1]} tokens, expected {length} + {taps} - 1")
    if rows.shape[2] != channels or rows.shape[0] != positions.shape[0]:
        raise ValueError(
            f"rows {tuple(rows.shape)} do not match weight {tuple(weight.shape)} and positions {tuple(positions.shape)}"
        )
    if activation not in (None, "silu"):
        raise ValueError(f"there is no activation '{activation}'; use 'silu' or None")
    if (backend or default_backend(rows.device)) is not Backend.TRITON:
        return short_convolution_reference(rows, weight, positions, activation)
    if taps > MOST_TAPS:
        raise ValueError(f"{taps} taps are more than the kernel's {MOST_TAPS}; use backend=Backend.CHUNKED")
    return short_convolution_triton(rows, weight, positions, activation)
