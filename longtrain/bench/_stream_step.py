"""One step's gradients of a model on one device, and what they take."""

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from longtrain.cluster.resolve import ResolvedJob
from longtrain.comm.group import Group
from longtrain.core.layout import SequenceLayout
from longtrain.core.targets import Targets
from longtrain.model.build import build_model
from longtrain.model.model import Model
from longtrain.objectives import next_token
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.handle import Algorithms, Handles
from longtrain.streaming.config import StreamConfig
from longtrain.streaming.stream import Stream
from longtrain_kernels.affine import accumulator_dtype
from longtrain_kernels.backend import Backend, default_backend

Precision = Literal["float32", "bfloat16", "bfloat16-parameters"]
OBJECTIVE = next_token.Objective(next_token.Config("next_token"))
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class Batch:
    """A sequence of random tokens, each with a random label."""

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Figures:
    """Of the repetitions of a step."""

    seconds: float
    """The median."""
    repeats: int
    first_seconds: float
    """Of the first step, which compiles what this length needs; it is not counted unless it is the only one."""
    loss: float
    peak_bytes: int | None
    """Of the device, with parameters and gradients; None on a CPU."""
    host_bytes: int | None
    """Of pinned memory, about; None on a CPU, and where PyTorch does not count it."""


@dataclass(frozen=True)
class Workload:
    """A model with random weights and how it computes."""

    model: Model
    handles: Handles
    precision: Precision
    seed: int

    @property
    def device(self) -> torch.device:
        """Of model and batches."""
        return self.handles.device

    @property
    def parameter_bytes(self) -> int:
        """Of the device."""
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def gradient_bytes(self) -> int:
        """Of the sums of all gradients, float32 at least."""
        return sum(p.numel() * accumulator_dtype(p.dtype).itemsize for p in self.model.parameters())

    def batch(self, length: int) -> Batch:
        """The same for all modes."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        vocabulary, shape = self.model.embedding.num_embeddings, (1, length)
        draw = partial(torch.randint, vocabulary, shape, generator=generator, device=self.device)
        return Batch(draw(), draw())

    def gradients(self, batch: Batch, config: StreamConfig) -> float:
        """Add them to the parameters' `grad`; returns the mean loss."""
        layout = SequenceLayout(batch.tokens.shape[1], 1, ((0,),), config.chunk_tokens)
        targets = Targets(batch.labels)
        count = OBJECTIVE.count(targets)
        stream = Stream(self.model, self.handles, OBJECTIVE, config, self._autocast)
        loss = stream.backward(batch.tokens, targets, layout, count)
        stream.deliver()
        return (loss / count).item()

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision != "float32")


def make_workload(job: ResolvedJob, vocabulary: int, precision: Precision, seed: int, device: torch.device) -> Workload:
    """The model of a configuration, made on the device: drawing billions of numbers takes a CPU minutes."""
    with device:
        model = build_model(job.config.model, job.config.mixer.options, vocabulary, seed, job.registry)
    if precision == "bfloat16-parameters":
        model.bfloat16()
    free()
    return Workload(model, make_handles(device, default_backend(device)), precision, seed)


def make_handles(device: torch.device, backend: Backend) -> Handles:
    """Of one rank."""
    return Handles(Algorithms(local.scan, local.attend), Group(0, 1), device, backend)


def measure(step: Callable[[], float], workload: Workload, repeats: int, seconds: float) -> Figures:
    """Time a step `repeats` times after one that is not counted; one longer than `seconds` is the only one.

    Memory is that of the last step.
    """
    times: list[float] = []
    while len(times) <= repeats:
        workload.model.zero_grad(set_to_none=True)
        _start_memory(workload.device)
        started = time.perf_counter()
        loss = step()  # waits for the device
        times.append(time.perf_counter() - started)
        if len(times) == 1 and times[0] > seconds:
            break
    counted = times[1:] or times
    peak, host = _memory(workload.device)
    return Figures(statistics.median(counted), len(counted), times[0], loss, peak, host)


def _start_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_peak_host_memory_stats()


def _memory(device: torch.device) -> tuple[int | None, int | None]:
    """Peaks of the device and of pinned memory since `_start_memory`."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device), torch.cuda.host_memory_stats().get("active_bytes.peak")


def free() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left: libraries report it in words of their own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in _OUT_OF_MEMORY
    )
