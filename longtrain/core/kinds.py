"""Names that configurations and what they configure share; importing them imports nothing else."""

from typing import Literal

LayoutKind = Literal["contiguous", "zigzag"]
"""How a sequence is cut over ranks; see `core.layout`."""
