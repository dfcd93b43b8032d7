"""A scan in which states alone travel, from the rank of each segment to that of the next.

Every rank finds the affine maps (M, B) of its segments first. Then a state goes through all segments in order, S <- M S
+ B, each rank with maps of its own; the cotangents of the states come back the same way, G <- M^T G + dS_in. A state is
cut into blocks that follow each other, so that all ranks are at work once the first has come round. Heads never mix,
nor do the columns of a state, whatever the transition; its rows do under a matrix.

The carry between chunks of time lives on the rank of the first segment; elsewhere it is empty.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from longtrain.comm.group import Group, Work
from longtrain.core.contracts import Recurrence
from longtrain.sequence_parallel.cost import WIDE, Machine, ScanShape
from longtrain.sequence_parallel.heads import split_evenly
from longtrain.sequence_parallel.segments import correct_parts, summarize_parts
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.affine import advance, advance_adjoint, transition_grad

Block = tuple[slice, slice, slice]
"""Heads, rows and columns of states [B H, K, V]."""


def scan_in_blocks(op: Recurrence, shard: Shard, carry: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, V] and the carry; states travel in `count` blocks or a few more."""
    segments, transitions, states = summarize_parts(op, shard)
    carry = states.new_zeros(0) if carry is None else carry
    states_in, carry = _Chain.apply(transitions, states, carry, shard, count)
    return correct_parts(segments, states_in), carry


class _Chain(torch.autograd.Function):
    """(M, B) of this rank's segments [n, B, H, ...] and the carry -> the states before them, and the next carry."""

    @staticmethod
    def forward(
        ctx: Any, transitions: Tensor, states: Tensor, carry: Tensor, shard: Shard, count: int
    ) -> tuple[Tensor, Tensor]:
        ctx.shard, ctx.count, ctx.carry_shape = shard, count, carry.shape
        maps, local = transitions.flatten(1, 2), states.flatten(1, 2)
        owners, slots, post = shard.layout.owners, shard.layout.slots(shard.group.rank), _Post(shard.group)
        states_in = torch.zeros_like(local)
        for i, slot in enumerate(slots):
            for at in _blocks(local[i], count):
                if slot > 0:
                    states_in[i][at] = post.receive(local[i][at], owners[slot - 1][0])
                elif carry.numel():
                    states_in[i][at] = carry.flatten(0, 1)[at]
                state = advance(maps[i][at[0]], states_in[i][at]) + local[i][at]
                if slot + 1 < len(owners) or _goes_on(shard):
                    post.send(state, owners[(slot + 1) % len(owners)][0])
        carry_out = local.new_empty(local.shape[1:] if slots[0] == 0 and _goes_on(shard) else 0)
        if carry_out.numel():
            for at in _blocks(carry_out, count):
                carry_out[at] = post.receive(carry_out[at], owners[-1][0])
        post.wait()
        ctx.save_for_backward(transitions, states_in.view_as(states))
        return states_in.view_as(states), carry_out.unflatten(0, states.shape[1:3]) if carry_out.numel() else carry_out

    @staticmethod
    def backward(ctx: Any, grads_in: Tensor, grad_carry: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        transitions, states_in = ctx.saved_tensors
        shard, count = ctx.shard, ctx.count
        maps, grads_in = transitions.flatten(1, 2), grads_in.flatten(1, 2)
        owners, slots, post = shard.layout.owners, shard.layout.slots(shard.group.rank), _Post(shard.group)
        grads = torch.zeros_like(grads_in)  # of the states behind the segments
        if grad_carry.numel():
            for at in _blocks(grads[0], count):
                post.send(grad_carry.flatten(0, 1)[at], owners[-1][0])
        grad_first = grads_in.new_zeros(ctx.carry_shape)
        for i, slot in reversed(list(enumerate(slots))):
            for at in _blocks(grads[i], count):
                if slot + 1 < len(owners) or _goes_on(shard):
                    grads[i][at] = post.receive(grads[i][at], owners[(slot + 1) % len(owners)][0])
                grad = advance_adjoint(maps[i][at[0]], grads[i][at]) + grads_in[i][at]
                if slot > 0:
                    post.send(grad, owners[slot - 1][0])
                elif grad_first.numel():
                    grad_first.flatten(0, 1)[at] = grad
        post.wait()
        grads = grads.view_as(states_in)
        return transition_grad(transitions, states_in, grads), grads, grad_first, None, None


def _goes_on(shard: Shard) -> bool:
    """Whether another chunk of time follows."""
    return shard.chunk + 1 < shard.layout.num_chunks


def _blocks(states: Tensor, count: int) -> Iterator[Block]:
    """The blocks of states [B H, K, V]: of heads first, and of columns where there are not heads enough."""
    heads, _, columns = states.shape
    for some_heads in split_evenly(heads, min(count, heads)):
        for some_columns in split_evenly(columns, min(-(-count // heads), columns)):
            yield some_heads, slice(None), some_columns


class _Post:
    """Tensors between ranks, and from a rank to itself, in the order in which they were sent."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._own: list[Tensor] = []
        self._sent: list[tuple[Work, Tensor]] = []

    def send(self, tensor: Tensor, to: int) -> None:
        if to == self._group.rank:
            self._own.append(tensor)
        else:
            tensor = tensor.contiguous()
            self._sent.append((self._group.send(tensor, to), tensor))

    def receive(self, like: Tensor, source: int) -> Tensor:
        if source == self._group.rank:
            return self._own.pop(0)
        received = torch.empty_like(like, memory_format=torch.contiguous_format)
        self._group.receive(received, source)
        return received

    def wait(self) -> None:
        """Until everything sent has arrived."""
        for work, _ in self._sent:
            work.wait()


def chain_seconds(shape: ScanShape, machine: Machine, count: int) -> float:
    """See `sequence_parallel.cost`: a hop from every segment to the next, of blocks that follow each other."""
    hops = machine.ranks * machine.slots - 1
    block = machine.links.send.seconds(shape.batch * shape.heads * shape.state * WIDE / count)
    return 2 * (hops + count - 1) * block if hops else 0.0
