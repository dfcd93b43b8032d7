"""A segment of a linear recurrence as the affine map of its state: S_out = M S_in + B.

The transition M is one of three shapes, and these functions are the only code that tells them apart: a scalar per head
[B, H, 1] or a vector per head [B, H, K], both diagonal, or a matrix per head [B, H, K, K]. States are [B, H, K, V].
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Segment(Protocol):
    """The affine map of a segment, and its outputs once the incoming state is known.

    The state after the segment is `advance(transition, state_in) + state`; a backend may rely on it: the cotangents of
    `transition` and `state` are those of that expression, for the `state_in` that `correct` was called with.
    """

    @property
    def transition(self) -> Tensor:
        """M of the whole segment; zero where the segment contains a document boundary."""
        ...

    @property
    def state(self) -> Tensor:
        """[B, H, K, V]: B, the final state from the zero state."""
        ...

    def correct(self, state: Tensor) -> Tensor:
        """The outputs [B, L, H, V] for the incoming state [B, H, K, V]; called once."""
        ...


@dataclass(frozen=True)
class LinearSegment:
    """A segment that was run from the zero state, with what is needed to add a carry afterwards by linearity."""

    output: Tensor
    """[B, L, H, V], from the zero state, as wide as the state: the carry's share is still to be added."""
    readout: Tensor
    """[B, L, H, K]: M_t^T q_t with M_t the product of the transitions up to t; zero behind a document boundary."""
    transition: Tensor
    """See `Segment`."""
    state: Tensor
    """See `Segment`."""
    dtype: torch.dtype
    """Of the values, and so of the finished output."""

    def correct(self, state: Tensor) -> Tensor:
        """o_t + S_in^T M_t^T q_t, in `dtype`."""
        return (self.output + torch.einsum("blhk,bhkv->blhv", self.readout, state)).to(self.dtype)


def run(segment: Segment, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, V] and final state of a segment from `state` [B, H, K, V] (None: zero)."""
    if state is None:
        state = torch.zeros_like(segment.state)
    return segment.correct(state), advance(segment.transition, state) + segment.state


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
