"""Attention by all-to-all between tokens and heads (Jacobs et al. 2023, "DeepSpeed Ulysses").

Every rank attends with all tokens of its share of the query heads, and gets the key heads that they read; where there
are fewer key heads than ranks, several ranks get the same. It keeps their keys and values of earlier chunks.
"""

from torch import Tensor

from longtrain.sequence_parallel.call import AttendCall
from longtrain.sequence_parallel.cost import BACKWARD, AttendShape, Machine
from longtrain.sequence_parallel.heads import HeadShares
from longtrain.sequence_parallel.shard import Shard


def attend(call: AttendCall, shard: Shard) -> Tensor:
    """Outputs [B, L, H, V]; a rank keeps keys and values of its heads."""
    shares = HeadShares(shard.team, call.k.shape[2], call.q.shape[2])
    k, v = call.prefix.extend(shares.of_keys(call.k), shares.of_keys(call.v), shard.rows(range(shard.group.size)))
    q = shares.values.to_heads(call.q)
    if q.shape[2]:
        output = call.attention(
            q, k, v, shard.tokens_between(*shard.layout.chunk(shard.chunk)), shard.tokens_between(*shard.seen)
        )
    else:  # no head is left for this rank, whose backward pass must take part all the same
        output = (q.sum(-1, keepdim=True) + k.sum() + v.sum()).expand(-1, -1, -1, v.shape[-1])
    return shares.values.to_tokens(output)


def seconds(shape: AttendShape, machine: Machine) -> float:
    """See `sequence_parallel.cost`: balanced up to the heads, and nothing overlaps."""
    busiest = -(-shape.heads // machine.ranks) * machine.ranks / shape.heads
    return busiest * (1 + BACKWARD) * shape.balanced_seconds(machine) + exchange_seconds(shape, machine)


def exchange_seconds(shape: AttendShape, machine: Machine) -> float:
    """Queries, keys and values there and the output back, and the same for their gradients."""
    copies = max(1.0, machine.ranks / shape.key_heads)  # of key heads that several ranks get
    numbers = shape.query_numbers + shape.output_numbers + copies * shape.key_value_numbers
    away = (machine.ranks - 1) / machine.ranks
    exchange = machine.links.exchange
    return 2 * (3 * exchange.latency + exchange.seconds(numbers * shape.itemsize * away))
