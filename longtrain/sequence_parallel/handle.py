"""The `Sequence` handle that mixers see, over the algorithms that were chosen."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.core.contracts import Recurrence, Stretch
from longtrain.core.errors import Refused
from longtrain.core.layout import SequenceLayout
from longtrain.sequence_parallel.call import AttendCall
from longtrain.sequence_parallel.halo import halo
from longtrain.sequence_parallel.prefix import Prefixes, Turn
from longtrain.sequence_parallel.shard import Shard
from longtrain.sequence_parallel.window import attend as attend_window
from longtrain_kernels.backend import Backend
from longtrain_kernels.block_attention import AUTO, BlockAttention, Unsupported

Output = TypeVar("Output")


@dataclass(frozen=True)
class Algorithms:
    """What serves each verb: the functions of the chosen modules."""

    scan: Callable[[Recurrence, Shard, Tensor | None], tuple[Tensor, Tensor]]
    attend: Callable[[AttendCall, Shard], Tensor]
    block_attention: str = AUTO
    """The kernel of softmax layers; see `longtrain_kernels.block_attention`."""


@dataclass
class ShardedSequence:
    """`core.contracts.Sequence` for one rank's part of one macro-chunk.

    Carries are opaque here: the n-th call that carries something receives what the n-th one of the chunk before left, a
    tensor, and its algorithm alone knows what that is and which ranks hold it. The n-th softmax layer has the n-th
    prefix.
    """

    shard: Shard
    algorithms: Algorithms
    carries_in: Sequence[Tensor] | None = None
    """Left by the chunk before; None for the first chunk."""
    prefixes: Prefixes = field(default_factory=Prefixes)
    """The same for all chunks of a sequence."""
    backend: Backend | None = None
    """See `core.contracts.Sequence.backend`."""
    carries_out: list[Tensor] = field(default_factory=list)
    _attends: int = 0

    @property
    def positions(self) -> Tensor:
        """[B, L] position of each token in its document."""
        return self.shard.positions

    def scan(self, op: Recurrence) -> Tensor:
        """See `core.contracts.Sequence.scan`."""
        with self._exact():
            return self._keep(*self.algorithms.scan(op, self.shard, self._carry()))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None
    ) -> Tensor:
        """See `core.contracts.Sequence.attend`. Raises Refused for a kernel that cannot compute it."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        call = AttendCall(q, k, v, BlockAttention(scale, window, self.algorithms.block_attention), self._turn(window))
        try:
            call.attention.choose(q, k, v, self.shard.tokens)
        except Unsupported as problem:
            raise Refused(f"sequence_parallel.block_attention={problem}") from None
        with self._exact():
            if window is None:
                output = self.algorithms.attend(call, self.shard)
                self.prefixes.has_attended(self._attends - 1, output)
                return output
            return self._keep(*attend_window(call, self.shard, self._carry()))

    def halo(self, x: Tensor, width: int) -> list[Stretch]:
        """See `core.contracts.Sequence.halo`."""
        return self._keep(*halo(x, width, self.shard, self._carry()))

    def _exact(self) -> AbstractContextManager[object]:
        """Autocast off: it would turn the float32 products of states and partial outputs into bfloat16."""
        return torch.autocast(self.shard.device.type, enabled=False)

    def _turn(self, window: int | None) -> Turn:
        """Of the layer that asks, if it sees the whole sequence."""
        if window is not None:
            return Turn(Prefixes(), 0)
        self._attends += 1
        return self.prefixes.at(self._attends - 1)

    def _carry(self) -> Tensor | None:
        return None if self.carries_in is None else self.carries_in[len(self.carries_out)]

    def _keep(self, output: Output, carry: Tensor) -> Output:
        self.carries_out.append(carry)
        return output


@dataclass(frozen=True)
class Handles:
    """Makes the handles of a run."""

    algorithms: Algorithms
    group: Group
    device: torch.device
    backend: Backend | None = None
    _shards: dict[SequenceLayout, list[Shard]] = field(default_factory=dict)

    def shards(self, layout: SequenceLayout) -> list[Shard]:
        """This rank's parts of the chunks of a batch; the same ones, with their plans, while the layout stays."""
        if layout not in self._shards:
            self._shards.clear()
            self._shards[layout] = [Shard(layout, self.group, self.device, c) for c in range(layout.num_chunks)]
        return self._shards[layout]

    def at(
        self, shard: Shard, carries: Sequence[Tensor] | None = None, prefixes: Prefixes | None = None
    ) -> ShardedSequence:
        """The handle of a chunk, from what the chunk before carried out and the prefixes of all."""
        return ShardedSequence(
            shard, self.algorithms, carries, Prefixes() if prefixes is None else prefixes, self.backend
        )
