"""The definition of the diagonal scan: one step a token."""

import torch
from torch import Tensor

from longtrain_kernels.affine import accumulator_dtype


def diagonal_scan_reference(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, documents: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + k_t v_t^T with a_t = 0 at the first token of a document; o_t = S_t^T q_t.

    Shapes as in `DiagonalScan`; returns outputs [B, L, H, V] and the final state [B, H, K, V].
    """
    batch, length, heads, width = keys.shape
    dtype = accumulator_dtype(values.dtype)
    decay = log_decay.to(dtype).exp()
    decay = decay if decay.dim() == 4 else decay.unsqueeze(-1)
    if state is None:
        state = values.new_zeros(batch, heads, width, values.shape[-1], dtype=dtype)
    previous = torch.cat([torch.zeros_like(documents[:, :1]), documents], dim=1)[:, :length]
    continues = (documents == previous).to(dtype)
    outputs = []
    for t in range(length):
        outer = torch.einsum("bhk,bhv->bhkv", keys[:, t].to(dtype), values[:, t].to(dtype))
        state = (decay[:, t] * continues[:, t, None, None]).unsqueeze(-1) * state + outer
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, queries[:, t].to(dtype)))
    output = torch.stack(outputs, dim=1) if outputs else values
    return output.to(values.dtype), state
