"""Times of calls on a device, and what the device can do at most."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CACHE_FLUSH_BYTES = 2**28
"""Written before each repetition: several times the last-level cache of any GPU."""
MOST_REPEATS = 500
PAUSE_CYCLES_PER_SECOND = 2e9  # above the clock of any GPU: a pause is never shorter than asked


@dataclass(frozen=True)
class Timing:
    """Milliseconds over repetitions, and the memory that one call adds to what was there before it."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    host_ms: float
    """What the host needs to queue the call; above the median, calls in a row are bound by the host."""
    repeats: int
    peak_bytes: int | None
    """None on a CPU."""


@dataclass(frozen=True)
class Ceilings:
    """The most that this device gives, measured in the same run as the rows that are compared with it."""

    matmul_tflops: float
    matmul: str
    """What was multiplied: size and dtype."""
    copy_bytes_per_second: float
    """Bytes read plus bytes written by a copy within the device's memory."""
    copy_buffer_bytes: int


def measure(call: Callable[[], object], device: torch.device, repeats: int, seconds: float) -> Timing:
    """Time `call` from a cold cache: at least `repeats` times, and for about `seconds` where it is short.

    On CUDA a repetition is queued behind a pause as long as the host needs to queue it, and timed by events: this is
    the device's time, as in a model that keeps it busy. The first calls, which compile, are not counted.
    """
    gc.collect()
    return (_measure_cuda if device.type == "cuda" else _measure_cpu)(call, device, repeats, seconds)


def _measure_cuda(call: Callable[[], object], device: torch.device, repeats: int, seconds: float) -> Timing:
    flush = torch.empty(CACHE_FLUSH_BYTES, dtype=torch.uint8, device=device)
    for _ in range(2):
        call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    started = time.perf_counter()
    call()
    host = time.perf_counter() - started
    torch.cuda.synchronize(device)
    count = _repetitions(time.perf_counter() - started, repeats, seconds)
    pause = int(2 * host * PAUSE_CYCLES_PER_SECOND)
    peak = torch.cuda.max_memory_allocated(device) - before
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        flush.zero_()
        torch.cuda._sleep(pause)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return _timing([start.elapsed_time(end) for start, end in events], host * 1e3, peak)


def _measure_cpu(call: Callable[[], object], device: torch.device, repeats: int, seconds: float) -> Timing:
    started = time.perf_counter()
    call()
    count = _repetitions(time.perf_counter() - started, repeats, seconds)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return _timing(times, statistics.median(times), None)


def _repetitions(once: float, repeats: int, seconds: float) -> int:
    return max(repeats, min(MOST_REPEATS, int(seconds / max(once, 1e-6))))


def _timing(times: list[float], host_ms: float, peak_bytes: int | None) -> Timing:
    ordered = sorted(times)
    p20, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return Timing(statistics.median(ordered), p20, p80, host_ms, len(ordered), peak_bytes)


def measure_ceilings(device: torch.device, repeats: int, seconds: float) -> Ceilings:
    """A large matrix product and a large copy; small ones on a CPU."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = measure(lambda: a @ b, device, repeats, seconds).median_ms / 1e3
    count = 2**32 if cuda else 2**26
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, repeats, seconds).median_ms / 1e3
    return Ceilings(
        matmul_tflops=2 * size**3 / product / 1e12,
        matmul=f"{size} x {size} x {size}, {str(dtype).removeprefix('torch.')}",
        copy_bytes_per_second=2 * count / copy,
        copy_buffer_bytes=count,
    )
