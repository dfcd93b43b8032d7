"""USP (Fang & Zhao 2024): ranks that share a node exchange heads, and rings of such groups pass on keys and values.

Heads bound the number of ranks that can exchange them to some use; rings have no bound, but send more the more ranks
they have. The groups are as large as the node and the key heads allow: with one group this is Ulysses, and with groups
of one rank it is ring attention.
"""

import dataclasses
import math

from torch import Tensor

from longtrain.sequence_parallel.attend import ring, ulysses
from longtrain.sequence_parallel.call import AttendCall
from longtrain.sequence_parallel.cost import AttendShape, Machine
from longtrain.sequence_parallel.heads import HeadShares
from longtrain.sequence_parallel.shard import Shard


def attend(call: AttendCall, shard: Shard) -> Tensor:
    """Outputs [B, L, H, V]; a rank keeps keys and values of its heads, of the tokens that its group holds."""
    size = shard.group.size
    inner = neighbours(size, shard.group.node_size, call.k.shape[2])
    near, far = shard.group.split(inner)
    groups = [tuple(range(first, first + inner)) for first in range(0, size, inner)]
    own = groups[shard.group.rank // inner]
    shares = HeadShares(shard.team_of(near, [(rank,) for rank in own]), call.k.shape[2], call.q.shape[2])
    k, v = call.prefix.extend(shares.of_keys(call.k), shares.of_keys(call.v), shard.rows(own))
    q = shares.values.to_heads(call.q)
    output = ring.ring_attention(q, k, v, shard.team_of(far, groups), call.attention)
    return shares.values.to_tokens(output)


def neighbours(size: int, node_size: int, key_heads: int) -> int:
    """Ranks that exchange heads: the largest common divisor, so that no key head goes round in copies."""
    return math.gcd(size, node_size, key_heads)


def seconds(shape: AttendShape, machine: Machine) -> float:
    """See `sequence_parallel.cost`: the exchange of a group, then a ring of groups with a share of the heads each."""
    inner = neighbours(machine.ranks, machine.node_size, shape.key_heads)
    share = dataclasses.replace(
        shape, tokens=shape.tokens * inner, heads=shape.heads // inner, key_heads=shape.key_heads // inner
    )
    rings = dataclasses.replace(machine, ranks=machine.ranks // inner)
    exchange = ulysses.exchange_seconds(shape, dataclasses.replace(machine, ranks=inner)) if inner > 1 else 0.0
    return ring.seconds(share, rings) + exchange
