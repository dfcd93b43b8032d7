"""Where tensors wait for the backward pass: where they are, or in the host's memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Shelf:
    """Tuples of tensors by chunk; each is put once and taken once. This one leaves them where they are."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def put(self, chunk: int, tensors: Sequence[Tensor]) -> None:
        """Keep them; the caller does not change them any more."""
        self._kept[chunk] = tuple(_alone(x) for x in tensors)

    def look(self, chunk: int) -> tuple[Tensor, ...]:
        """What was put there."""
        return self._kept[chunk]

    def take(self, chunk: int) -> tuple[Tensor, ...]:
        """What was put there, and is not kept any more. What was put before it is likely to be next."""
        return self._kept.pop(chunk)


def _alone(x: Tensor) -> Tensor:
    """Without what it is a part of: the last three rows of a chunk would keep all of its rows."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


@dataclass(frozen=True)
class _Moved:
    """Copies on another device, and when they are there."""

    tensors: tuple[Tensor, ...]
    done: torch.cuda.Event


class HostShelf(Shelf):
    """In pinned memory of the host. Copies run on a stream of their own, and come back one chunk ahead."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._away: dict[int, _Moved] = {}
        self._coming: dict[int, _Moved] = {}

    def put(self, chunk: int, tensors: Sequence[Tensor]) -> None:
        """See `Shelf.put`."""
        pinned = tuple(torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for there, here in zip(pinned, tensors, strict=True):
                there.copy_(here, non_blocking=True)
                here.record_stream(self._stream)
            self._away[chunk] = _Moved(pinned, self._stream.record_event())

    def look(self, chunk: int) -> tuple[Tensor, ...]:
        """See `Shelf.look`; the one behind it is fetched already."""
        found = self._coming.pop(chunk, None) or self._fetch(chunk)
        if chunk + 1 in self._away and chunk + 1 not in self._coming:
            self._coming[chunk + 1] = self._fetch(chunk + 1)
        return self._here(found)

    def take(self, chunk: int) -> tuple[Tensor, ...]:
        """See `Shelf.take`; the one before it is fetched already."""
        found = self._coming.pop(chunk, None) or self._fetch(chunk)
        self._away.pop(chunk)
        if chunk - 1 in self._away and chunk - 1 not in self._coming:
            self._coming[chunk - 1] = self._fetch(chunk - 1)
        return self._here(found)

    def _here(self, found: _Moved) -> tuple[Tensor, ...]:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(found.done)
        for tensor in found.tensors:
            tensor.record_stream(stream)
        return found.tensors

    def _fetch(self, chunk: int) -> _Moved:
        with torch.cuda.stream(self._stream):
            self._away[chunk].done.wait()
            tensors = tuple(x.to(self._device, non_blocking=True) for x in self._away[chunk].tensors)
            return _Moved(tensors, self._stream.record_event())


def make_shelf(offload: str, device: torch.device) -> Shelf:
    """For `stream.offload`; on a CPU everything is in the host's memory as it is."""
    return HostShelf(device) if offload == "host" and device.type == "cuda" else Shelf()
