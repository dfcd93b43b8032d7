"""Scan by a pipeline of blocks of a state (All-Scan: Chou et al. 2025, "ZeCO", section 3.2).

A rank passes a block on as soon as it has advanced it, and so P ranks take the time of one state and P - 1 blocks. A
rank sends H K V numbers, whatever the number of ranks and the length, and never a transition: where this is a K x K
matrix, the all-gather sends as much again, P - 1 times.
"""

from torch import Tensor

from longtrain.core.contracts import Recurrence
from longtrain.sequence_parallel.cost import Machine, ScanShape
from longtrain.sequence_parallel.scan._chain import chain_seconds, scan_in_blocks
from longtrain.sequence_parallel.shard import Shard

BLOCKS = 8


def scan(op: Recurrence, shard: Shard, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, V] and the state after the chunk, on the rank of the first segment."""
    return scan_in_blocks(op, shard, carry, BLOCKS)


def seconds(shape: ScanShape, machine: Machine) -> float:
    """See `sequence_parallel.cost`."""
    return chain_seconds(shape, machine, BLOCKS)
