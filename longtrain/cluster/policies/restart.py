"""Restart all ranks from the last committed checkpoint, within a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from longtrain.cluster.failure import Decision, Failure, Fault, GiveUp, Restart
from longtrain.core.errors import Diverged, Refused


@dataclass(frozen=True)
class Config:
    """`cluster.failure_policy` with `name: restart`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Literal["restart"]
    max_failures_without_progress: Annotated[int, Field(ge=1)]
    """Failures in a row at the same committed step before the run is given up: it would fail there for ever."""
    delay_seconds: Annotated[float, Field(ge=0)]
    """Pause before the second restart without progress; it doubles with each further one. The first is immediate."""


class Policy:
    """See `FailurePolicy`."""

    def __init__(self, config: Config, max_failures: int) -> None:
        self._config = config
        self._max_failures = max_failures

    def decide(self, failure: Failure, history: Sequence[Failure]) -> Decision:
        if failure.fault is Fault.REFUSED or isinstance(failure.error, Refused | Diverged):
            return GiveUp("a restart would end the same way")
        failures = [*history, failure]
        stuck = 0
        while stuck < len(failures) and failures[-1 - stuck].committed_step == failure.committed_step:
            stuck += 1
        if stuck >= self._config.max_failures_without_progress:
            return GiveUp(f"{stuck} failures in a row without progress ({_committed(failure)})")
        if len(failures) > self._max_failures:
            return GiveUp(f"cluster.max_failures={self._max_failures} is used up ({_committed(failure)})")
        return Restart(0.0 if stuck == 1 else self._config.delay_seconds * 2.0 ** (stuck - 2))


def _committed(failure: Failure) -> str:
    if failure.committed_step is None:
        return "no checkpoint was committed"
    return f"last committed step {failure.committed_step}"
