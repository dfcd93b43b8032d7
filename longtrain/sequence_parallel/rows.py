"""Rows [B, total, ...] of a sequence that chunks of time write and read: on the device, or in the host's memory."""

from typing import Protocol

import torch
from torch import Tensor

from longtrain.sequence_parallel.lift import Away, Coming, Lift
from longtrain.sequence_parallel.shard import Rows


class RowStore(Protocol):
    """Each chunk writes its rows once, all of one shape and type."""

    def write(self, rows: Rows, x: Tensor) -> None:
        """Keep the rows [B, begin to end, ...] of a chunk."""
        ...

    def join(self, rows: Rows, x: Tensor) -> Tensor:
        """Keep them if they are not there yet; returns [B, first to end, ...], all that the chunk sees."""
        ...

    def read(self, rows: Rows) -> Tensor:
        """[B, first to end, ...] once they are all there: not to be changed."""
        ...

    def prefetch(self, rows: Rows, own: bool) -> None:
        """`join` is likely to be next, or `read`, which needs the chunk's own rows too."""
        ...

    @property
    def device_bytes(self) -> int:
        """What is kept on the device."""
        ...


class SumStore(Protocol):
    """Sums of what chunks add to the rows that they see, the last chunk first."""

    def add(self, x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Add [B, first to end, ...] to sums in this type; returns those of [begin, end), which are not kept."""
        ...

    def prefetch(self, rows: Rows) -> None:
        """`add` is next."""
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
        """See `RowStore`. Rows that are there are written again, the same."""
        self.write(rows, x)
        return self.read(rows)

    def read(self, rows: Rows) -> Tensor:
        """See `RowStore`."""
        assert self._all is not None
        return self._all[:, rows.first : rows.end]

    def prefetch(self, rows: Rows, own: bool) -> None:
        """They are here."""

    @property
    def device_bytes(self) -> int:
        """See `RowStore`."""
        return 0 if self._all is None else self._all.nbytes


class DeviceSums:
    """In one tensor."""

    def __init__(self) -> None:
        self._all: Tensor | None = None

    def add(self, x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """See `SumStore`."""
        if self._all is None:
            self._all = x.new_zeros(x.shape[0], rows.total, *x.shape[2:], dtype=dtype)
        self._all[:, rows.first : rows.end] += x
        return self._all[:, rows.begin : rows.end]

    def prefetch(self, rows: Rows) -> None:
        """They are here."""

    @property
    def device_bytes(self) -> int:
        """See `SumStore`."""
        return 0 if self._all is None else self._all.nbytes


class HostRows:
    """In pinned memory of the host, a tensor for each chunk; what is read or joined is a copy on the device."""

    def __init__(self, lift: Lift) -> None:
        self._lift = lift
        self._pieces: dict[int, Away] = {}
        """By chunk; none is empty."""
        self._soon: dict[tuple[int, bool], Coming] = {}
        """By the chunk, and whether its own rows are in it: one that is read again and one that is joined, at most."""

    def write(self, rows: Rows, x: Tensor) -> None:
        """See `RowStore`."""
        if x.shape[1] and rows.chunk not in self._pieces:
            self._pieces[rows.chunk] = self._lift.down(x.detach())

    def join(self, rows: Rows, x: Tensor) -> Tensor:
        """See `RowStore`."""
        self.write(rows, x)
        if rows.begin == rows.first:
            return x.clone()
        whole = self._get(rows, own=False)
        whole[:, rows.begin - rows.first :] = x
        return whole

    def read(self, rows: Rows) -> Tensor:
        """See `RowStore`."""
        return self._get(rows, own=True)

    def prefetch(self, rows: Rows, own: bool) -> None:
        """See `RowStore`."""
        if (rows.chunk, own) not in self._soon and self._wanted(rows, own):
            self._soon[rows.chunk, own] = self._fetch(rows, own)

    @property
    def device_bytes(self) -> int:
        """See `RowStore`: what is on its way back."""
        return sum(coming.nbytes for coming in self._soon.values())

    def _get(self, rows: Rows, own: bool) -> Tensor:
        coming = self._soon.pop((rows.chunk, own), None)
        if coming is None:
            while self._soon:  # nobody wants it; its memory can hold what is wanted
                self._soon.popitem()[1].wait()
            coming = self._fetch(rows, own)
        return coming.wait()

    def _fetch(self, rows: Rows, own: bool) -> Coming:
        return self._lift.up_rows(self._wanted(rows, own), 0, rows.end - rows.first)

    def _wanted(self, rows: Rows, own: bool) -> list[Away]:
        """The pieces of the chunks that it sees, with its own or without."""
        chunks = range(rows.first_chunk, rows.chunk + own)
        return [self._pieces[chunk] for chunk in chunks if chunk in self._pieces]


class HostSums:
    """In pinned memory of the host: the rows to which a chunk has added and to which others will."""

    def __init__(self, lift: Lift) -> None:
        self._lift = lift
        self._away: Away | None = None
        self._soon: Coming | None = None

    def add(self, x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """See `SumStore`."""
        self.prefetch(rows)
        total = torch.zeros_like(x, dtype=dtype) if self._soon is None else self._soon.wait()
        total += x
        kept = total[:, : rows.begin - rows.first]
        self._away, self._soon = self._lift.down(kept, self._away) if kept.numel() else None, None
        return total[:, rows.begin - rows.first :]

    def prefetch(self, rows: Rows) -> None:
        """See `SumStore`. This chunk may see more than the one behind it: zeros before what that one has added to."""
        if self._soon is None and self._away is not None:
            room = rows.end - rows.first
            self._soon = self._lift.up_rows([self._away], room - self._away.tensor.shape[1], room)

    @property
    def device_bytes(self) -> int:
        """See `SumStore`: what is on its way back."""
        return 0 if self._soon is None else self._soon.nbytes
