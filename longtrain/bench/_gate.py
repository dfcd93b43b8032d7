"""Whether an implementation computes its operation at all: nothing is timed that is not right."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longtrain.bench._operations import Call, Layout, Operation, Shape, Tensors, leaves, packed, whole

LENGTH, BATCH, HEADS = 300, 2, 2
# Three documents a sequence: boundaries inside a tile, on the edge of one, and a document of one token.
STARTS = ((97, 200), (64, 65))

BOUNDS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Of the relative error norm. Half precision rounds operands and results to 2^-11 (float16) or 2^-9 (bfloat16), and a
few roundings follow one another; float32 products may be split in three, and gradients of decays are differences of
sums. A wrong formula, or a document that sees another, costs more than any of the three."""


def errors(
    call: Call, operation: Operation, width: int, dtype: torch.dtype, device: torch.device, ours: bool
) -> dict[str, float]:
    """|got - want| / |want| of outputs, final state and every gradient, against the definition in float64.

    Ours are held to packed documents and an incoming state; a peer, which need not have them, to one document and zero.
    """
    torch.manual_seed(0)
    tensors = operation.inputs(Shape(BATCH, LENGTH, HEADS, width), dtype, device)
    layout = packed(STARTS, LENGTH, device) if ours else whole(BATCH, LENGTH, device)
    if ours and operation.stateful:
        tensors["state"] = torch.randn(BATCH, HEADS, width, width, device=device)
    got, got_grads = _run(call, operation, tensors, layout, None)
    want, want_grads = _run(
        operation.definition, operation, {name: x.double() for name, x in tensors.items()}, layout, got
    )
    names = ("outputs", "final state")[: len(got)]
    found = {name: relative_error(a, b) for name, a, b in zip(names, got, want, strict=False)}
    return found | {f"gradient of {name}": relative_error(grad, want_grads[name]) for name, grad in got_grads.items()}


def _run(
    call: Call, operation: Operation, tensors: Tensors, layout: Layout, like: Sequence[Tensor] | None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results and gradients by input; cotangents are the same numbers for the results `like`, in their dtypes."""
    with_grad = {name: x.detach().requires_grad_() for name, x in leaves(operation, tensors).items()}
    results = list(call({**tensors, **with_grad}, layout))[: None if like is None else len(like)]
    torch.manual_seed(1)
    cotangents = [
        torch.randn(r.shape, device=r.device).to(r.dtype if like is None else like[i].dtype).to(r.dtype)
        for i, r in enumerate(results)
    ]
    grads = torch.autograd.grad(results, list(with_grad.values()), cotangents, materialize_grads=True)
    return [r.detach() for r in results], dict(zip(with_grad, grads, strict=True))


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| for a float64 `want`; NaN where `got` has one, which no bound lets pass."""
    if got.shape != want.shape:
        return float("inf")
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))
