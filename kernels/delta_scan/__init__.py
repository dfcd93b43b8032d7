"""Delta rule with decay: S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t.

One operation covers no decay (DeltaNet: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule",
equation 4), a scalar decay per token and head (Gated DeltaNet: Yang, Kautz & Hatamizadeh 2024, equation 10) and a
vector decay (KDA: Kimi Team 2025, "Kimi Linear", equation 1). The transition of a segment is a K x K matrix per head.
See README.md for the chunked form.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longtrain_kernels.affine import Segment, accumulator_dtype, run
from longtrain_kernels.backend import Backend, expand_heads, scan_backend
from longtrain_kernels.delta_scan.chunked import delta_segment_chunked
from longtrain_kernels.delta_scan.reference import delta_segment_reference

__all__ = ["DeltaScan"]


@dataclass(frozen=True)
class DeltaScan:
    """The recurrence bound to the inputs of one segment.

    Sums are float32 at least, whatever the inputs are. G key heads divide the H value heads; value head h reads key
    head h // (H / G).
    """

    queries: Tensor
    """[B, L, G, K], already scaled."""
    keys: Tensor
    """[B, L, G, K], of unit length."""
    values: Tensor
    """[B, L, H, V]."""
    beta: Tensor
    """[B, L, H], the step b_t in (0, 1), or (0, 2) for negative eigenvalues."""
    log_decay: Tensor | None = None
    """None for a = 1, [B, L, H] or [B, L, H, K]; finite and not positive."""
    backend: Backend | None = None
    """None: by the device; chunked for float64, which Triton's kernels do not compute."""

    def __post_init__(self) -> None:
        batch, length, groups, width = self.keys.shape
        heads = self.values.shape[2]
        shape = (batch, length, heads)
        if self.queries.shape != self.keys.shape:
            raise ValueError(f"queries {tuple(self.queries.shape)} and keys {tuple(self.keys.shape)} differ in shape")
        if self.values.shape[:2] != (batch, length) or heads % groups:
            raise ValueError(f"values {tuple(self.values.shape)} do not match keys {tuple(self.keys.shape)}")
        if self.beta.shape != shape:
            raise ValueError(f"beta {tuple(self.beta.shape)} is not [B, L, H] of values {tuple(self.values.shape)}")
        if self.log_decay is not None and self.log_decay.shape not in (shape, (*shape, width)):
            raise ValueError(
                f"log_decay {tuple(self.log_decay.shape)} is neither [B, L, H] nor [B, L, H, K] of keys "
                f"{tuple(self.keys.shape)} and values {tuple(self.values.shape)}"
            )

    def apply(self, documents: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run from `state` [B, H, K, V] (None: zero); returns outputs [B, L, H, V] and the final state.

        `documents` [B, L] counts the document starts of the segment up to and including each token: 0 is the document
        that the carry belongs to.
        """
        return run(self.summarize(documents), state)

    def summarize(self, documents: Tensor) -> Segment:
        """The segment's affine map, and what adds a carry to its outputs; `documents` as for `apply`."""
        backend = scan_backend(self.backend, self.values)
        if backend is Backend.TRITON:
            # Triton is not on every platform.
            from longtrain_kernels.delta_scan.triton import delta_segment_triton  # noqa: PLC0415

            return delta_segment_triton(self.queries, self.keys, self.values, self.beta, self.log_decay, documents)
        heads = self.values.shape[2]
        q, k = expand_heads(self.queries, heads), expand_heads(self.keys, heads)
        log_decay = self.log_decay
        if log_decay is None:
            log_decay = torch.zeros_like(self.beta, dtype=accumulator_dtype(self.values.dtype))
        segment = delta_segment_reference if backend is Backend.REFERENCE else delta_segment_chunked
        return segment(q, k, self.values, self.beta, log_decay, documents)
