"""The `Sequence` handle that mixers see, over the algorithms that were chosen."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from longtrain.core.contracts import Recurrence, Stretch
from longtrain.core.errors import Refused
from longtrain.sequence_parallel.call import AttendCall
from longtrain.sequence_parallel.halo import halo
from longtrain.sequence_parallel.shard import Shard
from longtrain.sequence_parallel.window import attend as attend_window
from longtrain_kernels.backend import Backend
from longtrain_kernels.block_attention import AUTO, BlockAttention, Unsupported

Output = TypeVar("Output")


@dataclass(frozen=True)
class Algorithms:
    """What serves each verb: the functions of the chosen modules."""

    scan: Callable[[Recurrence, Shard, Any], tuple[Tensor, Any]]
    attend: Callable[[AttendCall, Shard, Any], tuple[Tensor, Any]]
    block_attention: str = AUTO
    """The kernel of softmax layers; see `longtrain_kernels.block_attention`."""


@dataclass
class ShardedSequence:
    """`core.contracts.Sequence` for one rank's part of one macro-chunk.

    Carries are opaque here: the n-th call of a verb in a chunk receives what the n-th call of the chunk before left,
    and its algorithm alone knows what that is and which ranks hold it.
    """

    shard: Shard
    algorithms: Algorithms
    carries_in: list[Any] | None = None
    """Left by the chunk before; None for the first chunk."""
    backend: Backend | None = None
    """See `core.contracts.Sequence.backend`."""
    carries_out: list[Any] = field(default_factory=list)

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
        call = AttendCall(q, k, v, BlockAttention(scale, window, self.algorithms.block_attention))
        algorithm = self.algorithms.attend if window is None else attend_window
        try:
            call.attention.choose(q, k, v, self.shard.tokens)
        except Unsupported as problem:
            raise Refused(f"sequence_parallel.block_attention={problem}") from None
        with self._exact():
            return self._keep(*algorithm(call, self.shard, self._carry()))

    def halo(self, x: Tensor, width: int) -> list[Stretch]:
        """See `core.contracts.Sequence.halo`."""
        return self._keep(*halo(x, width, self.shard, self._carry()))

    def _exact(self) -> AbstractContextManager[object]:
        """Autocast off: it would turn the float32 products of states and partial outputs into bfloat16."""
        return torch.autocast(self.shard.device.type, enabled=False)

    def _carry(self) -> Any:
        return None if self.carries_in is None else self.carries_in[len(self.carries_out)]

    def _keep(self, output: Output, carry: Any) -> Output:
        self.carries_out.append(carry)
        return output
