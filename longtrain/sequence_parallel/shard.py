"""What an algorithm knows: which tokens this rank holds, who holds the others, and the group to reach them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.core.layout import SequenceLayout, span_index
from longtrain.sequence_parallel.before import Before, rows_before
from longtrain_kernels.block_attention import Tokens
from longtrain_kernels.spans import Span, Spans

Piece = tuple[int, slice]
"""A stretch of tokens: the rank that has it, and which of that rank's tokens it is."""


@dataclass(frozen=True)
class Rows:
    """Of the tokens that are held of all chunks, in ascending order, those of one chunk, and those that it sees."""

    size: int
    """Of a chunk; the last one has the rest."""
    total: int
    """Of all chunks."""
    chunk: int
    sees: tuple[int, ...]
    """See `SequenceLayout.sees`."""

    @property
    def first_chunk(self) -> int:
        """The first that the chunk sees."""
        return self.sees[self.chunk]

    @property
    def first(self) -> int:
        """The first row that the chunk sees."""
        return self.first_chunk * self.size

    @property
    def begin(self) -> int:
        """The first row of the chunk."""
        return self.chunk * self.size

    @property
    def end(self) -> int:
        """Behind its last row."""
        return self.total if self.chunk + 1 == len(self.sees) else self.begin + self.size

    @property
    def alone(self) -> bool:
        """Whether there is no other chunk: the same on all ranks, unlike the numbers."""
        return len(self.sees) == 1

    @property
    def last(self) -> "Rows":
        """Of the last chunk."""
        return replace(self, chunk=len(self.sees) - 1)

    def beside(self, step: int) -> "Rows | None":
        """Of the chunk that comes `step` later, if there is one."""
        chunk = self.chunk + step
        return replace(self, chunk=chunk) if 0 <= chunk < len(self.sees) else None


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
        layout = self.layout
        return Rows(layout.count(ranks, 0), layout.count_all(ranks), self.chunk, layout.sees)

    @cached_property
    def own_rows(self) -> Rows:
        """Of what this rank holds."""
        return self.rows([self.group.rank])

    @property
    def seen(self) -> Span:
        """The tokens that the chunk sees, whoever holds them."""
        return self.layout.seen(self.chunk)

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
            self._teams[key] = Team(group, self.layout, self.chunk, key, tuple(map(self._tokens, chunk)))
        return self._teams[key]

    @cached_property
    def positions(self) -> Tensor:
        """[B, L] position of each token in its document."""
        return self.layout.positions(self.index)

    @cached_property
    def segment_documents(self) -> list[Tensor]:
        """Of each part [B, len], the document starts in it up to each token: what a `Recurrence` needs."""
        parts = [self.documents_between(begin - 1, end) for begin, end in self.spans]
        return [documents[:, 1:] - documents[:, :1] for documents in parts]

    def before(self, width: int) -> Before:
        """Where the `width` rows before each part are; the same for all layers."""
        if width not in self._before:
            self._before[width] = rows_before(width, self.layout, self.group.rank, self.chunk)
        return self._before[width]

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
        for tokens in self._found.values():
            tokens.release()

    @cached_property
    def _before(self) -> dict[int, Before]:
        return {}

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
    layout: SequenceLayout
    chunk: int
    ranks: tuple[tuple[int, ...], ...]
    """Whose tokens each member stands for."""
    tokens: tuple[Tokens, ...]
    """Of this chunk, by rank."""

    @cached_property
    def held(self) -> tuple[Tokens, ...]:
        """Of this chunk and the earlier ones that it sees, by rank."""
        seen = self.layout.seen(self.chunk)
        return tuple(Tokens(self.layout.held(some).part(*seen), self.layout.starts) for some in self.ranks)

    @cached_property
    def most_rows(self) -> int:
        """That one of the ranks holds of all chunks."""
        return max(map(self.layout.count_all, self.ranks))

    @cached_property
    def counts(self) -> list[int]:
        """Tokens of the chunk on every rank."""
        return [tokens.count for tokens in self.tokens]

    @property
    def num_earlier(self) -> int:
        """Earlier chunks that this one sees."""
        return self.chunk - self.layout.sees[self.chunk]

    @cached_property
    def earlier_counts(self) -> list[int]:
        """Tokens of these on every rank."""
        return [self.num_earlier * self.layout.count(some, 0) for some in self.ranks]

    @cached_property
    def held_counts(self) -> list[int]:
        """Tokens of them and of this chunk on every rank."""
        return [earlier + now for earlier, now in zip(self.earlier_counts, self.counts, strict=True)]

    @cached_property
    def pieces(self) -> list[Piece]:
        """The chunk in ascending order."""
        return _ascending([tokens.spans for tokens in self.tokens])

    @cached_property
    def earlier_pieces(self) -> list[Piece]:
        """Any earlier chunk in ascending order: they are cut alike, other than the last of a sequence."""
        return _ascending([Spans(sorted(s for r in some for s in self.layout.spans(r, 0))) for some in self.ranks])


def _ascending(by_rank: Sequence[Spans]) -> list[Piece]:
    stretches = sorted((span, rank) for rank, spans in enumerate(by_rank) for span in spans)
    found = []
    for (begin, end), rank in stretches:
        at = by_rank[rank].below(begin)
        found.append((rank, slice(at, at + end - begin)))
    return found


def in_order(parts: Sequence[Tensor], pieces: list[Piece]) -> Tensor:
    """[B, tokens of a rank, ...] by rank -> all tokens in ascending order."""
    return torch.cat([parts[rank][:, piece] for rank, piece in pieces] or [parts[0][:, :0]], dim=1)


def by_rank(x: Tensor, pieces: list[Piece], ranks: int) -> list[Tensor]:
    """The inverse of `in_order`."""
    stretches = x.split([piece.stop - piece.start for _, piece in pieces], dim=1) if pieces else ()
    of_rank: list[list[Tensor]] = [[] for _ in range(ranks)]
    for (rank, _), stretch in zip(pieces, stretches, strict=True):
        of_rank[rank].append(stretch)
    return [some[0] if len(some) == 1 else torch.cat([x[:, :0], *some], dim=1) for some in of_rank]
