"""Segments cut into chunks of time, for the scans in plain PyTorch."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def split(x: Tensor, size: int) -> Tensor:
    """[B, L, H, D] -> [B, N, H, C, D], padded with zeros to whole chunks; at least one chunk, so that the result of an
    empty segment still depends on its inputs and takes part in every collective of the backward pass."""
    padding = -x.shape[1] % size if x.shape[1] else size
    return F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, size)).transpose(2, 3)


def split_documents(documents: Tensor, size: int) -> Tensor:
    """[B, L] -> [B, N, C]; padding continues the last document."""
    last = documents[:, -1:] if documents.shape[1] else documents.new_zeros(documents.shape[0], 1)
    padding = -documents.shape[1] % size if documents.shape[1] else size
    return torch.cat([documents, last.expand(-1, padding)], dim=1).unflatten(1, (-1, size))


def merge(x: Tensor, length: int) -> Tensor:
    """[B, N, H, C, D] -> [B, L, H, D], without the padding."""
    return x.transpose(2, 3).flatten(1, 2)[:, :length]


def bounded(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-decays in `dtype`, none so low that it would swallow the other terms of a sum: exp of the bound is the least
    number above zero."""
    return log_decay.to(dtype).clamp(
        min=math.log(torch.finfo(dtype).smallest_normal) + math.log(torch.finfo(dtype).eps)
    )
