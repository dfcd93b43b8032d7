"""How backpropagation is cut over layers and over time."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, PlainValidator

from longtrain.core.units import TokenCount


def _block_layers(value: Any) -> Any:
    if value in ("recurrent", "all") or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError("must be a number of layers from 0, recurrent or all")


@dataclass(frozen=True)
class StreamConfig:
    """`conf/stream/*.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    block_layers: Annotated[int | Literal["recurrent", "all"], PlainValidator(_block_layers)]
    """Layers that are streamed together; their inputs are kept, and what is inside is computed again. recurrent: a
    softmax layer, whose keys and values are a projection of what is kept, with the recurrent layers behind it. all:
    nothing is kept but what crosses chunks. 0: gradient checkpointing, which is 1 for whole sequences."""
    chunk_tokens: TokenCount | None
    """Tokens of a sequence, over all its ranks, that a block computes at a time; None: all."""
    logit_tokens: TokenCount
    """Tokens of a rank whose logits exist at once."""
    offload: Literal["none", "host"]
    """Where the inputs of blocks, carries, keys and values with the sums of their gradients wait to be used."""

    def __post_init__(self) -> None:
        if self.block_layers == 0 and self.chunk_tokens is not None:
            raise ValueError(
                f"chunk_tokens={self.chunk_tokens} does not go with block_layers=0, which computes a layer for the "
                "whole sequence; use block_layers=1, a larger number, recurrent or all"
            )
