"""Who is to blame when no rank goes on: a pure function of what the ranks last said.

A rank waits for another that has entered fewer phases or, in the same phase, has begun fewer collectives of a group
that both are in, and for the peers of a transfer that it is in. Blamed are the ranks that others wait for and that
wait for nobody: the ends of all chains of waiting. Ranks that wait for each other in a circle blame nobody.

The only rank of a job has nobody to wait for, and keeps nobody waiting: however long it does not go on, it is at work
of its own, which a restart would only begin again. Several ranks of which none seems to wait may still do so: with NCCL
a rank waits for its GPU outside of any exchange.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

from longtrain.cluster.pulse import Pulse

_OUTSIDE_STEPS = 2.0
"""The first step of an attempt compiles and tunes; loading and saving read and write files."""
NOBODY_WAITS = 10.0
"""All ranks at once may do long work between two exchanges."""


@dataclass(frozen=True)
class Verdict:
    """What holds a job up, in ranks."""

    silent: tuple[int, ...]
    """Not heard of: stopped, or cut off. To blame before any other."""
    behind: tuple[int, ...]
    """Waited for by others, and waiting for nobody."""
    waiting: tuple[int, ...]
    """Inside an exchange, or further than the others."""
    patience: float
    """How many times the limit is to be waited before this is believed; infinite for the only rank of a job."""

    @property
    def culprits(self) -> tuple[int, ...]:
        return self.silent or self.behind


def judge(pulses: Mapping[int, Pulse], done: Set[int] = frozenset(), silent: Set[int] = frozenset()) -> Verdict:
    """Who holds up the ranks that `pulses` are of. `done` ones have ended well, `silent` ones are not heard of."""
    present = {rank: pulse for rank, pulse in pulses.items() if rank not in done}
    phases = [pulse.phases for pulse in present.values()]
    fewest, most = _bounds(present)
    waits: set[int] = set()
    awaited: set[int] = set(present) if done else set()
    for rank, pulse in present.items():
        counts = [(count, (pulse.phases, group)) for group, count in pulse.exchanges.begun.items()]
        if pulse.phases > min(phases) or any(count > fewest[key] for count, key in counts):
            waits.add(rank)
        if pulse.phases < max(phases) or any(count < most[key] for count, key in counts):
            awaited.add(rank)
        if pulse.exchanges.inside and pulse.exchanges.last is not None:
            peers = present.keys() & set(pulse.exchanges.last.peers)
            awaited |= peers
            waits |= {rank} if peers else set()
    behind = awaited - waits
    inside = {rank for rank, pulse in present.items() if pulse.exchanges.inside}
    waiting = (waits | inside) - behind - silent
    suspects = [present[rank] for rank in silent or behind or present if rank in present]
    settled = all(pulse.phase == "step" and pulse.steps > 1 for pulse in suspects)
    patience = 1.0 if settled else _OUTSIDE_STEPS
    if not (waiting or silent):
        patience = NOBODY_WAITS if len(pulses) > 1 else math.inf
    return Verdict(tuple(sorted(silent)), tuple(sorted(behind)), tuple(sorted(waiting)), patience)


def _bounds(pulses: Mapping[int, Pulse]) -> tuple[dict[tuple[int, str], int], dict[tuple[int, str], int]]:
    """Fewest and most collectives begun, by phase and group: counts are compared within a phase."""
    fewest: dict[tuple[int, str], int] = {}
    most: dict[tuple[int, str], int] = {}
    for pulse in pulses.values():
        for group, count in pulse.exchanges.begun.items():
            key = (pulse.phases, group)
            fewest[key] = min(count, fewest.get(key, count))
            most[key] = max(count, most.get(key, count))
    return fewest, most
