"""What a kernel of block attention is: the attention of one rectangle of scores, or of many squares at once."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


class Unsupported(ValueError):
    """The kernel that was asked for cannot compute what it is given; the message is one line."""


@dataclass(frozen=True)
class Mask:
    """Which of m keys the i-th of l queries sees."""

    causal: bool
    """Keys up to m - l + i, where m >= l; else all."""
    window: int | None = None
    """Then only the last `window` of those."""


@dataclass(frozen=True)
class Block:
    """A rectangle of scores in which queries see every key, or every key up to their own token."""

    rows: slice
    """Of the batch."""
    queries: slice
    keys: slice
    causal: bool
    """The last key is the last query's own token, the last but one that of the query before it, and so on."""
    more: bool = False
    """Whether these queries have a block before this one in the plan."""

    @property
    def is_square(self) -> bool:
        return self.queries.stop - self.queries.start == self.keys.stop - self.keys.start


@dataclass(frozen=True)
class Squares:
    """Causal squares along the diagonal, one after another."""

    ends: Tensor
    """[n + 1] int32: where each begins, and where the last ends."""
    longest: int
    """Tokens of the largest."""


class Kernel(ABC):
    """Attention of queries [B, l, H, D] to keys [B, m, G, D] and values [B, m, G, V]; G divides H. No size is zero."""

    name: str
    windows = False
    """Whether masks may have a window, and causal ones more keys than queries."""
    packs = False
    """Whether `forward_squares` and `backward_squares` exist."""

    @abstractmethod
    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why it cannot compute these, if it cannot."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """Output [B, l, H, V] and natural log-sum-exp [B, H, l] of the scaled scores, which is float32 at least."""

    @abstractmethod
    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of a softmax that may have more keys than these: `output` and `lse` are those over all keys."""

    def forward_squares(
        self, q: Tensor, k: Tensor, v: Tensor, squares: Squares, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`forward` of q [n, H, D], k and v; output [n, H, V] and log-sum-exp [H, n]."""
        raise NotImplementedError

    def backward_squares(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        lse: Tensor,
        squares: Squares,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`backward` of the same."""
        raise NotImplementedError
