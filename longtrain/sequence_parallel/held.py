"""Tensors of all that ranks hold of a chunk and the chunks that it sees, ascending or by rank: copies of a few views.

Earlier chunks are cut alike, so that a slot of all of them is one view with a stride.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from longtrain.sequence_parallel.shard import Piece, Team, by_rank, in_order


def held_in_order(parts: Sequence[Tensor], team: Team) -> Tensor:
    """[B, tokens that a rank holds, ...] by rank -> [B, tokens of all, ...] in ascending order."""
    if not team.num_earlier:
        return in_order(parts, team.pieces)
    whole = parts[0].new_empty(parts[0].shape[0], sum(team.held_counts), *parts[0].shape[2:])
    for of_whole, of_part in _matches(whole, parts, team):
        of_whole.copy_(of_part)
    return whole


def held_by_rank(whole: Tensor, team: Team) -> list[Tensor]:
    """The inverse of `held_in_order`."""
    if not team.num_earlier:
        return by_rank(whole, team.pieces, team.group.size)
    parts = [whole.new_empty(whole.shape[0], count, *whole.shape[2:]) for count in team.held_counts]
    for of_whole, of_part in _matches(whole, parts, team):
        of_part.copy_(of_whole)
    return parts


def _matches(whole: Tensor, parts: Sequence[Tensor], team: Team) -> Iterator[tuple[Tensor, Tensor]]:
    """The same tokens of both."""
    counts, chunks = team.earlier_counts, team.num_earlier
    earlier = [_by_chunk(part[:, :count], chunks) for part, count in zip(parts, counts, strict=True)]
    yield from _in_pieces(_by_chunk(whole[:, : sum(counts)], chunks), earlier, team.earlier_pieces)
    now = [part[:, count:] for part, count in zip(parts, counts, strict=True)]
    yield from _in_pieces(whole[:, sum(counts) :], now, team.pieces)


def _by_chunk(x: Tensor, chunks: int) -> Tensor:
    """[B, chunks L, ...] -> [B, L, chunks, ...]."""
    return x.unflatten(1, (chunks, x.shape[1] // chunks)).transpose(1, 2)


def _in_pieces(whole: Tensor, parts: Sequence[Tensor], pieces: list[Piece]) -> Iterator[tuple[Tensor, Tensor]]:
    at = 0
    for rank, piece in pieces:
        end = at + piece.stop - piece.start
        yield whole[:, at:end], parts[rank][:, piece]
        at = end
