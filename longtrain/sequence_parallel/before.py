"""Which rows come before each part of a rank's tokens, and who holds them: host arithmetic, equal on all ranks."""

from dataclasses import dataclass

from longtrain.core.layout import SequenceLayout, overlap
from longtrain_kernels.spans import Span


@dataclass(frozen=True)
class Before:
    """Row ranges of one rank to send and to receive, by rank; empty ranges are left out.

    What a rank has to send are its rows of the last `width` tokens before the chunk, then those of the chunk.
    """

    sends: tuple[tuple[int, Span], ...]
    receives: tuple[tuple[int, Span], ...]
    """Of all that is received, one part after another."""
    num_rows: list[int]
    """Rows found before each part of this rank's tokens: `width`, or as many as there are in the sequence."""
    num_kept: int
    """Of the rows that it has to send, how many are of the last `width` tokens before the next chunk."""


def rows_before(width: int, layout: SequenceLayout, rank: int, chunk: int) -> Before:
    """The `width` rows before each part of the tokens that `rank` holds of `chunk`."""
    ranks = range(layout.num_ranks)
    chunk_begin, chunk_end = layout.chunk(chunk)
    spans = [layout.spans(r, chunk) for r in ranks]
    offered = [layout.held_between(r, chunk_begin - width, chunk_end) for r in ranks]

    def transfers(reader: Span, owner: int) -> list[Span]:
        begin, end = reader
        wanted = (begin - width, begin) if end > begin else (begin, begin)
        parts = [overlap(span, wanted) for span in offered[owner]]
        return [part for part in parts if part[1] > part[0]]

    # Two ranks exchange their ranges in one order: by the reader's part, then along the sequence.
    sends = [
        (r, _within(offered[rank], part)) for r in ranks for reader in spans[r] for part in transfers(reader, rank)
    ]
    receives, num_rows, at = [], [], 0
    for reader in spans[rank]:
        first = at
        for part, owner in sorted((part, r) for r in ranks for part in transfers(reader, r)):
            rows = part[1] - part[0]
            receives.append((owner, (at, at + rows)))
            at += rows
        num_rows.append(at - first)
    kept = sum(end - begin for begin, end in layout.held_between(rank, chunk_end - width, chunk_end))
    return Before(tuple(sends), tuple(receives), num_rows, kept)


def _within(spans: list[Span], part: Span) -> Span:
    """Where `part` lies in the concatenation of `spans`."""
    at = 0
    for begin, end in spans:
        if begin <= part[0] and part[1] <= end:
            return at + part[0] - begin, at + part[1] - begin
        at += end - begin
    raise AssertionError("a rank was asked for rows that it does not hold")
