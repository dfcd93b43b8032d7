"""Many causal squares, as one call of a kernel that takes sequences of several lengths."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from longtrain_kernels.block_attention.kernel import Block, Squares


@dataclass(frozen=True)
class Packed:
    """Squares of a batch, and where their tokens are."""

    squares: Squares
    rows: Tensor
    """[n] int64, the sequence of each token."""
    queries: Tensor
    """[n] int64, its place among the queries."""
    keys: Tensor
    """[n] int64, its place among the keys."""

    @classmethod
    def of(cls, blocks: tuple[Block, ...], device: torch.device) -> "Packed":
        """The squares `blocks`, on `device`: one copy to it serves all layers."""
        each = [(row, block) for block in blocks for row in range(block.rows.start, block.rows.stop)]
        sizes = [block.queries.stop - block.queries.start for _, block in each]
        firsts = [(row, block.queries.start, block.keys.start) for row, block in each]
        ends = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
        places = torch.tensor(firsts).repeat_interleave(torch.tensor(sizes), dim=0)
        inside = torch.arange(len(places)) - ends[:-1].long().repeat_interleave(torch.tensor(sizes))
        places[:, 1:] += inside[:, None]
        rows, queries, keys = places.to(device).unbind(1)
        return cls(Squares(ends.to(device), max(sizes)), rows, queries, keys)

    def of_queries(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [n, ...]."""
        return x[self.rows, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        """[B, M, ...] -> [n, ...]."""
        return x[self.rows, self.keys]

    def add_to_queries(self, part: Tensor, to: Tensor) -> None:
        """Add [n, ...] at their places in [B, L, ...]."""
        to[self.rows, self.queries] += part

    def add_to_keys(self, part: Tensor, to: Tensor) -> None:
        """Add [n, ...] at their places in [B, M, ...]; the squares share no keys."""
        to[self.rows, self.keys] += part
