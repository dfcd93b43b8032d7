"""Which algorithms serve a model best on these ranks: `sequence_parallel.scan=auto` and `attend=auto`.

What the model asks of its sequence is seen by running it on a few tokens; what the ranks can do is measured; the
algorithms estimate their own time (see `cost`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from longtrain.core.contracts import Recurrence
from longtrain.core.registry import Registry
from longtrain.sequence_parallel.cost import AttendShape, Machine, ScanShape
from longtrain.sequence_parallel.handle import ShardedSequence

AUTO = "auto"
Shape = TypeVar("Shape", ScanShape, AttendShape)


@dataclass(frozen=True)
class Demand:
    """What the layers of a model ask for, in order."""

    scans: list[ScanShape]
    attends: list[AttendShape]
    """Without sliding windows, which are always served alike."""


@dataclass
class DemandingSequence(ShardedSequence):
    """Notes what is asked of it, as if `tokens` of each sequence were on a rank."""

    tokens: int = 0
    batch: int = 0
    demand: Demand = field(default_factory=lambda: Demand([], []))

    def scan(self, op: Recurrence) -> Tensor:
        """See `core.contracts.Sequence.scan`."""
        [segment] = [op.summarize(documents) for documents in self.shard.segment_documents]
        heads = segment.state.shape[1]
        row_bytes = 0

        def note(x: Tensor) -> Tensor:
            nonlocal row_bytes
            row_bytes += x[0, 0].nbytes
            return x

        op.mapped(note, note)
        output = segment.correct(torch.zeros_like(segment.state))
        note(output)
        per_head = segment.state.shape[0] * heads
        self.demand.scans.append(
            ScanShape(
                batch=self.batch, tokens=self.tokens, heads=heads, state=segment.state.numel() // per_head,
                transition=segment.transition.numel() // per_head, row_bytes=row_bytes,
            )
        )  # fmt: skip
        return output

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None
    ) -> Tensor:
        """See `core.contracts.Sequence.attend`."""
        if window is None:
            self.demand.attends.append(
                AttendShape(
                    batch=self.batch, tokens=self.tokens, heads=q.shape[2], key_heads=k.shape[2], key=q.shape[3],
                    value=v.shape[3], itemsize=q.itemsize,
                )
            )  # fmt: skip
        return super().attend(q, k, v, window=window, scale=scale)


@dataclass(frozen=True)
class Choice:
    """An algorithm or a kernel, and the estimates that spoke for it."""

    name: str
    estimates: Mapping[str, float] = field(default_factory=dict)
    """Seconds a step of forward and backward, by algorithm, of what differs between them; empty for a kernel."""

    def __str__(self) -> str:
        if not self.estimates:
            return self.name
        ranked = sorted(self.estimates.items(), key=lambda item: item[1])
        listed = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in ranked)
        return f"{self.name} (estimated ms of forward and backward, all layers: {listed})"


def choose(kind: str, shapes: Sequence[Shape], machine: Machine, registry: Registry) -> Choice:
    """The algorithm of `sequence_parallel.<kind>` that is estimated to take least for all layers together.

    Algorithms without a `seconds` are not considered. Equal estimates go by name.
    """
    folder = f"sequence_parallel.{kind}"
    modules = {name: registry.load(folder, name, (kind,)) for name in registry.names(folder)}
    known: dict[str, Callable[[Any, Machine], float]] = {
        name: module.seconds for name, module in modules.items() if hasattr(module, "seconds")
    }
    estimates = {name: sum(seconds(shape, machine) for shape in shapes) for name, seconds in known.items()}
    return Choice(min(estimates, key=lambda name: (estimates[name], name)), estimates)
