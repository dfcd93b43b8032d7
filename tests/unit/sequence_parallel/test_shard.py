"""What a rank knows of its part of a chunk is right, found once, and no more work for there being more chunks."""

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from longtrain.comm.group import Group
from longtrain.core.kinds import LayoutKind
from longtrain.core.layout import SequenceLayout, span_index
from longtrain.sequence_parallel.before import rows_before
from longtrain.sequence_parallel.held import held_by_rank, held_in_order
from longtrain.sequence_parallel.shard import Shard

CPU = torch.device("cpu")
LENGTHS, CHUNKS = st.integers(1, 60), st.integers(1, 25)
KINDS = st.sampled_from(["contiguous", "zigzag"])


def shards(layout: SequenceLayout, rank: int = 0) -> list[Shard]:
    return [Shard(layout, Group(rank, layout.num_ranks), CPU, chunk) for chunk in range(layout.num_chunks)]


@given(length=LENGTHS, chunk=CHUNKS, kind=KINDS)
def test_rows_of_chunks_follow_each_other(length: int, chunk: int, kind: LayoutKind) -> None:
    layout = SequenceLayout(length, 3, ((0,),), chunk, kind)
    rows = [shard.rows([0, 2]) for shard in shards(layout)]
    counts = [sum(e - b for rank in (0, 2) for b, e in layout.spans(rank, c)) for c in range(layout.num_chunks)]
    assert [(r.begin, r.end, r.total) for r in rows] == [
        (sum(counts[:c]), sum(counts[: c + 1]), sum(counts)) for c in range(layout.num_chunks)
    ]
    assert {r.alone for r in rows} == {len(counts) == 1}


@given(length=LENGTHS, chunk=CHUNKS, kind=KINDS, rank=st.integers(0, 2))
def test_segments_count_the_starts_of_documents_inside_them(
    length: int, chunk: int, kind: LayoutKind, rank: int
) -> None:
    starts = (tuple(range(0, length, 5)), (0,))
    for shard in shards(SequenceLayout(length, 3, starts, chunk, kind), rank):
        assert [x.tolist() for x in shard.segment_documents] == [
            [[sum(b <= s <= t for s in row) for t in range(b, e)] for row in starts] for b, e in shard.spans
        ]


@given(length=LENGTHS, chunk=CHUNKS, kind=KINDS, width=st.integers(1, 30))
def test_rows_come_from_who_holds_them(length: int, chunk: int, kind: LayoutKind, width: int) -> None:
    layout = SequenceLayout(length, 3, ((0,),), chunk, kind)
    for c in range(layout.num_chunks):
        begin, end = layout.chunk(c)
        plans = [rows_before(width, layout, rank, c) for rank in range(3)]
        offered = [span_index(layout.held_between(r, begin - width, end), CPU) for r in range(3)]
        sent = [
            [[offered[o][slice(*rows)] for to, rows in plans[o].sends if to == r] for o in range(3)] for r in range(3)
        ]
        for rank, plan in enumerate(plans):
            come = [sent[rank][owner].pop(0) for owner, _ in plan.receives]
            assert [len(x) for x in come] == [e - b for _, (b, e) in plan.receives]
            parts = torch.cat([torch.arange(0), *come]).split(plan.num_rows)
            want = [range(max(0, b - width), b) if e > b else [] for b, e in layout.spans(rank, c)]
            assert [x.tolist() for x in parts] == [list(x) for x in want]
            assert plan.num_kept == sum(end - width <= t for t in offered[rank].tolist())
        assert not any(some for of_rank in sent for some in of_rank)


@pytest.mark.parametrize("members", [[(0,), (1,), (2,), (3,)], [(0, 1), (2, 3)]])
@given(length=LENGTHS, chunk=CHUNKS, kind=KINDS, document=st.integers(1, 60))
def test_what_ranks_hold_is_put_in_order(
    members: list[tuple[int, ...]], length: int, chunk: int, kind: LayoutKind, document: int
) -> None:
    layout = SequenceLayout(length, 4, (tuple(range(0, length, document)),), chunk, kind)
    for shard in shards(layout):
        team = shard.team_of(Group(0, len(members)), members)
        whole = torch.arange(*shard.seen)[None, :, None]
        parts = [span_index(list(tokens.spans), CPU)[None, :, None] for tokens in team.held]
        assert [part.shape[1] for part in parts] == team.held_counts
        assert torch.equal(held_in_order(parts, team), whole)
        assert all(map(torch.equal, held_by_rank(whole, team), parts))


def calls(function: Callable[[], object]) -> int:
    """How many functions it calls, those of Python's own library included."""
    count = 0

    def tell(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(tell)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def plan(layout: SequenceLayout, layers: int) -> None:
    """All that layers ask of a chunk that is not a tensor."""
    for shard in shards(layout, layout.num_ranks // 2):
        for _ in range(layers):
            _ = shard.own_rows, shard.rows([0]), shard.before(5), shard.team.most_rows
            _ = shard.team.pieces, shard.team.earlier_pieces, shard.team.held_counts
            for tokens in shard.team.held:
                shard.tokens.plan(tokens, None)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [2, 4])  # on one rank all that is held is one span
def test_plans_of_twice_as_many_chunks_are_twice_the_work(ranks: int, kind: LayoutKind) -> None:
    few, many, deep = (
        calls(lambda n=n, layers=layers: plan(SequenceLayout(16 * n, ranks, ((0, 7, 100),), 16, kind), layers))
        for n, layers in ((32, 1), (64, 1), (64, 2))
    )
    assert many < 2.1 * few
    assert deep < 1.5 * many


class NoWaits(TorchFunctionMode):
    """Refuses copies to a device for which the host waits. What reads from one fails by itself on `meta`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert function is not torch.tensor or "device" not in kwargs, "a list is copied to the device"
        assert function is not torch.Tensor.to or kwargs.get("non_blocking"), "a tensor is copied to the device"
        return function(*args, **kwargs)


def test_the_host_waits_for_no_device() -> None:
    layout = SequenceLayout(64, 2, (tuple(range(0, 64, 4)), (0, 5)), 20, "zigzag")
    shard = Shard(layout, Group(1, 2), torch.device("meta"), 1)
    with NoWaits():
        found = [*shard.segment_documents, shard.positions, shard.documents_between(3, 9), shard.index]
        packed = shard.tokens.plan(shard.team.held[1], None).packed(shard.device)
    assert {x.device.type for x in (*found, packed.rows, packed.queries, packed.squares.ends)} == {"meta"}


def test_index_tensors_go_when_a_chunk_is_done() -> None:
    """All layers of the chunk share one; the plan, which is small, stays."""
    [shard] = shards(SequenceLayout(64, 1, (tuple(range(0, 64, 4)),)))
    found = shard.tokens.plan(shard.team.held[0], None)
    packed = weakref.ref(found.packed(CPU))
    assert found.packed(CPU) is packed()
    shard.release()
    assert packed() is None
    assert shard.tokens.plan(shard.team.held[0], None) is found
    assert found.packed(CPU).queries.tolist() == list(range(64))
