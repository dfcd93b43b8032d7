"""The fused convolution against the shifted products in float64, and those against torch's: outputs, every gradient.

Kernels run on a GPU where there is one, else in Triton's interpreter.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain_kernels.backend import Backend
from longtrain_kernels.short_convolution import short_convolution
from longtrain_kernels.short_convolution.triton import _launch
from tests.harness.documents import awkward_starts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the largest of each result: float64 rounding; float32 rounding and a square of an approximate square root;
# results rounded once to bfloat16 or float16, which the interpreter does by cutting off.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def positions(length: int, edges: tuple[int, ...] = (16, 32)) -> Tensor:
    """Two sequences: one goes on with a document of two tokens, one has documents that end at awkward places."""
    starts = awkward_starts(length, edges)[1]
    packed = [t - max(s for s in starts if s <= t) for t in range(length)]
    return torch.tensor([[t + 2 for t in range(length)], packed], device=DEVICE)


def inputs(length: int, taps: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(length)
    rows = torch.randn(2, taps - 1 + length, channels, dtype=torch.float64)
    weight = torch.randn(channels, taps, dtype=torch.float64)
    return rows.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def run(
    rows: Tensor, weight: Tensor, at: Tensor, activation: Any, backend: Backend, cotangent: Tensor
) -> tuple[Tensor, ...]:
    """Outputs and the gradients of rows and weight."""
    leaves = rows.detach().requires_grad_(), weight.detach().requires_grad_()
    output = short_convolution(*leaves, at, activation, backend)
    return output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))


def assert_fused_is_the_definition(rows: Tensor, weight: Tensor, at: Tensor, activation: Any) -> None:
    torch.manual_seed(1)
    cotangent = torch.randn(*at.shape, rows.shape[2], device=DEVICE).to(rows.dtype)
    got = run(rows, weight, at, activation, Backend.TRITON, cotangent)
    want = run(rows.double(), weight.double(), at, activation, Backend.REFERENCE, cotangent)
    assert [x.dtype for x in got] == [rows.dtype, rows.dtype, weight.dtype]
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        bound = TOLERANCE[a.dtype] * float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("length", "taps", "activation"),
    [(1, 4, "silu"), (2, 4, "silu"), (3, 4, None), (63, 4, None), (65, 4, "silu"), (17, 1, "silu"), (20, 8, "silu")],
)
def test_fused_is_the_definition_in_float64(length: int, taps: int, activation: Any) -> None:
    rows, weight = inputs(length, taps, 5, torch.float64)
    at = positions(length)
    if length > 20:  # one sequence is enough for the interpreter
        rows, at = rows[1:], at[1:]
    assert_fused_is_the_definition(rows, weight, at, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_rounds_once(dtype: torch.dtype) -> None:
    rows, weight = inputs(15, 4, 7, dtype)
    assert_fused_is_the_definition(rows, weight, positions(15), "silu")


def test_fused_takes_more_channels_than_a_block_and_a_wider_weight() -> None:
    rows, weight = inputs(9, 3, 300, torch.float32)
    assert_fused_is_the_definition(rows.bfloat16(), weight, positions(9), "silu")


def test_fused_takes_any_strides() -> None:
    rows, weight = inputs(9, 4, 6, torch.float64)
    wide = torch.stack([rows, rows + 1], dim=-1).transpose(1, 2)  # [B, D, L, 2]
    strided = wide[..., 0].transpose(1, 2)
    assert strided.stride(-1) != 1
    assert_fused_is_the_definition(strided, weight.T.contiguous().T, positions(9), "silu")


def test_a_broadcast_cotangent_is_read_by_its_strides() -> None:
    rows, weight = inputs(9, 4, 6, torch.float64)
    ones = torch.ones((), dtype=torch.float64, device=DEVICE).expand(2, 9, 6)
    got, want = (run(rows, weight, positions(9), "silu", b, ones) for b in (Backend.TRITON, Backend.REFERENCE))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
def test_an_empty_segment_has_zero_gradients(backend: Backend) -> None:
    rows, weight = inputs(0, 4, 6, torch.float64)
    at = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
    output, *grads = run(rows, weight, at, "silu", backend, torch.zeros(2, 0, 6, device=DEVICE))
    assert output.shape == (2, 0, 6)
    assert [g.shape for g in grads] == [rows.shape, weight.shape]
    assert all(g.abs().max() == 0 for g in grads)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
def test_rows_of_another_document_are_never_read(backend: Backend) -> None:
    rows, weight = inputs(20, 4, 6, torch.float64)
    rows[:, :3] = float("nan")
    at = torch.arange(20, device=DEVICE).expand(2, -1)
    results = run(rows, weight, at, "silu", backend, torch.ones(2, 20, 6, device=DEVICE))
    assert all(torch.isfinite(x).all() for x in results)
    assert results[1][:, :3].abs().max() == 0


def test_gradients_are_the_same_bits_each_time() -> None:
    rows, weight = inputs(17, 4, 6, torch.float32)
    cotangent = torch.randn(2, 17, 6, device=DEVICE)
    first, second = (run(rows, weight, positions(17), "silu", Backend.TRITON, cotangent) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strips_cover_every_token_of_long_and_short_segments() -> None:
    for batch, tokens, channels in [(1, 1, 1), (4, 8192, 2048), (1, 2**20, 4096), (3, 100_003, 1537)]:
        launch = _launch(batch, tokens, channels, 4)
        assert launch.strips * launch.strip >= tokens > (launch.strips - 1) * launch.strip
        assert launch.programs == batch * launch.strips * -(-channels // launch.block)
    assert _launch(1, 32768, 2048, 4).programs >= 2048


def test_the_definition_is_conv1d_inside_each_document() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 20, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    bounds = ((0, 1), (1, 3), (3, 11), (11, 19), (19, 20))
    at = torch.cat([torch.arange(e - b) for b, e in bounds])[None]
    rows = torch.cat([torch.full((1, 3, 6), float("nan"), dtype=torch.float64), x], dim=1)
    pieces = [x[:, b:e] for b, e in bounds]
    want = [torch.conv1d(p.mT, weight[:, None], padding=3, groups=6)[..., : p.shape[1]].mT for p in pieces]
    torch.testing.assert_close(short_convolution(rows, weight, at), torch.cat(want, dim=1))
    torch.testing.assert_close(short_convolution(rows, weight, at, "silu"), F.silu(torch.cat(want, dim=1)))


@pytest.mark.parametrize(
    ("rows", "weight", "options", "message"),
    [
        ((1, 20, 6), (6, 4), {}, "expected 20"),
        ((1, 23, 5), (6, 4), {}, "do not match"),
        ((1, 23, 6), (6, 4), {"activation": "relu"}, "no activation 'relu'"),
        ((1, 28, 6), (6, 9), {"backend": Backend.TRITON}, "9 taps are more than"),
    ],
)
def test_what_does_not_fit_is_named(rows: Any, weight: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        short_convolution(torch.zeros(rows), torch.zeros(weight), torch.zeros(1, 20, dtype=torch.int64), **options)
