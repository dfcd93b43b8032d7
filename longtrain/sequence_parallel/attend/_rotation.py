"""What goes round a ring of ranks."""

from collections.abc import Sequence

from torch import Tensor

from longtrain.comm.group import Pending
from longtrain.sequence_parallel.shard import Team


def at_step(team: Team, step: int) -> int:
    """The rank whose tensors are here after so many steps round the ring."""
    return (team.group.rank - step) % team.group.size


def pass_on(team: Team, tensors: Sequence[Tensor], rows: int) -> Pending[tuple[Tensor, ...]]:
    """Begin to send [B, L, ...] to the next rank; what comes from the one before has `rows` rows."""
    received = tuple(t.new_empty(t.shape[0], rows, *t.shape[2:]) for t in tensors)
    after, before = at_step(team, -1), at_step(team, 1)
    return team.group.begin([(after, t) for t in tensors], [(before, t) for t in received], received)
