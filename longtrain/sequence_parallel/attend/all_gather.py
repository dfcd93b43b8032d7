"""Attention by one all-gather of keys and values (LASP-2H: Sun et al. 2025, section 3.2; Llama 3, section 3.3.2).

Simple, one exchange each way, and 2 T G (K + V) numbers of memory: for contexts whose keys and values fit on one rank.
"""

from typing import Any

import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.sequence_parallel.call import AttendCall, KeyValue
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.block_attention import Tokens, attention


def attend(call: AttendCall, shard: Shard, carry: KeyValue | None) -> tuple[Tensor, KeyValue]:
    """Outputs [B, L, H, V]; each rank carries the keys and values of its own tokens."""
    k, v = call.keys_and_values(carry)
    counts = shard.held_counts()
    tokens = [shard.held_tokens(r) for r in range(shard.group.size)]
    index = torch.cat([t.index for t in tokens])
    order = index.argsort()
    keys = Tokens(index=index[order], documents=torch.cat([t.documents for t in tokens], dim=1)[:, order])
    gathered = _GatherRows.apply(torch.cat([k, v], dim=-1), counts, shard.group)[:, order]
    k_all, v_all = gathered.split([k.shape[-1], v.shape[-1]], dim=-1)
    return attention(call.q, k_all, v_all, shard.tokens, keys, call.window, call.scale), (k, v)


class _GatherRows(torch.autograd.Function):
    """All-gather in dim 1; the cotangents of a rank's rows are summed over ranks, in float32, and returned to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: Group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return torch.cat(group.all_gather_rows(x, counts), dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        mine = ctx.group.reduce_scatter_rows(wide.split(ctx.counts, dim=1))
        return mine.to(grad.dtype), None, None
