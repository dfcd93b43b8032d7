"""A device's memory in the phases of a step: the peak of each grows with the context along a line of its own.

The backward pass of the last block has the inputs of all others beside it, that of the first block the gradients of all
parameters. So the phase that decides at a short context need not be the one that decides at a long one.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from longtrain.streaming.waiting import Waiting

DELIVERY = "delivery"
"""After the last chunk's backward pass."""
STEP = "step"
"""All of a step that tells no phases."""
Phase = dict[str, Any]
"""`phase`, its `peak_bytes`, and what was `waiting` after the chunk with that peak; None where nobody told."""


class Phases:
    """Of one step on a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Begins with the first phase."""
        self._device = device
        self._found: dict[str, Phase] = {}
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_peak_host_memory_stats()

    def __call__(self, phase: str, waiting: Waiting | None) -> None:
        """What was allocated since the last call belongs to a phase. The allocator knows without the device."""
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        if phase not in self._found or peak > self._found[phase]["peak_bytes"]:
            self._found[phase] = {"phase": phase, "peak_bytes": peak, "waiting": waiting and asdict(waiting)}

    def end(self, beside: int) -> list[Phase]:
        """In order; `beside` are bytes of the device that the allocator does not know."""
        self(DELIVERY if self._found else STEP, None)
        return [phase | {"peak_bytes": phase["peak_bytes"] + beside} for phase in self._found.values()]


def begin(device: torch.device) -> Phases | None:
    """None on a CPU, which does not count."""
    return Phases(device) if device.type == "cuda" else None


def most(ranks: Iterable[list[Phase]]) -> list[Phase]:
    """Of every phase, that of the rank with the highest peak."""
    found: dict[str, Phase] = {}
    for phase in (phase for phases in ranks for phase in phases):
        name = phase["phase"]
        if name not in found or phase["peak_bytes"] > found[name]["peak_bytes"]:
            found[name] = phase
    return list(found.values())


def highest(phases: list[Phase]) -> Phase | None:
    """The phase that needs most; None on a CPU."""
    return max(phases, key=lambda phase: phase["peak_bytes"], default=None)
