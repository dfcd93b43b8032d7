"""Attention of the same queries to disjoint keys, merged.

lse = log(e^a + e^b), O = O_a e^(a - lse) + O_b e^(b - lse).
"""

import torch
from torch import Tensor

try:
    from longtrain_kernels.block_attention.merging_kernel import merge_on_gpu
except ImportError:  # PyTorch without Triton, as on macOS
    merge_on_gpu = None


def merge_into(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a part in place.

    Args:
        output: [B, L, H, V], float32 at least. lse: [B, L, H]; -inf where a query has seen nothing yet.
        part, part_lse: the same of other keys, in any type.
    """
    if merge_on_gpu is not None and output.is_cuda and output.dtype == torch.float32:
        merge_on_gpu(output, lse, part, part_lse)
        return
    merged = torch.logaddexp(lse, part_lse)
    finite = merged.masked_fill(merged == float("-inf"), 0.0)
    output *= (lse - finite).exp_().unsqueeze(-1)
    output.addcmul_(part.to(output.dtype), (part_lse - finite).exp_().unsqueeze(-1))
    lse.copy_(merged)
