"""One rank: attention to all keys so far."""

from torch import Tensor

from longtrain.sequence_parallel.call import AttendCall, KeyValue
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.block_attention import attention


def attend(call: AttendCall, shard: Shard, carry: KeyValue | None) -> tuple[Tensor, KeyValue]:
    """Outputs [B, L, H, V] and the keys and values so far, which are the carry."""
    k, v = call.keys_and_values(carry)
    keys = shard.held_tokens(shard.group.rank)
    return attention(call.q, k, v, shard.tokens, keys, call.window, call.scale), (k, v)
