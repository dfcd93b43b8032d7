"""Look-ups among spans are those among the tokens one by one."""

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from longtrain_kernels.spans import Span, Spans

EDGES = st.lists(st.integers(0, 4), max_size=12).map(lambda steps: list(accumulate(steps, initial=-3)))


def taken(edges: list[int]) -> list[Span]:
    """Two of three of the spans between edges: some touch, and some are empty."""
    return [span for i, span in enumerate(pairwise(edges)) if i % 3]


@given(edges=EDGES, begin=st.integers(-5, 40), end=st.integers(-5, 40), a=st.integers(-5, 40), b=st.integers(-5, 40))
def test_look_ups_are_those_among_tokens(edges: list[int], begin: int, end: int, a: int, b: int) -> None:
    spans = Spans(taken(edges)).part(begin, end)
    tokens = [t for span in taken(edges) for t in range(*span) if begin <= t < end]
    assert [t for span in spans for t in range(*span)] == tokens
    assert spans.count == len(tokens)
    assert spans.below(a) == sum(t < a for t in tokens)
    assert [t for span in spans.between(a, b) for t in range(*span)] == [t for t in tokens if a <= t < b]


@given(edges=EDGES, begin=st.integers(-5, 40), end=st.integers(-5, 40))
def test_they_are_as_few_as_they_can_be(edges: list[int], begin: int, end: int) -> None:
    spans = list(Spans(taken(edges)).part(begin, end))
    assert len(spans) == len(Spans(taken(edges)).part(begin, end))
    assert all(begin < end for begin, end in spans)
    assert all(a[1] < b[0] for a, b in pairwise(spans))
