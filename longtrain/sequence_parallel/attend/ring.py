"""Ring attention (Liu, Zaharia & Abbeel 2023): keys and values go round, partial results merge by log-sum-exp.

Forward: P steps; at each a rank attends to the block that it holds, while the next one is on its way. Backward: the
blocks go round again, and the float32 gradients of their keys and values follow one step behind, which bring them home
after P steps. A rank keeps only its own tokens between the passes, so memory does not grow with P.
"""

from typing import Any

import torch
from torch import Tensor

from longtrain.comm.group import Pending
from longtrain.sequence_parallel.attend._rotation import go_round, pass_on
from longtrain.sequence_parallel.call import AttendCall
from longtrain.sequence_parallel.cost import BACKWARD, WIDE, AttendShape, Machine
from longtrain.sequence_parallel.shard import Shard, Team
from longtrain_kernels.affine import accumulator_dtype
from longtrain_kernels.block_attention import BlockAttention


def attend(call: AttendCall, shard: Shard) -> Tensor:
    """Outputs [B, L, H, V]; each rank keeps the keys and values of its own tokens."""
    k, v = call.prefix.extend(call.k, call.v, shard.own_rows)
    return ring_attention(call.q, k, v, shard.team, call.attention)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, team: Team, attention: BlockAttention) -> Tensor:
    """Of this rank's queries [B, L, H, D] to the keys [B, M, G, D] of all of the team; [B, L, H, V]."""
    return _RingAttention.apply(q, k, v, team, attention)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, team: Team, attention: BlockAttention) -> Tensor:
        queries, size = team.tokens[team.group.rank], team.group.size
        wide = accumulator_dtype(q.dtype)
        for step, keys, block in go_round(team, (k, v), team.held):
            if step == 0:
                output, lse = attention.forward(q, *block, queries, keys)
                output, lse = (output.to(wide), lse) if size > 1 else (output, lse)
            else:
                attention.merge(output, lse, q, *block, queries, keys)
        output = output.to(q.dtype)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.team, ctx.attention = team, attention
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, output, lse = ctx.saved_tensors
        team, attention = ctx.team, ctx.attention
        queries, size, wide = team.tokens[team.group.rank], team.group.size, accumulator_dtype(q.dtype)
        sums: Pending[tuple[Tensor, ...]] = Pending(())
        for step, keys, block in go_round(team, (k, v), team.held):
            found = attention.gradients(grad, q, *block, output, lse, queries, keys)
            if step == 0:
                dq, *own = found.whole(q, k, v)
                dq, total = dq.to(wide), tuple(x.to(wide) for x in own)
            else:
                total = sums.wait()
                found.add_to(dq, *total)
            sums = pass_on(team, total, step, team.held, lane="sums") if size > 1 else Pending(total)
        dk, dv = sums.wait()
        return dq.to(q.dtype), dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True), None, None


def seconds(shape: AttendShape, machine: Machine) -> float:
    """See `sequence_parallel.cost`: P - 1 transfers run beside blocks; backward, the last one brings gradients home."""
    own = shape.pair_seconds(shape.tokens**2 / 2, machine)
    block = own if machine.zigzag else 2 * own
    keys = machine.links.send.seconds(shape.key_value_numbers * shape.itemsize)
    sums = machine.links.send.seconds(shape.key_value_numbers * WIDE)
    steps = machine.ranks - 1
    forward = own + steps * max(block, keys)
    backward = BACKWARD * own + steps * max(BACKWARD * block, keys + sums) + (sums if steps else 0.0)
    return forward + backward
