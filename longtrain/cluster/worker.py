"""The worker actor: one rank, trained on the main thread of its process.

What needs torch is named, not imported: the driver imports this module and has no use for torch, and a worker loads
it after its number of threads is set.
"""

import ctypes
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from longtrain.cluster.controller import Done
from longtrain.cluster.mailbox import BEAT_SECONDS
from longtrain.cluster.pulse import Pulse
from longtrain.cluster.ranks import Place
from longtrain.comm.journal import Journal
from longtrain.core import errors
from longtrain.core.errors import LongtrainError

_HOST_STORE = "longtrain.comm.rendezvous:host_store"
_PR_SET_PDEATHSIG = 1
_FLUSH_SECONDS = 10.0
_STACK_SECONDS = 2.0
"""A rank that has not gone on for so long tells where its main thread is."""
_STACK_FRAMES = 12


@dataclass(frozen=True)
class Work:
    """What every rank does."""

    tree: dict[str, Any]
    """The resolved configuration, plain types."""
    plugins: tuple[Path, ...]
    directory: str
    """The driver's working directory, to which relative paths of the configuration refer."""
    target: str = "longtrain.cluster.target:train"
    """`module:function(tree, plugins, listener) -> Outcome`."""


@dataclass(frozen=True)
class Probe:
    """Where Ray put a worker."""

    node_id: str
    gpu_ids: tuple[str, ...]
    process_id: int


@dataclass(frozen=True)
class Raised:
    """An exception as plain text, so that no foreign class has to be unpickled by the driver."""

    summary: str
    """`ValueError: one line`."""
    error_class: str | None
    """Nearest class of `longtrain.core.errors`, None for any other exception."""
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> "Raised":
        known = [c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__]
        lines = str(error).strip().splitlines() or [""]
        text = "" if known else "".join(traceback.format_exception(error))
        return cls(f"{type(error).__name__}: {lines[0]}", known[0] if known else None, str(error), text)

    def error(self) -> LongtrainError | None:
        return getattr(errors, self.error_class)(self.message) if self.error_class else None


class Heart:
    """The worker's side of the mailbox, and the `Listener` of `run_rank`.

    A daemon thread pushes at once when there are events and every `BEAT_SECONDS` otherwise. The thread that makes the
    heart is the one whose stack is told when it has not gone on for a while.
    """

    def __init__(self, push: Callable[[Pulse, int, list[Any]], bool]) -> None:
        self._push = push
        self._changed = threading.Condition()
        self._watched = threading.get_ident()
        self._journal = Journal()
        # Replaced as a whole: phase, step, phases entered, steps among them.
        self._place = ("start", 0, 0, 0)
        self._count = 0
        self._position: tuple[int, int] = (0, 0)
        self._moved = time.monotonic()
        self._unsent: list[Any] = []
        self._sent = 0
        self._stop = self._closed = False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def event(self, event: Any) -> None:
        with self._changed:
            self._unsent.append(event)
            self._changed.notify()

    def phase(self, name: str, step: int) -> None:
        _, _, phases, steps = self._place
        self._place = (name, step, phases + 1, steps + (name == "step"))

    def watch(self, journal: Journal) -> None:
        self._journal = journal

    def stop_requested(self) -> bool:
        return self._stop

    def close(self) -> None:
        """Deliver what is left and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(_FLUSH_SECONDS)

    def _beat(self) -> None:
        while True:
            with self._changed:
                if self._count and not (self._unsent or self._closed):
                    self._changed.wait(BEAT_SECONDS)
                closed, events = self._closed, list(self._unsent)
                self._count += 1
                pulse = self._pulse()
            try:
                self._stop = self._push(pulse, self._sent, events) or self._stop
            except ray.exceptions.RayError:
                # The driver notices a lost mailbox itself; a passing fault must not end the training.
                if closed:
                    return
                threading.Event().wait(BEAT_SECONDS)
                continue
            with self._changed:
                del self._unsent[: len(events)]
                self._sent += len(events)
                if closed and not self._unsent:
                    return

    def _pulse(self) -> Pulse:
        phase, step, phases, steps = self._place
        pulse = Pulse(phase, step, self._count, phases, steps, self._journal.standing())
        if pulse.position != self._position:
            self._position, self._moved = pulse.position, time.monotonic()
        frame = sys._current_frames().get(self._watched)
        if frame is None or time.monotonic() - self._moved < _STACK_SECONDS:
            return pulse
        return replace(pulse, stack="".join(traceback.format_stack(frame, _STACK_FRAMES)))


def named(name: str) -> Callable[..., Any]:
    """The function `module:function`."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


class Worker:
    """Runs as a synchronous Ray actor: its methods are called on the main thread, one after the other."""

    def __init__(self) -> None:
        self._store: Any = None
        if sys.platform == "linux":
            # A stopped process (SIGSTOP) cannot notice that its raylet is gone; the kernel can.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def prepare(self, work: Work, variables: Mapping[str, str]) -> Probe | Raised:
        """Set `variables`, import what the rank will run, and tell where it is; never raises."""
        os.environ.update(variables)
        if os.path.isdir(work.directory):
            os.chdir(work.directory)
        try:
            named(_HOST_STORE)
            named(work.target)
        except BaseException as error:
            return Raised.of(error)
        context = ray.get_runtime_context()
        gpu_ids = tuple(str(gpu) for gpu in context.get_accelerator_ids().get("GPU", ()))
        return Probe(context.get_node_id(), gpu_ids, os.getpid())

    def host_store(self, address: str) -> int:
        """Serve the rendezvous store of this attempt; returns its port."""
        self._store = named(_HOST_STORE)(address)
        return self._store.port

    def run(self, work: Work, place: Place, variables: Mapping[str, str], mailbox: Any, attempt: int) -> Done | Raised:
        """Run the target as rank `place.rank`; never raises."""
        os.environ.update(variables)

        def push(pulse: Pulse, first: int, events: list[Any]) -> bool:
            return ray.get(mailbox.push.remote(attempt, place.rank, pulse, first, events))

        heart = Heart(push)
        try:
            outcome = named(work.target)(work.tree, work.plugins, heart)
            return Done(outcome.step, outcome.tokens, outcome.preempted)
        except BaseException as error:  # also SystemExit: whatever ends the rank is reported as its failure
            return Raised.of(error)
        finally:
            heart.close()
