"""How a run looks to the person who started it: a live line on a terminal, plain lines in a log."""

import math
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from longtrain.core.units import format_token_count
from longtrain.telemetry.events import CheckpointDone, Event, Started, StepDone, Warned

_BAR_FROM_COLUMNS = 110  # below, the numbers alone fill the line
_REFRESHES_PER_SECOND = 4
_MEAN_STEPS = 20
"""The loss of one step is that of the few documents it holds; the summary gives the mean of the last steps."""


class Progress:
    """Consumes events; `close` ends the live line and prints a summary. Also a context manager."""

    def __init__(
        self,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        every_seconds: float = 10.0,
    ) -> None:
        """Without a terminal, the first and last step are printed, and one whenever `every_seconds` have passed."""
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._every_seconds = every_seconds
        self._live: Live | None = None
        self._begun = clock()
        self._started: Started | None = None
        self._first: StepDone | None = None
        self._last: StepDone | None = None
        self._losses: deque[tuple[int, float]] = deque(maxlen=_MEAN_STEPS)
        """Of the last steps, each once: those that an attempt lost are made again."""
        self._pace: tuple[int, float] | None = None
        """Step and time from which the pace of this attempt is measured: its first step, which is slow, is left out."""
        self._saved: tuple[int, float | None] | None = None
        """Step of the last checkpoint, and when it was committed if that was seen."""
        self._printed = -math.inf

    def event(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Started():
                self._start(event)
            case StepDone():
                self._step(event)
            case CheckpointDone():
                self._saved = (event.step, self._clock())
                if not self._console.is_terminal:
                    self._print(f"checkpoint of step {event.step} saved in {event.seconds:.1f} s: {event.path}")
            case Warned():
                self._print(f"warning: {event.message}", style="yellow")
        if self._live is not None:
            self._live.refresh()

    def close(self) -> None:
        """End the live line and print the first loss and the last ones against the unigram entropy, tokens and time."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._started is None:
            return
        if self._first is None or self._last is None:
            if self._started.step >= self._started.total_steps:
                self._print(f"nothing is left to do; the losses are in {self._started.run_directory}/metrics.jsonl")
            self._started = None
            return
        first, last, entropy = self._first, self._last, self._started.unigram_entropy
        mean, steps = sum(loss for _, loss in self._losses) / len(self._losses), len(self._losses)
        self._print(f"step {last.step} of {self._started.total_steps}: {self._ending(last.step)}")
        unit = self._started.loss_unit
        self._print(
            f"loss: {_loss(first.loss, unit)} at step {first.step}, {_loss(mean, unit)} over the last {steps} steps"
        )
        if entropy is not None:
            self._print(f"unigram entropy of the data: {_loss(entropy, unit)}")
        elapsed = _duration(self._clock() - self._begun)
        self._print(f"{last.tokens:,} tokens since the start of training; this command took {elapsed}")
        if self._saved is not None:
            self._print(f"last checkpoint: step {self._saved[0]} in {self._started.run_directory}")
        self._started = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self, event: Started) -> None:
        self._started = event
        while self._losses and self._losses[-1][0] > event.step:
            self._losses.pop()
        self._pace = None
        self._saved = (event.step, None) if event.resumed_from else None
        self._print(
            f"longtrain: {event.parameters:,} parameters, context {format_token_count(event.context_length)}, "
            f"{event.world_size} {'rank' if event.world_size == 1 else 'ranks'}, "
            f"sequence parallel over {event.sequence_parallel_size}, {event.backend} mixers, "
            f"run directory {event.run_directory}"
        )
        for choice in event.choices:
            self._print(choice)
        origin = f"resumed from {event.resumed_from}" if event.resumed_from else "from the start"
        if event.initial_weights and event.resumed_from:
            origin += f" (initial_weights={event.initial_weights} is for a new run.name, and not read here)"
        elif event.initial_weights:
            origin = f"with the weights of {event.initial_weights}"
        self._print(f"{origin}: step {event.step} of {event.total_steps} is done")
        if self._console.is_terminal and self._live is None:
            self._live = Live(
                get_renderable=self._renderable, console=self._console, refresh_per_second=_REFRESHES_PER_SECOND
            )
            self._live.start()

    def _step(self, event: StepDone) -> None:
        now = self._clock()
        self._first = self._first or event
        self._last = event
        self._losses.append((event.step, event.loss))
        if self._pace is None:
            self._pace = (event.step, now)
        last = self._started is not None and event.step >= self._started.total_steps
        due = now - self._printed >= self._every_seconds
        if not self._console.is_terminal and (due or last):
            self._printed = now
            self._print(self._line())

    def _ending(self, step: int) -> str:
        if self._started is not None and step >= self._started.total_steps:
            return "done"
        if self._saved is None:
            return "stopped; nothing is saved, and the same command starts from the beginning"
        saved, _ = self._saved
        return "stopped; the same command goes on" + ("" if saved == step else f" from step {saved}")

    def _line(self) -> str:
        """Step, loss, speed, context, time to go, age of the last checkpoint."""
        if self._started is None:
            return ""
        parts = [f"step {self._last.step if self._last else self._started.step}/{self._started.total_steps}"]
        if self._last is not None:
            parts += [f"loss {self._last.loss:.4f}", *(f"{k} {v:.3g}" for k, v in self._last.metrics.items())]
            parts.append(f"{self._last.tokens_per_second:,.0f} tokens/s")
        parts.append(f"context {format_token_count(self._started.context_length)}")
        parts.append(f"ETA {self._remaining()}")
        parts.append(self._checkpoint_age())
        return " · ".join(parts)

    def _remaining(self) -> str:
        if self._started is None or self._last is None or self._pace is None or self._last.step <= self._pace[0]:
            return "?"
        seconds_per_step = (self._clock() - self._pace[1]) / (self._last.step - self._pace[0])
        return _duration(seconds_per_step * max(0, self._started.total_steps - self._last.step))

    def _checkpoint_age(self) -> str:
        if self._saved is None:
            return "not saved yet"
        step, when = self._saved
        return f"saved at step {step}" if when is None else f"saved {_duration(self._clock() - when)} ago"

    def _renderable(self) -> Table | Text:
        line = Text(self._line(), no_wrap=True, overflow="ellipsis")
        if self._console.width < _BAR_FROM_COLUMNS or self._started is None:
            return line
        done = self._last.step if self._last else self._started.step
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column()
        table.add_column(ratio=1)
        table.add_row(line, ProgressBar(total=self._started.total_steps, completed=done))
        return table

    def _print(self, line: str, style: str | None = None) -> None:
        # Paths and messages are not markup, and a log keeps its lines whole.
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _loss(loss: float, unit: str) -> str:
    """With bits beside nats per token, as compression is told."""
    bits = f" ({loss / math.log(2):.3f} bits/token)" if unit == "nats/token" else ""
    return f"{loss:.4f} {unit}{bits}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds))))
