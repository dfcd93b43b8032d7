"""The controller: an explicit state machine over a group of workers.

    Placing -> Starting -> Running -> Finished
                  ^           | a failure: all ranks are killed at once, the policy decides
                  |           v
               Placing <- Restarting            Running -> Stopping -> Preempted (asked to stop: saved and left)

Every state but the last row can also end in Failed. The group is a Protocol, the clock is an argument: unit tests
step the machine by hand. It knows nothing of Ray.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, Protocol

from longtrain.cluster.failure import Failure, FailurePolicy, Fault, GiveUp
from longtrain.cluster.pulse import Pulse
from longtrain.cluster.vigil import Vigil
from longtrain.core.errors import ExchangeFailed, LongtrainError, Refused, WorkerFailed

POLL_SECONDS = 0.2
"""Longest wait inside one step, so that a signal is answered in well under a second."""
SETTLE_SECONDS = 0.2
"""How long a raised exception waits for its cause: the peers of a dead rank see their connection close (23 to 40 ms)
at about the same time as Ray reports the death (13 to 28 ms)."""


class State(Enum):
    """Where a run is; the module's docstring draws the transitions."""

    PLACING = auto()
    STARTING = auto()
    RUNNING = auto()
    STOPPING = auto()
    RESTARTING = auto()
    FINISHED = auto()
    PREEMPTED = auto()
    FAILED = auto()

    @property
    def terminal(self) -> bool:
        return self in (State.FINISHED, State.PREEMPTED, State.FAILED)


@dataclass(frozen=True)
class Done:
    """A rank's outcome."""

    step: int
    tokens: int
    preempted: bool


@dataclass(frozen=True)
class Report:
    """What a group has to say since the last poll."""

    running: bool = False
    """All ranks have been told to run."""
    pulses: Mapping[int, Pulse] = field(default_factory=dict)
    """Newest pulse by rank."""
    events: tuple[Any, ...] = ()
    done: Mapping[int, Done] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()


class WorkerGroup(Protocol):
    """All ranks of one job. No method blocks longer than the timeout that it is given."""

    size: int

    def place(self, timeout: float) -> bool:
        """Reserve the resources, or see that they are still reserved; whether they are there."""
        ...

    def shortage(self) -> str:
        """What was asked for and what there is, in one line."""
        ...

    def start(self, attempt: int) -> None:
        """Begin to start all workers in the reserved place."""
        ...

    def poll(self, timeout: float) -> Report:
        """Wait for news, at most `timeout` seconds."""
        ...

    def stop(self) -> None:
        """Ask every rank to save and leave."""
        ...

    def kill(self) -> None:
        """End every worker at once; the place is kept."""
        ...

    def release(self) -> None:
        """Give the place back."""
        ...

    def name(self, rank: int) -> str:
        """The rank, its process and its host, of the attempt that runs."""
        ...


class Observer(Protocol):
    """Who follows a run from the driver."""

    def event(self, event: Any) -> None:
        """What rank 0 told."""
        ...

    def incident(self, kind: str, message: str, **details: Any) -> None:
        """A failure (`kind` is its `Fault`) with rank, step and decision; `recovered`; `slow`, which ends nothing."""
        ...

    def committed_step(self) -> int | None:
        """Newest committed checkpoint that an event told of."""
        ...


@dataclass(frozen=True)
class Limits:
    """The settings of `cluster` with these names."""

    start_timeout_seconds: float
    heartbeat_timeout_seconds: float
    hang_timeout_seconds: float


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    state: State
    outcome: Done | None = None
    error: LongtrainError | None = None
    traceback: str = ""
    """Of a worker, where the error is not one of longtrain's own."""


class Controller:
    """Drives one run to its end. `request_stop` may be called from a signal handler."""

    def __init__(
        self,
        group: WorkerGroup,
        policy: FailurePolicy,
        observer: Observer,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.state = State.PLACING
        self.attempt = 0
        self.result: Result | None = None
        self._group, self._policy, self._observer, self._limits = group, policy, observer, limits
        self._clock, self._sleep = clock, sleep
        self._stop_requested = False
        self._entered = self._looked = clock()
        self._restart_at = 0.0
        self._failed_at: float | None = None
        self._history: list[Failure] = []
        self._vigil = Vigil(limits.heartbeat_timeout_seconds, limits.hang_timeout_seconds)
        self._done: dict[int, Done] = {}

    def request_stop(self) -> None:
        self._stop_requested = True

    def run(self) -> Result:
        """Step until the end; the workers are gone and the place is given back when this returns or raises."""
        try:
            while not self.state.terminal:
                self.step()
        finally:
            self._group.kill()
            self._group.release()
        assert self.result is not None
        return self.result

    def step(self) -> None:
        """One look at the group and at most one transition."""
        {
            State.PLACING: self._step_placing,
            State.STARTING: self._step_starting,
            State.RUNNING: self._step_running,
            State.STOPPING: self._step_running,
            State.RESTARTING: self._step_restarting,
        }[self.state]()

    def _enter(self, state: State) -> None:
        self.state = state
        self._entered = self._looked = self._clock()

    def _end(self, state: State, **fields: Any) -> None:
        self._enter(state)
        self.result = Result(state, **fields)

    def _left_before_running(self) -> bool:
        # What was not committed is lost with the attempt anyway, so there is nothing to save.
        if self._stop_requested:
            self._group.kill()
            self._end(State.PREEMPTED)
        return self._stop_requested

    def _step_placing(self) -> None:
        if self._left_before_running():
            return
        if self._group.place(POLL_SECONDS):
            self._vigil.forget()
            self._done = {}
            self._group.start(self.attempt)
            self._enter(State.STARTING)
        elif self._clock() - self._entered > self._limits.start_timeout_seconds:
            waited = f"not available within cluster.start_timeout_seconds={self._limits.start_timeout_seconds:g}"
            if self._history:
                lost = f"the resources of the failed attempt are {waited}: {self._group.shortage()}"
                self._end(State.FAILED, error=WorkerFailed(f"{self._history[-1].message}; {lost}"))
            else:
                self._end(State.FAILED, error=Refused(f"{self._group.shortage()}; {waited}"))

    def _step_starting(self) -> None:
        if self._left_before_running():
            return
        report = self._group.poll(POLL_SECONDS)
        self._take(report)
        if report.failures:
            self._fail(report.failures)
        elif report.running:
            if self._failed_at is not None:
                seconds = self._clock() - self._failed_at
                self._observer.incident(
                    "recovered", f"all {self._group.size} ranks run again", attempt=self.attempt, seconds=seconds
                )
            self._vigil.begin(self._group.size)
            self._enter(State.RUNNING)
        elif self._clock() - self._entered > self._limits.start_timeout_seconds:
            limit = f"cluster.start_timeout_seconds={self._limits.start_timeout_seconds:g}"
            self._fail([Failure(Fault.NOT_STARTED, None, f"the workers did not start within {limit}")])

    def _step_running(self) -> None:
        if self._stop_requested and self.state is State.RUNNING:
            self._group.stop()
            self._enter(State.STOPPING)
        report = self._group.poll(POLL_SECONDS)
        self._take(report)
        failures = report.failures or self._vigil.failures(self._done.keys(), self._group.name)
        slow = self._vigil.notice(self._group.name)
        if slow is not None:
            pulse = self._vigil.pulses[0]
            self._observer.incident("slow", slow, rank=0, step=pulse.step, phase=pulse.phase, traceback=pulse.stack)
        if failures:
            self._fail(failures)
        elif len(self._done) == self._group.size:
            preempted = any(done.preempted for done in self._done.values())
            self._end(State.PREEMPTED if preempted else State.FINISHED, outcome=self._done[0])

    def _step_restarting(self) -> None:
        if self._left_before_running():
            return
        if self._clock() < self._restart_at:
            self._sleep(min(POLL_SECONDS, self._restart_at - self._clock()))
            return
        self.attempt += 1
        self._enter(State.PLACING)

    def _take(self, report: Report) -> None:
        now = self._clock()
        self._vigil.look(now - self._looked, report.pulses)
        self._looked = now
        for event in report.events:
            self._observer.event(event)
        self._done.update(report.done)

    def _fail(self, failures: Sequence[Failure]) -> None:
        failure = self._root_cause(failures)
        stopping = self.state is State.STOPPING
        self._failed_at = self._clock()
        self._group.kill()
        pulse = self._vigil.pulses.get(failure.rank) if failure.rank is not None else None
        failure = replace(
            failure,
            step=pulse.step if pulse else None,
            phase=pulse.phase if pulse else None,
            committed_step=self._observer.committed_step(),
        )
        decision = GiveUp("it had been asked to stop") if stopping else self._policy.decide(failure, self._history)
        self._history.append(failure)
        self._record(failure, decision)
        if isinstance(decision, GiveUp):
            # That an exchange failed says little without the rank and the reason to give up.
            own = None if isinstance(failure.error, ExchangeFailed) else failure.error
            error = own or WorkerFailed(f"{failure.message}; given up: {decision.reason}")
            self._end(State.FAILED, error=error, traceback=failure.traceback)
        else:
            self._restart_at = self._clock() + decision.delay_seconds
            self._enter(State.RESTARTING)

    def _root_cause(self, failures: Sequence[Failure]) -> Failure:
        """The failure that most likely led to the others: an ended process, a refusal, an exception, a vain wait."""
        found = list(failures)
        deadline = self._clock() + SETTLE_SECONDS
        while all(failure.fault is Fault.RAISED for failure in found) and self._clock() < deadline:
            report = self._group.poll(deadline - self._clock())
            self._take(report)
            found += report.failures
        return min(found, key=lambda f: (_BLAME.index(f.fault), isinstance(f.error, ExchangeFailed)))

    def _record(self, failure: Failure, decision: Any) -> None:
        self._observer.incident(
            failure.fault.value,
            failure.message,
            rank=failure.rank,
            step=failure.step,
            phase=failure.phase,
            committed_step=failure.committed_step,
            attempt=self.attempt,
            seconds_since_heard=self._vigil.silence.get(failure.rank) if failure.rank is not None else None,
            decision=f"give up: {decision.reason}" if isinstance(decision, GiveUp) else "restart",
            traceback=failure.traceback,
            **({"ranks": list(failure.ranks), "places": dict(failure.places)} if failure.places else {}),
        )


_BLAME = (
    Fault.NODE_LOST,
    Fault.OUT_OF_MEMORY,
    Fault.DIED,
    Fault.REFUSED,
    Fault.SILENT,
    Fault.HANG,
    Fault.RAISED,
    Fault.NOT_STARTED,
    Fault.CONTROL_LOST,
)
