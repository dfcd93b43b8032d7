"""Merging attention to disjoint keys, in Triton (its interpreter, without a GPU), against plain PyTorch."""

import pytest
import torch

from longtrain_kernels.block_attention import merge_into
from longtrain_kernels.block_attention.merging_kernel import merge_on_gpu
from tests.harness.scans import KERNEL_DEVICE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_pass_merges_as_six_do(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, length, heads, width = 2, 37, 3, 20
    output, part = (torch.randn(batch, 50, heads, width)[:, 5 : 5 + length] for _ in range(2))
    lse, part_lse = (10 * torch.randn(batch, heads, length) for _ in range(2))
    lse[:, 0, :9] = part_lse[:, 0, 5:15] = float("-inf")  # seen nothing here, there, or neither
    part, hidden = part.to(dtype), lse.mT == float("-inf")
    output[hidden] = 0.0
    want = [x.double() for x in (output, lse.mT)]
    merge_into(*want, part.double(), part_lse.mT.double())
    got = [x.to(KERNEL_DEVICE) for x in (output, lse.mT)]
    merge_on_gpu(*got, part.to(KERNEL_DEVICE), part_lse.mT.to(KERNEL_DEVICE))
    # float32 exponentials of numbers up to 40
    torch.testing.assert_close([x.cpu().double() for x in got], want, rtol=1e-5, atol=1e-5)
