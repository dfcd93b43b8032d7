"""Attention of some tokens to others, block by block, by the kernel that is fastest here.

Blocks of one call, and calls that share their queries, merge by log-sum-exp. A kernel rounds what it returns to the
operands' type; sums over blocks are float32 at least, so their errors do not grow with their number.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longtrain_kernels.affine import accumulator_dtype
from longtrain_kernels.block_attention.blocks import Block, Plan, Tokens
from longtrain_kernels.block_attention.choice import AUTO, choose_kernel
from longtrain_kernels.block_attention.kernel import Kernel, Mask
from longtrain_kernels.block_attention.merging import merge_into
from longtrain_kernels.block_attention.packing import Packed

PACK_FROM = 3  # squares: with fewer, launches cost less than gathering their tokens


@dataclass(frozen=True)
class BlockAttention:
    """Softmax attention of queries to the keys that they see; see `blocks`."""

    scale: float
    window: int | None = None
    """Tokens that a query sees at most, itself included."""
    kernel: str = AUTO
    """See `choice.NAMES`."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, queries: Tokens, keys: Tokens) -> Tensor:
        """Differentiable: queries [B, L, H, D] that see no keys but these [B, M, G, D] -> [B, L, H, V]."""
        return _Attention.apply(q, k, v, queries, keys, self)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, queries: Tokens, keys: Tokens) -> tuple[Tensor, Tensor]:
        """Attention to some of the keys.

        Args:
            q: [B, L, H, D]. k: [B, M, G, D]. v: [B, M, G, V]; G divides H.

        Returns:
            Output [B, L, H, V] (zero for a query that sees nothing), in q's type or float32; log-sum-exp [B, H, L]
            (then -inf), float32 at least.

        Raises:
            Unsupported: where the kernel that was asked for cannot compute it.
        """
        calls = self._calls(q, k, v, queries, keys)
        if calls.whole is not None:
            seen = calls.whole.keys
            return calls.kernel.forward(q, k[:, seen], v[:, seen], calls.mask(calls.whole), self.scale)
        dtype = accumulator_dtype(q.dtype)
        output = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=dtype)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=dtype)
        self._merge(calls, (output, lse.mT), q, k, v, fresh=True)
        return output, lse

    def merge(
        self, output: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, queries: Tokens, keys: Tokens
    ) -> None:
        """Add attention to more keys, in place, to what `forward` made of others, both in float32 or wider."""
        self._merge(self._calls(q, k, v, queries, keys), (output, lse.mT), q, k, v, fresh=False)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, queries: Tokens, keys: Tokens
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the same, as a part of a softmax over more keys (FlashAttention-2, algorithm 2).

        Args:
            grad: [B, L, H, V], of the whole output. output: [B, L, H, V] and lse: [B, H, L], over all keys.

        Returns:
            dq, dk, dv in the shapes of q, k, v; in their types or in float32.
        """
        return self.gradients(grad, q, k, v, output, lse, queries, keys).whole(q, k, v)

    def gradients(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, queries: Tokens, keys: Tokens
    ) -> "Gradients":
        """`backward`, to be added to sums that need not be there yet."""
        calls = self._calls(q, k, v, queries, keys)
        found = Gradients()
        if calls.packed is not None:
            packed = calls.packed
            parts = calls.kernel.backward_squares(
                packed.of_queries(grad), packed.of_queries(q), packed.of_keys(k), packed.of_keys(v),
                packed.of_queries(output), packed.of_queries(lse.mT).mT, packed.squares, self.window, self.scale,
            )  # fmt: skip
            found.append((packed.rows, packed.queries), (packed.rows, packed.keys), parts)
        for block in calls.single:
            own, seen = (block.rows, block.queries), (block.rows, block.keys)
            parts = calls.kernel.backward(
                grad[own], q[own], k[seen], v[seen], output[own], lse[block.rows, :, block.queries], calls.mask(block),
                self.scale,
            )  # fmt: skip
            found.append(own, seen, parts)
        return found

    def _merge(
        self, calls: "_Calls", result: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, fresh: bool
    ) -> None:
        """All blocks into output and log-sum-exp, [B, L, H, V] and [B, L, H]; `fresh` ones hold nothing yet."""
        if calls.packed is not None:
            packed = calls.packed
            part, lse = calls.kernel.forward_squares(
                packed.of_queries(q), packed.of_keys(k), packed.of_keys(v), packed.squares, self.window, self.scale
            )
            own = (packed.rows, packed.queries)
            _put(result, own, part, lse.mT) if fresh else _merge_copies(result, own, part, lse.mT)
        for block in calls.single:
            own, seen = (block.rows, block.queries), (block.rows, block.keys)
            part, lse = calls.kernel.forward(q[own], k[seen], v[seen], calls.mask(block), self.scale)
            if fresh and not block.more:
                _put(result, own, part, lse.mT)
            else:
                merge_into(*(x[own] for x in result), part, lse.mT)

    def choose(self, q: Tensor, k: Tensor, v: Tensor, queries: Tokens) -> Kernel:
        """What will compute it; the first time it may be measured, which other ranks should not have to wait for.

        Raises Unsupported.
        """
        recurring = all(len(row) == 1 for row in queries.starts)
        return choose_kernel(self.kernel, q, k, v, self.window, recurring)

    def _calls(self, q: Tensor, k: Tensor, v: Tensor, queries: Tokens, keys: Tokens) -> "_Calls":
        return _Calls(queries.plan(keys, self.window), self.choose(q, k, v, queries), self.window, q)


class Gradients:
    """Of some blocks, in the types in which kernels return them."""

    def __init__(self) -> None:
        self._parts: list[tuple[Any, Any, tuple[Tensor, Tensor, Tensor]]] = []

    def append(self, queries: Any, keys: Any, parts: tuple[Tensor, Tensor, Tensor]) -> None:
        """dq, dk and dv at these places of a batch; no place occurs twice in them."""
        self._parts.append((queries, keys, parts))

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv, of all of these: in float32 or wider where parts are added, or as kernels have them."""
        if len(self._parts) == 1:
            ((queries, keys, parts),) = self._parts
            if queries == _all(q) and keys == _all(k):
                self._parts.clear()
                return parts
        like_kernels = all(parts[1].dtype == k.dtype for *_, parts in self._parts)
        # Not float32 where nothing is added: keys may be all those of a long context.
        exact = like_kernels and _apart([keys for _, keys, _ in self._parts])
        dq = torch.zeros_like(q, dtype=accumulator_dtype(q.dtype))
        dk, dv = (torch.zeros_like(x, dtype=x.dtype if exact else accumulator_dtype(x.dtype)) for x in (k, v))
        self.add_to(dq, dk, dv)
        return dq, dk, dv

    def add_to(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """In place, to sums in float32 or wider; all that is here is then let go."""
        while self._parts:
            queries, keys, parts = self._parts.pop()
            for total, where, part in zip((dq, dk, dv), (queries, keys, keys), parts, strict=True):
                total[where] += part


@dataclass(frozen=True)
class _Calls:
    """What to ask of a kernel."""

    plan: Plan
    kernel: Kernel
    window: int | None
    q: Tensor

    @property
    def whole(self) -> Block | None:
        """The only block, where it holds every query."""
        blocks = (*self.plan.squares, *self.plan.rectangles)
        alone = len(blocks) == 1 and (blocks[0].rows, blocks[0].queries) == _all(self.q)
        return blocks[0] if alone else None

    @property
    def packed(self) -> Packed | None:
        """The squares at once, where there are many and the kernel can."""
        return self.plan.packed(self.q.device) if self._packs else None

    @property
    def single(self) -> tuple[Block, ...]:
        """Blocks one by one; those with `more` after the blocks with the same queries."""
        return self.plan.rectangles if self._packs else (*self.plan.squares, *self.plan.rectangles)

    @property
    def _packs(self) -> bool:
        return self.kernel.packs and len(self.plan.squares) >= PACK_FROM

    def mask(self, block: Block) -> Mask:
        """What queries see of a block's keys."""
        return Mask(block.causal, self.window if block.causal else None)


def _all(x: Tensor) -> tuple[slice, slice]:
    """Every row and token of [B, L, ...]."""
    return slice(0, x.shape[0]), slice(0, x.shape[1])


def _apart(places: list[Any]) -> bool:
    """Whether no row and token is in two of these (rows, tokens), all slices of every row."""
    if (
        not all(isinstance(tokens, slice) for _, tokens in places)
        or len({rows.stop - rows.start for rows, _ in places}) > 1
    ):
        return False
    ends = sorted((rows.start, tokens.start, tokens.stop) for rows, tokens in places)
    return all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(ends))


def _put(result: tuple[Tensor, Tensor], where: Any, *parts: Tensor) -> None:
    for whole, part in zip(result, parts, strict=True):
        whole[where] = part.to(whole.dtype)


def _merge_copies(result: tuple[Tensor, Tensor], where: Any, *parts: Tensor) -> None:
    """`where` is no view."""
    copies = tuple(x[where] for x in result)
    merge_into(*copies, *parts)
    _put(result, where, *copies)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, queries: Tokens, keys: Tokens, operation: BlockAttention
    ) -> Tensor:
        output, lse = operation.forward(q, k, v, queries, keys)
        output = output.to(q.dtype)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.arguments = (operation, queries, keys)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, output, lse = ctx.saved_tensors
        operation, queries, keys = ctx.arguments
        grads = operation.backward(grad, q, k, v, output, lse, queries, keys)
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None, None, None
