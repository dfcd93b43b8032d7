"""A scan compared with its definition in float64: outputs, final state, and every gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.harness.documents import awkward_starts, segment_documents

Inputs = dict[str, Tensor]
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there Triton's interpreter runs them


def scan_inputs(
    kind: str,
    shape: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    decay_scale: float = 1.0,
) -> Inputs:
    """Random inputs of `DiagonalScan` (none, constant, scalar, vector) or `DeltaScan` (delta, delta scalar, ...).

    shape is B, L, G, H, K, V. Log-decays lie around -decay_scale / 2.
    """
    batch, length, groups, heads, width, columns = shape
    generator = torch.Generator().manual_seed(length * 31 + width)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    inputs = {
        "queries": normal(batch, length, groups, width) * width**-0.5,
        "keys": normal(batch, length, groups, width),
        "values": normal(batch, length, heads, columns),
    }
    if kind.startswith("delta"):
        inputs["keys"] = torch.nn.functional.normalize(inputs["keys"], dim=-1)
        inputs["beta"] = 2 * normal(batch, length, heads).sigmoid()
    tensors = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    if kind.endswith("constant"):
        tensors["log_decay"] = -decay_scale * torch.rand(heads, generator=generator)
    if kind.endswith("scalar"):
        tensors["log_decay"] = -decay_scale * torch.rand(batch, length, heads, generator=generator)
    if kind.endswith("vector"):
        tensors["log_decay"] = (-decay_scale * torch.rand(batch, length, heads, width, generator=generator)).to(dtype)
    return {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}


def packed_documents(batch: int, length: int, edges: tuple[int, ...] = (16, 64)) -> Tensor:
    """[B, L]: even rows begin in the incoming state's document and have awkward boundaries, odd rows do neither."""
    starts = awkward_starts(length, edges=edges)
    rows = [starts[(i + 1) % len(starts)] for i in range(batch)]
    first = torch.tensor([[1 - i % 2] for i in range(batch)])
    return segment_documents(tuple(rows), 0, length) - first


def _decays_so_far(documents: Tensor) -> Tensor:
    """[B, L]: how many decays lie between each token and the start of its document, or the incoming state."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.diff(documents, dim=1, prepend=torch.zeros_like(documents[:, :1])) != 0
    return index - torch.where(starts, index, -1).cummax(1).values


def scan_errors(
    make: Callable[..., Any], reference: Callable[..., Any], inputs: Inputs, documents: Tensor
) -> dict[str, float]:
    """Relative error norms of `make(**inputs)` against `reference(**inputs in float64)`, by result and by gradient.

    Memory that a kernel forgets to write is NaN, and so is the error then. The gradient of decays sums q dq - k dk over
    later tokens; where most of that cancels, its error is relative to the terms. A head's constant decay counts each
    term as often as it was applied before it.
    """
    batch, _, heads, columns = inputs["values"].shape
    width = inputs["keys"].shape[-1]
    generator = torch.Generator().manual_seed(11)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(documents.device)

    state, grad_state = normal(batch, heads, width, columns), normal(batch, heads, width, columns)
    grad = normal(*inputs["values"].shape).to(inputs["values"].dtype)

    def run(op: Any, leaves: Inputs, state: Tensor) -> dict[str, Tensor]:
        state = state.requires_grad_()
        output, final = op.apply(documents, state)
        names = [name for name in leaves if leaves[name].requires_grad]
        grads = torch.autograd.grad(
            (output, final), [*(leaves[n] for n in names), state], (grad.to(output.dtype), grad_state.to(final.dtype))
        )
        gradients = {f"d_{name}": value for name, value in zip([*names, "state"], grads, strict=True)}
        return {"outputs": output, "final_state": final} | gradients

    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        got = run(make(**inputs), inputs, state.clone())
    finally:
        torch.use_deterministic_algorithms(False)
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in inputs.items()}
    want = run(reference(**exact), exact, state.double())
    scales = {name: tensor.norm() for name, tensor in want.items()}
    if "d_log_decay" in want:
        terms = exact["queries"] * want["d_queries"]
        if exact["log_decay"].dim() < 4:
            terms = terms.sum(-1)
        if exact["log_decay"].dim() == 1:
            terms = terms * _decays_so_far(documents)[..., None]
        scales["d_log_decay"] = torch.maximum(scales["d_log_decay"], terms.norm())
    return {name: ((got[name].double() - want[name]).norm() / (scales[name] + 1e-30)).item() for name in want}
