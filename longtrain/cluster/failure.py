"""What can go wrong with a worker, and what a policy may decide about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from longtrain.core.errors import LongtrainError


class Fault(StrEnum):
    """Fault classes, as they appear in `incidents.jsonl`."""

    REFUSED = "refused"
    """A worker raised `Refused`: the input cannot be used, now or later."""
    DIED = "died"
    """The process of a worker ended: killed, crashed."""
    OUT_OF_MEMORY = "out_of_memory"
    """Ray ended a worker because its node ran out of memory."""
    NODE_LOST = "node_lost"
    """The node of a worker left the cluster."""
    SILENT = "silent"
    """A worker was not heard of for `cluster.heartbeat_timeout_seconds`: stopped, or its interpreter hangs."""
    HANG = "hang"
    """No rank went on for `cluster.hang_timeout_seconds`, although all were heard of; names who holds up the others."""
    RAISED = "raised"
    """A worker raised any other exception."""
    NOT_STARTED = "not_started"
    """The workers did not come up within `cluster.start_timeout_seconds`."""
    CONTROL_LOST = "control_lost"
    """The actor that carries heartbeats to the driver ended."""


@dataclass(frozen=True)
class Failure:
    """One failed attempt, seen from the worker that is its most likely cause."""

    fault: Fault
    rank: int | None
    """None where no rank is to blame."""
    message: str
    """One line that names the rank and the cause."""
    error: LongtrainError | None = None
    """What the worker raised, where it was an error of longtrain."""
    traceback: str = ""
    """The worker's traceback for any other exception; of a rank that hangs, where its main thread is."""
    step: int | None = None
    """Step that the rank was last heard in."""
    phase: str | None = None
    committed_step: int | None = None
    """Newest committed checkpoint when the attempt failed."""
    ranks: tuple[int, ...] = ()
    """All ranks that are to blame, where that can be more than `rank`."""
    places: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Where the ranks were, in words, and which ones, where none went on."""


@dataclass(frozen=True)
class Restart:
    """Start all ranks again from the last committed checkpoint, after `delay_seconds`."""

    delay_seconds: float


@dataclass(frozen=True)
class GiveUp:
    """End the run; `reason` completes the failure's message for the user."""

    reason: str


Decision = Restart | GiveUp


class FailurePolicy(Protocol):
    """A module of `cluster/policies/` defines `Config` (a dataclass with `name`) and `Policy(config, max_failures)`."""

    def decide(self, failure: Failure, history: Sequence[Failure]) -> Decision:
        """Judge `failure`; `history` holds the earlier failures of this run, oldest first."""
        ...
