"""Block attention by cuDNN and FlashAttention on a GPU against its definition in float64: `pytest -m gpu`."""

import pytest
import torch
from torch import Tensor

from longtrain_kernels.block_attention import BlockAttention, Span, Tokens
from longtrain_kernels.block_attention.reference import attention_reference
from tests.harness.documents import awkward_starts

pytestmark = pytest.mark.gpu

T = 700
WHOLE = ((0,), (0,))
PACKED = awkward_starts(T, edges=(200, 500))
CUTS: dict[str, tuple[list[Span], list[Span]]] = {
    "whole": ([(0, T)], [(0, T)]),
    "prefix": ([(200, 500)], [(0, 500)]),
    "zigzag": ([(100, 200), (500, 611)], [(100, 200), (500, 611)]),
    "zigzag, earlier rank": ([(100, 200), (500, 600)], [(0, 100), (600, T)]),
    "zigzag, all": ([(100, 200), (500, 600)], [(0, T)]),
}
# Operands and results are rounded to bfloat16, 2^-9, as are the weights and their gradients: relative error norms.
BOUND = 8e-3


def operands(cut: tuple[list[Span], list[Span]], width: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(width)
    all_tokens = [torch.randn(2, T, heads, width, device="cuda").to(dtype) for heads in (6, 2, 2)]
    pairs = zip(all_tokens, (cut[0], cut[1], cut[1]), strict=True)
    return [torch.cat([x[:, max(0, b) : e] for b, e in spans], dim=1).requires_grad_() for x, spans in pairs]


def errors(operation: BlockAttention, leaves: list[Tensor], queries: Tokens, keys: Tokens) -> dict[str, float]:
    """Relative error norms; where a query sees one key its gradient cancels, and is compared with the cotangent."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want, want_lse = attention_reference(*exact, queries, keys, operation.scale, operation.window)
    grad = torch.randn_like(want)
    output = operation(*leaves, queries, keys)
    got = (output, *torch.autograd.grad(output, leaves, grad.to(output.dtype)))
    true = (want, *torch.autograd.grad(want, exact, grad.to(output.dtype).double()))
    _, lse = operation.forward(*(x.detach() for x in leaves), queries, keys)
    seen = want_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    pairs = [*zip(got, true, strict=True), (lse[seen], want_lse[seen])]
    names = ("output", "dq", "dk", "dv", "lse")
    return {
        n: ((a.double() - b).norm() / max(b.norm(), 0.01 * grad.norm())).item()
        for n, (a, b) in zip(names, pairs, strict=True)
    }


@pytest.mark.parametrize("kernel", ["auto", "cudnn", "flash"])
@pytest.mark.parametrize("starts", [WHOLE, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("cut", CUTS)
def test_cuts_and_documents(kernel: str, starts: tuple[tuple[int, ...], ...], cut: str) -> None:
    queries, keys = (Tokens(tuple(spans), starts) for spans in CUTS[cut])
    found = errors(BlockAttention(0.1, kernel=kernel), operands(CUTS[cut], 64, torch.bfloat16), queries, keys)
    assert max(found.values()) < BOUND, found


@pytest.mark.parametrize("width", [40, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_widths(kernel: str, width: int, dtype: torch.dtype) -> None:
    tokens = Tokens(((0, T),), PACKED)
    found = errors(BlockAttention(0.1, kernel=kernel), operands(CUTS["whole"], width, dtype), tokens, tokens)
    assert max(found.values()) < BOUND, found


@pytest.mark.parametrize("starts", [WHOLE, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("window", [1, 99, 1000])
def test_windows(window: int, starts: tuple[tuple[int, ...], ...]) -> None:
    cut = ([(200, 500)], [(max(0, 201 - window), 500)])
    queries, keys = (Tokens(tuple(spans), starts) for spans in cut)
    found = errors(BlockAttention(0.1, window), operands(cut, 128, torch.bfloat16), queries, keys)
    assert max(found.values()) < BOUND, found


def test_odd_widths_and_float32_run_plainly() -> None:
    tokens = Tokens(((0, T),), PACKED)
    for width, dtype, bound in ((30, torch.bfloat16, BOUND), (64, torch.float32, 1e-4)):
        found = errors(BlockAttention(0.1), operands(CUTS["whole"], width, dtype), tokens, tokens)
        assert max(found.values()) < bound, found
