"""Causal depthwise convolution over the last W tokens of the same document, optionally with SiLU behind it.

It stands before the scan in Mamba (Gu & Dao 2023, section 3.4) and Gated DeltaNet (Yang et al. 2024, figure 1).
"""

from typing import Literal

from torch import Tensor

from longtrain_kernels.backend import Backend, default_backend
from longtrain_kernels.short_convolution.reference import short_convolution_reference

try:
    from longtrain_kernels.short_convolution.triton import short_convolution_triton
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    short_convolution_triton = None  # type: ignore[assignment]  # Triton is made for Linux only

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
        weight: [D, W]; the last column multiplies the token itself, as in torch.nn.Conv1d (there it is [D, 1, W]). Its
            dtype may be wider than that of the rows.
        positions: [B, L], position of each token in its document.
        activation: what follows; "silu" is x sigmoid(x).
        backend: None: by the device. Reference and chunked are the same shifted products in PyTorch.

    Returns:
        [B, L, D] in the dtype of `rows`; sums are float32 at least. Differentiable in `rows` and `weight`.

    Raises:
        ValueError: shapes that do not fit, what is no backend; with Triton, W > 8 or no Triton installed.
    """
    if rows.dim() != 3 or weight.dim() != 2 or positions.dim() != 2:
        raise ValueError(
            f"rows {tuple(rows.shape)}, weight {tuple(weight.shape)} and positions {tuple(positions.shape)}, expected "
            "[B, W-1 + L, D], [D, W] and [B, L]"
        )
    length, (channels, taps) = positions.shape[1], weight.shape
    if rows.shape[1] != length + taps - 1:
        raise ValueError(f"rows hold {rows.shape[1]} tokens, expected {length} + {taps} - 1")
    if rows.shape[2] != channels or rows.shape[0] != positions.shape[0]:
        raise ValueError(
            f"rows {tuple(rows.shape)} do not match weight {tuple(weight.shape)} and positions {tuple(positions.shape)}"
        )
    if activation not in (None, "silu"):
        raise ValueError(f"there is no activation '{activation}'; use 'silu' or None")
    if Backend(backend or default_backend(rows.device)) is not Backend.TRITON:
        return short_convolution_reference(rows, weight, positions, activation)
    if short_convolution_triton is None:
        raise ValueError("Triton is not installed here; use backend=Backend.CHUNKED")
    return short_convolution_triton(rows, weight, positions, activation)
