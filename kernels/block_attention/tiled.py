"""Block attention in plain PyTorch, a tile of queries at a time; the backward pass recomputes the scores.

Partial outputs, their log-sum-exp and all gradients are float32 at least: they are summed over many blocks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtrain_kernels.affine import accumulator_dtype

TILE = 256  # queries a tile: 256 x 32k float32 scores are 32 MiB a head


@dataclass(frozen=True)
class Tokens:
    """Which tokens a block holds, in ascending order."""

    index: Tensor
    """[L] int64, index in the whole sequence."""
    documents: Tensor
    """[B, L] int64, document in the whole sequence."""


def _visible_keys(queries: Tokens, keys: Tokens, tile: slice, window: int | None) -> slice:
    """The contiguous range of keys outside which no query of the tile sees anything."""
    index = queries.index[tile]
    end = int(torch.searchsorted(keys.index, index[-1], right=True))
    begin = 0 if window is None else int(torch.searchsorted(keys.index, index[0] - window, right=True))
    # Documents ascend along the sequence: keys of documents before the tile's first are invisible in every row.
    first = int((keys.documents < queries.documents[:, tile][:, :1]).sum(1).min()) if keys.index.numel() else 0
    begin = max(begin, first)
    return slice(begin, max(begin, end))


def _mask(queries: Tokens, keys: Tokens, tile: slice, seen: slice, window: int | None) -> Tensor:
    """[B, 1, 1, l, m], true where the query sees the key."""
    distance = queries.index[tile, None] - keys.index[None, seen]
    visible = (distance >= 0) & (queries.documents[:, tile, None] == keys.documents[:, None, seen])
    if window is not None:
        visible = visible & (distance < window)
    return visible[:, None, None]


def _tiles(queries: Tokens, keys: Tokens, window: int | None) -> list[tuple[slice, slice]]:
    """Pairs of a query tile and the keys it sees, without the pairs that see nothing."""
    length = queries.index.numel()
    starts = range(0, length, TILE)
    pairs = [(t := slice(s, min(s + TILE, length)), _visible_keys(queries, keys, t, window)) for s in starts]
    return [(tile, seen) for tile, seen in pairs if seen.stop > seen.start]


def _heads_first(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[B, L, H, D] -> [B, G, H/G, L, D]."""
    return x.to(dtype).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _scores(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """[B, G, H/G, l, m] scores of scaled queries, -inf where the key is not visible; a tensor of its own."""
    return (q @ k.mT).masked_fill_(~visible, float("-inf"))


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, queries: Tokens, keys: Tokens, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one block.

    Args:
        q: [B, L, H, D]. k: [B, M, G, D]. v: [B, M, G, V]; G divides H.

    Returns:
        Output [B, L, H, V] (zero for a query that sees nothing) and natural log-sum-exp [B, H, L] (then -inf).
    """
    dtype, kv_heads = accumulator_dtype(q.dtype), k.shape[2]
    batch, length, heads, _ = q.shape
    q, k, v = (_heads_first(x, kv_heads, dtype) for x in (q, k, v))
    q = q * scale
    output = q.new_zeros(batch, kv_heads, heads // kv_heads, length, v.shape[-1])
    lse = q.new_full((batch, kv_heads, heads // kv_heads, length), float("-inf"))
    for tile, seen in _tiles(queries, keys, window):
        weights = _scores(q[..., tile, :], k[..., seen, :], _mask(queries, keys, tile, seen, window))
        # A row that sees nothing has the maximum -inf; exp(-inf - 0) is 0 for all its keys.
        top = weights.amax(-1, keepdim=True)
        top = top.masked_fill_(top == float("-inf"), 0.0)
        total = weights.sub_(top).exp_().sum(-1, keepdim=True)
        lse[..., tile] = (top + total.log()).squeeze(-1)
        output[..., tile, :] = (weights @ v[..., seen, :]) / total.clamp(min=torch.finfo(dtype).tiny)
    return output.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.flatten(1, 2)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    queries: Tokens,
    keys: Tokens,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block of a softmax that may span several blocks (FlashAttention-2, algorithm 2).

    Args:
        grad: [B, L, H, V], of the merged output. lse: [B, H, L], of all blocks together.
        delta: [B, H, L], the sum over V of grad x merged output.

    Returns:
        dq, dk, dv in the shapes of q, k, v, float32 at least.
    """
    dtype, kv_heads = accumulator_dtype(q.dtype), k.shape[2]
    q, k, v, grad = (_heads_first(x, kv_heads, dtype) for x in (q, k, v, grad))
    lse, delta = (x.unflatten(1, (kv_heads, -1)).unsqueeze(-1) for x in (lse, delta))
    q = q * scale
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for tile, seen in _tiles(queries, keys, window):
        weights = _scores(q[..., tile, :], k[..., seen, :], _mask(queries, keys, tile, seen, window))
        weights = weights.sub_(lse[..., tile, :]).exp_()
        dv[..., seen, :] += (weights.mT @ grad[..., tile, :]).sum(2, keepdim=True)
        dscores = (grad[..., tile, :] @ v[..., seen, :].mT).sub_(delta[..., tile, :]).mul_(weights)
        dq[..., tile, :] = dscores @ k[..., seen, :]
        dk[..., seen, :] += (dscores.mT @ q[..., tile, :]).sum(2, keepdim=True)
    dq, dk, dv = (x.permute(0, 3, 1, 2, 4).flatten(2, 3) for x in (dq * scale, dk, dv))
    return dq, dk, dv


def merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention to two disjoint blocks of keys: (O, lse) pairs, [B, L, H, V] and [B, H, L]."""
    merged = torch.logaddexp(lse, other_lse)
    finite = merged.masked_fill(merged == float("-inf"), 0.0)
    weight, other_weight = ((x - finite).exp().mT.unsqueeze(-1) for x in (lse, other_lse))
    return output * weight + other * other_weight, merged


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: Tokens,
        keys: Tokens,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        output, lse = attention_forward(q, k, v, queries, keys, scale, window)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.mask = (queries, keys, scale, window)
        return output.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, output, lse = ctx.saved_tensors
        delta = (grad.to(output.dtype) * output).sum(-1).mT
        dq, dk, dv = attention_backward(grad, q, k, v, lse, delta, *ctx.mask)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, queries: Tokens, keys: Tokens, scale: float, window: int | None = None
) -> Tensor:
    """Differentiable attention of queries [B, L, H, D] to all the keys [B, M, G, D] they may see; [B, L, H, V]."""
    return _Attention.apply(q, k, v, queries, keys, scale, window)
