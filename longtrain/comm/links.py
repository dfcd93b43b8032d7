"""What transfers between the ranks of a group cost, measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from longtrain.comm.group import Group

_SMALL_BYTES, _REPEATS = 4096, 7
_LARGE_BYTES = {"cuda": 2**25, "cpu": 2**20}


@dataclass(frozen=True)
class Link:
    """One kind of transfer."""

    latency: float
    """Seconds of a transfer of next to nothing."""
    bandwidth: float
    """Bytes that a rank receives a second."""

    def seconds(self, received: float) -> float:
        """For so many bytes on every rank."""
        return self.latency + received / self.bandwidth


@dataclass(frozen=True)
class Links:
    """Transfers between the ranks of a group when nothing else goes on."""

    gather: Link
    """All-gather; about that of a reduce-scatter too."""
    exchange: Link
    """All-to-all."""
    send: Link
    """From each rank to the next."""


def measure_links(group: Group, device: torch.device, everyone: Group) -> Links:
    """A collective call; the same result on `everyone`, of whom the slowest rank's times count."""
    small, large = _SMALL_BYTES // 4, _LARGE_BYTES[device.type] // 4
    measured = []  # least of some: what others do on the machine only adds
    for operation in (_gather, _exchange, _send):
        for numbers in (small, large):
            buffer = torch.zeros(max(1, numbers // group.size) * group.size, device=device)
            measured.append(_least_seconds(partial(operation, group, buffer), device))
    slowest = torch.stack(everyone.all_gather(torch.tensor(measured, device=device))).amax(0).tolist()
    others = group.size - 1
    received = (others * large * 4, large * 4 * others / group.size, large * 4)
    pairs = zip(slowest[::2], slowest[1::2], received, strict=True)
    return Links(*(fitted(little, much, nbytes) for little, much, nbytes in pairs))


def fitted(little: float, much: float, nbytes: float, steps: int = 1) -> Link:
    """From the seconds of a small transfer of `steps` latencies, and of one of `nbytes` more.

    Where noise has the small one longer, the latency is not known, and the whole time counts as traffic.
    """
    return Link(little / steps, nbytes / (much - little)) if much > little else Link(0.0, max(1.0, nbytes) / much)


def _gather(group: Group, buffer: Tensor) -> None:
    group.all_gather(buffer)


def _exchange(group: Group, buffer: Tensor) -> None:
    parts = buffer.chunk(group.size)
    group.all_to_all(parts, [tuple(part.shape) for part in parts])


def _send(group: Group, buffer: Tensor) -> None:
    if group.size > 1:
        group.shift([buffer[None]], [len(buffer)] * group.size, lane="round").wait()


def _least_seconds(transfer: Callable[[], None], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        _wait(device)
        started = time.perf_counter()
        transfer()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
