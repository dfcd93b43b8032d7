"""Copies between a device and the host's memory, beside what the device computes and beside each other."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The device waits for the oldest copy to the host when more than so many are not known to be finished, of tensors of so
# many bytes in all: the carries of a chunk are many and small; the largest, gradients of keys and of values, leave in
# pairs.
LEAVING, LEAVING_BYTES = 2, 2**28


@dataclass(frozen=True)
class Away:
    """A tensor in the host's memory, once its copy is done."""

    tensor: Tensor
    room: Tensor
    """[n] the memory that it is in, which may be larger."""
    number: int
    """Of the copy; they are done in this order."""
    done: torch.cuda.Event | None

    def is_there(self) -> bool:
        """Whether the copy is done by now."""
        return self.done is None or self.done.query()


class Lift:
    """A stream for each direction; on a CPU copies are made at once.

    A tensor that leaves is kept until the compute stream has waited for its copy, and one that comes belongs to the
    compute stream: so memory is used again in the order in which the device computes, however far ahead the host is.
    What comes waits for what the device computes when it is asked for, and for nothing that is queued afterwards.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._down, self._up = (torch.cuda.Stream(device) if on_gpu else None for _ in range(2))
        self._begun = 0
        self._leaving: deque[tuple[Tensor, Away]] = deque()
        self._leaving_bytes = 0
        self._coming: list[Coming] = []
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        """Before and after each wait of the compute stream that is not counted yet."""
        self._waited = 0.0

    def down(self, x: Tensor, place: Away | None = None) -> Away:
        """Begin a copy to pinned memory of the host, in the place of what has been brought back if there is room."""
        self._begun += 1
        if place is not None and place.room.numel() >= x.numel() and place.room.dtype == x.dtype:
            room = place.room
        else:
            room = torch.empty(x.numel(), dtype=x.dtype, pin_memory=self._down is not None)
        there = room[: x.numel()].view(x.shape)
        if self._down is None:
            _copy(there, x)
            return Away(there, room, self._begun, None)
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            _copy(there, x)
        away = Away(there, room, self._begun, self._down.record_event())
        self._leaving.append((x, away))
        while self._leaving and self._leaving[0][1].is_there():
            self._let_go()
        while len(self._leaving) > LEAVING and self._leaving_bytes > LEAVING_BYTES:
            self._wait_for(self._let_go().done)
        return away

    def up(self, away: Away) -> "Coming":
        """Begin to bring back what is at the host."""
        return self._bring(away.tensor.shape, [away], lambda whole: _copy(whole, away.tensor))

    def up_rows(self, pieces: Sequence[Away], at: int, room: int) -> "Coming":
        """Begin to bring back pieces [B, n, ...], one behind the other, into [B, room, ...] from row `at`.

        Rows before them are zeros, those behind are not set.
        """

        def fill(whole: Tensor) -> None:
            whole[:, :at].zero_()
            begin = at
            for away in pieces:
                end = begin + away.tensor.shape[1]
                _copy(whole[:, begin:end], away.tensor)
                begin = end

        like = pieces[0].tensor
        return self._bring((like.shape[0], room, *like.shape[2:]), pieces, fill)

    def settle(self) -> None:
        """Let go of everything that is under way; the device waits for it."""
        while self._leaving:
            self._wait_for(self._let_go().done)
        for coming in list(self._coming):
            coming.wait()

    def waited(self) -> float:
        """Seconds that the compute stream stood still for copies since the last call; the host waits for the last."""
        if self._waits:
            self._waits[-1][1].synchronize()
        self._count_waits()
        found, self._waited = self._waited, 0.0
        return found

    def received(self, coming: "Coming", done: torch.cuda.Event) -> None:
        """The compute stream needs it now."""
        self._coming.remove(coming)
        self._wait_for(done)

    def _let_go(self) -> Away:
        """Of what left first."""
        x, away = self._leaving.popleft()
        self._leaving_bytes -= x.untyped_storage().nbytes()
        return away

    def _wait_for(self, done: torch.cuda.Event | None) -> None:
        assert done is not None
        stream = torch.cuda.current_stream(self._device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        done.wait(stream)
        end.record(stream)
        self._waits.append((begin, end))
        self._count_waits()

    def _count_waits(self) -> None:
        """Those that are over."""
        while self._waits and self._waits[0][1].query():
            begin, end = self._waits.popleft()
            self._waited += begin.elapsed_time(end) / 1e3

    def _bring(self, shape: Sequence[int], sources: Sequence[Away], fill: Callable[[Tensor], object]) -> "Coming":
        whole = torch.empty(tuple(shape), dtype=sources[0].tensor.dtype, device=self._device)
        if self._up is None:
            fill(whole)
            return Coming(whole, None, self)
        self._up.wait_stream(torch.cuda.current_stream(self._device))
        last = max(sources, key=lambda away: away.number).done
        assert last is not None
        self._up.wait_event(last)
        with torch.cuda.stream(self._up):
            fill(whole)
            coming = Coming(whole, self._up.record_event(), self)
        self._coming.append(coming)
        return coming


class Coming:
    """A tensor that is being filled."""

    def __init__(self, tensor: Tensor, done: torch.cuda.Event | None, lift: Lift) -> None:
        self._tensor, self._done, self._lift = tensor, done, lift

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return self._tensor.nbytes

    def wait(self) -> Tensor:
        """On a GPU the stream waits, not the host."""
        done, self._done = self._done, None
        if done is not None:
            self._lift.received(self, done)
        return self._tensor


def _copy(to: Tensor, source: Tensor) -> None:
    """Beside what the host does: rows of a batch one by one, since copies of what is not contiguous are staged."""
    if to.is_contiguous() and source.is_contiguous():
        to.copy_(source, non_blocking=True)
    else:
        for row, some in zip(to, source, strict=True):
            row.copy_(some, non_blocking=True)
