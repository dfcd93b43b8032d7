"""Document boundaries for tests: the same hard cases wherever packing is tested."""

import torch
from torch import Tensor


def awkward_starts(length: int, edges: tuple[int, ...] = ()) -> tuple[tuple[int, ...], ...]:
    """Two sequences: one document; and boundaries at, just before and just after every edge, and inside the spans."""
    inside = {1, 2, length // 3, length // 2, length - 1}
    near = {e + d for e in edges for d in (-1, 0, 1)}
    starts = sorted({0} | {s for s in inside | near if 0 < s < length})
    return (0,), tuple(starts)


def segment_documents(starts: tuple[tuple[int, ...], ...], begin: int, end: int) -> Tensor:
    """[B, end - begin]: document starts in [begin, t] for each token t, by the definition."""
    return torch.tensor([[sum(begin <= s <= t for s in row) for t in range(begin, end)] for row in starts]).reshape(
        len(starts), end - begin
    )
