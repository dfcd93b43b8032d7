"""What surrounds a rank: progress goes out, a request to stop comes in."""

from typing import Protocol

from longtrain.telemetry.events import Event


class Listener(Protocol):
    """What a rank tells its surroundings, and what it asks of them."""

    def event(self, event: Event) -> None:
        """Rank 0 only, on the main thread."""
        ...

    def phase(self, name: str, step: int) -> None:
        """Every rank, on the main thread, cheap: `start`, `load`, `step`, `checkpoint`, `done`."""
        ...

    def stop_requested(self) -> bool:
        """Asked once a step on every rank; one that says yes makes all ranks save and leave."""
        ...
