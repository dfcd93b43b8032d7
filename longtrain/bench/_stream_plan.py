"""What `longtrain bench stream` measures: made once, and the same for every rank."""

from dataclasses import dataclass

from longtrain.bench._stream_modes import Mode
from longtrain.bench._stream_step import Precision
from longtrain.cluster.resolve import ResolvedJob
from longtrain.core.kinds import LayoutKind


@dataclass(frozen=True)
class Sizes:
    """What a device's defaults fill in; tokens are those of all ranks together."""

    model: str
    tokens: tuple[int, ...]
    """Ascending."""
    chunk_tokens: int
    vocabulary: int
    precision: Precision


@dataclass(frozen=True)
class Plan:
    """All that a rank must know."""

    ranks: int
    device: str
    threads: int
    """Of torch on a CPU, of each rank."""
    job: ResolvedJob
    """Of the model."""
    sizes: Sizes
    logit_tokens: int
    modes: tuple[Mode, ...]
    gate_mode: Mode
    gate_tokens: int
    scan: str
    attend: str
    peers: bool
    layout: LayoutKind
    document_tokens: int | None
    repeats: int
    seconds: float
    seed: int


def share(tokens: int, ranks: int) -> int:
    """Of one rank."""
    return -(-tokens // ranks)
