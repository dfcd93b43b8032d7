"""All-to-all between tokens and heads (Jacobs et al. 2023, "DeepSpeed Ulysses", section 3.1).

A rank that holds some tokens of all heads comes to hold all tokens of some heads, and back. Neither heads nor tokens
need to be multiples of the number of ranks; a rank may get no head. Where two ranks get the same head, as a key head
that serves queries of both, their cotangents of it are summed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longtrain.sequence_parallel.shard import Team, by_rank, in_order

Linear = Callable[[Tensor], Tensor]


def split_evenly(count: int, parts: int) -> list[slice]:
    """Consecutive ranges of `count` things whose sizes differ by one at most."""
    ends = [count * (i + 1) // parts for i in range(parts)]
    return [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


@dataclass(frozen=True)
class HeadExchange:
    """Of one macro-chunk; `heads[r]` are the heads that rank r gets, of `total`."""

    team: Team
    heads: list[slice]
    total: int

    def to_heads(self, x: Tensor) -> Tensor:
        """This rank's tokens of all heads [B, L, total, ...] -> the chunk's tokens, ascending, of this rank's heads."""
        return _Linear.apply(x, self.gather, self.scatter)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The inverse of `to_heads`, of heads that one rank has each."""
        return _Linear.apply(x, self.scatter, self.gather)

    def gather(self, x: Tensor) -> Tensor:
        """`to_heads` without gradients."""
        group, mine = self.team.group, self.heads[self.team.group.rank]
        shapes = [(x.shape[0], count, mine.stop - mine.start, *x.shape[3:]) for count in self.team.counts]
        return in_order(group.all_to_all([x[:, :, heads] for heads in self.heads], shapes), self.team.pieces)

    def scatter(self, x: Tensor) -> Tensor:
        """Its transpose: what several ranks have of a head is summed."""
        group = self.team.group
        length = self.team.counts[group.rank]
        shapes = [(x.shape[0], length, heads.stop - heads.start, *x.shape[3:]) for heads in self.heads]
        parts = group.all_to_all(by_rank(x, self.team.pieces, group.size), shapes)
        if sum(heads.stop - heads.start for heads in self.heads) == self.total:
            return torch.cat(parts, dim=2)
        result = x.new_zeros(x.shape[0], length, self.total, *x.shape[3:])
        for heads, part in zip(self.heads, parts, strict=True):
            result[:, :, heads] += part
        return result


@dataclass(frozen=True)
class HeadShares:
    """Which heads each rank gets: value (or query) heads as evenly as they go, and the key heads that they read."""

    team: Team
    key_heads: int
    value_heads: int

    @cached_property
    def values(self) -> HeadExchange:
        """The exchange of value heads."""
        return HeadExchange(self.team, split_evenly(self.value_heads, self.team.group.size), self.value_heads)

    def of_keys(self, x: Tensor) -> Tensor:
        """[B, L, G, ...] -> [B, T, g, ...], key heads of this rank's value heads: h of them read a key head in a row.

        Each comes once where all serve equally many, h / g, and otherwise as often as it is read.
        """
        mine, keys = (exchange.heads[self.team.group.rank] for exchange in (self.values, self._keys))
        gathered, reads = self._keys.to_heads(x), [head // self._per_key for head in range(mine.start, mine.stop)]
        if len({reads.count(head) for head in range(keys.start, keys.stop)}) <= 1:
            return gathered
        return gathered[:, :, torch.arange(mine.start, mine.stop, device=x.device) // self._per_key - keys.start]

    @property
    def _per_key(self) -> int:
        return self.value_heads // self.key_heads

    @cached_property
    def _keys(self) -> HeadExchange:
        shares = [slice(v.start // self._per_key, -(-v.stop // self._per_key)) for v in self.values.heads]
        empty = slice(0, 0)
        heads = [k if v.stop > v.start else empty for k, v in zip(shares, self.values.heads, strict=True)]
        return HeadExchange(self.team, heads, self.key_heads)


class _Linear(torch.autograd.Function):
    """A linear function and its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Linear, transpose: Linear) -> Tensor:
        ctx.transpose = transpose
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.transpose(grad), None, None
