"""Rows [B, total, ...] of a sequence that are written chunk by chunk: on the device, or in the host's memory."""

from typing import Protocol

import torch
from torch import Tensor

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

    def add(self, x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Add [B, end, ...] to sums in this type, zero at first; returns those of [begin, end), not kept any more."""
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

    def add(self, x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """See `RowStore`."""
        if self._all is None:
            self._all = x.new_zeros(x.shape[0], rows.total, *x.shape[2:], dtype=dtype)
        self._all[:, : rows.end] += x
        return self._all[:, rows.begin : rows.end]


class Lift:
    """Copies between a device and the host's memory, on a stream of their own, in the order in which they are asked
    for; on a CPU they are made at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def down(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        """Begin a copy in the host's memory, in `there` if it is given; returns it."""
        if there is None:
            there = torch.empty(x.shape, dtype=x.dtype, pin_memory=self._stream is not None)
        if self._stream is None:
            return there.copy_(x)
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            there.copy_(x, non_blocking=True)
        x.record_stream(self._stream)
        return there

    def up(self, pieces: list[Tensor], room: int, device: torch.device) -> "Coming":
        """Begin to copy pieces [B, n, ...] from the host, one behind the other, into [B, room, ...]."""
        first = pieces[0]
        if self._stream is None:
            return Coming(_filled(pieces, first.new_empty(first.shape[0], room, *first.shape[2:])), None)
        with torch.cuda.stream(self._stream):
            whole = torch.empty(first.shape[0], room, *first.shape[2:], dtype=first.dtype, device=device)
            return Coming(_filled(pieces, whole), self._stream.record_event())


class Coming:
    """A tensor that is being filled."""

    def __init__(self, tensor: Tensor, done: torch.cuda.Event | None) -> None:
        self._tensor, self._done = tensor, done

    def wait(self) -> Tensor:
        """On a GPU the stream waits, not the host."""
        if self._done is not None:
            self._done.wait()
            self._tensor.record_stream(torch.cuda.current_stream(self._tensor.device))
        return self._tensor


class HostRows:
    """In pinned memory of the host; what is read or joined is a copy on the device.

    What is written is kept in a tensor for each chunk, sums in one.
    """

    def __init__(self, lift: Lift) -> None:
        self._lift = lift
        self._pieces: dict[int, Tensor] = {}
        """By the first row."""
        self._device = torch.device("cpu")
        self._soon: tuple[tuple[int, int], Coming] | None = None

    def write(self, rows: Rows, x: Tensor) -> None:
        """See `RowStore`."""
        self._device = x.device
        self._pieces[rows.begin] = self._lift.down(x.detach(), self._pieces.get(rows.begin))

    def join(self, rows: Rows, x: Tensor) -> Tensor:
        """See `RowStore`."""
        self.write(rows, x)
        whole = self._get(rows.begin, rows.end) if rows.begin else x.new_empty(x.shape[0], rows.end, *x.shape[2:])
        whole[:, rows.begin : rows.end] = x
        return whole

    def read(self, end: int) -> Tensor:
        """See `RowStore`."""
        return self._get(end, end)

    def prefetch(self, count: int, room: int) -> None:
        """See `RowStore`; one prefetch at a time."""
        if count and self._pieces:
            self._soon = (count, room), self._fetch(count, room)

    def add(self, x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """See `RowStore`."""
        self._device = x.device
        total = self._get(rows.end, rows.end) if self._pieces else torch.zeros_like(x, dtype=dtype)
        total += x
        there = self._pieces.pop(0, None)
        if rows.begin:
            there = None if there is None else there[:, : rows.begin]
            self._pieces[0] = self._lift.down(total[:, : rows.begin], there)
        return total[:, rows.begin :]

    def _get(self, count: int, room: int) -> Tensor:
        soon, self._soon = self._soon, None
        coming = soon[1] if soon is not None and soon[0] == (count, room) else self._fetch(count, room)
        return coming.wait()

    def _fetch(self, count: int, room: int) -> Coming:
        pieces = [self._pieces[begin] for begin in sorted(self._pieces) if begin < count]
        return self._lift.up(pieces, room, self._device)


def _filled(pieces: list[Tensor], whole: Tensor) -> Tensor:
    at = 0
    for piece in pieces:
        whole[:, at : at + piece.shape[1]].copy_(piece, non_blocking=True)
        at += piece.shape[1]
    return whole
