"""Signals of the driver: the first asks the run to save and leave, a second interrupt quits at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED_EXIT_CODE = 130
_LAST_WORDS_SECONDS = 0.3


class StopSignals:
    """Whether the run was asked to stop. Installed by `listening()`."""

    def __init__(self, before_quit: Callable[[], None] = lambda: None) -> None:
        self.requested = False
        self._before_quit = before_quit
        self._on_request: Callable[[], None] = lambda: None

    def call_on_request(self, callback: Callable[[], None]) -> None:
        """Have `callback` called in the signal handler; at once where a stop was requested before."""
        self._on_request = callback
        if self.requested:
            callback()

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            # Workers need no word: Ray ends them with their driver. Its own shutdown would take seconds.
            # The main thread may hold a lock that the callback waits for, so it is not waited for long.
            last_words = threading.Thread(target=self._before_quit, daemon=True)
            last_words.start()
            last_words.join(_LAST_WORDS_SECONDS)
            os._exit(INTERRUPTED_EXIT_CODE)
        self.requested = True
        self._on_request()

    def install(self) -> None:
        """Take SIGINT and SIGTERM over, again where another library has replaced the handlers."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)


@contextmanager
def listening(signals: StopSignals) -> Iterator[StopSignals]:
    """Handle SIGINT and SIGTERM in the block, and restore what was there."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals.install()
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
