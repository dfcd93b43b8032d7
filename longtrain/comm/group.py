"""A group of ranks on one axis of the mesh, with the few collectives that longtrain uses.

None of these is differentiable: an algorithm that needs gradients writes its forward and its mirrored backward with
them, which keeps every rank's collectives in the same order in both passes. A group of one rank communicates nothing.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.comm.journal import Journal


@dataclass(frozen=True)
class Work:
    """Something that has begun; `wait` for it."""

    handle: dist.Work
    inside: Callable[[], AbstractContextManager[None]]
    """Surrounds the wait."""

    def wait(self) -> None:
        """Return when it is done."""
        with self.inside():
            self.handle.wait()


def _started(work: dist.Work | None) -> dist.Work:
    """torch answers None to a rank that is not in the group."""
    assert work is not None
    return work


@dataclass(frozen=True)
class Group:
    """Ranks that share an axis; `rank` is this process's index in it.

    Every method that exchanges raises ExchangeFailed where another rank is late or gone.
    """

    rank: int
    size: int
    handle: dist.ProcessGroup | None = None
    name: str = "the group"
    members: Sequence[int] = ()
    """Ranks of the job, in the order of the group; empty where they are the same as in the group."""
    journal: Journal = field(default_factory=Journal, compare=False)
    """Of this process; all its groups write into one."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every rank, in rank order; shapes are equal."""
        if self.size == 1:
            return [tensor]
        tensor = tensor.contiguous()
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._inside("all_gather"):
            dist.all_gather(gathered, tensor, group=self.handle)
        return gathered

    def all_gather_rows(self, tensor: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Like `all_gather` for tensors that differ in dim 1: rank r brings [B, counts[r], ...]."""
        if self.size == 1:
            return [tensor]
        longest = max(counts)
        padded = tensor.new_zeros(tensor.shape[0], longest, *tensor.shape[2:])
        padded[:, : tensor.shape[1]] = tensor
        return [part[:, :count] for part, count in zip(self.all_gather(padded), counts, strict=True)]

    def reduce_scatter_rows(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum over ranks of the part meant for this rank; `parts[r]` is [B, counts[r], ...] on every rank."""
        if self.size == 1:
            return parts[0]
        longest = max(part.shape[1] for part in parts)
        padded = parts[0].new_zeros(self.size, parts[0].shape[0], longest, *parts[0].shape[2:])
        for row, part in zip(padded, parts, strict=True):
            row[:, : part.shape[1]] = part
        with self._inside("reduce_scatter"):
            if padded.is_cuda:
                mine = torch.empty_like(padded[0])
                dist.reduce_scatter_tensor(mine, padded, group=self.handle)
            else:  # gloo has no reduce-scatter
                dist.all_reduce(padded, group=self.handle)
                mine = padded[self.rank]
        return mine[:, : parts[self.rank].shape[1]].contiguous()

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Part r goes to rank r; returns what every rank sent here, of the given shapes and the parts' dtype."""
        if self.size == 1:
            return list(parts)
        sent = torch.cat([part.flatten() for part in parts])
        counts = [math.prod(shape) for shape in shapes]
        received = sent.new_empty(sum(counts))
        with self._inside("all_to_all"):
            dist.all_to_all_single(received, sent, counts, [part.numel() for part in parts], group=self.handle)
        return [part.view(shape) for part, shape in zip(received.split(counts), shapes, strict=True)]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; returns its argument."""
        if self.size > 1:
            with self._inside("all_reduce"):
                dist.all_reduce(tensor, group=self.handle)
        return tensor

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        """Point to point: send tensors to ranks and fill the given tensors from ranks. Empty tensors are not sent."""
        operations = [
            dist.P2POp(operation, tensor, group=self.handle, group_peer=peer)
            for operation, pairs in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in pairs
            if tensor.numel()
        ]
        if operations:
            with self._inside("exchange", sorted({peer for peer, tensor in (*sends, *receives) if tensor.numel()})):
                for work in dist.batch_isend_irecv(operations):
                    work.wait()

    def send(self, tensor: Tensor, to: int) -> Work:
        """Begin to send; `tensor` must stay as it is until the work is waited for."""
        with self._inside("send", [to]):
            work = _started(dist.isend(tensor, group=self.handle, group_dst=to))
        return Work(work, lambda: self._inside("send", [to]))

    def receive(self, into: Tensor, source: int) -> None:
        """Fill a contiguous tensor from another rank, whose tensors arrive in the order in which it sent them."""
        with self._inside("receive", [source]):
            _started(dist.irecv(into, group=self.handle, group_src=source)).wait()

    def rotate(self, tensors: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Send `tensors` to the next rank of the ring and fill `received` from the previous one."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        self.exchange([(after, t.contiguous()) for t in tensors], [(before, t) for t in received])

    def _inside(self, operation: str, peers: Iterable[int] | None = None) -> AbstractContextManager[None]:
        """Surrounds an exchange in the journal: a collective, or with `peers` (indices in the group) a transfer."""
        ranks = None if peers is None else [self.members[peer] if self.members else peer for peer in peers]
        return self.journal.inside(operation, self.name, ranks)
