"""Keys and values of a softmax layer between chunks of time: computed once, and differentiated once.

Carries of recurrent layers have a fixed size and go from chunk to chunk by value. Keys and values grow with the
context: a chunk adds its rows to those of the chunks before and attends to all that have a token of a document that
goes on. Backward, from the last chunk to the first, every chunk adds what it finds to float32 sums of the gradients of
these; when a chunk's turn comes, those of its own rows are whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from longtrain.sequence_parallel.lift import Lift
from longtrain.sequence_parallel.rows import DeviceRows, DeviceSums, HostRows, HostSums, RowStore, SumStore
from longtrain.sequence_parallel.shard import Rows
from longtrain_kernels.affine import accumulator_dtype

Saved = Tensor | Callable[[], Tensor]
_Place = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Where a tensor is, its shape and its strides."""


class Filled(Exception):
    """The last keys and values that were wanted are there; nothing that would follow is of use."""


class Prefix:
    """Of one layer, on one rank."""

    def __init__(self, lift: Lift | None = None) -> None:
        self._kept: tuple[RowStore, RowStore]
        self._sums: tuple[SumStore, SumStore]
        if lift is None:
            self._kept, self._sums = (DeviceRows(), DeviceRows()), (DeviceSums(), DeviceSums())
        else:
            self._kept, self._sums = (HostRows(lift), HostRows(lift)), (HostSums(lift), HostSums(lift))
        self._extended: dict[_Place, RowStore] = {}
        """While it attends; the tensors themselves would hold this prefix, a cycle if attention raises."""
        self._read_again = False
        """Whether the backward pass reads what was extended last; an algorithm may have saved something else."""
        self.only_fill = False
        """Lets `extend` raise Filled."""
        self.differentiated = False
        """Whether there is a backward pass of what attended last."""
        self.rows = Rows(0, 0, 0, (0,))
        """Of the chunk that was there last."""

    def extend(self, k: Tensor, v: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Keys [B, n, G, K] and values [B, n, G, V] of the n tokens that this chunk sees, from those of this one.

        They are in ascending order: those that `Shard.team` has as `held`, of whom the rows are. Differentiable once
        for every chunk, the last chunk first. A sequence of one chunk is not kept.

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
        self._extended = dict(zip(map(_place, found), self._kept, strict=True))
        return found

    def pack(self, tensor: Tensor) -> Saved | None:
        """How to get back what `extend` returned last, in place of saving it; None for another tensor."""
        store = self._extended.get(_place(tensor)) if tensor.numel() else None
        if store is None:
            return None
        self._read_again = True
        return partial(store.read, self.rows)

    def has_attended(self, differentiated: bool) -> None:
        """With the keys and values that were extended last."""
        self._extended, self.differentiated = {}, differentiated

    def prefetch(self, rows: Rows | None) -> None:
        """It attends in this chunk soon, if there is such a chunk."""
        if rows is not None and not self.only_fill:
            for store in self._kept:
                store.prefetch(rows, own=False)

    def prefetch_again(self) -> None:
        """It is differentiated soon."""
        for store in self._kept if self._read_again else ():
            store.prefetch(self.rows, own=True)

    def prefetch_sums(self) -> None:
        """It is being differentiated."""
        for store in self._sums:
            store.prefetch(self.rows)

    def join(self, k: Tensor, v: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """`extend` without gradients."""
        return self._kept[0].join(rows, k), self._kept[1].join(rows, v)

    def collect(self, dk: Tensor, dv: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Add gradients of all rows that the chunk sees; returns those of its own, to which no chunk adds any more."""
        own = [
            store.add(grad, rows, accumulator_dtype(grad.dtype)).to(grad.dtype)
            for store, grad in zip(self._sums, (dk, dv), strict=True)
        ]
        return own[0], own[1]

    @property
    def device_bytes(self) -> tuple[int, int]:
        """Of keys and values, and of the sums of their gradients, on the device."""
        return sum(store.device_bytes for store in self._kept), sum(store.device_bytes for store in self._sums)


class Prefixes:
    """Of the softmax layers of a block, in order; made as they are asked for.

    What waits in the host's memory is asked for before attention is queued, the longest work of a chunk, so that it
    comes beside that: keys and values of the layer that attends or is differentiated next, and the sums of this one.
    """

    def __init__(self, lift: Lift | None = None, filled: int = 0) -> None:
        """With a `lift` they wait in the host's memory while they are not used.

        With `filled` layers, a pass over them ends with Filled at the last one, until `all_filled`.
        """
        self._lift, self._filled = lift, filled
        self._prefixes: list[Prefix] = []
        self._with_a_graph = False

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

    def at(self, layer: int) -> "Turn":
        """Of the next softmax layer, or of one before."""
        if layer == len(self._prefixes):
            self._prefixes.append(Prefix(self._lift))
            self._prefixes[layer].only_fill = layer + 1 == self._filled
        return Turn(self, layer)

    def extend(self, layer: int, k: Tensor, v: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Prefix.extend`; attention comes next."""
        found = self._prefixes[layer].extend(k, v, rows)
        if layer + 1 < len(self._prefixes) and not self._prefixes[layer + 1].only_fill:
            self._prefixes[layer + 1].prefetch(rows)
        elif not self._with_a_graph:
            self._prefixes[0].prefetch(rows.beside(1))
        return found

    def has_attended(self, layer: int, output: Tensor) -> None:
        """A layer, with this output."""
        self._prefixes[layer].has_attended(output.requires_grad)
        if self._lift is None:
            return
        if output.requires_grad:
            output.register_hook(lambda grad: self._is_differentiated(layer))
        elif self._with_a_graph and layer + 1 == len(self._prefixes):
            self._follow(layer)

    def all_filled(self) -> None:
        """From now on layers attend, in the last chunk first."""
        self._filled = 0
        for prefix in self._prefixes:
            prefix.only_fill = False
        if self._prefixes:
            self._prefixes[0].prefetch(self._prefixes[0].rows.last)

    @contextmanager
    def with_a_graph(self) -> Iterator[None]:
        """Around a forward pass that is differentiated; the chunk before comes next. Keys and values from the host are
        read again, not saved, but for those of the last layer, which is differentiated first."""
        self._with_a_graph = True
        with saved_tensors_hooks(self._pack, _unpack) if self._lift is not None else nullcontext():
            yield
        self._with_a_graph = False

    def _is_differentiated(self, layer: int) -> None:
        self._prefixes[layer].prefetch_sums()
        self._follow(layer)

    def _follow(self, layer: int) -> None:
        """Fetch what is needed after the backward pass of a layer."""
        if layer and self._prefixes[layer - 1].differentiated:
            self._prefixes[layer - 1].prefetch_again()
        else:
            self._prefixes[0].prefetch(self._prefixes[layer].rows.beside(-1))

    def _pack(self, tensor: Tensor) -> Saved:
        found = (prefix.pack(tensor) for prefix in self._prefixes[:-1])
        # The tensor itself would hold the node that saves it: a cycle, where that is not differentiated.
        return next((saved for saved in found if saved is not None), tensor.detach())


@dataclass(frozen=True)
class Turn:
    """Of a softmax layer to attend, in one chunk."""

    prefixes: Prefixes
    layer: int

    def extend(self, k: Tensor, v: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Prefix.extend`."""
        return self.prefixes.extend(self.layer, k, v, rows)


def _place(tensor: Tensor) -> _Place:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


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
