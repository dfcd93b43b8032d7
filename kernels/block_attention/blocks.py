"""Which tokens a block of attention holds, and the rectangles of scores that kernels compute: host arithmetic.

Tokens come as spans of the whole sequence with the starts of its documents, so nothing is asked of a device. A query
sees the keys of its document up to itself. Among keys in ascending order these lie in a row, whatever spans they come
from; so a run of queries needs one square of scores, causal, with the keys that are the queries' own tokens, and one
rectangle, whole, with the keys before them.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch

from longtrain_kernels.block_attention.kernel import Block
from longtrain_kernels.block_attention.packing import Packed
from longtrain_kernels.spans import Span, Spans


@dataclass(frozen=True)
class Plan:
    """All blocks of some queries and keys; squares overlap with none of each other, in queries or keys."""

    squares: tuple[Block, ...]
    """Causal, with keys that are the queries' own tokens."""
    rectangles: tuple[Block, ...]
    """Whole; under a window causal, for it says how far queries see."""

    def packed(self, device: torch.device) -> Packed:
        """The squares as one call; found once for all layers."""
        if device not in self._packed:
            self._packed[device] = Packed.of(self.squares, device)
        return self._packed[device]

    def release(self) -> None:
        """Let go of what `packed` found; it is found again if it is asked for."""
        self._packed.clear()

    @cached_property
    def _packed(self) -> dict[torch.device, Packed]:
        return {}


class Tokens:
    """Tokens of a batch of sequences, in ascending order."""

    def __init__(self, spans: Iterable[Span] | Spans, starts: tuple[tuple[int, ...], ...]) -> None:
        """
        Args:
            spans: of every sequence; disjoint, ascending. One may begin before token 0: nobody sees those tokens.
            starts: of each sequence, the ascending tokens at which a document begins; the first is 0.
        """
        self.spans = spans if isinstance(spans, Spans) else Spans(spans)
        self.starts = starts
        self._plans: dict[tuple[Spans, int | None], Plan] = {}

    @property
    def count(self) -> int:
        """L, tokens of a sequence."""
        return self.spans.count

    def plan(self, keys: "Tokens", window: int | None) -> Plan:
        """The blocks in which these tokens, as queries, see the keys; found once for all layers.

        Raises ValueError where keys for a window are no single span that holds the queries.
        """
        wanted = (keys.spans, window)
        if wanted not in self._plans:
            self._plans[wanted] = _plan(self, keys, window)
        return self._plans[wanted]

    def release(self) -> None:
        """Let go of what plans have on devices for every token."""
        for plan in self._plans.values():
            plan.release()


def _plan(queries: Tokens, keys: Tokens, window: int | None) -> Plan:
    alike = all(starts == queries.starts[0] for starts in queries.starts)
    rows = [slice(0, len(queries.starts))] if alike else [slice(i, i + 1) for i in range(len(queries.starts))]
    squares: list[Block] = []
    rectangles: list[Block] = []
    for row in rows:
        for block in _blocks(queries, keys, queries.starts[row.start], window):
            _split(replace(block, rows=row), window, squares, rectangles)
    return Plan(tuple(squares), tuple(rectangles))


def _split(block: Block, window: int | None, squares: list[Block], rectangles: list[Block]) -> None:
    if not block.causal or (window is not None and not block.is_square):
        rectangles.append(block)
        return
    own = block.keys.stop - (block.queries.stop - block.queries.start)
    squares.append(replace(block, keys=slice(own, block.keys.stop)))
    if own > block.keys.start:
        rectangles.append(replace(block, keys=slice(block.keys.start, own), causal=False, more=True))


def _blocks(queries: Tokens, keys: Tokens, starts: tuple[int, ...], window: int | None) -> Iterator[Block]:
    """The blocks of one sequence, as large as they go; a query is in one of them at most."""
    if window is not None and len(keys.spans) > 1:
        raise ValueError("keys for a window come as one span")
    last: tuple[int, Block] | None = None  # a block and the start of its document
    for begin, end, at in _runs(queries, keys, starts):
        document = starts[bisect_right(starts, begin) - 1]
        first = document if window is None else max(document, begin - window + 1)
        seen = slice(keys.spans.below(first), keys.spans.below(end))
        if seen.start == seen.stop:
            continue
        causal = bool(keys.spans.between(begin, begin + 1))
        if window is not None and not causal:
            raise ValueError("keys for a window hold the queries' own tokens")
        block = Block(slice(0, 1), slice(at, at + end - begin), seen, causal)
        if last is not None and last[0] == document and _continues(last[1], block, keys.spans.below(begin)):
            block = replace(
                block,
                queries=slice(last[1].queries.start, block.queries.stop),
                keys=slice(last[1].keys.start, seen.stop),
            )
        elif last is not None:
            yield last[1]
        last = document, block
    if last is not None:
        yield last[1]


def _continues(block: Block, following: Block, before: int) -> bool:
    """Whether two blocks of a document are one: both causal, or both with the same keys, and nothing between them."""
    if block.causal != following.causal or block.queries.stop != following.queries.start:
        return False
    return block.keys.stop == (before if following.causal else following.keys.stop)


def _runs(queries: Tokens, keys: Tokens, starts: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Runs [begin, end) of queries that no document's start and no edge of the keys divides, and where each begins."""
    at = 0
    for begin, end in queries.spans:
        inner = {edge for span in keys.spans.between(begin, end) for edge in span if begin < edge < end}
        inner |= {*starts[bisect_right(starts, begin) : bisect_left(starts, end)]}
        for a, b in pairwise([begin, *sorted(inner), end]):
            if b > a:
                yield a, b, at + a - begin
        at += end - begin
