"""The definition of block attention: the whole score matrix at once."""

import torch
from torch import Tensor

from longtrain_kernels.affine import accumulator_dtype
from longtrain_kernels.block_attention.tiled import Tokens


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, queries: Tokens, keys: Tokens, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `attention_forward`; differentiable through autograd."""
    dtype = accumulator_dtype(q.dtype)
    group = q.shape[2] // k.shape[2]
    k, v = (x.to(dtype).repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("blhd,bmhd->bhlm", q.to(dtype), k) * scale
    distance = queries.index[:, None] - keys.index[None, :]
    visible = (distance >= 0) & (queries.documents[:, :, None] == keys.documents[:, None, :])
    if window is not None:
        visible = visible & (distance < window)
    scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().masked_fill(~visible.unsqueeze(1), 0.0)
    return torch.einsum("bhlm,bmhd->blhd", weights, v), lse
