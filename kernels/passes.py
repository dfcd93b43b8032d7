"""How a scan made of kernels becomes a differentiable `Segment`.

A scan runs in two passes over its inputs, forward and backward alike: a light one that finds the affine map of the
segment, and one that computes results from the true incoming state (forward) or its cotangent (backward). Between the
two lies whatever composes segments: nothing, a scan over ranks, the next chunk of a stream. No pass is ever repeated.

    forward    summarize -> M, B        |  state_in known      |  outputs
    backward   adjoint -> dstate_in     |  dstate_out known    |  gradients
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Passes(ABC):
    """The four passes of one scan over one segment, called at most once each and in this order.

    They keep what later ones need as attributes. States and maps are float32, and not differentiated through.
    """

    adjoined = False
    """Whether the backward passes have begun."""
    released = False
    """Whether they have ended, and nothing is kept any more."""

    @abstractmethod
    def summarize(self) -> tuple[Tensor, Tensor]:
        """The segment's transition M and its final state from the zero state [B, H, K, V]."""

    @abstractmethod
    def outputs(self, state: Tensor) -> Tensor:
        """[B, L, H, V] from the incoming state [B, H, K, V]."""

    @abstractmethod
    def adjoint(self, grad: Tensor | None) -> Tensor:
        """The cotangent of the incoming state through the outputs alone, from theirs [B, L, H, V] (None: zero)."""

    @abstractmethod
    def gradients(self, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        """The cotangents of the inputs, from that of the outgoing state [B, H, K, V] and the `grad` of `adjoint`."""

    def start_backward(self) -> None:
        """Before `adjoint`. Raises RuntimeError where the backward passes have been through already."""
        if self.released:
            raise RuntimeError("a scan's backward passes run once: its graph cannot be kept for a second time")
        self.adjoined = True

    def release(self) -> None:
        """Drop every tensor, as autograd drops what it saved: the graph may live on until the step ends."""
        vars(self).clear()
        self.adjoined = self.released = True


class KernelSegment:
    """A `longtrain_kernels.affine.Segment` over `passes`; `inputs` are the tensors that `gradients` answers for."""

    def __init__(self, passes: Passes, *inputs: Tensor | None) -> None:
        self._passes = passes
        self.transition, self.state, self._order = _Summary.apply(passes, *inputs)

    def correct(self, state: Tensor) -> Tensor:
        """See `Segment`."""
        return _Outputs.apply(self._passes, self._order, state)


class _Summary(torch.autograd.Function):
    """Inputs -> M, B, and an empty tensor that makes autograd run `_Outputs.backward` before this one's.

    The cotangent of M is not read: it is that of M S_in + B with respect to M, which `gradients` contains because it
    differentiates the run from the true S_in.
    """

    @staticmethod
    def forward(ctx: Any, passes: Passes, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        ctx.passes = passes
        # The passes keep the inputs themselves, and so must notice what autograd would: a change in place.
        ctx.versions = [(x.detach(), x._version) for x in inputs if x is not None and not x.is_inference()]
        transition, state = passes.summarize()
        return transition, state, state.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad_state: Tensor, __: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if any(x._version != version for x, version in ctx.versions):
            raise RuntimeError("an input of a scan was modified by an inplace operation before its backward pass")
        if ctx.passes.released or not ctx.passes.adjoined:  # nothing depends on the outputs
            ctx.passes.start_backward()
            ctx.passes.adjoint(None)
        grads = ctx.passes.gradients(grad_state)
        ctx.passes.release()
        ctx.versions = []
        return None, *grads


class _Outputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: Passes, order: Tensor, state: Tensor) -> Tensor:
        ctx.passes = passes
        ctx.save_for_backward(order)
        return passes.outputs(state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (order,) = ctx.saved_tensors
        ctx.passes.start_backward()
        return None, torch.zeros_like(order), ctx.passes.adjoint(grad)
