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
        coming = None if last else pass_on(team, tensors, tokens[at_step(team, step + 1)].count)
        yield step, tokens[at_step(team, step)], tensors
        tensors = coming.wait() if coming else ()


def pass_on(team: Team, tensors: Sequence[Tensor], rows: int) -> Pending[tuple[Tensor, ...]]:
    """Begin to send [B, L, ...] to the next rank; what comes from the one before has `rows` rows."""
    received = tuple(t.new_empty(t.shape[0], rows, *t.shape[2:]) for t in tensors)
    after, before = at_step(team, -1), at_step(team, 1)
    return team.group.begin([(after, t) for t in tensors], [(before, t) for t in received], received)
