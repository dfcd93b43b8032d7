"""Many causal squares, as one call of a kernel that takes sequences of several lengths."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from longtrain_kernels.block_attention.kernel import Block, Squares
from longtrain_kernels.upload import upload


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
        """The squares `blocks`, on `device`, for which the host does not wait."""
        each = [(row, block) for block in blocks for row in range(block.rows.start, block.rows.stop)]
        sizes = [block.queries.stop - block.queries.start for _, block in each]
        edges = list(accumulate(sizes, initial=0))
        # Less the tokens of the squares before it, places of the first token and numbers of all tokens add up.
        firsts = [
            (row, b.queries.start - edge, b.keys.start - edge) for (row, b), edge in zip(each, edges, strict=False)
        ]
        ends = upload(torch.tensor(edges, dtype=torch.int32), device)
        places = upload(torch.tensor(firsts), device)
        places = places.repeat_interleave(ends.diff(), dim=0, output_size=edges[-1])
        places[:, 1:] += torch.arange(edges[-1], device=device)[:, None]
        return cls(Squares(ends, max(sizes)), *places.unbind(1))

    def of_queries(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [n, ...]."""
        return x[self.rows, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        """[B, M, ...] -> [n, ...]."""
        return x[self.rows, self.keys]
