"""Diagonal linear recurrence: S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, with a_t = exp(log_decay_t).

One operation covers a scalar decay per head (Mamba-2 / SSD, simple GLA; log_decay [B, L, H]) and a vector decay per
head (GLA, HGRN2; log_decay [B, L, H, K]); a constant decay is an expanded scalar, no decay is zeros.
See README.md for the derivation of the chunked form.
"""

from dataclasses import dataclass

from torch import Tensor

from longtrain_kernels.affine import Segment
from longtrain_kernels.diagonal_scan.chunked import diagonal_scan_chunked, diagonal_segment_chunked

__all__ = ["DiagonalScan"]


@dataclass(frozen=True)
class DiagonalScan:
    """The recurrence bound to the inputs of one segment. Arithmetic is float32 at least, whatever the inputs are."""

    queries: Tensor
    """[B, L, H, K], already scaled."""
    keys: Tensor
    """[B, L, H, K]."""
    values: Tensor
    """[B, L, H, V]."""
    log_decay: Tensor
    """[B, L, H] or [B, L, H, K], finite and not positive."""

    def __post_init__(self) -> None:
        batch, length, heads, width = self.keys.shape
        if self.queries.shape != self.keys.shape:
            raise ValueError(f"queries {tuple(self.queries.shape)} and keys {tuple(self.keys.shape)} differ in shape")
        if self.values.shape[:3] != (batch, length, heads):
            raise ValueError(f"values {tuple(self.values.shape)} do not match keys {tuple(self.keys.shape)}")
        if self.log_decay.shape not in ((batch, length, heads), (batch, length, heads, width)):
            raise ValueError(
                f"log_decay {tuple(self.log_decay.shape)} is neither [B, L, H] nor [B, L, H, K] of keys "
                f"{tuple(self.keys.shape)}"
            )

    def apply(self, documents: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run from `state` [B, H, K, V] (None: zero); returns outputs [B, L, H, V] and the final state.

        `documents` [B, L] counts the document starts of the segment up to and including each token: 0 is the document
        that the carry belongs to.
        """
        return diagonal_scan_chunked(self.queries, self.keys, self.values, self.log_decay, documents, state)

    def summarize(self, documents: Tensor) -> Segment:
        """Run from the zero state and return the segment's affine map with it; `documents` as for `apply`."""
        return diagonal_segment_chunked(self.queries, self.keys, self.values, self.log_decay, documents)
