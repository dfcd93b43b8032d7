"""Sliding-window attention: keys and values of the window before each stretch come as a halo, and no others travel.

The same whichever algorithm serves attention to all tokens. The carry is that of the halo: its size is the window's.
"""

import torch
from torch import Tensor

from longtrain.sequence_parallel.call import AttendCall
from longtrain.sequence_parallel.halo import halo
from longtrain.sequence_parallel.shard import Shard


def attend(call: AttendCall, shard: Shard, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, V] of queries that see themselves and the `window - 1` tokens before them."""
    assert call.attention.window is not None
    width = min(call.attention.window - 1, shard.layout.length)
    sizes = [call.k.flatten(2).shape[-1], call.v.flatten(2).shape[-1]]
    stretches, carry = halo(torch.cat([call.k.flatten(2), call.v.flatten(2)], dim=-1), width, shard, carry)
    outputs = []
    for (part, rows), (begin, end) in zip(stretches, shard.spans, strict=True):
        k, v = (x.unflatten(2, like.shape[2:]) for x, like in zip(rows.split(sizes, -1), (call.k, call.v), strict=True))
        # Nobody sees the rows before the sequence.
        queries, keys = shard.tokens_between(begin, end), shard.tokens_between(begin - width, end)
        outputs.append(call.attention(call.q[:, part], k, v, queries, keys))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), carry
