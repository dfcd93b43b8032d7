"""Rows [B, total, ...] of a sequence that are written chunk by chunk: on the device, or in the host's memory."""

from typing import Protocol

import torch
from torch import Tensor

from longtrain.sequence_parallel.lift import Coming, Lift
from longtrain.sequence_parallel.shard import Rows


class RowStore(Protocol):
    """All rows have one shape and type."""

    def write(self, rows: Rows, x: Tensor) -> None:
        """Keep the rows [B, begin to end, ...] of a chunk."""
        ...

    def join(self, rows: Rows, x: Tensor) -> Tensor:
        """Keep them; returns [B, end, ...], those of the chunks before and these."""
        ...

    def read(self, end: int) -> Tensor:
        """[B, end, ...]: not to be changed."""
        ...

    def prefetch(self, count: int, room: int) -> None:
        """`join` of the rows [count, room), or `read` of `count` = `room`, is likely to be next."""
        ...

    def prefetch_before(self, end: int) -> None:
        """`join` of the rows of the chunk that ends at `end` is likely to be next; they were written before."""
        ...

    def add(self, x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Add [B, end, ...] to sums in this type, zero at first; returns those of [begin, end), not kept any more."""
        ...

    @property
    def device_bytes(self) -> int:
        """What is kept on the device."""
        ...


class DeviceRows:
    """In one tensor, where they come from."""

    def __init__(self) -> None:
        self._all: Tensor | None = None

    def write(self, rows: Rows, x: Tensor) -> None:
        """See `RowStore`."""
        if self._all is None:
            self._all = x.new_empty(x.shape[0], rows.total, *x.shape[2:])
        self._all[:, rows.begin : rows.end] = x

    def join(self, rows: Rows, x: Tensor) -> Tensor:
        """See `RowStore`."""
        self.write(rows, x)
        return self.read(rows.end)

    def read(self, end: int) -> Tensor:
        """See `RowStore`."""
        assert self._all is not None
        return self._all[:, :end]

    def prefetch(self, count: int, room: int) -> None:
        """They are here."""

    def prefetch_before(self, end: int) -> None:
        """They are here."""

    def add(self, x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """See `RowStore`."""
        if self._all is None:
            self._all = x.new_zeros(x.shape[0], rows.total, *x.shape[2:], dtype=dtype)
        self._all[:, : rows.end] += x
        return self._all[:, rows.begin : rows.end]

    @property
    def device_bytes(self) -> int:
        """See `RowStore`."""
        return 0 if self._all is None else self._all.nbytes


class HostRows:
    """In pinned memory of the host; what is read or joined is a copy on the device.

    What is written is kept in a tensor for each chunk, sums in one.
    """

    def __init__(self, lift: Lift) -> None:
        self._lift = lift
        self._pieces: dict[int, Tensor] = {}
        """By the first row; none is empty."""
        self._soon: tuple[tuple[int, int], Coming] | None = None

    def write(self, rows: Rows, x: Tensor) -> None:
        """See `RowStore`."""
        if x.shape[1]:
            self._pieces[rows.begin] = self._lift.down(x.detach(), self._pieces.get(rows.begin))

    def join(self, rows: Rows, x: Tensor) -> Tensor:
        """See `RowStore`."""
        self.write(rows, x)
        if not rows.begin:
            return x.clone()
        whole = self._get(rows.begin, rows.end)
        whole[:, rows.begin : rows.end] = x
        return whole

    def read(self, end: int) -> Tensor:
        """See `RowStore`."""
        return self._get(end, end)

    def prefetch(self, count: int, room: int) -> None:
        """See `RowStore`."""
        if count and self._pieces and self._soon is None:
            self._soon = (count, room), self._fetch(count, room)

    def prefetch_before(self, end: int) -> None:
        """See `RowStore`."""
        self.prefetch(max((begin for begin in self._pieces if begin < end), default=0), end)

    def add(self, x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """See `RowStore`."""
        total = self._get(rows.end, rows.end) if self._pieces else torch.zeros_like(x, dtype=dtype)
        total += x
        there = self._pieces.pop(0, None)
        if rows.begin:
            there = None if there is None else there[:, : rows.begin]
            self._pieces[0] = self._lift.down(total[:, : rows.begin], there)
        return total[:, rows.begin :]

    @property
    def device_bytes(self) -> int:
        """See `RowStore`: what is on its way back."""
        return 0 if self._soon is None else self._soon[1].nbytes

    def _get(self, count: int, room: int) -> Tensor:
        soon, self._soon = self._soon, None
        if soon is not None:
            found = soon[1].wait()
            if soon[0] == (count, room):
                return found
            del found, soon  # their memory can hold what is wanted
        return self._fetch(count, room).wait()

    def _fetch(self, count: int, room: int) -> Coming:
        return self._lift.up_rows([self._pieces[begin] for begin in sorted(self._pieces) if begin < count], room)
