"""Which tokens of a sequence each rank holds, and where its documents begin: host-side arithmetic, equal on all ranks.

A sequence of T tokens is cut into macro-chunks of time, and each chunk into slots, whose lengths differ by one token at
most; a slot may be empty. Without streaming there is one chunk. In a contiguous layout slot r belongs to rank r. In a
zigzag layout there are two slots a rank, r and 2P - 1 - r, so that causal attention costs every rank the same (Llama 3,
2024, section 3.3.2). A rank's rows are those of its slots in ascending order.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from longtrain.core.kinds import LayoutKind
from longtrain_kernels.spans import Span, Spans
from longtrain_kernels.upload import upload


@dataclass(frozen=True)
class SequenceLayout:
    """The cut of a batch of sequences of equal length."""

    length: int
    """T, tokens of each sequence."""
    num_ranks: int
    """P."""
    starts: tuple[tuple[int, ...], ...]
    """Of each sequence of the batch: the ascending tokens at which a document begins; the first is 0."""
    chunk_tokens: int | None = None
    """Tokens of a macro-chunk; None: the whole sequence."""
    kind: LayoutKind = "contiguous"

    def __post_init__(self) -> None:
        for row in self.starts:
            if not row or row[0] != 0 or list(row) != sorted(set(row)) or row[-1] >= self.length:
                raise ValueError(f"document starts must ascend from 0 and stay below {self.length}, got {row[:8]}")

    @property
    def num_chunks(self) -> int:
        """Macro-chunks of the sequence."""
        return -(-self.length // (self.chunk_tokens or self.length))

    def chunk(self, chunk: int) -> Span:
        """The tokens of a macro-chunk."""
        size = self.chunk_tokens or self.length
        return chunk * size, min(self.length, (chunk + 1) * size)

    @cached_property
    def sees(self) -> tuple[int, ...]:
        """Of each macro-chunk, the first that has a token of a document that goes on in it, in any of the sequences."""
        begins = [self.chunk(chunk)[0] for chunk in range(self.num_chunks)]
        oldest = (min(row[bisect_right(row, begin) - 1] for row in self.starts) for begin in begins)
        return tuple(token // (self.chunk_tokens or self.length) for token in oldest)

    def seen(self, chunk: int) -> Span:
        """The tokens of a macro-chunk and of those before it that it sees."""
        return self.chunk(self.sees[chunk])[0], self.chunk(chunk)[1]

    def slots(self, rank: int) -> tuple[int, ...]:
        """The slots of every chunk that belong to a rank, ascending; as many on each rank."""
        if self.kind == "contiguous" or self.num_ranks == 1:
            return (rank,)
        return rank, 2 * self.num_ranks - 1 - rank

    @cached_property
    def owners(self) -> list[tuple[int, int]]:
        """Of every slot in order: its rank, and which of that rank's slots it is."""
        owners = {s: (rank, i) for rank in range(self.num_ranks) for i, s in enumerate(self.slots(rank))}
        return [owners[slot] for slot in sorted(owners)]

    def spans(self, rank: int, chunk: int) -> list[Span]:
        """The tokens of a macro-chunk that a rank holds, by slot."""
        return [self._slot(slot, chunk) for slot in self.slots(rank)]

    def count(self, ranks: Sequence[int], chunk: int) -> int:
        """How many tokens of a macro-chunk some ranks hold together."""
        return sum(end - begin for rank in ranks for begin, end in self.spans(rank, chunk))

    def count_all(self, ranks: Sequence[int]) -> int:
        """The same of all chunks, of which all but the last are of one length."""
        last = self.num_chunks - 1
        return last * self.count(ranks, 0) + self.count(ranks, last)

    def held_between(self, rank: int, begin: int, end: int) -> list[Span]:
        """The tokens of [begin, end) that a rank holds, ascending; no empty spans."""
        size = self.chunk_tokens or self.length
        chunks = range(max(0, begin) // size, -(-min(end, self.length) // size))
        parts = [overlap(span, (begin, end)) for chunk in chunks for span in self.spans(rank, chunk)]
        return [part for part in parts if part[1] > part[0]]

    def held(self, ranks: tuple[int, ...]) -> Spans:
        """The tokens of all chunks that some ranks hold together; found once for all chunks."""
        if ranks not in self._held:
            chunks = range(self.num_chunks)
            self._held[ranks] = Spans(sorted(s for c in chunks for rank in ranks for s in self.spans(rank, c)))
        return self._held[ranks]

    @cached_property
    def _held(self) -> dict[tuple[int, ...], Spans]:
        return {}

    def _slot(self, slot: int, chunk: int) -> Span:
        begin, end = self.chunk(chunk)
        short, longer = divmod(end - begin, len(self.owners))
        first = begin + slot * short + min(slot, longer)
        return first, first + short + (slot < longer)

    def documents(self, index: Tensor) -> Tensor:
        """[L] int64 tokens -> [B, L] the document of each, counted from 0; -1 before the sequence."""
        starts = self._starts(index.device)
        return torch.searchsorted(starts, index.expand(len(starts), -1).contiguous(), right=True) - 1

    def positions(self, index: Tensor) -> Tensor:
        """[L] int64 tokens of the sequence -> [B, L] the position of each in its document."""
        return index - self._starts(index.device).gather(1, self.documents(index))

    def _starts(self, device: torch.device) -> Tensor:
        """[B, documents] int64, filled up with what no token reaches; one copy to a device serves all layers."""
        if device not in self._starts_by_device:
            most = max(map(len, self.starts))
            rows = [[*row, *[torch.iinfo(torch.int64).max] * (most - len(row))] for row in self.starts]
            self._starts_by_device[device] = upload(torch.tensor(rows, dtype=torch.int64), device)
        return self._starts_by_device[device]

    @cached_property
    def _starts_by_device(self) -> dict[torch.device, Tensor]:
        return {}


def span_index(spans: Sequence[Span], device: torch.device) -> Tensor:
    """The tokens of some spans, one after another, as int64 [L]."""
    parts = [torch.arange(*span, device=device) for span in spans]
    return torch.cat(parts) if parts else torch.arange(0, device=device)


def overlap(a: Span, b: Span) -> Span:
    """The common part of two spans, empty as (x, x)."""
    begin = max(a[0], b[0])
    return begin, max(begin, min(a[1], b[1]))


def mean_context(layouts: Iterable[SequenceLayout]) -> float:
    """Tokens that a causal token of some batches sees on average: half of its document."""
    lengths = [
        end - begin for layout in layouts for row in layout.starts for begin, end in pairwise((*row, layout.length))
    ]
    return sum(length**2 for length in lengths) / (2 * sum(lengths))
