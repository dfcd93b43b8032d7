"""A recurrence cut into the parts of the sequence that this rank holds."""

from collections.abc import Iterable

import torch
from torch import Tensor

from longtrain.core.contracts import Recurrence
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.affine import Segment


def summarize_parts(op: Recurrence, shard: Shard) -> tuple[list[Segment], Tensor, Tensor]:
    """The parts of this rank's tokens, with their transitions [n, B, H, ...] and states from zero [n, B, H, K, V]."""
    ops = [op] if len(shard.parts) == 1 else [op.rows(part) for part in shard.parts]
    segments = [part.summarize(documents) for part, documents in zip(ops, shard.segment_documents, strict=True)]
    return segments, torch.stack([s.transition for s in segments]), torch.stack([s.state for s in segments])


def correct_parts(segments: list[Segment], states: Iterable[Tensor]) -> Tensor:
    """Outputs [B, L, H, V] of all parts from the state before each [B, H, K, V]."""
    outputs = [segment.correct(state) for segment, state in zip(segments, states, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
