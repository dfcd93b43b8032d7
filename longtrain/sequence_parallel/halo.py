"""The rows just before each stretch of a rank's tokens, from the ranks that hold them.

A stretch may be shorter than the halo: then rows come from several ranks, and from earlier chunks. Backward sends the
cotangents back the same way. One all-to-all carries them: on GPUs it costs a third of as many sends of few rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.core.contracts import Stretch
from longtrain.core.layout import Span, overlap
from longtrain.sequence_parallel.shard import Shard


def halo(x: Tensor, width: int, shard: Shard, carry: Tensor | None) -> tuple[list[Stretch], Tensor]:
    """See `core.contracts.Sequence.halo`; the carry is this rank's rows of the last `width` before the next chunk."""
    chunk_begin, chunk_end = shard.layout.chunk(shard.chunk)
    rows = x if carry is None else torch.cat([carry, x], dim=1)
    plan = _plan(width, shard, chunk_begin)
    before = _Exchange.apply(rows, plan, shard.group).split(plan.num_rows, dim=1)
    stretches = []
    for part, found in zip(shard.parts, before, strict=True):
        start = x.new_zeros(x.shape[0], width - found.shape[1], *x.shape[2:])
        stretches.append(Stretch(part, torch.cat([start, found, x[:, part]], dim=1)))
    keep = sum(e - b for b, e in shard.held_between(shard.group.rank, chunk_end - width, chunk_end))
    return stretches, rows[:, rows.shape[1] - keep :]


@dataclass(frozen=True)
class _Plan:
    """Row ranges of the local `rows` to send and of the result to receive, by rank; empty ranges are left out."""

    sends: tuple[tuple[int, Span], ...]
    receives: tuple[tuple[int, Span], ...]
    num_rows: list[int]
    """Rows found before each part of this rank's tokens, one part after another in the result."""


def _plan(width: int, shard: Shard, chunk_begin: int) -> _Plan:
    ranks = range(shard.group.size)
    spans = [shard.layout.spans(r, shard.chunk) for r in ranks]
    _, chunk_end = shard.layout.chunk(shard.chunk)
    # What every rank can offer: its rows of the chunk and of the `width` before it, in the order of its `rows`.
    offered = [shard.held_between(r, chunk_begin - width, chunk_end) for r in ranks]

    def transfers(reader: Span, owner: int) -> list[Span]:
        begin, end = reader
        wanted = (begin - width, begin) if end > begin else (begin, begin)
        parts = [overlap(span, wanted) for span in offered[owner]]
        return [part for part in parts if part[1] > part[0]]

    # Two ranks exchange their ranges in one order: by the reader's part, then along the sequence.
    me = shard.group.rank
    sends = [(r, _within(offered[me], part)) for r in ranks for reader in spans[r] for part in transfers(reader, me)]
    receives, num_rows, at = [], [], 0
    for reader in spans[me]:
        first = at
        for part, owner in sorted((part, r) for r in ranks for part in transfers(reader, r)):
            rows = part[1] - part[0]
            receives.append((owner, (at, at + rows)))
            at += rows
        num_rows.append(at - first)
    return _Plan(tuple(sends), tuple(receives), num_rows)


def _within(spans: list[Span], part: Span) -> Span:
    """Where `part` lies in the concatenation of `spans`."""
    at = 0
    for begin, end in spans:
        if begin <= part[0] and part[1] <= end:
            return at + part[0] - begin, at + part[1] - begin
        at += end - begin
    raise AssertionError("a rank was asked for rows that it does not hold")


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: _Plan, group: Group) -> Tensor:
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
