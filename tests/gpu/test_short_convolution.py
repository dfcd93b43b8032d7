"""The fused convolution as compiled, against the definition in float64, at sizes beyond the interpreter."""

import pytest
import torch
from torch import Tensor

from longtrain_kernels.backend import Backend
from longtrain_kernels.short_convolution import short_convolution

pytestmark = pytest.mark.gpu

# Relative error norms: a result is rounded once, to 2^-9 or 2^-12 at most; in float32 the sigmoid is good to 2^-21, and
# the derivative of SiLU has a zero.
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 5e-6}


def run(rows: Tensor, weight: Tensor, at: Tensor, backend: Backend, cotangent: Tensor) -> tuple[Tensor, ...]:
    """Outputs and the gradients of rows and weight."""
    leaves = rows.detach().requires_grad_(), weight.detach().requires_grad_()
    output = short_convolution(*leaves, at, "silu", backend)
    return output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))


def random_positions(batch: int, length: int) -> Tensor:
    """Documents of 200 tokens on average; the first goes on with one that has a past."""
    at = torch.arange(length, device="cuda").expand(batch, -1)
    starts = torch.rand(batch, length, device="cuda") < 0.005
    last = torch.where(starts, at, -100).cummax(1).values
    return at - last


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("batch", "length", "channels", "taps"),
    [(1, 1, 1, 4), (2, 63, 7, 2), (2, 1000, 384, 4), (1, 4099, 257, 3), (1, 513, 1024, 1), (1, 515, 130, 8)],
)
def test_fused_is_the_definition(dtype: torch.dtype, batch: int, length: int, channels: int, taps: int) -> None:
    torch.manual_seed(length)
    rows = torch.randn(batch, length + taps - 1, channels, device="cuda").to(dtype)
    weight = torch.randn(channels, taps, device="cuda").to(dtype)
    at = random_positions(batch, length)
    cotangent = torch.randn(batch, length, channels, device="cuda").to(dtype)
    got = run(rows, weight, at, Backend.TRITON, cotangent)
    want = run(rows.double(), weight.double(), at, Backend.REFERENCE, cotangent)
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors
    again = run(rows, weight, at, Backend.TRITON, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_views_of_a_projection_are_read_in_place() -> None:
    wide = torch.randn(2, 300, 3, 256, device="cuda", dtype=torch.bfloat16)
    rows, weight = wide[:, :, 1], torch.randn(256, 4, device="cuda")
    at, cotangent = random_positions(2, 297), torch.ones((), device="cuda").expand(2, 297, 256)
    got = run(rows, weight, at, Backend.TRITON, cotangent)
    want = run(rows.contiguous(), weight, at, Backend.TRITON, cotangent.contiguous())
    torch.testing.assert_close(got, want)


def test_offsets_beyond_32_bits() -> None:
    # 2^31 + 2^25 elements, all zero but for the last 67 rows, which 67 tokens read
    length, channels = 2**16 + 2**10, 2**15
    rows = torch.zeros(1, length + 3, channels, device="cuda", dtype=torch.bfloat16)
    rows[:, -67:] = torch.randn(1, 67, channels, device="cuda").to(torch.bfloat16)
    weight = torch.randn(channels, 4, device="cuda")
    at = torch.arange(length, device="cuda")[None]
    one = torch.ones((), device="cuda", dtype=torch.bfloat16)
    output, grad_rows, grad_weight = run(rows, weight, at, Backend.TRITON, one.expand(1, length, channels))
    tail = run(rows[:, -70:], weight, at[:, -67:], Backend.TRITON, one.expand(1, 67, channels))
    torch.testing.assert_close(output[:, -67:], tail[0])
    torch.testing.assert_close(grad_rows[:, -67:], tail[1][:, -67:])
    torch.testing.assert_close(grad_weight, tail[2], rtol=1e-4, atol=1e-4)
    assert output[:, :-67].abs().max() == 0
