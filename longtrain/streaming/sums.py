"""Gradients of parameters, summed over the parts of a step and handed over once."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from longtrain_kernels.affine import accumulator_dtype


class GradientSums:
    """In float32 at least: hundreds of chunks in bfloat16 would lose a weight's gradient in its own rounding."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._sums: dict[nn.Parameter, Tensor] = {}

    def add(self, parameters: Sequence[nn.Parameter], grads: list[Tensor]) -> None:
        """Gradients in any type. Empties the list, so that they and their sums are not all there at once."""
        for parameter in reversed(parameters):
            grad = grads.pop()
            if parameter in self._sums:
                self._sums[parameter] += grad
            else:  # a copy: autograd may have returned one tensor for several parameters
                dtype = accumulator_dtype(grad.dtype)
                self._sums[parameter] = grad.to(dtype, copy=True, memory_format=torch.contiguous_format)

    @property
    def nbytes(self) -> int:
        """Of the sums so far."""
        return sum(x.nbytes for x in self._sums.values())

    def deliver(self) -> None:
        """Add the sums to the parameters' `grad`, as their hooks see it: once each, zeros where nothing was added."""
        for parameter in self._parameters:
            total = self._sums.pop(parameter, None)
            grad = torch.zeros_like(parameter) if total is None else total.to(parameter.dtype)
            torch.autograd.backward([parameter], [grad])
