"""Keys and values of a softmax layer between chunks of time: computed once, and differentiated once.

Carries of recurrent layers have a fixed size and go from chunk to chunk by value. Keys and values grow with the
context: a chunk adds its rows to those of the chunks before and attends to all of them. Backward, from the last chunk
to the first, every chunk adds what it finds to float32 sums of the gradients of all of them; when a chunk's turn comes,
those of its own rows are whole.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from longtrain.sequence_parallel.lift import Lift
from longtrain.sequence_parallel.rows import DeviceRows, HostRows, RowStore
from longtrain.sequence_parallel.shard import Rows
from longtrain_kernels.affine import accumulator_dtype

Saved = Tensor | Callable[[], Tensor]


class Filled(Exception):
    """The last keys and values that were wanted are there; nothing that would follow is of use."""


class Prefix:
    """Of one layer, on one rank."""

    def __init__(self, lift: Lift | None = None, below: "Prefix | None" = None, only_fill: bool = False) -> None:
        """`below` is of the softmax layer before it in the block. `only_fill` lets `extend` raise Filled."""
        self._lift, self._below, self.only_fill = lift, below, only_fill
        self._kept: tuple[RowStore, RowStore] = self._store(), self._store()
        self._sums: tuple[RowStore, RowStore] = self._store(), self._store()
        self._extended: list[tuple[Tensor, RowStore]] = []
        self._read_again = False
        """Whether the backward pass reads what was extended last; an algorithm may have saved something else."""
        self.rows = Rows(0, 0, 0, alone=True)
        """Of the chunk that was there last."""

    def extend(self, k: Tensor, v: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Keys [B, rows.end, G, K] and values [B, rows.end, G, V] of all chunks so far from those of this one.

        Differentiable once for every chunk, the last chunk first. A sequence of one chunk is not kept.

        Raises Filled where no more than keeping them was asked for.
        """
        if rows.alone:
            return k, v
        self.rows, self._read_again = rows, False
        if self.only_fill:
            for store, new in zip(self._kept, (k, v), strict=True):
                store.write(rows, new)
            raise Filled
        found: tuple[Tensor, Tensor] = _Extend.apply(k, v, self, rows)
        self._extended = list(zip(found, self._kept, strict=True))
        return found

    def pack(self, tensor: Tensor) -> Saved | None:
        """How to get back what `extend` returned last, in place of saving it; None for another tensor."""
        for x, store in self._extended if tensor.numel() else ():
            if (x.data_ptr(), x.shape, x.stride()) == (tensor.data_ptr(), tensor.shape, tensor.stride()):
                self._read_again = True
                return partial(self._again, store, self.rows.end)
        return None

    def leave(self) -> None:
        """The layer has attended."""
        self._extended = []

    def prefetch_chunk(self, rows: Rows) -> None:
        """It attends next, in the same chunk as the layer below, whose rows these are."""
        for store in self._kept:
            store.prefetch(rows.begin, rows.end)

    def prefetch_next_chunk(self) -> None:
        """It attends next, in the chunk behind this one; all but the last are of one length."""
        begin, end, total, _ = self.rows
        if end < total:
            for store in self._kept:
                store.prefetch(end, min(2 * end - begin, total))

    def prefetch_again(self) -> None:
        """It is differentiated next; sums follow what is read again."""
        for store in self._kept if self._read_again else self._sums:
            store.prefetch(self.rows.end, self.rows.end)

    def join(self, k: Tensor, v: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """`extend` without gradients. Rows that are there already are written again, the same."""
        return self._kept[0].join(rows, k), self._kept[1].join(rows, v)

    def collect(self, dk: Tensor, dv: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Add gradients of all rows so far; returns those of this chunk's rows, which no chunk adds to any more."""
        own = [
            store.add(grad, rows, accumulator_dtype(grad.dtype)).to(grad.dtype)
            for store, grad in zip(self._sums, (dk, dv), strict=True)
        ]
        if self._below is not None:
            self._below.prefetch_again()
        else:  # the next to attend, in the chunk before
            for store in self._kept:
                store.prefetch_before(rows.begin)
        return own[0], own[1]

    @property
    def device_bytes(self) -> tuple[int, int]:
        """Of keys and values, and of the sums of their gradients, on the device."""
        kept, sums = (sum(store.device_bytes for store in pair) for pair in (self._kept, self._sums))
        return kept, sums

    def _again(self, store: RowStore, end: int) -> Tensor:
        """What was extended, for the backward pass, which adds to the sums next."""
        found = store.read(end)
        for sums in self._sums:
            sums.prefetch(end, end)
        return found

    def _store(self) -> RowStore:
        return DeviceRows() if self._lift is None else HostRows(self._lift)


class Prefixes:
    """Of the softmax layers of a block, in order; made as they are asked for."""

    def __init__(self, lift: Lift | None = None, filled: int = 0) -> None:
        """With a `lift` they wait in the host's memory while they are not used.

        With `filled` layers, a pass over them ends with Filled at the last one, until `all_filled`.
        """
        self._lift, self._filled = lift, filled
        self._prefixes: list[Prefix] = []

    def __len__(self) -> int:
        """How many layers have asked."""
        return len(self._prefixes)

    @property
    def wanted(self) -> bool:
        """Whether there are layers to be filled."""
        return self._filled > 0

    @property
    def device_bytes(self) -> tuple[int, int]:
        """Of keys and values, and of the sums of their gradients, on the device."""
        found = [prefix.device_bytes for prefix in self._prefixes]
        return sum(kept for kept, _ in found), sum(sums for _, sums in found)

    def at(self, layer: int) -> Prefix:
        """Of the next softmax layer, or of one before."""
        if layer == len(self._prefixes):
            below = self._prefixes[-1] if self._prefixes else None
            self._prefixes.append(Prefix(self._lift, below, only_fill=layer + 1 == self._filled))
        return self._prefixes[layer]

    def leave(self, layer: int) -> None:
        """A layer has attended. What is needed next comes back beside what the device computes until then."""
        left = self._prefixes[layer]
        left.leave()
        above = self._prefixes[layer + 1] if layer + 1 < len(self._prefixes) else None
        if above is not None and not above.only_fill:
            above.prefetch_chunk(left.rows)
        elif torch.is_grad_enabled():  # the chunk's backward pass follows
            left.prefetch_again()
        else:
            self._prefixes[0].prefetch_next_chunk()

    def all_filled(self) -> None:
        """From now on layers attend, in the last chunk first."""
        self._filled = 0
        for prefix in self._prefixes:
            prefix.only_fill = False
        if self._prefixes:
            self._prefixes[0].prefetch_next_chunk()

    def saving(self) -> AbstractContextManager[object]:
        """Around a forward pass with a graph: keys and values from the host are read again, not saved."""
        return saved_tensors_hooks(self._pack, _unpack) if self._lift is not None else nullcontext()

    def _pack(self, tensor: Tensor) -> Saved:
        found = (prefix.pack(tensor) for prefix in self._prefixes)
        # The tensor itself would hold the node that saves it: a cycle, where that is not differentiated.
        return next((saved for saved in found if saved is not None), tensor.detach())


def _unpack(saved: Saved) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved()


class _Extend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, prefix: Prefix, rows: Rows) -> tuple[Tensor, Tensor]:
        ctx.prefix, ctx.rows = prefix, rows
        return prefix.join(k, v, rows)

    @staticmethod
    def backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *ctx.prefix.collect(dk, dv, ctx.rows), None, None
