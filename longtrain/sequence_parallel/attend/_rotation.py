"""What goes round a ring of ranks."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from longtrain.comm.group import Pending
from longtrain.sequence_parallel.shard import Team
from longtrain_kernels.block_attention import Tokens


def at_step(team: Team, step: int) -> int:
    """The rank whose tensors are here after so many steps round the ring."""
    return (team.group.rank - step) % team.group.size


def go_round(
    team: Team, tensors: tuple[Tensor, ...], tokens: Sequence[Tokens]
) -> Iterator[tuple[int, Tokens, tuple[Tensor, ...]]]:
    """Every rank's tensors [B, L, ...] in turn, this rank's first, while the next ones are on their way.

    `tokens` are those that each rank's tensors have a row for. Yields the step, the tokens and the tensors.
    """
    for step in range(team.group.size):
        last = step + 1 == team.group.size
        coming = None if last else pass_on(team, tensors, step, tokens)
        yield step, tokens[at_step(team, step)], tensors
        tensors = coming.wait() if coming else ()


def pass_on(
    team: Team, tensors: Sequence[Tensor], step: int, tokens: Sequence[Tokens], lane: str = "round"
) -> Pending[tuple[Tensor, ...]]:
    """Begin to send the tensors [B, L, ...] of a step to the next rank, which has them at the next step.

    What comes stays until the second call after; see `Group.shift`.
    """
    size = team.group.size
    rows = [tokens[(rank - step) % size].count for rank in range(size)]
    return team.group.shift(tensors, rows, lane=lane, most_rows=team.most_rows if tokens is team.held else 0)
