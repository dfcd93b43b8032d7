"""The diagonal scan by Triton kernels: segments of some thousand tokens run side by side, their maps folded between.

Forward: `summarize` finds every segment's affine map from keys and values and folds them to the states at segment
boundaries; `outputs` runs every segment from its own. Backward mirrors it with the cotangents of the states. Only
boundary states are kept; the states of chunks are made again by each pass, on chip.
"""

import torch
from torch import Tensor

from longtrain_kernels.diagonal_scan.launch import Plan, Settings
from longtrain_kernels.diagonal_scan.scalar import ScalarPasses
from longtrain_kernels.diagonal_scan.vector import VectorPasses
from longtrain_kernels.passes import KernelSegment

_SMALL = Settings(32, 4, 1)
SCALAR = Plan(64, 264, 64, Settings(64, 4, 3), Settings(64, 4, 2), _SMALL)
VECTOR = Plan(64, 264, 32, Settings(64, 4, 2), Settings(64, 4, 2), Settings(64, 4, 2))
WIDE = Plan(32, 528, 64, _SMALL, _SMALL, _SMALL)
"""float32 and float16 operands, or heads wider than 128."""


def diagonal_segment_triton(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, documents: Tensor
) -> KernelSegment:
    """`DiagonalScan.summarize`; log_decay is [B, L, H] or [B, L, H, K]."""
    vector = log_decay.dim() == 4
    fits = values.dtype == torch.bfloat16 and max(keys.shape[-1], values.shape[-1]) <= 128
    plan = (VECTOR if vector else SCALAR) if fits else WIDE
    passes = (VectorPasses if vector else ScalarPasses)(queries, keys, values, log_decay, documents, plan)
    return KernelSegment(passes, queries, keys, values, log_decay)
