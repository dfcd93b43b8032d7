"""Every token belongs to one rank and one chunk, whatever the lengths."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longtrain.core.kinds import LayoutKind
from longtrain.core.layout import SequenceLayout, mean_context, overlap

KINDS = st.sampled_from(["contiguous", "zigzag"])


@given(length=st.integers(1, 60), ranks=st.integers(1, 9), chunk=st.none() | st.integers(1, 70), kind=KINDS)
def test_ranks_and_chunks_cover_the_sequence_once(length: int, ranks: int, chunk: int | None, kind: LayoutKind) -> None:
    layout = SequenceLayout(length, ranks, ((0,),), chunk, kind)
    spans = [layout.spans(r, c)[i] for c in range(layout.num_chunks) for r, i in layout.owners]
    assert [t for span in spans for t in range(*span)] == list(range(length))
    for c in range(layout.num_chunks):
        sizes = [sum(e - b for b, e in layout.spans(r, c)) for r in range(ranks)]
        assert max(sizes) - min(sizes) <= 1


def test_zigzag_gives_a_rank_an_early_and_a_late_slot() -> None:
    layout = SequenceLayout(80, 4, ((0,),), kind="zigzag")
    assert [layout.spans(r, 0) for r in range(4)] == [
        [(0, 10), (70, 80)],
        [(10, 20), (60, 70)],
        [(20, 30), (50, 60)],
        [(30, 40), (40, 50)],
    ]


@given(length=st.integers(1, 60), ranks=st.integers(1, 5), chunk=st.integers(1, 20), kind=KINDS)
def test_what_ranks_hold_is_what_they_hold_of_all_chunks(length: int, ranks: int, chunk: int, kind: LayoutKind) -> None:
    layout = SequenceLayout(length, ranks, ((0,),), chunk, kind)
    for some in [(r,) for r in range(ranks)], [tuple(range(ranks))]:
        held = [[t for span in layout.held(each) for t in range(*span)] for each in some]
        assert sorted(t for tokens in held for t in tokens) == list(range(length))
        assert [layout.count_all(each) for each in some] == [len(tokens) for tokens in held]


STARTS = st.sets(st.integers(1, 39)).map(lambda s: tuple(sorted({0, *s})))


@given(starts=st.lists(STARTS, min_size=1, max_size=2), chunk=st.integers(1, 45))
def test_chunks_see_those_with_a_token_of_a_document_that_goes_on(starts: list[tuple[int, ...]], chunk: int) -> None:
    layout = SequenceLayout(40, 2, tuple(starts), chunk)
    for c in range(layout.num_chunks):
        begin, end = layout.chunk(c)
        oldest = min(t for row in starts for t in range(40) if not any(t < s <= begin for s in row))
        [first] = [other for other in range(c + 1) if oldest in range(*layout.chunk(other))]
        assert layout.sees[c] == first
        assert layout.seen(c) == (layout.chunk(first)[0], end)


@given(length=st.integers(1, 60), chunk=st.integers(1, 20), kind=KINDS, a=st.integers(-9, 70), b=st.integers(-9, 70))
def test_tokens_held_between_two_are_those_held(length: int, chunk: int, kind: LayoutKind, a: int, b: int) -> None:
    layout = SequenceLayout(length, 3, ((0,),), chunk, kind)
    for rank in range(3):
        found = layout.held_between(rank, a, b)
        assert all(begin < end for begin, end in found)
        assert [t for span in found for t in range(*span)] == [
            t for span in layout.held((rank,)) for t in range(*span) if a <= t < b
        ]


@given(STARTS)
def test_documents_and_positions_follow_the_starts(starts: tuple[int, ...]) -> None:
    layout = SequenceLayout(40, 1, (starts, (0,)))
    index = torch.arange(40)
    documents, positions = layout.documents(index), layout.positions(index)
    assert documents[0].tolist() == [sum(s <= t for s in starts) - 1 for t in range(40)]
    assert positions[0].tolist() == [t - max(s for s in starts if s <= t) for t in range(40)]
    assert positions[1].tolist() == list(range(40))
    assert layout.documents(torch.tensor([-1]))[0].item() == -1


@pytest.mark.parametrize("starts", [(), (1, 2), (0, 5, 5), (0, 7, 3), (0, 40)])
def test_impossible_starts_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascend from 0"):
        SequenceLayout(40, 1, (starts,))


def test_overlap_of_disjoint_spans_is_empty() -> None:
    assert overlap((0, 5), (3, 9)) == (3, 5)
    begin, end = overlap((0, 2), (5, 9))
    assert begin == end


def test_a_token_sees_half_of_its_document_on_average() -> None:
    assert mean_context([SequenceLayout(8, 1, ((0,),))]) == 4
    # Three documents of 8, two of 6 and two of 2 tokens.
    layouts = [SequenceLayout(8, 2, ((0,), (0, 2)), 3), SequenceLayout(8, 2, ((0, 6), (0,), (0,)))]
    assert mean_context(layouts) == (3 * 64 + 2 * 36 + 2 * 4) / (2 * 40)
