"""What the scans have in common: queries, keys and values bound to a recurrence."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

from torch import Tensor

from longtrain_kernels.affine import Segment, run
from longtrain_kernels.backend import expand_heads

OnHeads = Callable[[Tensor], Tensor]
"""Of a tensor [B, L, heads, ...], one with other tokens and heads."""


@dataclass(frozen=True)
class BoundScan(ABC):
    """A recurrence bound to the inputs of one segment.

    Sums are float32 at least, whatever the inputs are. G key heads divide the H value heads; value head h reads key
    head h // (H / G).
    """

    queries: Tensor
    """[B, L, G, K], already scaled."""
    keys: Tensor
    """[B, L, G, K]."""
    values: Tensor
    """[B, L, H, V]."""

    def __post_init__(self) -> None:
        tensors = {"queries": self.queries, "keys": self.keys, "values": self.values}
        for name, tensor in tensors.items():
            if tensor.dim() != 4 or not tensor.is_floating_point():
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} of {tensor.dtype}, expected [B, L, heads, width] of floats"
                )
        batch, length, groups, _ = self.keys.shape
        if self.queries.shape != self.keys.shape:
            raise ValueError(f"queries {tuple(self.queries.shape)} and keys {tuple(self.keys.shape)} differ in shape")
        heads = self.values.shape[2]
        if self.values.shape[:2] != (batch, length) or (heads % groups if groups else heads):
            raise ValueError(f"values {tuple(self.values.shape)} do not match keys {tuple(self.keys.shape)}")

    def rows(self, part: slice) -> Self:
        """The recurrence of some of the tokens; what belongs to no token, such as a constant decay, is kept."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: t[:, part] for n, t in tensors.items() if isinstance(t, Tensor) and t.dim() > 1})

    @property
    def num_heads(self) -> tuple[int, int]:
        """Key heads G and value heads H."""
        return self.keys.shape[2], self.values.shape[2]

    def mapped(self, on_key_heads: OnHeads, on_value_heads: OnHeads) -> Self:
        """The recurrence of what the functions make of its tensors; a constant decay becomes one of each token."""
        shape = self.values.shape[:3]
        changes = {}
        for f in fields(self):
            tensor = getattr(self, f.name)
            if isinstance(tensor, Tensor):
                function = on_key_heads if f.name in ("queries", "keys") else on_value_heads
                changes[f.name] = function(tensor if tensor.dim() > 1 else tensor.expand(shape))
        return replace(self, **changes)

    def apply(self, documents: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run from `state` [B, H, K, V] (None: zero); returns outputs [B, L, H, V] and the final state.

        `documents` [B, L] counts the document starts of the segment up to and including each token: 0 is the document
        that the carry belongs to. Raises ValueError for shapes that do not fit.
        """
        if state is not None:
            batch, _, heads, columns = self.values.shape
            expected = batch, heads, self.keys.shape[-1], columns
            if state.shape != expected:
                raise ValueError(f"state {tuple(state.shape)}, expected [B, H, K, V] = {expected}")
        return run(self.summarize(documents), state)

    def summarize(self, documents: Tensor) -> Segment:
        """The segment's affine map, and what adds a carry to its outputs; `documents` as for `apply`."""
        expected = self.values.shape[:2]
        if documents.shape != expected or documents.is_floating_point():
            raise ValueError(
                f"documents {tuple(documents.shape)} of {documents.dtype}, expected integers [B, L] = {tuple(expected)}"
            )
        return self._segment(documents)

    @abstractmethod
    def _segment(self, documents: Tensor) -> Segment:
        """See `summarize`."""

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, L, H, K], a key head for each value head."""
        heads = self.values.shape[2]
        return expand_heads(self.queries, heads), expand_heads(self.keys, heads)
