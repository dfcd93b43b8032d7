"""Scan by all-to-all between tokens and heads (Jacobs et al. 2023, "DeepSpeed Ulysses", applied to recurrences).

Every rank runs the recurrence over all tokens of its share of the heads, and carries their states. What travels grows
with the length, unlike states; in return no rank waits for another's state.
"""

from torch import Tensor

from longtrain.core.contracts import Recurrence
from longtrain.sequence_parallel.cost import Machine, ScanShape
from longtrain.sequence_parallel.heads import HeadShares
from longtrain.sequence_parallel.shard import Shard


def scan(op: Recurrence, shard: Shard, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, V] and the states of this rank's heads after the chunk."""
    shares = HeadShares(shard.team, *op.num_heads)
    begin, end = shard.layout.chunk(shard.chunk)
    documents = shard.documents_between(begin - 1, end)
    mine = op.mapped(shares.of_keys, shares.values.to_heads)
    output, state = mine.apply(documents[:, 1:] - documents[:, :1], carry)
    return shares.values.to_tokens(output), state


def seconds(shape: ScanShape, machine: Machine) -> float:
    """See `sequence_parallel.cost`: inputs there, outputs back, and their gradients; ranks without a head idle."""
    busiest = -(-shape.heads // machine.ranks) * machine.ranks / shape.heads
    away = (machine.ranks - 1) / machine.ranks
    one_way = machine.links.exchange.seconds(busiest * away * shape.batch * shape.tokens * shape.row_bytes)
    return 2 * (one_way + 4 * machine.links.exchange.latency)
