"""Delta rule with decay: S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t.

One operation covers no decay (DeltaNet: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule",
equation 4), a scalar decay per token and head (Gated DeltaNet: Yang, Kautz & Hatamizadeh 2024, equation 10) and a
vector decay (KDA: Kimi Team 2025, "Kimi Linear", equation 1). The transition of a segment is a K x K matrix per head.
See README.md for the chunked form.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longtrain_kernels.affine import Segment, accumulator_dtype
from longtrain_kernels.backend import Backend, choose_backend
from longtrain_kernels.delta_scan.chunked import delta_segment_chunked
from longtrain_kernels.delta_scan.reference import delta_segment_reference
from longtrain_kernels.scan import BoundScan

__all__ = ["DeltaScan"]


@dataclass(frozen=True)
class DeltaScan(BoundScan):
    """The delta rule with decay; keys are of unit length."""

    beta: Tensor
    """[B, L, H], the step b_t in (0, 1), or (0, 2) for negative eigenvalues."""
    log_decay: Tensor | None = None
    """None for a = 1, [B, L, H] or [B, L, H, K]; finite and not positive."""
    backend: Backend | None = None
    """None: by the device; chunked for float64, which Triton's kernels do not compute."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shape, width = self.values.shape[:3], self.keys.shape[-1]
        if self.beta.shape != shape:
            raise ValueError(f"beta {tuple(self.beta.shape)} is not [B, L, H] of values {tuple(self.values.shape)}")
        if self.log_decay is not None and self.log_decay.shape not in (shape, (*shape, width)):
            raise ValueError(
                f"log_decay {tuple(self.log_decay.shape)} is neither [B, L, H] nor [B, L, H, K] of keys "
                f"{tuple(self.keys.shape)} and values {tuple(self.values.shape)}"
            )

    def _segment(self, documents: Tensor) -> Segment:
        backend = choose_backend(self.backend, self.values, self.queries, self.keys)
        if backend is Backend.TRITON and self.values.numel() > 0:
            # Triton is not on every platform.
            from longtrain_kernels.delta_scan.triton import delta_segment_triton  # noqa: PLC0415

            return delta_segment_triton(self.queries, self.keys, self.values, self.beta, self.log_decay, documents)
        q, k = self.expanded()
        log_decay = self.log_decay
        if log_decay is None:
            log_decay = torch.zeros_like(self.beta, dtype=accumulator_dtype(self.values.dtype))
        segment = delta_segment_reference if backend is Backend.REFERENCE else delta_segment_chunked
        return segment(q, k, self.values, self.beta, log_decay, documents)
