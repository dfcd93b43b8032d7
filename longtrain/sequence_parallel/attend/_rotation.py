"""What goes round a ring of ranks."""

from torch import Tensor

from longtrain.comm.group import Group


def pass_on(tensors: tuple[Tensor, ...], rows: int, group: Group) -> tuple[Tensor, ...]:
    """Send [B, L, ...] to the next rank of the ring; receive [B, rows, ...] of each from the previous one."""
    received = tuple(t.new_empty(t.shape[0], rows, *t.shape[2:]) for t in tensors)
    group.rotate(tensors, received)
    return received
