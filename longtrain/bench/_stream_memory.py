"""A device's memory in the phases of a step: the peak of each grows with the context along a line of its own.

The backward pass of the last block has the inputs of all others beside it, that of the first block the gradients of all
parameters. So the phase that decides at a short context need not be the one that decides at a long one.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from longtrain.streaming.kept import Held

DELIVERY = "delivery"
"""After the last chunk's backward pass; of a step that tells no phases, all of it."""
Phase = dict[str, Any]
"""`phase`, its `peak_bytes` without what other ranks write here, and what was `held` after the chunk with that peak."""


class Phases:
    """Of one step on a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Begins with the first phase."""
        self._device = device
        self._found: dict[str, Phase] = {}
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_peak_host_memory_stats()

    def __call__(self, phase: str, held: Held | None) -> None:
        """What was allocated since the last call belongs to a phase. The allocator knows without the device."""
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        if phase not in self._found or peak > self._found[phase]["peak_bytes"]:
            self._found[phase] = {"phase": phase, "peak_bytes": peak, "held": held and asdict(held)}

    def end(self) -> list[Phase]:
        """In order."""
        self(DELIVERY, None)
        return list(self._found.values())


def begin(device: torch.device) -> Phases | None:
    """None on a CPU, which does not count."""
    return Phases(device) if device.type == "cuda" else None


def most(ranks: Iterable[list[Phase]]) -> list[Phase]:
    """Of every phase, that of the rank with the highest peak; all have the same phases."""
    return [max(of_ranks, key=lambda phase: phase["peak_bytes"]) for of_ranks in zip(*ranks, strict=True)]


def highest(phases: list[Phase]) -> Phase | None:
    """The phase that needs most; None on a CPU."""
    return max(phases, key=lambda phase: phase["peak_bytes"], default=None)
