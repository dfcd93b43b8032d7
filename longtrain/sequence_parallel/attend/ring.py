"""Ring attention (Liu, Zaharia & Abbeel 2023): keys and values go round, partial results merge by log-sum-exp.

Forward: P steps; at each a rank attends to the block it holds and passes the block on. Backward: the blocks go round
again together with the float32 gradients of their keys and values, which come home after P steps. A rank keeps only its
own tokens between the passes, so memory does not grow with P.
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
    return _Ring.apply(call.q, k, v, shard, call.scale), (k, v)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, shard: Shard, scale: float) -> Tensor:
        group, rows = shard.group, shard.held_counts()
        output, lse = attention_forward(q, k, v, shard.tokens, shard.held_tokens(group.rank), scale)
        block: tuple[Tensor, ...] = (k, v)
        for step in range(1, group.size):
            holder = (group.rank - step) % group.size
            block = pass_on(block, rows[holder], group)
            part = attention_forward(q, *block, shard.tokens, shard.held_tokens(holder), scale)
            output, lse = merge(output, lse, *part)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.shard, ctx.scale = shard, scale
        return output.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, output, lse = ctx.saved_tensors
        shard, rows = ctx.shard, ctx.shard.held_counts()
        delta = (grad.to(output.dtype) * output).sum(-1).mT
        dq = torch.zeros_like(q, dtype=output.dtype)
        block: tuple[Tensor, ...] = (k, v)
        sums: tuple[Tensor, ...] = tuple(torch.zeros_like(x, dtype=output.dtype) for x in (k, v))
        for step in range(shard.group.size):
            holder = (shard.group.rank - step) % shard.group.size
            keys = shard.held_tokens(holder)
            dq_part, *parts = attention_backward(grad, q, *block, lse, delta, shard.tokens, keys, ctx.scale)
            dq += dq_part
            sums = tuple(total + part for total, part in zip(sums, parts, strict=True))
            if step + 1 < shard.group.size:
                received = pass_on((*block, *sums), rows[(holder - 1) % shard.group.size], shard.group)
                block, sums = received[:2], received[2:]
        if shard.group.size > 1:  # home, without the keys and values
            sums = pass_on(sums, rows[shard.group.rank], shard.group)
        dk, dv = sums
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None
