"""Groups that stand in for the real one while sequence parallelism is measured: one counts bytes, one sends none.

Both override every method of `Group` by which ranks communicate; a method that a stand-in inherited would escape the
count, or wait for ranks that never call.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from longtrain.comm.group import Group, Pending, Result


@dataclass(frozen=True)
class CountingGroup(Group):
    """Delegates, and counts the bytes that this rank sends to others.

    A collective counts as what a rank sends in the usual ring algorithm, whatever the library chooses: P - 1 times the
    tensor for an all-gather, P - 1 parts for a reduce-scatter, 2 (P - 1) / P of the tensor for an all-reduce. Padding
    travels, and counts.
    """

    _real: Group = field(default_factory=lambda: Group(0, 1))
    # Not super(): some of the real methods call others, which would count twice.
    _sent: list[int] = field(default_factory=lambda: [0])

    @classmethod
    def like(cls, group: Group) -> Self:
        """In front of a group."""
        return cls(**_fields(group), _real=group)

    @property
    def sent_bytes(self) -> int:
        """Since the group was made."""
        return self._sent[0]

    def _count(self, count: float) -> None:
        self._sent[0] += round(count)

    def _count_all(self, sends: Sequence[tuple[int, Tensor]]) -> None:
        self._count(sum(tensor.nbytes for peer, tensor in sends if peer != self.rank))

    def split(self, inner: int) -> tuple[Group, Group]:
        """See `Group.split`; the parts count into the same sum."""
        one, other = (CountingGroup(**_fields(part), _real=part, _sent=self._sent) for part in self._real.split(inner))
        return one, other

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """See `Group.all_gather`."""
        self._count((self.size - 1) * tensor.nbytes)
        return self._real.all_gather(tensor)

    def all_gather_rows(self, tensor: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """See `Group.all_gather_rows`."""
        self._count((self.size - 1) * _padded_bytes(tensor, max(counts)))
        return self._real.all_gather_rows(tensor, counts)

    def reduce_scatter_rows(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Group.reduce_scatter_rows`."""
        self._count((self.size - 1) * _padded_bytes(parts[0], max(part.shape[1] for part in parts)))
        return self._real.reduce_scatter_rows(parts)

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """See `Group.all_to_all`."""
        self._count(sum(part.nbytes for rank, part in enumerate(parts) if rank != self.rank))
        return self._real.all_to_all(parts, shapes)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See `Group.all_reduce`."""
        self._count(2 * (self.size - 1) / self.size * tensor.nbytes)
        return self._real.all_reduce(tensor)

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        """See `Group.exchange`."""
        self._count_all(sends)
        self._real.exchange(sends, receives)

    def begin(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], result: Result
    ) -> Pending[Result]:
        """See `Group.begin`."""
        self._count_all(sends)
        return self._real.begin(sends, receives, result)

    def shift(
        self, tensors: Sequence[Tensor], rows: Sequence[int], by: int = 1, lane: str = "", most_rows: int = 0
    ) -> Pending[tuple[Tensor, ...]]:
        """See `Group.shift`."""
        self._count(sum(tensor.nbytes for tensor in tensors))
        return self._real.shift(tensors, rows, by, lane, most_rows)


@dataclass(frozen=True)
class SilentGroup(Group):
    """Answers at once, with tensors of the right shapes and wrong values: only the time of what follows counts.

    What would arrive is this rank's own data where the shapes allow it, and zeros elsewhere, so that all numbers stay
    finite. The copies by which the real methods pack what they send are made here too.
    """

    @classmethod
    def like(cls, group: Group) -> Self:
        """Of the same ranks."""
        return cls(**_fields(group))

    def split(self, inner: int) -> tuple[Group, Group]:
        """Silent groups of the same sizes."""
        return SilentGroup(self.rank % inner, inner), SilentGroup(self.rank // inner, self.size // inner)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The own tensor, once for every rank."""
        return [tensor.contiguous()] * self.size

    def all_gather_rows(self, tensor: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """The own rows, padded to the most that a rank has."""
        padded = tensor.new_zeros(tensor.shape[0], max(counts), *tensor.shape[2:])
        padded[:, : tensor.shape[1]] = tensor
        return [padded[:, :count] for count in counts]

    def reduce_scatter_rows(self, parts: Sequence[Tensor]) -> Tensor:
        """The own part alone."""
        padded = parts[0].new_zeros(self.size, parts[0].shape[0], max(p.shape[1] for p in parts), *parts[0].shape[2:])
        for row, part in zip(padded, parts, strict=True):
            row[:, : part.shape[1]] = part
        return padded[self.rank][:, : parts[self.rank].shape[1]].contiguous()

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """What would be sent, cut into the shapes that would arrive."""
        counts = [math.prod(shape) for shape in shapes]
        flat = parts[0].new_empty(sum(part.numel() for part in parts))
        for packed, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True):
            packed.view(part.shape).copy_(part)
        if len(flat) < sum(counts):
            flat = torch.cat([flat, flat.new_zeros(sum(counts) - len(flat))])
        return [part.view(shape) for part, shape in zip(flat[: sum(counts)].split(counts), shapes, strict=True)]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The argument as it is."""
        return tensor

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        """What is sent, where it fits, and zeros elsewhere: buffers come unfilled."""
        self.begin(sends, receives, None)

    def begin(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], result: Result
    ) -> Pending[Result]:
        """What is sent, where it fits: computing with zeros takes a GPU less power, and so less time."""
        sent = [tensor.contiguous() for _, tensor in sends]
        left = list(sent)
        for _, tensor in receives:
            fitting = next((i for i, x in enumerate(left) if (x.shape, x.dtype) == (tensor.shape, tensor.dtype)), None)
            tensor.zero_() if fitting is None else tensor.copy_(left.pop(fitting))
        return Pending(result, sent=sent)

    def shift(
        self, tensors: Sequence[Tensor], rows: Sequence[int], by: int = 1, lane: str = "", most_rows: int = 0
    ) -> Pending[tuple[Tensor, ...]]:
        """What is sent, where it fits: a transfer by copy engines costs no kernel time."""
        to, source = (self.rank + by) % self.size, (self.rank - by) % self.size
        received = tuple(x.new_empty(x.shape[0], rows[source], *x.shape[2:]) for x in tensors)
        return self.begin([(to, x) for x in tensors], [(source, x) for x in received], received)


def _fields(group: Group) -> dict[str, Any]:
    return {f.name: getattr(group, f.name) for f in fields(Group)}


def _padded_bytes(tensor: Tensor, rows: int) -> int:
    """Of [B, rows, ...]."""
    return tensor.shape[0] * rows * math.prod(tensor.shape[2:]) * tensor.element_size()
