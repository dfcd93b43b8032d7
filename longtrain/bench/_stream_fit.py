"""Bytes a token, and the context that they lead to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FIT_FROM = 2  # lengths at least


@dataclass(frozen=True)
class Fit:
    """Bytes as a linear function of tokens."""

    bytes_per_token: float
    fixed_bytes: float
    """At no tokens: parameters, gradients, and what a chunk takes."""

    def longest(self, memory_bytes: float) -> float:
        """Tokens that fit: an extrapolation, which knows nothing of fragmentation. Infinite for what does not grow."""
        if self.bytes_per_token <= 0:
            return math.inf
        return max(0.0, (memory_bytes - self.fixed_bytes) / self.bytes_per_token)

    def at(self, tokens: float) -> float:
        """Bytes there."""
        return self.fixed_bytes + self.bytes_per_token * tokens


def slope(before: tuple[int, int] | None, now: tuple[int, int]) -> float | None:
    """Bytes a token between two measurements (tokens, bytes); None for the first."""
    if before is None or now[0] == before[0]:
        return None
    return (now[1] - before[1]) / (now[0] - before[0])


def fit(points: Sequence[tuple[int, int]]) -> Fit | None:
    """Least squares over the longer half of the measurements (tokens, bytes), two at least; None for fewer."""
    if len(points) < FIT_FROM:
        return None
    longer = sorted(points)[-max(FIT_FROM, math.ceil(len(points) / 2)) :]
    x0, y0 = (sum(values) / len(longer) for values in zip(*longer, strict=True))
    spread = sum((x - x0) ** 2 for x, _ in longer)
    bytes_per_token = sum((x - x0) * (y - y0) for x, y in longer) / spread
    return Fit(bytes_per_token, y0 - bytes_per_token * x0)
