"""What `Sequence.attend` was asked, as the algorithms receive it."""

from dataclasses import dataclass

from torch import Tensor

from longtrain.sequence_parallel.prefix import Turn
from longtrain_kernels.block_attention import BlockAttention


@dataclass(frozen=True)
class AttendCall:
    """Causal attention to tokens of the same document; shapes as in `core.contracts.Sequence.attend`."""

    q: Tensor
    k: Tensor
    v: Tensor
    attention: BlockAttention
    """What computes it, block by block; algorithms other than that for windows have none in it."""
    prefix: Turn
    """Keeps keys and values between chunks; windows, which carry a few rows, leave it empty."""
