"""Diagonal linear recurrence: S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, with a_t = exp(log_decay_t).

One operation covers no decay (linear attention), a constant decay per head (retention, Lightning), a scalar decay per
token and head (Mamba-2 / SSD, simple GLA) and a vector decay (GLA, HGRN2). See README.md for the chunked form.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longtrain_kernels.affine import Segment, accumulator_dtype
from longtrain_kernels.backend import Backend, choose_backend
from longtrain_kernels.diagonal_scan.chunked import diagonal_segment_chunked
from longtrain_kernels.diagonal_scan.reference import diagonal_segment_reference
from longtrain_kernels.scan import BoundScan

__all__ = ["DiagonalScan"]


@dataclass(frozen=True)
class DiagonalScan(BoundScan):
    """The diagonal recurrence."""

    log_decay: Tensor | None = None
    """None for a = 1, [H] constant, [B, L, H] or [B, L, H, K]; finite and not positive."""
    backend: Backend | None = None
    """None: by the device; chunked for float64, which Triton's kernels do not compute."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shape, width = self.values.shape[:3], self.keys.shape[-1]
        allowed = (shape[2:], shape, (*shape, width))
        if self.log_decay is not None and self.log_decay.shape not in allowed:
            raise ValueError(
                f"log_decay {tuple(self.log_decay.shape)} is none of [H], [B, L, H] and [B, L, H, K] of keys "
                f"{tuple(self.keys.shape)} and values {tuple(self.values.shape)}"
            )

    def _segment(self, documents: Tensor) -> Segment:
        backend = choose_backend(self.backend, self.values, self.queries, self.keys)
        if backend is Backend.TRITON and self.values.numel() > 0:
            # At the point of use: Triton is not installed on every platform.
            from longtrain_kernels.diagonal_scan.triton import diagonal_segment_triton  # noqa: PLC0415

            return diagonal_segment_triton(self.queries, self.keys, self.values, self._token_decay(), documents)
        q, k = self.expanded()
        segment = diagonal_segment_reference if backend is Backend.REFERENCE else diagonal_segment_chunked
        return segment(q, k, self.values, self._token_decay(), documents)

    def _token_decay(self) -> Tensor:
        """Log-decays as [B, L, H] or [B, L, H, K]."""
        shape = self.values.shape[:3]
        if self.log_decay is None:
            return torch.zeros(shape, dtype=accumulator_dtype(self.values.dtype), device=self.values.device)
        return self.log_decay.expand(shape) if self.log_decay.dim() == 1 else self.log_decay
