"""The short convolution as one kernel forward and one backward: each number is read once, save at the seams of strips.

A program walks along a strip of tokens with a block of channels, and keeps the last W-1 rows in registers; see
README.md. GROUP rows are loaded before any of them is used, so that enough loads are under way.
"""

# ruff: noqa: RUF005 (kernels know the sum of tuples, not unpacking)

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtrain_kernels.affine import accumulator_dtype

MOST_TAPS = 8
# Tokens whose rows are loaded together. Backward keeps three times as much in registers, and 128 of them leave 16 warps
# on a multiprocessor: at either size some 30 KB of loads are under way there.
_FORWARD_GROUP, _BACKWARD_GROUP, _BACKWARD_REGISTERS = 8, 4, 128
# Strips are as short as makes this many programs: long ones re-read less at their seams and leave fewer partial sums.
_PROGRAMS = 4096
_STRIPS = (16, 256)


@triton.jit
def _sigmoid(y):
    # rsqrt(x)^2 for 1 / x: a division takes as many instructions as all the rest of the forward pass.
    root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * y))
    return root * root


@triton.jit
def _tap_sum(xs, taps, position, first: tl.constexpr, W: tl.constexpr, PACKED: tl.constexpr):
    """sum_w weight[:, W-1-w] x_{t-w}, for the window xs[first : first + W] that ends with x_t.

    Without PACKED, every tap is inside the document.
    """
    total = xs[first + W - 1] * taps[W - 1]
    for back in tl.static_range(1, W):
        x = xs[first + W - 1 - back]
        total += (tl.where(position >= back, x, 0.0) if PACKED else x) * taps[W - 1 - back]
    return total


@triton.jit
def _block(channels, strips, BLOCK: tl.constexpr):
    """Sequence, strip and channels of this program; neighbours in memory run side by side."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, BLOCK)
    d = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return program // blocks // strips, program // blocks % strips, d


@triton.jit
def _live(d, channels, t, end):
    """Mask of a row: the channels that there are, none outside [0, end)."""
    return d < tl.where((t >= 0) & (t < end), channels, 0)


@triton.jit
def _load_rows(pointers, stride, begin, end, d, channels, ACC: tl.constexpr, COUNT: tl.constexpr):
    """Rows begin .. begin + COUNT as a tuple; zero outside [0, end)."""
    xs = ()
    for j in tl.static_range(COUNT):
        mask = _live(d, channels, begin + j, end)
        xs = xs + (tl.load(pointers + (begin + j) * stride, mask=mask, other=0.0).to(ACC),)
    return xs


@triton.jit
def _load_positions(pointer, begin, length, COUNT: tl.constexpr):
    """Positions of tokens begin .. begin + COUNT as a tuple; zero outside the segment."""
    ps = ()
    for j in tl.static_range(COUNT):
        ps = ps + (tl.load(pointer + begin + j, mask=(begin + j >= 0) & (begin + j < length), other=0),)
    return ps


@triton.jit
def _load_taps(weight, d, channels, W: tl.constexpr, ACC: tl.constexpr):
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.load(weight + d * W + w, mask=d < channels, other=0.0).to(ACC),)
    return taps


@triton.jit
def _least(ps, COUNT: tl.constexpr):
    """The smallest position of a group: from W-1 on, every tap of every token is inside."""
    least = ps[0]
    for j in tl.static_range(1, COUNT):
        least = tl.minimum(least, ps[j])
    return least


@triton.jit
def _forward_group(
    xs, taps, ps, output, t, length, d, channels,
    W: tl.constexpr, SILU: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    for j in tl.static_range(GROUP):
        y = _tap_sum(xs, taps, ps[j], j, W, PACKED)
        if SILU:
            y = y * _sigmoid(y)
        tl.store(output + (t + j) * channels + d, y.to(output.dtype.element_ty), mask=_live(d, channels, t + j, length))


@triton.jit
def _forward_kernel(
    rows, weight, positions, output,
    length, channels, strips, row_batch, row_token, row_channel,
    W: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
    STRIP: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, strip, d = _block(channels, strips, BLOCK)
    rows += b * row_batch + d * row_channel
    positions += b * length
    output += b * length * channels
    taps = _load_taps(weight, d, channels, W, ACC)
    begin = strip * STRIP
    history = _load_rows(rows, row_token, begin, length + W - 1, d, channels, ACC, W - 1)
    for group in range(0, STRIP, GROUP):
        t = begin + group
        xs = history + _load_rows(rows, row_token, t + W - 1, length + W - 1, d, channels, ACC, GROUP)
        ps = _load_positions(positions, t, length, GROUP)
        if _least(ps, GROUP) >= W - 1:
            _forward_group(xs, taps, ps, output, t, length, d, channels, W, SILU, GROUP, False)
        else:
            _forward_group(xs, taps, ps, output, t, length, d, channels, W, SILU, GROUP, True)
        history = xs[GROUP:]


@triton.jit
def _sum_grad(dy, xs, taps, position, first: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr):
    """The cotangent of the sum in front of the activation: silu'(y) = s (1 + y (1 - s)) with s = sigmoid(y)."""
    if SILU:
        y = _tap_sum(xs, taps, position, first, W, PACKED)
        s = _sigmoid(y)
        dy = dy * s * (1 + y * (1 - s))
    return dy


@triton.jit
def _spread(partial, dy, taps, position, W: tl.constexpr, PACKED: tl.constexpr):
    """Row gradients of t .. t+W-1, of which `partial` has what tokens before t add to the first W-1, with token t."""
    rows = ()
    for k in tl.static_range(W - 1):
        seen = tl.where(position >= W - 1 - k, dy, 0.0) if PACKED else dy
        rows = rows + (partial[k] + seen * taps[k],)
    return rows + (dy * taps[W - 1],)


@triton.jit
def _backward_group(
    xs, dys, taps, ps, partial, sums, grad_rows, t, total, d, channels,
    W: tl.constexpr, SILU: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    for j in tl.static_range(GROUP):
        dy = _sum_grad(dys[j], xs, taps, ps[j], j, W, SILU, PACKED)
        dxs = _spread(partial, dy, taps, ps[j], W, PACKED)
        tl.store(
            grad_rows + (t + j) * channels + d,
            dxs[0].to(grad_rows.dtype.element_ty),
            mask=_live(d, channels, t + j, total),
        )
        partial = dxs[1:]
        updated = ()
        for k in tl.static_range(W):
            x = tl.where(ps[j] >= W - 1 - k, xs[j + k], 0.0) if PACKED else xs[j + k]
            updated = updated + (sums[k] + dy * x,)
        sums = updated
    return partial, sums


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros((BLOCK,), ACC),)
    return zeros


@triton.jit
def _backward_kernel(
    rows, weight, positions, grad, grad_rows, grad_weight,
    length, channels, strips, row_batch, row_token, row_channel, grad_batch, grad_token, grad_channel,
    W: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
    STRIP: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A strip of rows s: row s is read by tokens s-W+1 .. s, and the weight gradient counts the tokens of the strip.
    b, strip, d = _block(channels, strips, BLOCK)
    total = length + W - 1
    rows += b * row_batch + d * row_channel
    grad += b * grad_batch + d * grad_channel
    positions += b * length
    grad_rows += b * total * channels
    taps = _load_taps(weight, d, channels, W, ACC)
    begin = strip * STRIP

    # The tokens just before the strip, whose gradients reach into it.
    before = begin - (W - 1)
    window = _load_rows(rows, row_token, before, total, d, channels, ACC, 2 * (W - 1))
    dys_before = _load_rows(grad, grad_token, before, length, d, channels, ACC, W - 1)
    ps_before = _load_positions(positions, before, length, W - 1)
    partial = _zeros(W - 1, BLOCK, ACC)
    for j in tl.static_range(W - 1):
        dy = _sum_grad(dys_before[j], window, taps, ps_before[j], j, W, SILU, True)
        # Rows before the sequence may hold anything, NaN too.
        dy = tl.where(before + j >= 0, dy, 0.0)
        partial = _spread(partial, dy, taps, ps_before[j], W, True)[1:]

    sums = _zeros(W, BLOCK, ACC)
    history = window[W - 1 :]
    for group in range(0, STRIP, GROUP):
        t = begin + group
        xs = history + _load_rows(rows, row_token, t + W - 1, total, d, channels, ACC, GROUP)
        dys = _load_rows(grad, grad_token, t, length, d, channels, ACC, GROUP)
        ps = _load_positions(positions, t, length, GROUP)
        if _least(ps, GROUP) >= W - 1:
            partial, sums = _backward_group(
                xs, dys, taps, ps, partial, sums, grad_rows, t, total, d, channels, W, SILU, GROUP, False
            )
        else:
            partial, sums = _backward_group(
                xs, dys, taps, ps, partial, sums, grad_rows, t, total, d, channels, W, SILU, GROUP, True
            )
        history = xs[GROUP:]
    grad_weight += (b * strips + strip) * W * channels + d
    for k in tl.static_range(W):
        tl.store(grad_weight + k * channels, sums[k], mask=d < channels)


@dataclass(frozen=True)
class _Launch:
    """How a segment is cut into programs. A thread holds four channels, or two where many taps fill its registers."""

    block: int
    strip: int
    strips: int
    programs: int

    @property
    def settings(self) -> dict[str, int]:
        return {"STRIP": self.strip, "BLOCK": self.block, "num_warps": 2}


def _launch(batch: int, tokens: int, channels: int, taps: int) -> _Launch:
    block = 256 if channels > 128 and taps <= 4 else 128
    blocks = batch * triton.cdiv(channels, block)
    tokens_each = triton.cdiv(tokens * blocks, _PROGRAMS)
    strip = min(max(triton.next_power_of_2(max(tokens_each, 1)), _STRIPS[0]), _STRIPS[1])
    strips = triton.cdiv(tokens, strip)
    return _Launch(block, strip, strips, strips * blocks)


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, positions: Tensor, silu: bool) -> Tensor:
        weight, positions = weight.contiguous(), positions.contiguous()
        ctx.save_for_backward(rows, weight, positions)
        ctx.silu = silu
        (batch, length), (channels, taps) = positions.shape, weight.shape
        output = rows.new_empty(batch, length, channels)
        launch = _launch(batch, length, channels, taps)
        if launch.programs:
            _forward_kernel[(launch.programs,)](
                rows, weight, positions, output,
                length, channels, launch.strips, *rows.stride(),
                W=taps, SILU=silu, ACC=_accumulator(rows), GROUP=_FORWARD_GROUP, **launch.settings,
            )  # fmt: skip
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        rows, weight, positions = ctx.saved_tensors
        (batch, length), (channels, taps) = positions.shape, weight.shape
        total = length + taps - 1
        grad_rows = rows.new_empty(rows.shape)
        launch = _launch(batch, total, channels, taps)
        partial = rows.new_empty(batch * launch.strips, taps, channels, dtype=accumulator_dtype(rows.dtype))
        if launch.programs:
            _backward_kernel[(launch.programs,)](
                rows, weight, positions, grad, grad_rows, partial,
                length, channels, launch.strips, *rows.stride(), *grad.stride(),
                W=taps, SILU=ctx.silu, ACC=_accumulator(rows), GROUP=_BACKWARD_GROUP,
                maxnreg=_BACKWARD_REGISTERS, **launch.settings,
            )  # fmt: skip
        return grad_rows, partial.sum(0).T.to(weight.dtype), None, None


def _accumulator(rows: Tensor) -> tl.dtype:
    return tl.float64 if accumulator_dtype(rows.dtype) is torch.float64 else tl.float32


def short_convolution_triton(rows: Tensor, weight: Tensor, positions: Tensor, activation: str | None) -> Tensor:
    """Shapes as in `short_convolution`; 1 to 8 taps."""
    return _ShortConvolution.apply(rows, weight, positions, activation == "silu")
