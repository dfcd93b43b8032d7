"""Processes that measure together: the command starts them, a GPU each or on a CPU, and hears rank 0."""

import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

import torch
import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from longtrain.bench._world import World, joined
from longtrain.comm.rendezvous import host_store
from longtrain.core.errors import Refused, WorkerFailed
from longtrain.core.registry import Registry, did_you_mean

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.1


class RankPlan(Protocol):
    """What a rank must know of the others; a benchmark's own plan says what they do."""

    @property
    def ranks(self) -> int:
        """How many there are."""
        ...

    @property
    def device(self) -> str:
        """cuda or cpu."""
        ...

    @property
    def threads(self) -> int:
        """Of torch on a CPU, of each rank."""
        ...


P = TypeVar("P", bound=RankPlan)
Entry = Callable[[int, P, int, Connection], None]
"""A module's function that is a rank's process: its number, the plan, and what `joined_rank` takes."""
Send = Callable[[str, Any], None]


def launch(plan: P, entry: Entry[P]) -> Generator[tuple[str, Any], None, None]:
    """Run `entry` on every rank, and yield what rank 0 sends. Raises WorkerFailed as soon as one has ended badly."""
    store = host_store(LOOPBACK)
    reader, writer = torch.multiprocessing.get_context("spawn").Pipe(duplex=False)
    context = torch.multiprocessing.spawn(entry, (plan, store.port, writer), nprocs=plan.ranks, join=False)
    assert context is not None
    try:
        done = False
        while not done:
            trouble = None
            try:
                done = context.join(POLL_SECONDS, grace_period=1.0)
            except (ProcessExitedException, ProcessRaisedException) as error:
                trouble = error
            while reader.poll():
                kind, content = json.loads(reader.recv_bytes())
                yield kind, content
            if trouble is not None:
                print(trouble, file=sys.stderr)
                last = str(trouble).strip().splitlines()[-1]
                raise WorkerFailed(f"rank {trouble.error_index} of {plan.ranks} failed: {last}")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


@contextmanager
def joined_rank(rank: int, plan: RankPlan, port: int, connection: Connection) -> Iterator[tuple[World, Send]]:
    """This process joins the others; the store at which they meet listens on `LOOPBACK`. Only rank 0 is heard."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(plan.ranks),
        MASTER_ADDR=LOOPBACK,
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    if sys.platform == "linux":  # a host's name may lead elsewhere, or nowhere
        os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    torch.set_num_threads(plan.threads)
    device = torch.device(plan.device, rank) if plan.device == "cuda" else torch.device(plan.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def send(kind: str, content: Any) -> None:
        if rank == 0:
            connection.send_bytes(json.dumps([kind, content]).encode())

    with joined(device, LOOPBACK, port) as world:
        yield world, send


def check_gpus(device: str, ranks: int) -> None:
    """Raises Refused where there are fewer GPUs than ranks that need one each."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and gpus < ranks:
        raise Refused(f"{ranks} ranks need a GPU each, and there are {gpus}; write device=cpu, or fewer ranks")


def threads_of_a_rank(ranks: int) -> int:
    """A rank's share of this process's."""
    return max(1, torch.get_num_threads() // ranks)


def known_algorithms(verb: str, names: tuple[str, ...] | None, registry: Registry) -> tuple[str, ...]:
    """The named ones for scan or attend, or all, each of which can be imported. Raises Refused."""
    kind = f"sequence_parallel.{verb}"
    found = known_names(verb, names, registry.names(kind))
    for name in found:
        registry.load(kind, name, (verb,))
    return found


def known_names(option: str, names: tuple[str, ...] | None, known: list[str]) -> tuple[str, ...]:
    """The names that an option has, or all. Raises Refused for one that is not known."""
    for name in names or ():
        if name not in known:
            raise Refused(f"{option}={name}: there is no '{name}'{did_you_mean(name, known)}")
    return tuple(known) if names is None else names
