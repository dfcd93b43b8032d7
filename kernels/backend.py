"""Which implementation of an operation runs. Chosen by whoever builds the operation, never by the environment."""

from enum import StrEnum

import torch
from torch import Tensor


class Backend(StrEnum):
    """Every operation has all three; they compute the same function."""

    REFERENCE = "reference"
    """The definition: a loop over time in plain PyTorch, as slow as it is short."""
    CHUNKED = "chunked"
    """Matrix products over chunks of time in plain PyTorch; any device and dtype, float64 included."""
    TRITON = "triton"
    """Kernels for GPUs; on a CPU only under Triton's interpreter."""


def default_backend(device: torch.device) -> Backend:
    """Triton on CUDA devices, chunked PyTorch elsewhere."""
    return Backend.TRITON if device.type == "cuda" else Backend.CHUNKED


def choose_backend(asked: Backend | None, *tensors: Tensor) -> Backend:
    """What an operation on `tensors` runs on.

    Raises ValueError for what is no backend, and for Triton and float64, which its kernels do not compute.
    """
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    if asked is None:
        return Backend.CHUNKED if wide else default_backend(tensors[0].device)
    asked = Backend(asked)
    if asked is Backend.TRITON and wide:
        raise ValueError("float64 is nothing that Triton's kernels compute: use another backend or dtype")
    return asked


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, G, ...] -> [B, L, H, ...]: each of G key heads serves H / G value heads in a row."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)
