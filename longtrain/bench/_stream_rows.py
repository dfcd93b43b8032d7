"""What the rows of `longtrain bench stream` say of each other."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from longtrain.bench._stream_fit import fit, slope
from longtrain.bench._stream_modes import CHECKPOINTING, Mode
from longtrain.bench._stream_plan import share

Row = dict[str, Any]


class Rows:
    """Those so far that were measured, by mode, number of ranks and tokens."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._rows: dict[tuple[str, int, int], Row] = {}

    def add(self, row: Row) -> Row:
        """The row with what those before it say of it."""
        if row["status"] != "ok":
            return row
        mode, ranks, tokens = row["mode"], row["ranks"], row["tokens"]
        before = next(((last["tokens"], last["peak_bytes"]) for last in reversed(self.of(mode, ranks))), None)
        self._rows[mode, ranks, tokens] = row
        checkpointing = self._rows.get((CHECKPOINTING.name, ranks, tokens))
        single = self._rows.get((mode, 1, share(tokens, ranks))) if ranks > 1 else None
        return row | {
            "bytes_per_token": None if row["peak_bytes"] is None else slope(before, (tokens, row["peak_bytes"])),
            "of_checkpointing": checkpointing and row["seconds"] / checkpointing["seconds"],
            "of_one_rank": single and row["seconds"] / single["seconds"],
            "flops_of_one_rank": single and row["model_tflops"] / single["model_tflops"],
        }

    def of(self, mode: str, ranks: int) -> list[Row]:
        """In order."""
        return [row for (name, size, _), row in self._rows.items() if (name, size) == (mode, ranks)]

    def longest(self, modes: Iterable[Mode]) -> list[Row]:
        """The last of every mode, of all ranks together."""
        return [rows[-1] for mode in modes if (rows := self.of(mode.name, self._ranks))]

    def fits(self, modes: Iterable[Mode], memory_bytes: int) -> list[Row]:
        """Of all ranks together: see `extrapolate`."""
        found = (extrapolate(mode, self.of(mode.name, self._ranks), memory_bytes) for mode in modes)
        return [each for each in found if each is not None]


def extrapolate(mode: Mode, rows: list[Row], memory_bytes: int) -> Row | None:
    """The longest context of a mode that would fit; None where there are too few lengths.

    With the phase of a step that fills the memory there, and its bytes a token.
    """
    lines = {name: found for name, points in _points(rows).items() if (found := fit(points)) is not None}
    if not lines:
        return None
    furthest = rows[-1]["tokens"]
    # Where none ever fills the memory, the one that needs most at the longest context that was measured.
    phase = min(lines, key=lambda name: (lines[name].longest(memory_bytes), -lines[name].at(furthest)))
    found, longest = lines[phase], lines[phase].longest(memory_bytes)
    bounded = longest != float("inf")
    pinned = [(row["tokens"], row["host_bytes"]) for row in rows if row["host_bytes"] is not None]
    host = fit(pinned) if mode.offload == "host" else None
    return {
        "mode": mode.name,
        "phase": phase,
        **asdict(found),
        "longest_tokens": longest if bounded else None,
        "host_bytes_per_token": None if host is None else host.bytes_per_token,
        "host_bytes_then": None if host is None or not bounded else host.at(longest),
    }


def _points(rows: list[Row]) -> dict[str, list[tuple[int, int]]]:
    """Tokens and peak bytes, by phase; rows of a mode have the same phases."""
    points: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        for phase in row["phases"]:
            points.setdefault(phase["phase"], []).append((row["tokens"], phase["peak_bytes"]))
    return points
