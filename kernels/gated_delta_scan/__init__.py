"""Gated delta rule: S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t.

Yang, Kautz & Hatamizadeh 2024, "Gated Delta Networks", equation 10.
The transition of a segment is a K x K matrix per head.
"""

from dataclasses import dataclass

from torch import Tensor

from longtrain_kernels.affine import Segment
from longtrain_kernels.gated_delta_scan.reference import gated_delta_reference, gated_delta_segment_reference

__all__ = ["GatedDeltaScan"]


@dataclass(frozen=True)
class GatedDeltaScan:
    """The recurrence bound to the inputs of one segment. Arithmetic is float32 at least, whatever the inputs are."""

    queries: Tensor
    """[B, L, H, K], already scaled."""
    keys: Tensor
    """[B, L, H, K], of unit length."""
    values: Tensor
    """[B, L, H, V]."""
    log_decay: Tensor
    """[B, L, H], log a_t, finite and not positive."""
    beta: Tensor
    """[B, L, H], the step b_t in (0, 1), or (0, 2) for negative eigenvalues."""

    def __post_init__(self) -> None:
        expected = self.keys.shape[:3]
        for name in ("queries", "values", "log_decay", "beta"):
            shape = getattr(self, name).shape
            if shape[:3] != expected or len(shape) != (4 if name in ("queries", "values") else 3):
                raise ValueError(f"{name} {tuple(shape)} does not match keys {tuple(self.keys.shape)}")

    def apply(self, documents: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run from `state` [B, H, K, V] (None: zero); returns outputs [B, L, H, V] and the final state.

        `documents` [B, L] counts the document starts of the segment up to and including each token: 0 is the document
        that the carry belongs to.
        """
        return gated_delta_reference(self.queries, self.keys, self.values, self.log_decay, self.beta, documents, state)

    def summarize(self, documents: Tensor) -> Segment:
        """Run from the zero state and return the segment's affine map with it; `documents` as for `apply`."""
        return gated_delta_segment_reference(self.queries, self.keys, self.values, self.log_decay, self.beta, documents)
