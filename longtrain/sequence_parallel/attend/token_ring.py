"""TokenRing (Wang et al. 2024): queries go round, and partial outputs come straight home, against the traffic.

Keys and values stay where they are, and so do the sums of their gradients. Pays where queries and outputs are fewer
numbers than keys and values: not where many query heads share a key head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longtrain.comm.group import Pending
from longtrain.sequence_parallel.attend._rotation import go_round
from longtrain.sequence_parallel.call import AttendCall
from longtrain.sequence_parallel.cost import BACKWARD, WIDE, AttendShape, Machine
from longtrain.sequence_parallel.shard import Shard, Team
from longtrain_kernels.affine import accumulator_dtype
from longtrain_kernels.block_attention import BlockAttention, merge_into


def attend(call: AttendCall, shard: Shard) -> Tensor:
    """Outputs [B, L, H, V]; each rank keeps the keys and values of its own tokens."""
    k, v = call.prefix.extend(call.k, call.v, shard.own_rows)
    return _TokenRing.apply(call.q, k, v, shard.team, call.attention)


class _TokenRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, team: Team, attention: BlockAttention) -> Tensor:
        keys, wide = team.held[team.group.rank], accumulator_dtype(q.dtype)
        home: Pending[tuple[Tensor, ...]] | None = None
        for step, queries, (their_q,) in go_round(team, (q,), team.tokens):
            part, part_lse = attention.forward(their_q, k, v, queries, keys)
            if step == 0:
                output, lse = part.to(wide), part_lse.mT.contiguous()
            else:
                if home is not None:
                    merge_into(output, lse, *home.wait())
                home = _send_home((part.to(wide), part_lse.mT), step, team)
        if home is not None:
            merge_into(output, lse, *home.wait())
        output = output.to(q.dtype)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.team, ctx.attention = team, attention
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, output, lse = ctx.saved_tensors
        team, attention = ctx.team, ctx.attention
        keys = team.held[team.group.rank]
        dq, dk, dv = (torch.zeros_like(x, dtype=accumulator_dtype(x.dtype)) for x in (q, k, v))
        home: Pending[tuple[Tensor, ...]] | None = None
        for step, queries, block in go_round(team, (grad, q, output, lse), team.tokens):
            rows, their_q, their_output, their_lse = block
            part = dq if step == 0 else torch.zeros_like(their_q, dtype=dq.dtype)
            found = attention.gradients(rows, their_q, k, v, their_output, their_lse.mT, queries, keys)
            found.add_to(part, dk, dv)
            if step > 0:
                if home is not None:
                    dq += home.wait()[0]
                home = _send_home((part,), step, team)
        if home is not None:
            dq += home.wait()[0]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _send_home(parts: Sequence[Tensor], step: int, team: Team) -> Pending[tuple[Tensor, ...]]:
    """Begin to send parts to the rank `step` before this one; this rank's come from the rank `step` behind it."""
    counts = [team.tokens[(rank - step) % team.group.size].count for rank in range(team.group.size)]
    return team.group.shift(parts, counts, by=-step, lane="home")


def seconds(shape: AttendShape, machine: Machine) -> float:
    """See `sequence_parallel.cost`: queries and results travel in opposite directions, the last results alone."""
    own = shape.pair_seconds(shape.tokens**2 / 2, machine)
    block = own if machine.zigzag else 2 * own
    send, steps = machine.links.send, machine.ranks - 1
    results = send.seconds(shape.output_numbers * WIDE)
    queries = send.seconds(shape.query_numbers * shape.itemsize)
    forward = own + steps * max(block, queries, results) + (results if steps else 0.0)
    rows = send.seconds((shape.query_numbers + 2 * shape.output_numbers) * shape.itemsize)
    grads = send.seconds(shape.query_numbers * WIDE)
    backward = BACKWARD * own + steps * max(BACKWARD * block, rows, grads) + (grads if steps else 0.0)
    return forward + backward
