"""How far a rank is in its exchanges with others, and which one it is in.

What counts is what a rank has begun. With NCCL a call returns as soon as the GPU knows of it, so a rank runs ahead and
waits later, outside of any exchange; with gloo it waits inside. Either way the rank that others wait for is the one
that has begun fewer collectives of a group than its other members, who run the same ones in the same order. Transfers
between pairs are not counted: a rank at the end of a chain makes fewer of them; they name their peers instead.

Needs no torch, because the driver reads the records.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from longtrain.core.errors import ExchangeFailed

# gloo raises a plain RuntimeError for a lost or late peer, as for wrong arguments, which pass unchanged.
_NETWORK_WORDS = ("gloo", "pair closure", "onnection", "imed out", "NCCL")


@dataclass(frozen=True)
class Exchange:
    """A collective, or a transfer between pairs."""

    operation: str
    group: str
    number: int | None
    """Which collective of its group it is, from 1; None for a transfer."""
    peers: tuple[int, ...] = ()
    """Ranks of the job that a transfer is with."""

    def __str__(self) -> str:
        if self.number is None:
            return f"{self.operation} with {list_ranks(self.peers)} of {self.group}"
        return f"{self.operation} {self.number} of {self.group}"


@dataclass(frozen=True)
class Standing:
    """A journal at one moment."""

    begun: Mapping[str, int] = field(default_factory=dict)
    """Collectives begun, by group; a group of which none has begun is there with 0."""
    count: int = 0
    """Grows with every exchange that begins or ends, and every tick."""
    last: Exchange | None = None
    inside: bool = False
    """Whether `last` has not ended."""
    seconds: float = 0.0
    """Since `last` began or ended, or the last tick."""


class Journal:
    """Written by the thread that exchanges, one at a time; `standing` may be asked for on any other."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}
        # Replaced as a whole, so that another thread never sees halves of two exchanges.
        self._state: tuple[Exchange | None, bool, int, float] = (None, False, 0, time.monotonic())

    def add_group(self, name: str) -> None:
        """Tell of a group that this rank is in, before it exchanges: 0 collectives is less than a peer's 1."""
        self._begun.setdefault(name, 0)

    @contextmanager
    def inside(self, operation: str, group: str, peers: Sequence[int] | None = None) -> Iterator[None]:
        """Surround an exchange: a collective, or with `peers` a transfer with these ranks of the job.

        Raises ExchangeFailed where the exchange raises that a peer is late or gone.
        """
        number = None
        if peers is None:
            number = self._begun[group] = self._begun.get(group, 0) + 1
        exchange = Exchange(operation, group, number, tuple(peers or ()))
        begun = self._mark(exchange, inside=True)
        try:
            yield
        except RuntimeError as error:
            # The exchange is not marked as ended: what this rank was in is what its last heartbeat tells.
            if not any(word in str(error) for word in _NETWORK_WORDS):
                raise
            reason = str(error).strip().splitlines()[0]
            raise ExchangeFailed(
                f"{exchange} failed after {time.monotonic() - begun:.0f} s ({reason}): another rank is late or gone; "
                "look for it in the log, or raise cluster.hang_timeout_seconds"
            ) from error
        self._mark(exchange, inside=False)

    def tick(self) -> None:
        """A sign of life from long work of this rank alone, such as reading a large file."""
        last, inside, count, _ = self._state
        self._state = (last, inside, count + 1, time.monotonic())

    def standing(self) -> Standing:
        """Where this rank is now."""
        last, inside, count, since = self._state
        return Standing(dict(self._begun), count, last, inside, time.monotonic() - since)

    def _mark(self, exchange: Exchange, inside: bool) -> float:
        now = time.monotonic()
        self._state = (exchange, inside, self._state[2] + 1, now)
        return now


def list_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0 to 3`, `ranks 0, 2 and 6 more`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 1 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} {'and' if len(ranks) == 2 else 'to'} {ranks[-1]}"
    shown = ", ".join(str(rank) for rank in ranks[:4])
    return f"ranks {shown}" + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
