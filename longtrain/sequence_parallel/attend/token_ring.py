"""TokenRing (Wang et al. 2024): queries go round, and partial outputs come straight home, against the traffic.

Keys and values stay where they are, and so do the sums of their gradients. Pays where queries and outputs are fewer
numbers than keys and values: not where many query heads share a key head.
"""

from typing import Any

import torch
from torch import Tensor

from longtrain.sequence_parallel.attend._rotation import pass_on
from longtrain.sequence_parallel.call import AttendCall, KeyValue
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.block_attention import attention_backward, attention_forward, merge


def attend(call: AttendCall, shard: Shard, carry: KeyValue | None) -> tuple[Tensor, KeyValue]:
    """Outputs [B, L, H, V]; each rank carries the keys and values of its own tokens."""
    k, v = call.keys_and_values(carry)
    return _TokenRing.apply(call.q, k, v, shard, call.scale), (k, v)


class _TokenRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, shard: Shard, scale: float) -> Tensor:
        group, keys = shard.group, shard.held_tokens(shard.group.rank)
        output, lse = attention_forward(q, k, v, shard.tokens, keys, scale)
        block: tuple[Tensor, ...] = (q,)
        for step in range(1, group.size):
            owner = (group.rank - step) % group.size
            tokens = shard.tokens_of(owner)
            block = pass_on(block, tokens.index.numel(), group)
            part, part_lse = attention_forward(*block, k, v, tokens, keys, scale)
            home, home_lse = _send_home((part, part_lse.mT), (output, lse.mT), step, shard)
            output, lse = merge(output, lse, home, home_lse.mT)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.shard, ctx.scale = shard, scale
        return output.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, output, lse = ctx.saved_tensors
        shard, group = ctx.shard, ctx.shard.group
        keys = shard.held_tokens(group.rank)
        delta = (grad.to(output.dtype) * output).sum(-1)
        dq = torch.zeros_like(q, dtype=output.dtype)
        dk, dv = (torch.zeros_like(x, dtype=output.dtype) for x in (k, v))
        block: tuple[Tensor, ...] = (grad, q, lse.mT, delta)
        for step in range(group.size):
            tokens = shard.tokens_of((group.rank - step) % group.size)
            if step:
                block = pass_on(block, tokens.index.numel(), group)
            rows, queries, sums, deltas = block
            part, *parts = attention_backward(rows, queries, k, v, sums.mT, deltas.mT, tokens, keys, ctx.scale)
            dk, dv = dk + parts[0], dv + parts[1]
            dq += _send_home((part,), (dq,), step, shard)[0] if step else part
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _send_home(parts: tuple[Tensor, ...], like: tuple[Tensor, ...], step: int, shard: Shard) -> list[Tensor]:
    """Parts to the rank `step` before this one; returns those of this rank, from the rank `step` behind it."""
    group = shard.group
    owner, helper = (group.rank - step) % group.size, (group.rank + step) % group.size
    received = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]
    group.exchange([(owner, x.contiguous()) for x in parts], [(helper, x) for x in received])
    return received
