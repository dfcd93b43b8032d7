"""A group of ranks on one axis of the mesh, with the few collectives that longtrain uses.

None of these is differentiable: an algorithm that needs gradients writes its forward and its mirrored backward with
them, which keeps every rank's collectives in the same order in both passes. A group of one rank communicates nothing.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.comm.copying import Lanes, node_number, open_lanes, room_for
from longtrain.comm.journal import Journal, list_ranks

COLLECTIVE_TIMEOUT = timedelta(minutes=5)
"""A collective that takes longer has lost a rank."""

# Newer releases of PyTorch call them by other names, and warn of these.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Result = TypeVar("Result")
Surround = Callable[[], AbstractContextManager[None]]


def options(backend: str, timeout: timedelta) -> Any:
    """Under which a transfer gets a GPU's multiprocessors before the kernels that compute, and so runs beside them."""
    if backend != "nccl":
        return None
    chosen = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    chosen._timeout = timeout
    return chosen


def new_group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup | None:
    """A collective call of all ranks of the job, whether they are in the group or not."""
    return dist.new_group(list(ranks), timeout, pg_options=options(dist.get_backend(), timeout))


@dataclass(frozen=True)
class Pending(Generic[Result]):
    """Transfers that have begun, and what they bring."""

    result: Result
    works: Sequence[dist.Work] = ()
    sent: Sequence[Tensor] = ()
    """Kept as long as this is. On a GPU the transfers end before what is queued after `wait`, on its stream."""
    done: torch.cuda.Event | None = None
    """Of transfers by copy engines."""
    inside: Surround = nullcontext
    """Surrounds the wait."""

    def wait(self) -> Result:
        """What has come. On a GPU the stream waits, not the host."""
        with self.inside():
            for work in self.works:
                work.wait()
            if self.done is not None:
                self.done.wait()
        return self.result


@dataclass(frozen=True)
class Group:
    """Ranks that share an axis; `rank` is this process's index in it.

    Every method that exchanges, but `shift`, raises ExchangeFailed where another rank is late or gone.
    """

    rank: int
    size: int
    handle: dist.ProcessGroup | None = None
    node_size: int = 1
    """Ranks in a row that share a node, as far as is known; a divisor of `size`."""
    name: str = "the group"
    members: Sequence[int] = ()
    """Ranks of the job, in the order of the group; empty where they are the same as in the group."""
    journal: Journal = field(default_factory=Journal, compare=False)
    """Of this process; all its groups write into one."""
    timeout: timedelta = COLLECTIVE_TIMEOUT
    """Of groups that are split off."""

    axis: Sequence[Sequence[int]] = ()
    """Of every group that this one is alike, ranks of the job; empty where it is the only one."""
    copy_engines: bool = True
    """Whether `shift` may use them."""

    def split(self, inner: int) -> "tuple[Group, Group]":
        """This rank's group of `inner` neighbours, and its group of the ranks with the same place among theirs.

        The first time a collective call of the whole job, for which groups that are alike split in the same order.
        Raises ValueError where `inner` does not divide the size.
        """
        if self.size % inner:
            raise ValueError(f"{self.size} ranks are not a multiple of {inner}")
        if inner not in self._splits:
            neighbours = [range(first, first + inner) for first in range(0, self.size, inner)]
            others = [range(first, self.size, inner) for first in range(inner)]
            self._splits[inner] = self._own_part(neighbours), self._own_part(others)
        return self._splits[inner]

    def _own_part(self, parts: list[range]) -> "Group":
        """The part with this rank. Every rank creates every part: NCCL splits what it has among all of the job."""
        own = next(part for part in parts if self.rank in part)
        if len(own) == self.size:
            return self
        job_ranks = self._job_ranks(own)
        name = f"{list_ranks(job_ranks)} of {self.name}"
        handle = None
        if len(own) > 1:
            self.journal.add_group(name)
            with self._inside("new_group"):
                for members in self.axis or [self._job_ranks(range(self.size))]:
                    for part in parts:
                        ranks = tuple(members[rank] for rank in part)
                        created = new_group(ranks, self.timeout)
                        handle = created if ranks == job_ranks else handle
        return Group(
            own.index(self.rank),
            len(own),
            handle,
            1,
            name,
            job_ranks,
            self.journal,
            self.timeout,
            copy_engines=self.copy_engines,
        )

    @cached_property
    def _splits(self) -> "dict[int, tuple[Group, Group]]":
        return {}

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every rank, in rank order; shapes are equal."""
        if self.size == 1:
            return [tensor]
        gathered = tensor.new_empty(self.size * tensor.numel())
        with self._inside("all_gather"):
            _all_gather(gathered, tensor.flatten(), group=self.handle)
        return list(gathered.view(self.size, *tensor.shape))

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
                _reduce_scatter(mine, padded, group=self.handle)
            else:  # gloo has no reduce-scatter
                dist.all_reduce(padded, group=self.handle)
                mine = padded[self.rank]
        return mine[:, : parts[self.rank].shape[1]].contiguous()

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Part r goes to rank r; returns what every rank sent here, of the given shapes and the parts' dtype."""
        if self.size == 1:
            return list(parts)
        sent = parts[0].new_empty(sum(part.numel() for part in parts))
        for packed, part in zip(sent.split([part.numel() for part in parts]), parts, strict=True):
            packed.view(part.shape).copy_(part)
        counts = [math.prod(shape) for shape in shapes]
        received = sent.new_empty(sum(counts))
        with self._inside("all_to_all"):
            dist.all_to_all_single(received, sent, counts, [part.numel() for part in parts], group=self.handle)
        return [part.view(shape) for part, shape in zip(received.split(counts), shapes, strict=True)]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; returns its argument."""
        if self.size > 1:
            whole = tensor.contiguous()  # NCCL takes nothing else
            with self._inside("all_reduce"):
                dist.all_reduce(whole, group=self.handle)
            if whole is not tensor:
                tensor.copy_(whole)
        return tensor

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        """Point to point: send tensors to ranks and fill the given tensors from ranks. Empty tensors are not sent."""
        self.begin(sends, receives, None).wait()

    def begin(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], result: Result
    ) -> Pending[Result]:
        """Begin an `exchange`, after which `result` is there. Sent tensors must stay as they are until then.

        Ranks begin and wait for theirs in one order.
        """
        sent = [(peer, tensor.contiguous()) for peer, tensor in sends]
        operations = [
            dist.P2POp(operation, tensor, group=self.handle, group_peer=peer)
            for operation, pairs in ((dist.isend, sent), (dist.irecv, receives))
            for peer, tensor in pairs
            if tensor.numel()
        ]
        if not operations:
            return Pending(result)
        peers = sorted({peer for peer, tensor in (*sends, *receives) if tensor.numel()})
        with self._inside("exchange", peers):
            works = dist.batch_isend_irecv(operations)
        tensors = [tensor for _, tensor in sent]
        return Pending(result, works, tensors, inside=lambda: self._inside("exchange", peers))

    def shift(
        self, tensors: Sequence[Tensor], rows: Sequence[int], by: int = 1, lane: str = "", most_rows: int = 0
    ) -> Pending[tuple[Tensor, ...]]:
        """Begin to send tensors [B, L, ...] to the rank `by` after, and to receive those of the rank `by` before.

        `rows[r]` is the L of rank r. All ranks shift in one order. What came stays until the second shift of the same
        lane after it: between GPUs of a node, tensors come to two places in turn (see `copying`). `by` must not be a
        multiple of the size. `most_rows` may come with a later shift of the lane: a lane that has to grow holds all up.

        A copy engine waits for a rank that is late or gone as long as it takes; the journal tells for whom.
        """
        to, source = (self.rank + by) % self.size, (self.rank - by) % self.size
        sent = [tensor.contiguous() for tensor in tensors]
        come = [(x.shape[0], rows[source], *x.shape[2:]) for x in sent]
        if self._lanes is None:
            received = tuple(x.new_empty(shape) for x, shape in zip(sent, come, strict=True))
            return self.begin([(to, x) for x in sent], [(source, x) for x in received], received)
        longest = max(*rows, most_rows)
        most = room_for([(x.shape[0], longest, *x.shape[2:]) for x in sent], [x.element_size() for x in sent])
        peers = sorted({to, source})
        with self._inside("shift"):  # as a collective: all ranks shift alike, and the host does not wait here
            received, done = self._lanes.shift(lane, sent, come, by, most)
        return Pending(received, sent=sent, done=done, inside=lambda: self._inside("shift", peers))

    @property
    def lane_bytes(self) -> int:
        """What `shift` keeps on this GPU beside the tensors of its caller, here and in groups that are split off."""
        parts = [part for pair in self._splits.values() for part in pair if part is not self]
        opened = self.__dict__.get("_lanes")
        return (opened.nbytes if opened is not None else 0) + sum(part.lane_bytes for part in parts)

    @cached_property
    def _lanes(self) -> Lanes | None:
        """Opened by the first that asks: a collective call of the group."""
        if self.handle is None or not self.copy_engines or dist.get_backend(self.handle) != "nccl":
            return None
        device = torch.device("cuda", torch.cuda.current_device())
        number = torch.tensor([node_number(self.size, device)], dtype=torch.int64, device=device)
        return open_lanes(self.rank, self.handle, device, [int(other) for other in self.all_gather(number)])

    def _inside(self, operation: str, peers: Iterable[int] | None = None) -> AbstractContextManager[None]:
        """Surrounds an exchange in the journal: a collective, or with `peers` (indices in the group) a transfer."""
        return self.journal.inside(operation, self.name, None if peers is None else self._job_ranks(peers))

    def _job_ranks(self, ranks: Iterable[int]) -> tuple[int, ...]:
        return tuple(self.members[rank] if self.members else rank for rank in ranks)
