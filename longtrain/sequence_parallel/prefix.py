"""Keys and values of a softmax layer between chunks of time: computed once, and differentiated once.

Carries of recurrent layers have a fixed size and go from chunk to chunk by value. Keys and values grow with the
context: a chunk adds its rows to a buffer and attends to all rows so far. Backward, from the last chunk to the first,
every chunk adds what it finds to float32 sums of the gradients of all of them; when a chunk's turn comes, those of its
own rows are whole.
"""

from typing import Any

import torch
from torch import Tensor

from longtrain.sequence_parallel.shard import Rows
from longtrain_kernels.affine import accumulator_dtype


class Filled(Exception):
    """The last keys and values that were wanted are there; nothing that would follow is of use."""


class Prefix:
    """Of one layer, on one rank."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None
        self._sums: tuple[Tensor, Tensor] | None = None
        self.only_fill = False
        """Whether `extend` raises Filled: for a pass that brings back keys and values of layers below."""

    def extend(self, k: Tensor, v: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Keys [B, rows.end, G, K] and values [B, rows.end, G, V] of all chunks so far from those of this one.

        Differentiable once for every chunk, the last chunk first. A sequence of one chunk is not kept.

        Raises Filled where no more than keeping them was asked for.
        """
        if rows.total == rows.end - rows.begin:
            return k, v
        k, v = _Extend.apply(k, v, self, rows)
        if self.only_fill:
            raise Filled
        return k, v

    def keep(self, k: Tensor, v: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """`extend` without gradients. Rows that are there already are written again, the same."""
        if self._kept is None:
            self._kept = _buffer(k, rows.total, k.dtype), _buffer(v, rows.total, v.dtype)
        for kept, new in zip(self._kept, (k, v), strict=True):
            kept[:, rows.begin : rows.end] = new
        return self._kept[0][:, : rows.end], self._kept[1][:, : rows.end]

    def collect(self, dk: Tensor, dv: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Add gradients of all rows so far; returns those of this chunk's rows, which no chunk adds to any more."""
        if self._sums is None:
            self._sums = tuple(  # type: ignore[assignment]
                _buffer(grad, rows.total, accumulator_dtype(grad.dtype)).zero_() for grad in (dk, dv)
            )
        assert self._sums is not None
        for total, grad in zip(self._sums, (dk, dv), strict=True):
            total[:, : rows.end] += grad
        own_k, own_v = (total[:, rows.begin : rows.end] for total in self._sums)
        return own_k.to(dk.dtype), own_v.to(dv.dtype)


def _buffer(like: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return like.new_empty(like.shape[0], rows, *like.shape[2:], dtype=dtype)


class _Extend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, prefix: Prefix, rows: Rows) -> tuple[Tensor, Tensor]:
        ctx.prefix, ctx.rows = prefix, rows
        return prefix.keep(k, v, rows)

    @staticmethod
    def backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *ctx.prefix.collect(dk, dv, ctx.rows), None, None
