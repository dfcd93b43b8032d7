"""What `Sequence.attend` was asked, as the algorithms receive it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longtrain_kernels.block_attention import BlockAttention

KeyValue = tuple[Tensor, Tensor]
"""Keys [B, M, G, K] and values [B, M, G, V] that this rank holds: the carry of softmax layers."""


@dataclass(frozen=True)
class AttendCall:
    """Causal attention to tokens of the same document; shapes as in `core.contracts.Sequence.attend`."""

    q: Tensor
    k: Tensor
    v: Tensor
    attention: BlockAttention
    """What computes it, block by block; algorithms other than that for windows have none in it."""

    def keys_and_values(self, carry: KeyValue | None) -> KeyValue:
        """This rank's keys and values of earlier chunks and of this one."""
        if carry is None:
            return self.k, self.v
        return torch.cat([carry[0], self.k], dim=1), torch.cat([carry[1], self.v], dim=1)
