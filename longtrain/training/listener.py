"""What surrounds a rank: progress goes out, a request to stop comes in."""

from typing import Protocol

from longtrain.comm.journal import Journal
from longtrain.telemetry.events import Event


class Listener(Protocol):
    """What a rank tells its surroundings, and what it asks of them."""

    def event(self, event: Event) -> None:
        """Rank 0 only, on the main thread."""
        ...

    def phase(self, name: str, step: int) -> None:
        """Every rank, on the main thread, cheap: `start`, `join`, `load`, `step`, `checkpoint`, `done`.

        All ranks enter the same phases in the same order, so that one that stays behind can be told.
        """
        ...

    def watch(self, journal: Journal) -> None:
        """Every rank, once, between `join` and `load`: what it exchanges with others will be in `journal`."""
        ...

    def stop_requested(self) -> bool:
        """Asked once a step on every rank; one that says yes makes all ranks save and leave."""
        ...
