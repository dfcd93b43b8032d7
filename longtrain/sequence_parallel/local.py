"""One rank: nothing to exchange. Not a choice beside the others, since with several ranks it would be wrong."""

from torch import Tensor

from longtrain.core.contracts import Recurrence
from longtrain.sequence_parallel.call import AttendCall
from longtrain.sequence_parallel.shard import Shard


def scan(op: Recurrence, shard: Shard, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, V] and the state after the chunk, which is the carry."""
    return op.apply(shard.segment_documents[0], carry)


def attend(call: AttendCall, shard: Shard) -> Tensor:
    """Outputs [B, L, H, V]."""
    k, v = call.prefix.extend(call.k, call.v, shard.own_rows)
    return call.attention(call.q, k, v, shard.tokens, shard.team.held[shard.group.rank])
