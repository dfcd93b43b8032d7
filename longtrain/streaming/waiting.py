"""What waits between the forward and the backward pass of a step, and how much memory that is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from longtrain.sequence_parallel.prefix import Prefixes
from longtrain.streaming.shelf import Shelf
from longtrain.streaming.sums import GradientSums


@dataclass
class Kept:
    """Of a block, for its backward pass; shelves are by chunk."""

    inputs: Shelf
    """Tokens [B, L] of the first block, hidden states [B, L, D] of the others, and in their place their gradients."""
    carries: Shelf
    """What came into a chunk; nothing for the first one."""
    prefixes: Prefixes


@dataclass(frozen=True)
class Waiting:
    """Bytes that wait on the device between two chunks.

    Neither what a chunk needs for itself, nor what it hands to the next one: the cotangents of carries.
    """

    block_inputs: int
    """And their gradients."""
    carries: int
    keys_and_values: int
    key_and_value_gradients: int
    """Their sums."""
    parameter_gradients: int
    """The sums so far."""


Watch = Callable[[str, Waiting], None]
"""Called after the forward pass, with `forward`, and after every chunk of a block's backward pass, with its layers."""


def waiting(inputs: Iterable[Shelf], kept: Iterable[Kept], sums: GradientSums) -> Waiting:
    """Of blocks, and of inputs besides theirs."""
    blocks = list(kept)
    prefixes = [block.prefixes.device_bytes for block in blocks]
    return Waiting(
        block_inputs=sum(shelf.device_bytes for shelf in (*inputs, *(block.inputs for block in blocks))),
        carries=sum(block.carries.device_bytes for block in blocks),
        keys_and_values=sum(rows for rows, _ in prefixes),
        key_and_value_gradients=sum(rows for _, rows in prefixes),
        parameter_gradients=sums.nbytes,
    )
