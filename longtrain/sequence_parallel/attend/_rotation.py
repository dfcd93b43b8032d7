"""Ranks in a ring: which tokens each holds, and what goes round."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from longtrain.comm.group import Group, Pending
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.block_attention import Tokens


@dataclass(frozen=True)
class Ring:
    """The ranks of a ring and the tokens of each."""

    group: Group
    queries: list[Tokens]
    """Of this chunk, by rank."""
    keys: list[Tokens]
    """Of this chunk and all earlier ones, by rank."""

    @classmethod
    def of(cls, shard: Shard) -> "Ring":
        """All ranks that share the sequence."""
        ranks = range(shard.group.size)
        return cls(shard.group, [shard.tokens_of(r) for r in ranks], [shard.held_tokens(r) for r in ranks])

    def at(self, step: int) -> int:
        """The rank whose tokens are here after so many steps round the ring."""
        return (self.group.rank - step) % self.group.size

    def pass_on(self, tensors: Sequence[Tensor], rows: int) -> Pending[tuple[Tensor, ...]]:
        """Begin to send [B, L, ...] to the next rank; what comes from the one before has `rows` rows."""
        received = tuple(t.new_empty(t.shape[0], rows, *t.shape[2:]) for t in tensors)
        after, before = (self.group.rank + 1) % self.group.size, self.at(1)
        return self.group.begin([(after, t) for t in tensors], [(before, t) for t in received], received)
