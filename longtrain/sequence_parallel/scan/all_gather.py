"""Scan by one all-gather of the ranks' affine maps (LASP-2: Sun et al. 2025, "LASP-2", algorithm 2).

Each rank finds the affine maps (M, B) of its segments, gathers those of all ranks, folds the ones before each of its
own into that segment's incoming state, and finishes the outputs. Backward mirrors it: one all-gather of the cotangents
of the incoming states, and a fold from the last segment. What travels is H (K V + |M|) numbers a segment, whatever the
length.
"""

from typing import Any

import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.core.contracts import Recurrence
from longtrain.sequence_parallel.cost import WIDE, Machine, ScanShape
from longtrain.sequence_parallel.segments import correct_parts, summarize_parts
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.affine import advance, advance_adjoint, transition_grad


def scan(op: Recurrence, shard: Shard, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, V] and the state after the chunk, which every rank carries."""
    segments, transitions, states = summarize_parts(op, shard)
    carry = torch.zeros_like(states[0]) if carry is None else carry
    states_in, state_out = _ExclusiveScan.apply(transitions, states, carry, shard.layout.owners, shard.group)
    return correct_parts(segments, states_in), state_out


class _ExclusiveScan(torch.autograd.Function):
    """(M, B) of every rank's segments [n, ...] and the chunk's incoming state -> the states before this rank's
    segments [n, ...], and after the last segment of all.

    The carry and its cotangent are the same on all ranks: each rank folds all maps, in both directions.
    """

    @staticmethod
    def forward(
        ctx: Any, transitions: Tensor, states: Tensor, carry: Tensor, owners: list[tuple[int, int]], group: Group
    ) -> tuple[Tensor, Tensor]:
        gathered = group.all_gather(torch.cat([transitions.flatten(), states.flatten()]))
        sizes = [transitions.numel(), states.numel()]
        maps = [(m.view_as(transitions), b.view_as(states)) for m, b in (part.split(sizes) for part in gathered)]
        in_order = [maps[rank][0][i] for rank, i in owners]
        before = []
        for m, (rank, i) in zip(in_order, owners, strict=True):
            before.append(carry)
            carry = advance(m, carry) + maps[rank][1][i]
        ctx.owners, ctx.group = owners, group
        states_in = torch.stack([state for state, (rank, _) in zip(before, owners, strict=True) if rank == group.rank])
        ctx.save_for_backward(states_in, *in_order)
        return states_in, carry

    @staticmethod
    def backward(ctx: Any, grads_in: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states_in, *in_order = ctx.saved_tensors
        gathered = ctx.group.all_gather(grads_in)
        grad_states = torch.empty_like(states_in)
        grad_transitions: list[Any] = [None] * len(states_in)
        # grad: of the state behind the segment at hand
        for m, (rank, i) in zip(reversed(in_order), reversed(ctx.owners), strict=True):
            if rank == ctx.group.rank:
                grad_states[i], grad_transitions[i] = grad, transition_grad(m, states_in[i], grad)
            grad = advance_adjoint(m, grad) + gathered[rank][i]
        return torch.stack(grad_transitions), grad_states, grad, None, None


def seconds(shape: ScanShape, machine: Machine) -> float:
    """See `sequence_parallel.cost`: maps in forward, cotangents of states in backward."""
    heads = (machine.ranks - 1) * machine.slots * shape.batch * shape.heads * WIDE
    gather = machine.links.gather
    return gather.seconds(heads * (shape.state + shape.transition)) + gather.seconds(heads * shape.state)
