"""Copies between a device and the host's memory, beside what the device computes."""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# The device waits for the oldest copy to the host when more than so many are unfinished, of so many bytes in all: the
# carries of a chunk are many and small.
LEAVING, LEAVING_BYTES = 4, 2**28


class Lift:
    """One stream, in the order of the calls; on a CPU copies are made at once.

    A tensor that leaves is kept until the compute stream has waited for its copy, and one that comes belongs to the
    compute stream: so memory is used again in the order in which the device computes, however far ahead the host is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._coming: list[Coming] = []
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        """Before and after each wait of the compute stream."""

    def down(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        """Begin a copy in pinned memory of the host, in `there` if it is given; returns it."""
        if there is None:
            there = torch.empty(x.shape, dtype=x.dtype, pin_memory=self._stream is not None)
        if self._stream is None:
            return there.copy_(x)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            there.copy_(x, non_blocking=True)
            self._leaving.append((x, self._stream.record_event()))
        while len(self._leaving) > LEAVING and sum(x.nbytes for x, _ in self._leaving) > LEAVING_BYTES:
            self._wait_for(self._leaving.popleft()[1])
        return there

    def up(self, x: Tensor) -> "Coming":
        """Begin to bring back what is at the host."""
        return self._bring(x.shape, x.dtype, lambda whole: whole.copy_(x, non_blocking=True))

    def up_rows(self, pieces: Sequence[Tensor], room: int) -> "Coming":
        """Begin to bring back pieces [B, n, ...], one behind the other, into [B, room, ...]."""
        first = pieces[0]

        def fill(whole: Tensor) -> None:
            at = 0
            for piece in pieces:
                whole[:, at : at + piece.shape[1]].copy_(piece, non_blocking=True)
                at += piece.shape[1]

        return self._bring((first.shape[0], room, *first.shape[2:]), first.dtype, fill)

    def settle(self) -> None:
        """Let go of everything that is under way; the device waits for it."""
        while self._leaving:
            self._wait_for(self._leaving.popleft()[1])
        for coming in list(self._coming):
            coming.wait()

    def waited(self) -> float:
        """Seconds that the compute stream stood still for copies since the last call; the host waits for the last."""
        waits, self._waits = self._waits, []
        if waits:
            waits[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in waits) / 1e3

    def received(self, coming: "Coming", done: torch.cuda.Event) -> None:
        """The compute stream needs it now."""
        self._coming.remove(coming)
        self._wait_for(done)

    def _wait_for(self, done: torch.cuda.Event) -> None:
        stream = torch.cuda.current_stream(self._device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        done.wait(stream)
        end.record(stream)
        self._waits.append((begin, end))

    def _bring(self, shape: Sequence[int], dtype: torch.dtype, fill: Callable[[Tensor], object]) -> "Coming":
        whole = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        if self._stream is None:
            fill(whole)
            return Coming(whole, None, self)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            fill(whole)
            coming = Coming(whole, self._stream.record_event(), self)
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
