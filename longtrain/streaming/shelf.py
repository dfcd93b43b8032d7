"""Where tensors wait for the backward pass: where they are, or in the host's memory."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from longtrain.sequence_parallel.lift import Away, Coming, Lift


class Shelf(Protocol):
    """Tuples of tensors by chunk, looked at in ascending order and taken in descending order."""

    def put(self, chunk: int, tensors: Sequence[Tensor]) -> None:
        """Keep them; nobody changes them any more."""
        ...

    def look(self, chunk: int) -> tuple[Tensor, ...]:
        """What was put there."""
        ...

    def take(self, chunk: int) -> tuple[Tensor, ...]:
        """What was put there, and is not kept any more: others may be put in its place."""
        ...

    @property
    def device_bytes(self) -> int:
        """What is kept on the device."""
        ...


class DeviceShelf:
    """Leaves them where they are."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def put(self, chunk: int, tensors: Sequence[Tensor]) -> None:
        """See `Shelf`."""
        self._kept[chunk] = tuple(map(_alone, tensors))

    def look(self, chunk: int) -> tuple[Tensor, ...]:
        """See `Shelf`."""
        return self._kept[chunk]

    def take(self, chunk: int) -> tuple[Tensor, ...]:
        """See `Shelf`."""
        return self._kept.pop(chunk)

    @property
    def device_bytes(self) -> int:
        """See `Shelf`."""
        return sum(x.nbytes for tensors in self._kept.values() for x in tensors)


class HostShelf:
    """In pinned memory of the host; they come back one chunk ahead.

    What is put in the place of what was taken has its memory: an allocator would wait until the device has read that.
    """

    def __init__(self, lift: Lift) -> None:
        self._lift = lift
        self._away: dict[int, tuple[Away, ...]] = {}
        self._room: dict[int, tuple[Away, ...]] = {}
        """Of what was taken last."""
        self._soon: dict[int, tuple[Coming, ...]] = {}

    def put(self, chunk: int, tensors: Sequence[Tensor]) -> None:
        """See `Shelf`."""
        room = self._room.pop(chunk, (None,) * len(tensors))
        self._away[chunk] = tuple(self._lift.down(_alone(x), there) for x, there in zip(tensors, room, strict=True))

    def look(self, chunk: int) -> tuple[Tensor, ...]:
        """See `Shelf`."""
        return self._get(chunk, chunk + 1)

    def take(self, chunk: int) -> tuple[Tensor, ...]:
        """See `Shelf`."""
        found = self._get(chunk, chunk - 1)
        self._room = {chunk: self._away.pop(chunk)}
        return found

    @property
    def device_bytes(self) -> int:
        """See `Shelf`: what is on its way back."""
        return sum(coming.nbytes for tensors in self._soon.values() for coming in tensors)

    def _get(self, chunk: int, following: int) -> tuple[Tensor, ...]:
        found = self._soon.pop(chunk, None) or self._fetch(chunk)
        if following in self._away and following not in self._soon:
            self._soon[following] = self._fetch(following)
        return tuple(coming.wait() for coming in found)

    def _fetch(self, chunk: int) -> tuple[Coming, ...]:
        return tuple(self._lift.up(x) for x in self._away[chunk])


def _alone(x: Tensor) -> Tensor:
    """A few rows of a large tensor are copied: they would keep all of it, while they wait or leave."""
    return x if x.nbytes == x.untyped_storage().nbytes() else x.clone()


def make_shelf(lift: Lift | None) -> Shelf:
    """On the host with a lift to it."""
    return DeviceShelf() if lift is None else HostShelf(lift)
