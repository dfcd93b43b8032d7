"""One rank: the recurrence as it is."""

from torch import Tensor

from longtrain.core.contracts import Recurrence
from longtrain.sequence_parallel.shard import Shard


def scan(op: Recurrence, shard: Shard, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, V] and the state after the chunk, which is the carry."""
    return op.apply(shard.segment_documents, carry)
