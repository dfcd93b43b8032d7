"""How the sequence axis is cut over ranks."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

from longtrain.core.kinds import BlockAttentionKind, LayoutKind


@dataclass(frozen=True)
class SequenceParallelConfig:
    """`conf/sequence_parallel/*.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    size: Annotated[int, Field(ge=1)]
    """Ranks that share one sequence (the sequence-parallel degree)."""
    scan: str
    """Algorithm for recurrent layers, a module of `sequence_parallel/scan/`, or auto (see `choice`)."""
    attend: str
    """Algorithm for softmax layers, a module of `sequence_parallel/attend/`, or auto."""
    layout: LayoutKind
    """Which tokens a rank holds; see `core.layout`."""
    block_attention: BlockAttentionKind
    """What computes softmax attention on a rank; auto: the fastest of what the machine has."""
    copy_engines: bool
    """Whether copy engines carry what goes round a ring of GPUs of one node; where they cannot, NCCL does."""
