"""What stand-ins send to the driver. Apart from them, because the mailbox and the driver need no torch to read it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    step: int
    tokens: int
    preempted: bool


@dataclass(frozen=True)
class Committed:
    """Stands for the event of a committed checkpoint."""

    step: int
