"""Diagonal linear recurrence: S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, with a_t = exp(log_decay_t).

One operation covers no decay (linear attention), a constant decay per head (retention, Lightning), a scalar decay per
token and head (Mamba-2 / SSD, simple GLA) and a vector decay (GLA, HGRN2). See README.md for the chunked form.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longtrain_kernels.affine import Segment, accumulator_dtype, run
from longtrain_kernels.backend import Backend, expand_heads, scan_backend
from longtrain_kernels.diagonal_scan.chunked import diagonal_segment_chunked
from longtrain_kernels.diagonal_scan.reference import diagonal_segment_reference

__all__ = ["DiagonalScan"]


@dataclass(frozen=True)
class DiagonalScan:
    """The recurrence bound to the inputs of one segment.

    Sums are float32 at least, whatever the inputs are. G key heads divide the H value heads; value head h reads key
    head h // (H / G).
    """

    queries: Tensor
    """[B, L, G, K], already scaled."""
    keys: Tensor
    """[B, L, G, K]."""
    values: Tensor
    """[B, L, H, V]."""
    log_decay: Tensor | None = None
    """None for a = 1, [H] constant, [B, L, H] or [B, L, H, K]; finite and not positive."""
    backend: Backend | None = None
    """None: by the device."""

    def __post_init__(self) -> None:
        batch, length, groups, width = self.keys.shape
        heads = self.values.shape[2]
        if self.queries.shape != self.keys.shape:
            raise ValueError(f"queries {tuple(self.queries.shape)} and keys {tuple(self.keys.shape)} differ in shape")
        if self.values.shape[:2] != (batch, length) or heads % groups:
            raise ValueError(f"values {tuple(self.values.shape)} do not match keys {tuple(self.keys.shape)}")
        allowed = ((heads,), (batch, length, heads), (batch, length, heads, width))
        if self.log_decay is not None and self.log_decay.shape not in allowed:
            raise ValueError(
                f"log_decay {tuple(self.log_decay.shape)} is none of [H], [B, L, H] and [B, L, H, K] of keys "
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
        if backend is Backend.TRITON and self.values.shape[1] > 0:
            # At the point of use: Triton is not installed on every platform.
            from longtrain_kernels.diagonal_scan.triton import diagonal_segment_triton  # noqa: PLC0415

            return diagonal_segment_triton(self.queries, self.keys, self.values, self._token_decay(), documents)
        heads = self.values.shape[2]
        q, k = expand_heads(self.queries, heads), expand_heads(self.keys, heads)
        segment = diagonal_segment_reference if backend is Backend.REFERENCE else diagonal_segment_chunked
        return segment(q, k, self.values, self._token_decay(), documents)

    def _token_decay(self) -> Tensor:
        """Log-decays as [B, L, H] or [B, L, H, K]."""
        shape = self.values.shape[:3]
        if self.log_decay is None:
            return torch.zeros(shape, dtype=accumulator_dtype(self.values.dtype), device=self.values.device)
        return self.log_decay.expand(shape) if self.log_decay.dim() == 1 else self.log_decay
