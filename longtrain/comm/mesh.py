"""The mesh of ranks: data x sequence. Ranks of one sequence are neighbours, so that they share a node where they can.

rank = data_rank * sequence_size + sequence_rank
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from longtrain.comm.group import COLLECTIVE_TIMEOUT, Group, new_group, options
from longtrain.comm.journal import Journal, list_ranks

_WORLD = "the world"


@dataclass(frozen=True)
class Mesh:
    """This process's groups."""

    world: Group
    data: Group
    """Ranks that hold the same part of different sequences."""
    sequence: Group
    """Ranks that share a sequence."""
    journal: Journal
    """What this process has exchanged in all its groups."""

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the run directory."""
        return self.world.rank == 0


def build_mesh(sequence_size: int, timeout: timedelta = COLLECTIVE_TIMEOUT, copy_engines: bool = True) -> Mesh:
    """Groups over the default process group; a single process without one is a mesh of size one.

    `copy_engines` says whether `Group.shift` may use them on the sequence axis.

    Raises ValueError where `sequence_size` does not divide the number of ranks.
    """
    if not dist.is_initialized():
        rank, size = 0, 1
    else:
        rank, size = dist.get_rank(), dist.get_world_size()
    if size % sequence_size:
        raise ValueError(f"{size} ranks are not a multiple of the sequence-parallel size {sequence_size}")
    num_data = size // sequence_size
    sequences = [[d * sequence_size + s for s in range(sequence_size)] for d in range(num_data)]
    data = [list(column) for column in zip(*sequences, strict=True)]
    journal = Journal()
    journal.add_group(_WORLD)
    world = Group(rank, size, dist.group.WORLD if size > 1 else None, 1, _WORLD, range(size), journal, timeout)
    sequence = _own_group("sequence", sequences, rank, timeout, journal)
    return Mesh(
        world=world,
        data=_own_group("data", data, rank, timeout, journal),
        sequence=replace(sequence, node_size=_in_a_node(sequence_size, world), copy_engines=copy_engines),
        journal=journal,
    )


def _in_a_node(size: int, world: Group) -> int:
    """Of `size` ranks in a row, how many always share a node; all, where the launcher does not say.

    Nodes may have different numbers of ranks, which lie in a row: a divisor of all of them is the same on every rank.
    """
    own = torch.tensor([int(os.environ.get("LOCAL_WORLD_SIZE", size))], device=_collective_device())
    return math.gcd(size, *(int(ranks) for ranks in world.all_gather(own)))


def _collective_device() -> torch.device:
    """Where tensors of collectives live: NCCL carries nothing of the host's."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _own_group(axis: str, members: list[list[int]], rank: int, timeout: timedelta, journal: Journal) -> Group:
    """Create the groups of an axis (a collective call, in the same order on every rank) and return this rank's.

    An axis over all ranks is the world's own group: every group costs threads, and with NCCL memory.
    """
    own = None
    for ranks in members:
        if len(members) == 1:
            handle = dist.group.WORLD if len(ranks) > 1 else None
        else:
            handle = new_group(ranks, timeout) if len(ranks) > 1 else None
        if rank in ranks:
            name = f"{axis} {list_ranks(ranks)}"
            own = Group(ranks.index(rank), len(ranks), handle, 1, name, tuple(ranks), journal, timeout, members)
    assert own is not None
    journal.add_group(own.name)
    return own


@contextmanager
def process_group(device: torch.device, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Iterator[None]:
    """Join the job described by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; leave it at the end.

    A job of one rank needs no process group, and no variables. A process that has joined already stays as it is.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method="env://",
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
        pg_options=options(backend, timeout),
    )
    yield
    # Not after an error: peers may still wait in a collective, and leaving waits for them; the process ends instead.
    dist.destroy_process_group()
