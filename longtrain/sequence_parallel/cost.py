"""What algorithms are told when they estimate their own time: a module of `scan/` or `attend/` may define
`seconds(shape, machine) -> float`, of forward and backward of one layer, and is then considered by `auto`.

Estimates leave out what every algorithm does alike. They are for choosing, not for planning: transfers have the time
that was measured when nothing else went on, and overlap perfectly with computation where an algorithm overlaps them.
"""

from dataclasses import dataclass

from longtrain.comm.links import Links

BACKWARD = 2.5
"""Operations of the backward pass of attention, in those of the forward pass."""
WIDE = 4
"""Bytes of a float32, in which states, partial outputs and sums of gradients travel."""


@dataclass(frozen=True)
class Machine:
    """The ranks and what they can do."""

    ranks: int
    node_size: int
    """Of them, neighbours that share a node."""
    links: Links
    attention_flops: float
    """A second, of block attention forward and backward on one rank."""
    zigzag: bool
    """Whether the layout balances causal work."""

    @property
    def slots(self) -> int:
        """Stretches of the sequence on a rank."""
        return 2 if self.zigzag else 1


@dataclass(frozen=True)
class ScanShape:
    """A recurrent layer."""

    batch: int
    tokens: int
    """On a rank."""
    heads: int
    state: int
    """Numbers of a head's state."""
    transition: int
    """Numbers of a head's transition."""
    row_bytes: int
    """Of a token's inputs and outputs, all heads."""


@dataclass(frozen=True)
class AttendShape:
    """A softmax layer that sees everything."""

    batch: int
    tokens: int
    """On a rank."""
    heads: int
    key_heads: int
    key: int
    value: int
    """Widths of a head."""
    itemsize: int
    """Bytes of a number."""

    @property
    def key_value_numbers(self) -> int:
        """On a rank."""
        return self.batch * self.tokens * self.key_heads * (self.key + self.value)

    @property
    def query_numbers(self) -> int:
        """On a rank."""
        return self.batch * self.tokens * self.heads * self.key

    @property
    def output_numbers(self) -> int:
        """On a rank."""
        return self.batch * self.tokens * self.heads * self.value

    def pair_seconds(self, pairs: float, machine: Machine) -> float:
        """Of a forward pass over so many pairs of a query and a key, all heads."""
        operations = 2 * (self.key + self.value) * self.heads * self.batch * pairs
        return operations / machine.attention_flops

    def balanced_seconds(self, machine: Machine) -> float:
        """Of a forward pass in which every rank has the same number of pairs."""
        return self.pair_seconds(machine.ranks * self.tokens**2 / 2, machine)

    def slowest_seconds(self, machine: Machine) -> float:
        """Of a forward pass, on the rank with most pairs where each rank attends from its own tokens."""
        pairs = machine.ranks / 2 if machine.zigzag else machine.ranks - 0.5
        return self.pair_seconds(pairs * self.tokens**2, machine)
