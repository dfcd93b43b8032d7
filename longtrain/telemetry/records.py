"""The files in which a run keeps its history: one JSON object a line, each line one write. One writer: rank 0.

`ledger.jsonl` says which tokens every committed step consumed. The ledger lines of the steps since the last checkpoint
travel in the metadata of the next one, and are appended when it is committed; `rewind` repairs what a kill in between
left out, so that the ledger has every committed step exactly once.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from longtrain.core.errors import Refused
from longtrain.telemetry.events import StepDone

METRICS, LEDGER, INCIDENTS = "metrics.jsonl", "ledger.jsonl", "incidents.jsonl"


@dataclass(frozen=True)
class LedgerLine:
    """One committed step. Tokens are counted from the start of training."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    step: int
    """Counted from 1."""
    begin: int
    end: int
    """The step consumed the tokens [begin, end) of the stream; the next step begins at `end`."""
    tokens: int
    """Consumed by this step."""
    context_length: int
    batch_size: int
    seed: int
    world_size: int
    sequence_parallel_size: int
    attempt: int
    """Which start of the workers computed it."""
    loss: str
    """`float.hex()` of the loss: exact to the bit, NaN included."""


_LINE = TypeAdapter(LedgerLine)


class RunRecords:
    """Appends to the records in one run directory. Raises Refused, one line, where a line cannot be written."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        """`directory` exists. `clock` gives the wall time of incidents, in seconds since 1970."""
        self._directory = directory
        self._clock = clock

    def metrics(self, event: StepDone) -> None:
        """Append a step to `metrics.jsonl`; `mfu` only where it is known."""
        self._append(METRICS, event.values())

    def ledger(self, lines: Sequence[LedgerLine]) -> None:
        """Append the steps of a checkpoint, after it was committed; they and their metrics are durable on return."""
        self._append(METRICS, durable=True)
        self._append(LEDGER, *map(asdict, lines), durable=True)

    def committed_steps(self) -> int:
        """The last step in the ledger, 0 where there is none; a torn last line does not count."""
        data = b"".join(line + b"\n" for line in _lines(self._directory / LEDGER))
        end = _end_of(data, None)
        begin = data.rfind(b"\n", 0, max(end - 1, 0)) + 1
        return int(json.loads(data[begin:end])["step"]) if end else 0

    def incident(self, kind: str, message: str, **details: Any) -> None:
        """Append to `incidents.jsonl`: a worker that died, a checkpoint that was passed over, a restart."""
        self._append(INCIDENTS, {"time": self._clock(), "kind": kind, "message": message, "details": details})

    def rewind(self, step: int, ledger_tail: Sequence[LedgerLine]) -> list[str]:
        """Make the records those of a run that has just committed `step`; called before the first step of an attempt.

        Torn last lines and everything beyond `step` go; the lines of `ledger_tail`, as stored in the checkpoint of
        `step`, are appended where they are missing. A kill at any moment, here too, is repaired by the next call.

        Returns one line for each gap that no checkpoint can fill (somebody removed lines), and records it.
        """
        first = min((line.step for line in ledger_tail), default=step + 1)
        self._cut(METRICS, step)
        self._cut(INCIDENTS, None)
        # The tail is what was committed: it takes the place of whatever the file says of the same steps.
        self._cut(LEDGER, min(first - 1, step))
        self.ledger(ledger_tail)
        path = self._directory / LEDGER
        problems = check_ledger(path, first_step=None, last_step=step if path.stat().st_size else None)
        for problem in problems:
            self.incident("ledger", problem)
        return problems

    def _append(self, name: str, *lines: dict[str, Any], durable: bool = False) -> None:
        path = self._directory / name
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                for line in lines:
                    _write_line(descriptor, json.dumps(_finite(line), allow_nan=False).encode() + b"\n")
                if durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if durable:
                _sync_folder(self._directory)
        except OSError as error:
            raise _refused(path, error) from error

    def _cut(self, name: str, last: int | None) -> None:
        """Cut a file behind its last whole line whose step is at most `last` (any whole line for None)."""
        path = self._directory / name
        try:
            if not path.exists():
                return
            data = path.read_bytes()
            keep = _end_of(data, last)
            if keep < len(data):
                descriptor = os.open(path, os.O_WRONLY)
                try:
                    os.ftruncate(descriptor, keep)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise _refused(path, error) from error


def check_ledger(path: Path, first_step: int | None = 1, last_step: int | None = None) -> list[str]:
    """Gaps, duplicates, unreadable lines and token spans that do not meet, one line each; empty when all is well.

    `first_step` is the step of the first line; None for a run that began from another run's checkpoint. `last_step`,
    if given, is the step of the last one: that of the newest checkpoint, when nothing is being written.
    """
    problems: list[str] = []
    previous: LedgerLine | None = None
    for number, text in enumerate(_lines(path), start=1):
        try:
            line = _LINE.validate_json(text)
        except ValidationError:
            problems.append(f"{path}:{number}: not a ledger line")
            continue
        problems += [f"{path}:{number}: {problem}" for problem in _faults(line, previous, first_step)]
        previous = line
    reached = previous.step if previous else (first_step or 1) - 1
    if last_step is not None and reached < last_step:
        problems.append(f"{path}: steps {reached + 1} to {last_step} are missing at the end")
    elif last_step is not None and reached > last_step:
        problems.append(f"{path}: step {reached} is beyond the last committed step {last_step}")
    return problems


def _faults(line: LedgerLine, previous: LedgerLine | None, first_step: int | None) -> Iterable[str]:
    expected = previous.step + 1 if previous else first_step
    if expected is not None and line.step < expected:
        yield f"step {line.step} is there again"
    elif expected is not None and line.step > expected:
        yield f"steps {expected} to {line.step - 1} are missing"
    elif previous is not None and line.begin != previous.end:
        yield f"step {line.step} begins at token {line.begin}, but step {previous.step} ended at {previous.end}"
    if line.end - line.begin != line.tokens:
        yield f"step {line.step} has {line.tokens} tokens, but spans {line.begin} to {line.end}"


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def _end_of(data: bytes, last: int | None) -> int:
    """Length of `data` up to its last whole line of a step up to `last`. Steps only grow, so only the end is read."""
    end = data.rfind(b"\n") + 1
    while end:
        begin = data.rfind(b"\n", 0, end - 1) + 1
        try:
            step = json.loads(data[begin:end]).get("step")
            if last is None or (isinstance(step, int) and step <= last):
                break
        except (ValueError, AttributeError, RecursionError):
            pass  # half a line that a later one was written behind
        end = begin
    return end


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_line(descriptor: int, line: bytes) -> None:
    """One write of a whole line; a line of which only a part fits is taken back."""
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        if written < len(line):
            os.write(descriptor, line[written:])  # tells why it did not fit
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _sync_folder(path: Path) -> None:
    """Make the name of a new file durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(path: Path, error: OSError) -> Refused:
    return Refused(f"{path} cannot be written: {error.strerror}; free space or make it writable, and run it again")
