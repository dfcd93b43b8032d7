"""What an algorithm knows: which tokens this rank holds, who holds the others, and the group to reach them."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.core.layout import SequenceLayout, Span, overlap, span_index
from longtrain_kernels.block_attention import Tokens


@dataclass(frozen=True)
class Rows:
    """Of the tokens that are held of all chunks, in ascending order, those of one chunk, and those that it sees."""

    ends: tuple[int, ...]
    """How many are held up to and including each chunk."""
    firsts: tuple[int, ...]
    """The first that each chunk sees: of a document that has not ended before it, in any sequence of the batch."""
    chunk: int

    @property
    def first(self) -> int:
        """The first row that the chunk sees."""
        return self.firsts[self.chunk]

    @property
    def first_chunk(self) -> int:
        """The chunk that has it."""
        return bisect_right(self.ends, self.first)

    @property
    def begin(self) -> int:
        """The first row of the chunk."""
        return self.ends[self.chunk - 1] if self.chunk else 0

    @property
    def end(self) -> int:
        """Behind its last row."""
        return self.ends[self.chunk]

    @property
    def total(self) -> int:
        """Of all chunks."""
        return self.ends[-1]

    @property
    def alone(self) -> bool:
        """Whether there is no other chunk: the same on all ranks, unlike the numbers."""
        return len(self.ends) == 1

    @property
    def last(self) -> "Rows":
        """Of the last chunk."""
        return replace(self, chunk=len(self.ends) - 1)

    def beside(self, step: int) -> "Rows | None":
        """Of the chunk so many behind this one, if there is one."""
        chunk = self.chunk + step
        return replace(self, chunk=chunk) if 0 <= chunk < len(self.ends) else None


@dataclass(frozen=True)
class Shard:
    """One rank's part of one macro-chunk."""

    layout: SequenceLayout
    group: Group
    device: torch.device
    chunk: int = 0

    @cached_property
    def spans(self) -> list[Span]:
        """This rank's tokens of the chunk, by slot."""
        return self.layout.spans(self.group.rank, self.chunk)

    @cached_property
    def parts(self) -> list[slice]:
        """Where each of `spans` is among this rank's tokens of the chunk."""
        ends = list(accumulate(end - begin for begin, end in self.spans))
        return [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    @cached_property
    def tokens(self) -> Tokens:
        """This rank's tokens of the chunk."""
        return self.team.tokens[self.group.rank]

    def rows(self, ranks: Sequence[int]) -> Rows:
        """Of what some ranks hold together."""
        chunks = range(self.layout.num_chunks)
        counts = [sum(e - b for rank in ranks for b, e in self.layout.spans(rank, chunk)) for chunk in chunks]
        return Rows(tuple(accumulate(counts)), (0,) * len(chunks), self.chunk)

    @cached_property
    def own_rows(self) -> Rows:
        """Of what this rank holds."""
        return self.rows([self.group.rank])

    def tokens_between(self, begin: int, end: int) -> Tokens:
        """The tokens [begin, end), whoever holds them."""
        return self._tokens([(begin, end)])

    def documents_between(self, begin: int, end: int) -> Tensor:
        """[B, end - begin] the document of each token of the sequence, from 0; -1 before the sequence."""
        return self.layout.documents(torch.arange(begin, end, device=self.device))

    @cached_property
    def team(self) -> "Team":
        """All ranks that share the sequence."""
        return self.team_of(self.group, [(rank,) for rank in range(self.group.size)])

    def team_of(self, group: Group, ranks: Sequence[tuple[int, ...]]) -> "Team":
        """A group of whose members each stands for the tokens of some ranks; the same for all layers."""
        key = tuple(ranks)
        if key not in self._teams:
            chunk = [sorted(s for r in some for s in self.layout.spans(r, self.chunk)) for some in ranks]
            held = [sorted(s for r in some for s in self.layout.held(r, self.chunk)) for some in ranks]
            most = max(self.rows(some).total for some in ranks)
            parts = tuple(map(self._tokens, chunk)), tuple(map(self._tokens, held))
            self._teams[key] = Team(group, self.device, *parts, most)
        return self._teams[key]

    @cached_property
    def positions(self) -> Tensor:
        """[B, L] position of each token in its document."""
        return self.layout.positions(self.index)

    @cached_property
    def segment_documents(self) -> list[Tensor]:
        """Of each part [B, len], the document starts in it up to each token: what a `Recurrence` needs."""
        before = self.layout.documents(torch.tensor([begin - 1 for begin, _ in self.spans], device=self.device))
        documents = self.layout.documents(self.index)
        return [documents[:, part] - before[:, i, None] for i, part in enumerate(self.parts)]

    def held_between(self, rank: int, begin: int, end: int) -> list[Span]:
        """The tokens in [begin, end) that a rank holds of this chunk and earlier ones; no empty spans."""
        parts = [overlap(span, (begin, end)) for span in self.layout.held(rank, self.chunk)]
        return [part for part in parts if part[1] > part[0]]

    def _tokens(self, spans: list[Span]) -> Tokens:
        """The same for all layers, so that they plan once."""
        return self._found.setdefault(tuple(spans), Tokens(tuple(spans), self.layout.starts))

    @cached_property
    def index(self) -> Tensor:
        """[L] this rank's tokens of the chunk."""
        return span_index(self.spans, self.device)

    def release(self) -> None:
        """Let go of what was made for every token; it is made again if it is asked for."""
        for name in ("index", "positions", "segment_documents"):
            self.__dict__.pop(name, None)

    @cached_property
    def _found(self) -> dict[tuple[Span, ...], Tokens]:
        return {}

    @cached_property
    def _teams(self) -> dict[tuple[tuple[int, ...], ...], "Team"]:
        return {}


@dataclass(frozen=True)
class Team:
    """Ranks that work together on a macro-chunk, and the tokens of each."""

    group: Group
    device: torch.device
    tokens: tuple[Tokens, ...]
    """Of this chunk, by rank."""
    held: tuple[Tokens, ...]
    """Of this chunk and all earlier ones, by rank."""
    most_rows: int
    """That one of the ranks holds of all chunks."""

    @cached_property
    def counts(self) -> list[int]:
        """Tokens of the chunk on every rank."""
        return [tokens.count for tokens in self.tokens]

    @cached_property
    def held_counts(self) -> list[int]:
        """Tokens of this chunk and all earlier ones on every rank."""
        return [tokens.count for tokens in self.held]

    @cached_property
    def pieces(self) -> list[tuple[int, slice]]:
        """The chunk in ascending order: of each stretch the rank that has it, and which of that rank's tokens it is."""
        return _ascending(self.tokens)

    @cached_property
    def held_pieces(self) -> list[tuple[int, slice]]:
        """The same of all that they hold."""
        return _ascending(self.held)


def _ascending(by_rank: tuple[Tokens, ...]) -> list[tuple[int, slice]]:
    stretches = [
        (begin, end, rank, tokens.below(begin)) for rank, tokens in enumerate(by_rank) for begin, end in tokens.spans
    ]
    return [(rank, slice(at, at + end - begin)) for begin, end, rank, at in sorted(stretches) if end > begin]


def in_order(parts: Sequence[Tensor], pieces: list[tuple[int, slice]]) -> Tensor:
    """[B, tokens of a rank, ...] by rank -> all tokens in ascending order."""
    return torch.cat([parts[rank][:, piece] for rank, piece in pieces] or [parts[0][:, :0]], dim=1)


def by_rank(x: Tensor, pieces: list[tuple[int, slice]], ranks: int) -> list[Tensor]:
    """The inverse of `in_order`."""
    stretches = x.split([piece.stop - piece.start for _, piece in pieces], dim=1) if pieces else ()
    of_rank: list[list[Tensor]] = [[] for _ in range(ranks)]
    for (rank, _), stretch in zip(pieces, stretches, strict=True):
        of_rank[rank].append(stretch)
    return [some[0] if len(some) == 1 else torch.cat([x[:, :0], *some], dim=1) for some in of_rank]
