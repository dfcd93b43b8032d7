"""Attention by one all-gather of keys and values (LASP-2H: Sun et al. 2025, section 3.2; Llama 3, section 3.3.2).

Simple, one exchange each way, and 2 T G (K + V) numbers of memory: for contexts whose keys and values fit on one rank.
The cotangents of a rank's keys and values are summed over ranks in float32 before they return to it.
"""

from typing import Any

import torch
from torch import Tensor

from longtrain.sequence_parallel.call import AttendCall
from longtrain.sequence_parallel.cost import BACKWARD, WIDE, AttendShape, Machine
from longtrain.sequence_parallel.held import held_by_rank, held_in_order
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.affine import accumulator_dtype
from longtrain_kernels.block_attention import BlockAttention


def attend(call: AttendCall, shard: Shard) -> Tensor:
    """Outputs [B, L, H, V]; each rank keeps the keys and values of its own tokens."""
    k, v = call.prefix.extend(call.k, call.v, shard.own_rows)
    return _GatheredAttention.apply(call.q, k, v, shard, call.attention)


class _GatheredAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, shard: Shard, attention: BlockAttention) -> Tensor:
        keys, team = shard.tokens_between(*shard.seen), shard.team
        widths = [k.shape[-1], v.shape[-1]]
        by_holder = shard.group.all_gather_rows(torch.cat([k, v], dim=-1), team.held_counts)
        k_all, v_all = held_in_order(by_holder, team).split(widths, dim=-1)
        output, lse = attention.forward(q, k_all, v_all, shard.tokens, keys)
        output = output.to(q.dtype)
        ctx.save_for_backward(q, k_all, v_all, output, lse)
        ctx.shard, ctx.keys, ctx.attention = shard, keys, attention
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k_all, v_all, output, lse = ctx.saved_tensors
        dq, dk, dv = ctx.attention.backward(grad, q, k_all, v_all, output, lse, ctx.shard.tokens, ctx.keys)
        whole = torch.cat([dk, dv], dim=-1).to(accumulator_dtype(dk.dtype))
        sums = held_by_rank(whole, ctx.shard.team)
        dk, dv = ctx.shard.group.reduce_scatter_rows(sums).split([dk.shape[-1], dv.shape[-1]], dim=-1)
        return dq.to(q.dtype), dk.to(k_all.dtype), dv.to(v_all.dtype), None, None


def seconds(shape: AttendShape, machine: Machine) -> float:
    """See `sequence_parallel.cost`: nothing overlaps."""
    received = (machine.ranks - 1) * shape.key_value_numbers
    transfers = machine.links.gather.seconds(received * shape.itemsize) + machine.links.gather.seconds(received * WIDE)
    return (1 + BACKWARD) * shape.slowest_seconds(machine) + transfers
