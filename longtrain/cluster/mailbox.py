"""The mailbox between workers and driver: heartbeats and events one way, the request to stop the other way.

Workers run the training on their main thread, so nobody can call them; they push instead. The driver holds one
`drain` call open, which returns at once when there are events and every `BEAT_SECONDS` otherwise.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from longtrain.cluster.pulse import Pulse

BEAT_SECONDS = 0.5
"""Longest time between two pushes of a worker."""


class Mailbox:
    """Runs as an asynchronous Ray actor on the driver's node; holds one attempt's mail."""

    def __init__(self) -> None:
        self._attempt = -1
        self._open(-1)

    def _open(self, attempt: int) -> None:
        self._attempt = attempt
        self._pulses: dict[int, Pulse] = {}
        self._events: list[Any] = []
        self._received: dict[int, int] = {}
        self._stop = False
        self._news = asyncio.Event()

    async def open(self, attempt: int) -> None:
        """Begin an attempt; what earlier attempts still send is dropped."""
        self._open(attempt)

    async def push(self, attempt: int, rank: int, pulse: Pulse, first: int, events: Sequence[Any]) -> bool:
        """Deliver a pulse and `events`, the first of which is number `first` of this rank; whether to stop.

        A worker that got no answer sends its events again under the same numbers, and they are kept once.
        """
        if attempt != self._attempt:
            return False
        self._pulses[rank] = pulse
        received = self._received.get(rank, 0)
        fresh = events[received - first :]
        if fresh:
            self._events += fresh
            self._received[rank] = received + len(fresh)
            self._news.set()
        return self._stop

    async def drain(self, attempt: int, timeout: float) -> tuple[dict[int, Pulse], list[Any]]:
        """Newest pulse by rank and the events since the last call; waits for events at most `timeout` seconds."""
        if attempt == self._attempt and not self._events:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), timeout)
        if attempt != self._attempt:
            return {}, []
        events, self._events = self._events, []
        self._news.clear()
        return dict(self._pulses), events

    async def wake(self) -> None:
        """Let a waiting `drain` return now."""
        self._news.set()

    async def stop(self) -> None:
        """Answer every further push with the request to stop."""
        self._stop = True
