"""A segment of a linear recurrence as the affine map of its state: S_out = M S_in + B.

The transition M is one of three shapes, and these functions are the only code that tells them apart: a scalar per head
[B, H, 1] or a vector per head [B, H, K], both diagonal, or a matrix per head [B, H, K, K]. States are [B, H, K, V].
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A segment that was run from the zero state, with what is needed to add a carry afterwards."""

    output: Tensor
    """[B, L, H, V], from the zero state, as wide as the state: the carry's share is still to be added."""
    readout: Tensor
    """[B, L, H, K]: M_t^T q_t with M_t the product of the transitions up to t; zero behind a document boundary."""
    transition: Tensor
    """M of the whole segment; zero where the segment contains a document boundary."""
    state: Tensor
    """[B, H, K, V]: B, the final state from the zero state."""
    dtype: torch.dtype
    """Of the values, and so of the finished output."""

    def correct(self, state: Tensor) -> Tensor:
        """The output for the incoming state [B, H, K, V], by linearity: o_t + S_in^T M_t^T q_t; in `dtype`."""
        return (self.output + torch.einsum("blhk,bhkv->blhv", self.readout, state)).to(self.dtype)


def advance(transition: Tensor, state: Tensor) -> Tensor:
    """M S."""
    return transition @ state if transition.dim() == state.dim() else transition.unsqueeze(-1) * state


def advance_adjoint(transition: Tensor, grad: Tensor) -> Tensor:
    """M^T G: the cotangent of S where G is the cotangent of M S."""
    return transition.mT @ grad if transition.dim() == grad.dim() else transition.unsqueeze(-1) * grad


def transition_grad(transition: Tensor, state: Tensor, grad: Tensor) -> Tensor:
    """The cotangent of M, in the shape of M, where G is the cotangent of M S."""
    if transition.dim() == state.dim():
        return grad @ state.mT
    return (grad * state).sum(-1).sum_to_size(transition.shape)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """States and sums are kept in float32, or in float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)
