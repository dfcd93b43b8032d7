"""Options that several recurrent mixers share."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class HeadsConfig:
    """Heads of a linear recurrence, each with a state of K x V numbers."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    num_heads: Positive
    key_dim: Positive
    """K, of one head."""
    value_dim: Positive
    """V, of one head."""

    @property
    def value_heads(self) -> int:
        """H."""
        return self.num_heads

    @property
    def channels(self) -> int:
        """H V, of the values and of the output before its projection."""
        return self.value_heads * self.value_dim

    @property
    def state_size(self) -> int:
        """H K V, numbers that a layer remembers."""
        return self.channels * self.key_dim


@dataclass(frozen=True)
class ConvolvedConfig(HeadsConfig):
    """Heads behind a short convolution."""

    conv_width: Annotated[int, Field(ge=1, le=8)]
    """W, taps of the convolution; 1 is none."""


@dataclass(frozen=True)
class GroupedConfig(ConvolvedConfig):
    """Heads of which each key head serves several value heads (Dao & Gu 2024, section 7.2)."""

    num_value_heads: Positive | None
    """A multiple of `num_heads`, which then counts the heads of queries and keys; null: as many."""

    def __post_init__(self) -> None:
        if self.value_heads % self.num_heads:
            raise ValueError(
                f"num_value_heads={self.value_heads} is not a multiple of num_heads={self.num_heads} key heads"
            )

    @property
    def value_heads(self) -> int:
        """H."""
        return self.num_value_heads or self.num_heads
