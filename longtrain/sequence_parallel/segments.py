"""A recurrence cut into the parts of the sequence that this rank holds."""

from collections.abc import Iterable

import torch
from torch import Tensor

from longtrain.core.contracts import Recurrence
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.affine import Segment


def summarize_parts(op: Recurrence, shard: Shard) -> list[Segment]:
    """The affine map of each part of this rank's tokens."""
    ops = [op] if len(shard.parts) == 1 else [op.rows(part) for part in shard.parts]
    return [part.summarize(documents) for part, documents in zip(ops, shard.segment_documents, strict=True)]


def correct_parts(segments: list[Segment], states: Iterable[Tensor]) -> Tensor:
    """Outputs [B, L, H, V] of all parts from the state before each [B, H, K, V]."""
    outputs = [segment.correct(state) for segment, state in zip(segments, states, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
