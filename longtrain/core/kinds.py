"""Names that configurations and what they configure share; importing them imports nothing else."""

from typing import Literal

LayoutKind = Literal["contiguous", "zigzag"]
"""How a sequence is cut over ranks; see `core.layout`."""

BlockAttentionKind = Literal["auto", "cudnn", "flash", "plain"]
"""The kernel of softmax layers; see `longtrain_kernels.block_attention`."""
