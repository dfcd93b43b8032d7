"""Scan by a state that goes from rank to rank whole (LASP-1: Sun et al. 2024, "Linear Attention Sequence Parallelism",
algorithm 2): the baseline. Its time grows with the number of ranks; `pipeline` is the same with blocks.
"""

from torch import Tensor

from longtrain.core.contracts import Recurrence
from longtrain.sequence_parallel.cost import Machine, ScanShape
from longtrain.sequence_parallel.scan._chain import chain_seconds, scan_in_blocks
from longtrain.sequence_parallel.shard import Shard


def scan(op: Recurrence, shard: Shard, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, V] and the state after the chunk, on the rank of the first segment."""
    return scan_in_blocks(op, shard, carry, 1)


def seconds(shape: ScanShape, machine: Machine) -> float:
    """See `sequence_parallel.cost`."""
    return chain_seconds(shape, machine, 1)
