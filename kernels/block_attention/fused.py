"""The fused kernels that PyTorch brings: cuDNN's, FlashAttention, and a flash kernel for CPUs.

Measured on one H200 (torch 2.11, cuDNN 9.19; bfloat16, 16 heads of 128): cuDNN computes 8k x 8k causal scores at 546
and 498 TFLOP/s (forward, backward), FlashAttention 2 at 276 and 273; but cuDNN needs 50 ms to plan for each shape that
it has not met, forward and backward each, and so serves the shapes that come back.

Softmax gradients need output and log-sum-exp over all keys alone, so a block's gradients are what these kernels find
when told those of the whole.
"""

from typing import Any

import torch
from torch import Tensor

from longtrain_kernels.block_attention.kernel import Kernel, Mask, Squares
from longtrain_kernels.block_attention.plain import Plain

_aten: Any = torch.ops.aten
HALVES = (torch.bfloat16, torch.float16)
_UNIT, _WIDEST = 8, 256  # widths of heads


class Cudnn(Kernel):
    """cuDNN's fused attention (`aten::_scaled_dot_product_cudnn_attention`)."""

    name = "cudnn"

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """See `Kernel`."""
        if not torch.backends.cudnn.is_available():
            return "PyTorch has no cuDNN here"
        problem = _refusal(q, v)
        if problem is None and q.shape[-1] > 128 and torch.cuda.get_device_capability(q.device) < (9, 0):
            return "heads wider than 128 need a GPU of compute capability 9.0 or newer"
        return problem

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel`; a causal mask only for squares without a window."""
        _check_square(q, k, mask)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        output, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, mask.causal, False, scale=scale
        )
        return output.transpose(1, 2), lse.squeeze(-1)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`; masks as in `forward`."""
        _check_square(q, k, mask)
        if q.shape[1] == k.shape[1] == 1:  # one score, which cuDNN refuses
            return Plain().backward(grad, q, k, v, output, lse, mask, scale)
        none = q.new_zeros((), dtype=torch.int64)  # there is no dropout
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            *(x.transpose(1, 2) for x in (grad.to(q.dtype), q, k, v, output.to(q.dtype))),
            lse.contiguous().unsqueeze(-1),  # in any other order it is read wrongly
            none, none, None, None, None, q.shape[1], k.shape[1], 0.0, mask.causal, scale=scale,
        )  # fmt: skip
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv


class Flash(Kernel):
    """FlashAttention, the version that is active in PyTorch (`aten::_flash_attention_forward`)."""

    name = "flash"
    windows = True
    packs = True

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """See `Kernel`."""
        return _refusal(q, v)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        output, lse, *_ = _aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, mask.causal, False, scale=scale, **_window(mask.window)
        )
        return output, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        return self._backward(grad, q, k, v, output, lse, None, (q.shape[1], k.shape[1]), mask, scale)

    def forward_squares(
        self, q: Tensor, k: Tensor, v: Tensor, squares: Squares, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        ends, longest = squares.ends, squares.longest
        output, lse, *_ = _aten._flash_attention_forward(
            q, k, v, ends, ends, longest, longest, 0.0, True, False, scale=scale, **_window(window)
        )
        return output, lse

    def backward_squares(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, squares: Squares,
        window: int | None, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `Kernel`."""
        sizes = (squares.longest, squares.longest)
        return self._backward(grad, q, k, v, output, lse, squares.ends, sizes, Mask(True, window), scale)

    @staticmethod
    def _backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, ends: Tensor | None,
        sizes: tuple[int, int], mask: Mask, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        none = torch.zeros(2, dtype=torch.int64, device=q.device)  # there is no dropout
        dq, dk, dv = _aten._flash_attention_backward(
            grad.to(q.dtype).contiguous(), q, k, v, output.to(q.dtype).contiguous(), lse.contiguous(), ends, ends,
            *sizes, 0.0, mask.causal, none, none[0], scale=scale, **_window(mask.window),
        )  # fmt: skip
        return dq, dk, dv


class FlashOnCpu(Kernel):
    """PyTorch's flash kernel for CPUs, float64 included (`aten::_scaled_dot_product_flash_attention_for_cpu`)."""

    name = "flash"

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """See `Kernel`."""
        return None if q.shape[-1] == v.shape[-1] else "it wants keys and values of one width"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel`; a causal mask only for squares without a window."""
        _check_square(q, k, mask)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        output, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask.causal, scale=scale)
        return output.transpose(1, 2), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`; masks as in `forward`."""
        _check_square(q, k, mask)
        grad, q, k, v, output = (x.to(q.dtype).transpose(1, 2) for x in (grad, q, k, v, output))
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, output, lse, 0.0, mask.causal, scale=scale
        )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv


def _refusal(q: Tensor, v: Tensor) -> str | None:
    if q.device.type != "cuda":
        return "it runs on NVIDIA GPUs"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    if q.dtype not in HALVES:
        return f"it computes bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % _UNIT or q.shape[-1] > _WIDEST:
        return f"it wants keys and values of one width, a multiple of {_UNIT} up to {_WIDEST}"
    return None


def _check_square(q: Tensor, k: Tensor, mask: Mask) -> None:
    if mask.causal and (mask.window is not None or q.shape[1] != k.shape[1]):
        raise ValueError("this kernel has causal masks for squares alone, and no windows")


def _window(window: int | None) -> dict[str, int]:
    """Without one, none: then PyTorch keeps the kernel's own causal mask."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
