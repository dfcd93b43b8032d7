"""The ranks of a measurement: how they join, agree on what goes next, and time a call together."""

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from longtrain.bench._report import one_line
from longtrain.bench._timing import CACHE_FLUSH_BYTES, MOST_REPEATS, PAUSE_CYCLES_PER_SECOND
from longtrain.comm.group import Group
from longtrain.comm.links import Link, fitted
from longtrain.comm.mesh import build_mesh, process_group

T = TypeVar("T")

AGREEMENT_TIMEOUT = timedelta(minutes=30)  # rank 0 works alone for long where one rank does the work of all
SMALL_BYTES = 2**12


class RankFailed(RuntimeError):
    """Another rank could not do its part."""


@dataclass(frozen=True)
class World:
    """One rank's view of them."""

    group: Group
    """What is measured."""
    store: dist.Store
    """By which they agree: devices and their links stay out of it."""
    device: torch.device
    _rounds: list[int] = field(default_factory=lambda: [0])
    """How often they have."""

    @classmethod
    def alone(cls, device: torch.device) -> "World":
        """Of one rank, which has nobody to wait for."""
        return cls(Group(0, 1), dist.HashStore(), device)

    def gather(self, value: Any) -> list[Any]:
        """What JSON can say, from every rank, by rank. Raises RankFailed where another rank gave up meanwhile."""
        answers = self._exchange({"value": value})
        for rank, answer in enumerate(answers):
            if "problem" in answer:
                raise RankFailed(f"rank {rank}: {answer['problem']}")
        return [answer["value"] for answer in answers]

    def share(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.gather(value if self.group.rank == 0 else None)[0]

    def agreed(self, work: Callable[[], T]) -> tuple[T | None, str]:
        """The result here, and what went wrong on the first rank where something did, in one line; "" if nothing.

        All ranks go on together after it. A rank that fails while others wait for it in a collective keeps them until
        the collective's timeout, which then ends the process.
        """
        result, problem = None, ""
        try:
            result = work()
        except RankFailed as failure:  # the rank that failed has been heard, and waits for nobody
            return None, str(failure)
        except Exception as error:  # whatever an algorithm or another version of a peer raises is a result
            problem = one_line(error)
        answers = self._exchange({"problem": problem})
        problems = [answer.get("problem", "") for answer in answers]
        first = next((rank for rank, text in enumerate(problems) if text), None)
        if first is None and not all("problem" in answer for answer in answers):
            raise RuntimeError("the ranks of the benchmark are not at the same step")
        return result, "" if first is None else f"rank {first}: {problems[first]}"

    def _exchange(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        self._rounds[0] += 1
        turn = self._rounds[0]
        self.store.set(f"{turn}/{self.group.rank}", json.dumps(answer))
        return [json.loads(self.store.get(f"{turn}/{rank}")) for rank in range(self.group.size)]

    def barrier(self) -> None:
        """All ranks are here; on CUDA their streams are, and the host goes on."""
        self.group.all_reduce(torch.zeros(1, device=self.device))

    def synchronize(self) -> None:
        """Wait for the own device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def joined(device: torch.device, address: str, port: int) -> Iterator[World]:
    """Join the ranks that the env:// variables describe, and the store at which they meet."""
    with process_group(device):
        group = build_mesh(dist.get_world_size()).sequence
        store = dist.TCPStore(address, port, is_master=False, timeout=AGREEMENT_TIMEOUT)
        yield World(group, dist.PrefixStore("bench", store), device)


@dataclass(frozen=True)
class Spread:
    """Milliseconds over repetitions, each as long as its slowest rank took; the most memory that a rank added."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    peak_bytes: int | None
    """None on a CPU."""


def measure_together(call: Callable[[], object], world: World, repeats: int, seconds: float) -> Spread:
    """Time a call that all ranks make: at least `repeats` times, and for about `seconds` where it is short.

    A barrier comes before each repetition. On CUDA both are queued behind a pause, and timed by events, as in
    `_timing.measure`; caches are cold.
    """
    gc.collect()
    for _ in range(2 if world.device.type == "cuda" else 1):
        call()
    world.synchronize()
    world.barrier()
    cuda = world.device.type == "cuda"
    before = torch.cuda.memory_allocated(world.device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(world.device)
    started = time.perf_counter()
    call()
    host = time.perf_counter() - started
    world.synchronize()
    once = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(world.device) - before if cuda else 0
    pairs = world.gather((once, peak))
    count = max(repeats, min(MOST_REPEATS, int(seconds / max(*(once for once, _ in pairs), 1e-6))))
    times = (_times_cuda if cuda else _times_cpu)(call, world, count, host)
    return spread(world.gather(times), max(peak for _, peak in pairs) if cuda else None)


def spread(times: list[list[float]], peak_bytes: int | None) -> Spread:
    """Of milliseconds by rank and repetition: the slowest rank's of each repetition, and how they vary."""
    slowest = sorted(max(of_ranks) for of_ranks in zip(*times, strict=True))
    p20, p80 = (slowest[round(share * (len(slowest) - 1))] for share in (0.2, 0.8))
    return Spread(statistics.median(slowest), p20, p80, len(slowest), peak_bytes)


def _times_cpu(call: Callable[[], object], world: World, count: int, host: float) -> list[float]:
    times = []
    for _ in range(count):
        world.barrier()
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def _times_cuda(call: Callable[[], object], world: World, count: int, host: float) -> list[float]:
    flush = torch.empty(CACHE_FLUSH_BYTES, dtype=torch.uint8, device=world.device)
    pause = int(2 * host * PAUSE_CYCLES_PER_SECOND)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        flush.zero_()
        torch.cuda._sleep(pause)
        world.barrier()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(world.device)
    return [start.elapsed_time(end) for start, end in events]


def measure_links(world: World, repeats: int, seconds: float) -> dict[str, Any]:
    """Times of an all-gather of all ranks and of a message from rank 0 to rank 1, small and large, and their links."""
    large = 2**26 if world.device.type == "cuda" else 2**22
    group = world.group
    times: dict[str, list[float]] = {"all_gather": [], "point_to_point": []}
    for count in (SMALL_BYTES, large):
        tensor = torch.zeros(count, dtype=torch.uint8, device=world.device)
        sends, receives = ([(1, tensor)], []) if group.rank == 0 else ([], [(0, tensor)] if group.rank == 1 else [])

        def gather(tensor: torch.Tensor = tensor) -> object:
            return group.all_gather(tensor)

        def pass_on(sends: Any = sends, receives: Any = receives) -> None:
            group.exchange(sends, receives)

        for name, call in (("all_gather", gather), ("point_to_point", pass_on)):
            times[name].append(measure_together(call, world, 3 * repeats, seconds).p20_ms / 1e3)
    steps = {"all_gather": ((group.size - 1).bit_length() or 1, group.size - 1), "point_to_point": (1, 1)}
    found: dict[str, Any] = {}
    for name, (small_seconds, large_seconds) in times.items():
        latencies, messages = steps[name]
        link = fitted(small_seconds, large_seconds, messages * (large - SMALL_BYTES), latencies)
        measured = {"small_bytes": SMALL_BYTES, "small_seconds": small_seconds}
        measured |= {"large_bytes": large, "large_seconds": large_seconds}
        found[name] = measured | asdict(link)
    return found


def links_of(found: dict[str, Any]) -> tuple[Link, Link]:
    """What `measure_links` found: of all-gathers, and of two ranks."""
    names = ("all_gather", "point_to_point")
    collective, pair = (Link(found[name]["latency"], found[name]["bandwidth"]) for name in names)
    return collective, pair
