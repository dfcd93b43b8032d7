"""Watches the pulses of one attempt: who is not heard of, and who holds the others up."""

from collections.abc import Callable, Mapping, Sequence, Set

from longtrain.cluster.failure import Failure, Fault
from longtrain.cluster.hang import NOBODY_WAITS, Verdict, judge
from longtrain.cluster.pulse import Pulse
from longtrain.comm.journal import list_ranks

_SHOWN = 3
"""Places of waiting ranks that one message tells; the incident's details have every rank."""


class Vigil:
    """Over the ranks of a job, attempt by attempt; told of the time that passes, so that it has no clock of its own."""

    def __init__(self, heartbeat_timeout_seconds: float, hang_timeout_seconds: float) -> None:
        self._silence_limit, self._hang_limit = heartbeat_timeout_seconds, hang_timeout_seconds
        self.forget()

    def forget(self) -> None:
        """A new attempt begins; nobody is watched until `begin`."""
        self.pulses: dict[int, Pulse] = {}
        self.silence: dict[int, float] = {}
        """Seconds for which each rank has not been heard of."""
        self._stillness: dict[int, float] = {}
        self._noticed = False

    def begin(self, size: int) -> None:
        """All `size` ranks run from now on."""
        self.silence, self._stillness = dict.fromkeys(range(size), 0.0), dict.fromkeys(range(size), 0.0)

    def look(self, elapsed: float, pulses: Mapping[int, Pulse]) -> None:
        """The newest pulse of each rank, `elapsed` seconds after the last look."""
        # A driver that was itself suspended must not blame its workers: no look counts for more than a quarter
        # of a limit, so that silence is only believed after several looks in vain.
        elapsed = min(elapsed, self._silence_limit / 4, self._hang_limit / 4)
        for rank in self.silence:
            self.silence[rank] += elapsed
            self._stillness[rank] += elapsed
        for rank, pulse in pulses.items():
            old = self.pulses.get(rank)
            if old is None or pulse.count > old.count:
                self.silence[rank] = 0.0
                if old is None or pulse.position != old.position:
                    self._stillness[rank], self._noticed = 0.0, False
                self.pulses[rank] = pulse

    def failures(self, done: Set[int], name: Callable[[int], str]) -> list[Failure]:
        """What is wrong with the ranks that are not `done`; `name` says in words which process a rank is."""
        limit = self._silence_limit
        silent = [rank for rank, seconds in self.silence.items() if seconds > limit and rank not in done]
        if silent:
            message = f"was not heard of for {limit:g} s (cluster.heartbeat_timeout_seconds)"
            return [Failure(Fault.SILENT, rank, f"{name(rank)} {message}") for rank in silent]
        return self._hang(done, name)

    def notice(self, name: Callable[[int], str]) -> str | None:
        """A line, once each time, where the only rank of a job is at something for long, which is no failure."""
        if self._noticed or self.pulses.keys() != {0} or self._stillness.keys() != {0}:
            return None
        still = self._stillness[0]
        if still <= self._hang_limit * NOBODY_WAITS:
            return None
        self._noticed = True
        told = f"{name(0)}: no progress for {still:.0f} s {self.pulses[0]}"
        return f"{told}; no other rank waits for it, so it goes on, and incidents.jsonl has its stack"

    def _hang(self, done: Set[int], name: Callable[[int], str]) -> list[Failure]:
        still = min((seconds for rank, seconds in self._stillness.items() if rank not in done), default=0.0)
        if still <= self._hang_limit:
            return []
        silent = {rank for rank, seconds in self.silence.items() if seconds > self._hang_limit / 2} - done
        if silent == self.silence.keys() - done:  # then it is the way to all of them that is lost
            return []
        verdict = judge(self.pulses, done, silent)
        if still <= self._hang_limit * verdict.patience:
            return []
        return [self._failure(verdict, still, done, name)]

    def _failure(self, verdict: Verdict, still: float, done: Set[int], name: Callable[[int], str]) -> Failure:
        present = sorted(self.pulses.keys() - done)
        setting = f"cluster.hang_timeout_seconds={self._hang_limit:g}"
        culprits, waiting = verdict.culprits, self._told(verdict.waiting)
        if verdict.silent:
            message = f"not heard of for {min(self.silence[rank] for rank in culprits):.0f} s"
        elif culprits:
            message = f"no progress for {still:.0f} s {self._told(culprits, with_ranks=len(culprits) > 1)}"
        else:
            message = f"no rank went on for {still:.0f} s, and none is behind: {self._told(present)}"
        if culprits:
            # A single one with its process and host, which are what a person looks for next.
            message = f"{name(culprits[0]) if len(culprits) == 1 else list_ranks(culprits)}: {message}"
            message += f"; it holds up {waiting}" if waiting else ""
        return Failure(
            Fault.SILENT if verdict.silent else Fault.HANG,
            culprits[0] if culprits else None,
            f"{message} ({setting})",
            traceback=self.pulses[culprits[0]].stack if culprits and culprits[0] in self.pulses else "",
            ranks=culprits,
            places=self._places(present),
        )

    def _places(self, ranks: Sequence[int]) -> dict[str, list[int]]:
        """Where these ranks are, those at one place together."""
        at: dict[str, list[int]] = {}
        for rank in ranks:
            at.setdefault(str(self.pulses[rank]), []).append(rank)
        return at

    def _told(self, ranks: Sequence[int], with_ranks: bool = True) -> str:
        at = self._places(ranks)
        told = [f"{list_ranks(here)} {place}" if with_ranks else place for place, here in list(at.items())[:_SHOWN]]
        return ", ".join(told) + (f" and {len(at) - _SHOWN} other places" if len(at) > _SHOWN else "")
