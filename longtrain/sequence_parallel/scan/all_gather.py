"""Scan by one all-gather of the ranks' affine maps (LASP-2: Sun et al. 2025, "LASP-2", algorithm 2).

Each rank runs its segment from the zero state, gathers all affine maps (M, B), folds those of the ranks before it
into its incoming state, and corrects its outputs by linearity. Backward mirrors it: one all-gather of the cotangents of
the incoming states, and a fold from the last rank. What travels is H (K V + |M|) numbers a rank, whatever the length.
"""

from typing import Any

import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.core.contracts import Recurrence
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.affine import advance, advance_adjoint, transition_grad


def scan(op: Recurrence, shard: Shard, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, V] and the state after the chunk, which every rank carries."""
    segment = op.summarize(shard.segment_documents)
    carry = torch.zeros_like(segment.state) if carry is None else carry
    state_in, state_out = _ExclusiveScan.apply(segment.transition, segment.state, carry, shard.group)
    return segment.correct(state_in), state_out


class _ExclusiveScan(torch.autograd.Function):
    """(M, B) of every rank and the chunk's incoming state -> the state before this rank, and after the last.

    The carry and its cotangent are the same on all ranks: each rank folds all maps, in both directions.
    """

    @staticmethod
    def forward(ctx: Any, transition: Tensor, state: Tensor, carry: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        gathered = group.all_gather(torch.cat([transition.flatten(), state.flatten()]))
        sizes = [transition.numel(), state.numel()]
        maps = [part.split(sizes) for part in gathered]
        ctx.transitions = [m.view_as(transition) for m, _ in maps]
        before = []
        for m, b in maps:
            before.append(carry)
            carry = advance(m.view_as(transition), carry) + b.view_as(state)
        ctx.group = group
        ctx.save_for_backward(before[group.rank])
        # Clones: an output may be neither an input (rank 0 starts from the carry itself) nor saved twice.
        return before[group.rank].clone(), carry

    @staticmethod
    def backward(ctx: Any, grad_in: Tensor, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (state_in,) = ctx.saved_tensors
        rank = ctx.group.rank
        grads_in = ctx.group.all_gather(grad_in)
        grad = grad_out  # of the state after the rank at hand
        for r in reversed(range(ctx.group.size)):
            if r == rank:
                grad_state, grad_transition = grad, transition_grad(ctx.transitions[r], state_in, grad)
            grad = advance_adjoint(ctx.transitions[r], grad) + grads_in[r]
        return grad_transition, grad_state, grad, None
