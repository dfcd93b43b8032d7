"""Scans past 2^31 elements agree with the same scans cut in two, and keep their memory within twice what they touch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrain_kernels.backend import Backend
from longtrain_kernels.delta_scan import DeltaScan
from longtrain_kernels.diagonal_scan import DiagonalScan

pytestmark = pytest.mark.gpu

H, D = 16, 128
KINDS = ("scalar", "vector", "gated", "kda")
LONG = 2**20 + 2**14 + 77  # times H D: past 2^31, and a multiple of nothing


def inputs(kind: str, length: int) -> list[Tensor]:
    torch.manual_seed(0)
    normal = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    q, k, v = (normal(1, length, H, D) for _ in range(3))
    q *= D**-0.5
    gate = torch.rand(1, length, H, device="cuda") * -0.1
    if kind in ("vector", "kda"):
        gate = normal(1, length, H, D).sigmoid_().mul_(-0.1)
    if kind in ("gated", "kda"):
        k = torch.nn.functional.normalize(k, dim=-1)
        return [q, k, v, torch.rand(1, length, H, device="cuda").to(torch.bfloat16), gate]
    return [q, k, v, gate]


def names(kind: str) -> list[str]:
    """Of the inputs."""
    return ["q", "k", "v", "beta", "gate"] if kind in ("gated", "kda") else ["q", "k", "v", "gate"]


def scan(kind: str) -> Callable[..., Any]:
    return partial(DeltaScan if kind in ("gated", "kda") else DiagonalScan, backend=Backend.TRITON)


def run(kind: str, leaves: list[Tensor], state: Tensor | None, grad: Tensor, grad_state: Tensor) -> list[Tensor]:
    """Outputs, final state, and the gradients of the inputs and of the incoming state."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    state = torch.zeros(1, H, D, D, device="cuda") if state is None else state
    state.requires_grad_()
    documents = torch.zeros(grad.shape[:2], dtype=torch.int32, device="cuda")
    output, final = scan(kind)(*leaves).apply(documents, state)
    grads = torch.autograd.grad((output, final), (*leaves, state), (grad, grad_state))
    return [output.detach(), final.detach(), *grads]


def difference(got: Tensor, want: Tensor) -> float:
    parts = zip(got.split(2**16, 1), want.split(2**16, 1), strict=True)
    squares = [(torch.dist(a.float(), b.float()) ** 2, b.float().norm() ** 2) for a, b in parts]
    return (sum(s for s, _ in squares) / sum(n for _, n in squares)).sqrt().item()


@pytest.mark.parametrize("kind", KINDS)
def test_past_two_to_the_31_elements(kind: str) -> None:
    whole = inputs(kind, LONG)
    assert whole[0].numel() > 2**31
    grad, grad_state = torch.randn_like(whole[2]), torch.randn(1, H, D, D, device="cuda")
    output, final, *grads, _ = run(kind, whole, None, grad, grad_state)
    cut = LONG // 2 - 5
    first, second = ([leaf.detach()[:, part] for leaf in whole] for part in (slice(0, cut), slice(cut, None)))
    with torch.no_grad():
        documents = torch.zeros(1, cut, dtype=torch.int32, device="cuda")
        _, middle = scan(kind)(*first).apply(documents, None)
    right = run(kind, second, middle, grad[:, cut:], grad_state)
    left = run(kind, first, None, grad[:, :cut], right[-1])
    # Chunks lie elsewhere behind the cut: bfloat16 roundings differ, each 2^-9
    assert difference(torch.cat([left[0], right[0]], 1), output) < 1e-2
    assert difference(right[1], final) < 1e-2
    # a gate's gradient adds up the roundings of its segment, which are longer in the diagonal scan
    of_gate = 4e-2 if kind in ("scalar", "vector") else 1e-2
    for name, a, b, both in zip(names(kind), left[2:-1], right[2:-1], grads, strict=True):
        assert difference(torch.cat([a, b], 1), both) < (of_gate if name == "gate" else 1e-2), name


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_a_million_tokens(kind: str) -> None:
    before = torch.cuda.memory_allocated()  # a failed test's tensors live on
    leaves = [leaf.requires_grad_() for leaf in inputs(kind, 2**20)]
    grad = torch.randn_like(leaves[2])
    documents = torch.zeros(1, 2**20, dtype=torch.int32, device="cuda")
    outside = sum(leaf.nbytes for leaf in leaves) + grad.nbytes
    torch.cuda.reset_peak_memory_stats()
    output, _ = scan(kind)(*leaves).apply(documents, None)
    grads = torch.autograd.grad(output, leaves, grad)
    own = outside + output.nbytes + sum(g.nbytes for g in grads)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2 * own, f"{peak / own:.2f} times inputs, outputs and their gradients"
