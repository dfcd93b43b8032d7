"""The rows just before each stretch of a rank's tokens, from the ranks that hold them.

A stretch may be shorter than the halo: then rows come from several ranks, and from earlier chunks. Backward sends the
cotangents back the same way. One all-to-all carries them: on GPUs it costs a third of as many sends of few rows.
"""

from typing import Any

import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.core.contracts import Stretch
from longtrain.sequence_parallel.before import Before
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.spans import Span


def halo(x: Tensor, width: int, shard: Shard, carry: Tensor | None) -> tuple[list[Stretch], Tensor]:
    """See `core.contracts.Sequence.halo`; the carry is this rank's rows of the last `width` before the next chunk."""
    rows = x if carry is None else torch.cat([carry, x], dim=1)
    plan = shard.before(width)
    before = _Exchange.apply(rows, plan, shard.group).split(plan.num_rows, dim=1)
    stretches = []
    for part, found in zip(shard.parts, before, strict=True):
        start = x.new_zeros(x.shape[0], width - found.shape[1], *x.shape[2:])
        stretches.append(Stretch(part, torch.cat([start, found, x[:, part]], dim=1)))
    return stretches, rows[:, rows.shape[1] - plan.num_kept :]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: Before, group: Group) -> Tensor:
        ctx.plan, ctx.group, ctx.num_rows = plan, group, rows.shape[1]
        result = rows.new_empty(rows.shape[0], sum(plan.num_rows), *rows.shape[2:])
        _transfer(rows, plan.sends, result, plan.receives, group, add=False)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        result = grad.new_zeros(grad.shape[0], ctx.num_rows, *grad.shape[2:])
        _transfer(grad, ctx.plan.receives, result, ctx.plan.sends, ctx.group, add=True)
        return result, None, None


def _transfer(
    source: Tensor,
    sends: tuple[tuple[int, Span], ...],
    target: Tensor,
    receives: tuple[tuple[int, Span], ...],
    group: Group,
    add: bool,
) -> None:
    """Move row ranges between ranks. `add` sums where ranges overlap."""
    ranks = range(group.size)
    nothing = source[:, :0]
    outgoing = [torch.cat([nothing, *(source[:, b:e] for to, (b, e) in sends if to == rank)], dim=1) for rank in ranks]
    counts = [sum(e - b for owner, (b, e) in receives if owner == rank) for rank in ranks]
    arrived = group.all_to_all(outgoing, [(source.shape[0], count, *source.shape[2:]) for count in counts])
    taken = [0] * group.size
    for owner, (b, e) in receives:
        part = arrived[owner][:, taken[owner] : taken[owner] + e - b]
        taken[owner] += e - b
        target[:, b:e] = target[:, b:e] + part if add else part
