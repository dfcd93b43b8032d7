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
        self._before = list(accumulate(lengths, initial=0))
        self._end = self._ends[-1] if self._ends else 0

    def until(self, end: int) -> "Spans":
        """The tokens before `end`: as cheap for many spans as for one, which both then share."""
        found = copy.copy(self)
        found._end = min(end, self._end)
        return found

    def below(self, token: int) -> int:
        """How many of the tokens come before `token`."""
        token = min(token, self._end)
        i = bisect_left(self._ends, token)
        return self._before[i] + (max(0, token - self._begins[i]) if i < len(self._ends) else 0)

    def between(self, begin: int, end: int) -> list[Span]:
        """Those in [begin, end)."""
        end = min(end, self._end)
        if begin >= end:
            return []
        some = slice(bisect_right(self._ends, begin), bisect_left(self._begins, end))
        pairs = zip(self._begins[some], self._ends[some], strict=True)
        return [(max(begin, b), min(end, e)) for b, e in pairs]

    @property
    def count(self) -> int:
        """Tokens in all."""
        return self.below(self._end)

    def __len__(self) -> int:
        return bisect_left(self._begins, self._end)

    def __iter__(self) -> Iterator[Span]:
        return iter(self.between(self._begins[0], self._end) if self._begins else ())
