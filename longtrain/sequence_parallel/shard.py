"""What an algorithm knows: which tokens this rank holds, who holds the others, and the group to reach them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.core.layout import SequenceLayout, span_index
from longtrain.sequence_parallel.before import Before, rows_before
from longtrain_kernels.block_attention import Tokens
from longtrain_kernels.spans import Span, Spans

Piece = tuple[int, slice]
"""A stretch of tokens: the rank that has it, and which of that rank's tokens it is."""


class Rows(NamedTuple):
    """Of the tokens that are held of all chunks, in ascending order, those of this one: [begin, end) of `total`."""

    begin: int
    end: int
    total: int
    alone: bool
    """Whether there is no other chunk: the same on all ranks, unlike the numbers."""


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
        begin = self.layout.count_before(ranks, self.chunk)
        end = begin + self.layout.count(ranks, self.chunk)
        return Rows(begin, end, self.layout.count_all(ranks), alone=self.layout.num_chunks == 1)

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
        """Of this chunk and all earlier ones, by rank."""
        _, end = self.layout.chunk(self.chunk)
        return tuple(Tokens(self.layout.held(some).until(end), self.layout.starts) for some in self.ranks)

    @cached_property
    def most_rows(self) -> int:
        """That one of the ranks holds of all chunks."""
        return max(map(self.layout.count_all, self.ranks))

    @cached_property
    def counts(self) -> list[int]:
        """Tokens of the chunk on every rank."""
        return [tokens.count for tokens in self.tokens]

    @cached_property
    def counts_before(self) -> list[int]:
        """Tokens of all earlier chunks on every rank."""
        return [self.layout.count_before(some, self.chunk) for some in self.ranks]

    @cached_property
    def held_counts(self) -> list[int]:
        """Tokens of this chunk and all earlier ones on every rank."""
        return [before + now for before, now in zip(self.counts_before, self.counts, strict=True)]

    @cached_property
    def pieces(self) -> list[Piece]:
        """The chunk in ascending order."""
        return _ascending([tokens.spans for tokens in self.tokens])

    @cached_property
    def pieces_before(self) -> list[Piece]:
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
