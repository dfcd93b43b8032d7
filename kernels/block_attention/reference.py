"""The definition of block attention: the whole score matrix at once."""

import torch
from torch import Tensor

from longtrain_kernels.affine import accumulator_dtype
from longtrain_kernels.block_attention.blocks import Tokens


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, queries: Tokens, keys: Tokens, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp as of `BlockAttention.forward`; differentiable through autograd."""
    dtype = accumulator_dtype(q.dtype)
    group = q.shape[2] // k.shape[2]
    k, v = (x.to(dtype).repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("blhd,bmhd->bhlm", q.to(dtype), k) * scale
    (q_index, q_documents), (k_index, k_documents) = (_documents(x, q.device) for x in (queries, keys))
    distance = q_index[:, None] - k_index
    visible = (distance >= 0) & (q_documents[:, :, None] == k_documents[:, None, :])
    if window is not None:
        visible = visible & (distance < window)
    scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().masked_fill(~visible.unsqueeze(1), 0.0)
    return torch.einsum("bhlm,bmhd->blhd", weights, v), lse


def _documents(tokens: Tokens, device: torch.device) -> tuple[Tensor, Tensor]:
    """[L] the tokens themselves, and [B, L] the document of each."""
    index = torch.cat([torch.arange(*span, device=device) for span in [(0, 0), *tokens.spans]])
    starts = [torch.tensor(row, device=device) for row in tokens.starts]
    return index, torch.stack([torch.searchsorted(row, index, right=True) for row in starts])
