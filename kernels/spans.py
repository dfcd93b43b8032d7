"""Where tokens are in a sequence. A look-up goes to the spans that it asks for, however many there are."""

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate

Span = tuple[int, int]
"""Tokens [begin, end) of the whole sequence."""


class Spans:
    """Disjoint spans in ascending order."""

    def __init__(self, spans: Iterable[Span]) -> None:
        """Ascending. Those that touch become one, and empty ones are left out."""
        self._begins: list[int] = []
        self._ends: list[int] = []
        for begin, end in spans:
            if begin < end and self._ends[-1:] == [begin]:
                self._ends[-1] = end
            elif begin < end:
                self._begins.append(begin)
                self._ends.append(end)
        lengths = (end - begin for begin, end in zip(self._begins, self._ends, strict=True))
        self._counts = list(accumulate(lengths, initial=0))
        self._begin, self._end = (self._begins[0], self._ends[-1]) if self._begins else (0, 0)

    def part(self, begin: int, end: int) -> "Spans":
        """The tokens in [begin, end): as cheap for many spans as for one, which both then share."""
        found = copy.copy(self)
        found._begin = max(begin, self._begin)
        found._end = max(found._begin, min(end, self._end))
        return found

    def below(self, token: int) -> int:
        """How many of the tokens come before `token`."""
        return self._count(max(self._begin, min(token, self._end))) - self._count(self._begin)

    def between(self, begin: int, end: int) -> list[Span]:
        """Those in [begin, end)."""
        begin, end = max(begin, self._begin), min(end, self._end)
        if begin >= end:
            return []
        some = slice(bisect_right(self._ends, begin), bisect_left(self._begins, end))
        pairs = zip(self._begins[some], self._ends[some], strict=True)
        return [(max(begin, b), min(end, e)) for b, e in pairs]

    @property
    def count(self) -> int:
        """Tokens in all."""
        return self.below(self._end)

    def _count(self, token: int) -> int:
        """How many tokens come before it, with those before this part."""
        i = bisect_left(self._ends, token)
        return self._counts[i] + (max(0, token - self._begins[i]) if i < len(self._ends) else 0)

    def __len__(self) -> int:
        empty = self._begin == self._end
        return 0 if empty else bisect_left(self._begins, self._end) - bisect_right(self._ends, self._begin)

    def __iter__(self) -> Iterator[Span]:
        return iter(self.between(self._begin, self._end))
