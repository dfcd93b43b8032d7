"""Attention in plain PyTorch, a tile of queries at a time; the backward pass recomputes the scores.

Any device and dtype; results are float32 at least.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from longtrain_kernels.affine import accumulator_dtype
from longtrain_kernels.block_attention.kernel import Kernel, Mask

TILE = 256  # queries a tile: 256 x 32k float32 scores are 32 MiB a head


class Plain(Kernel):
    """See the module."""

    name = "plain"
    windows = True

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """None."""
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        dtype, kv_heads = accumulator_dtype(q.dtype), k.shape[2]
        batch, length, heads, _ = q.shape
        q, k, v = (_heads_first(x, kv_heads, dtype) for x in (q, k, v))
        q = q * scale
        output = q.new_empty(batch, kv_heads, heads // kv_heads, length, v.shape[-1])
        lse = q.new_empty(output.shape[:-1])
        for tile, seen, hidden in _tiles(length, k.shape[-2], mask, q.device):
            weights = _scores(q[..., tile, :], k[..., seen, :], hidden)
            top = weights.amax(-1, keepdim=True)
            total = weights.sub_(top).exp_().sum(-1, keepdim=True)
            lse[..., tile] = (top + total.log()).squeeze(-1)
            output[..., tile, :] = (weights @ v[..., seen, :]).div_(total)
        return output.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.flatten(1, 2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel` (FlashAttention-2, algorithm 2)."""
        dtype, kv_heads = accumulator_dtype(q.dtype), k.shape[2]
        q, k, v, grad, output = (_heads_first(x, kv_heads, dtype) for x in (q, k, v, grad, output))
        lse = lse.unflatten(1, (kv_heads, -1)).unsqueeze(-1)
        delta = (grad * output).sum(-1, keepdim=True)
        q = q * scale
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for tile, seen, hidden in _tiles(q.shape[-2], k.shape[-2], mask, q.device):
            weights = _scores(q[..., tile, :], k[..., seen, :], hidden).sub_(lse[..., tile, :]).exp_()
            dv[..., seen, :] += (weights.mT @ grad[..., tile, :]).sum(2, keepdim=True)
            dscores = (grad[..., tile, :] @ v[..., seen, :].mT).sub_(delta[..., tile, :]).mul_(weights)
            dq[..., tile, :] = dscores @ k[..., seen, :]
            dk[..., seen, :] += (dscores.mT @ q[..., tile, :]).sum(2, keepdim=True)
        dq, dk, dv = (x.permute(0, 3, 1, 2, 4).flatten(2, 3) for x in (dq * scale, dk, dv))
        return dq, dk, dv


def _tiles(length: int, keys: int, mask: Mask, device: torch.device) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Tiles of queries, the keys that any of a tile sees, and where [l, m] a query does not see one of those."""
    before = keys - length
    for begin in range(0, length, TILE):
        tile = slice(begin, min(begin + TILE, length))
        if not mask.causal:
            yield tile, slice(0, keys), None
            continue
        first = 0 if mask.window is None else max(0, before + begin - mask.window + 1)
        seen = slice(first, before + tile.stop)
        own = before + torch.arange(begin, tile.stop, device=device)[:, None]
        distance = own - torch.arange(first, seen.stop, device=device)
        hidden = distance < 0
        yield tile, seen, hidden if mask.window is None else hidden | (distance >= mask.window)


def _heads_first(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[B, L, H, D] -> [B, G, H/G, L, D]."""
    return x.to(dtype).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _scores(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    """[B, G, H/G, l, m] scores of scaled queries, -inf where the key is hidden; a tensor of its own."""
    scores = q @ k.mT
    return scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))
