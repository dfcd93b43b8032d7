"""What a worker tells of itself with every heartbeat."""

from dataclasses import dataclass, field

from longtrain.comm.journal import Standing


@dataclass(frozen=True)
class Pulse:
    """What a worker last said of itself."""

    phase: str
    step: int
    count: int
    """Grows with every heartbeat of the attempt, so that an old pulse is not taken for a new one."""
    phases: int = 0
    """Phases entered in this attempt: all ranks enter the same ones in the same order."""
    steps: int = 0
    """Phases `step` among them."""
    exchanges: Standing = field(default_factory=Standing)
    stack: str = ""
    """Of the main thread, where it has not gone on for a while."""

    @property
    def position(self) -> tuple[int, int]:
        """Changes with every sign of progress."""
        return self.phases, self.exchanges.count

    def __str__(self) -> str:
        names = {"step": f"step {self.step + 1}", "checkpoint": f"the checkpoint of step {self.step}"}
        phase, last = names.get(self.phase, f"phase {self.phase}"), self.exchanges.last
        if last is None:
            return f"in {phase}"
        return f"{'in' if self.exchanges.inside else 'after'} {last}, {phase}"
