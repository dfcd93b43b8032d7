"""One step's gradients of a model, on one device or several that share a sequence, and what they take."""

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from longtrain.bench._stream_memory import Phase, begin, highest, most
from longtrain.bench._world import World
from longtrain.cluster.resolve import ResolvedJob
from longtrain.comm.group import Group
from longtrain.core.kinds import LayoutKind
from longtrain.core.labels import IGNORED_LABEL
from longtrain.core.layout import SequenceLayout
from longtrain.core.registry import Registry
from longtrain.core.targets import Targets
from longtrain.engine.replicated import sum_over_ranks
from longtrain.model.build import build_handles, build_model
from longtrain.model.model import Model
from longtrain.objectives import next_token
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.config import SequenceParallelConfig
from longtrain.sequence_parallel.handle import Algorithms, Handles
from longtrain.streaming.config import StreamConfig
from longtrain.streaming.stream import Stream
from longtrain.streaming.waiting import Watch
from longtrain_kernels.affine import accumulator_dtype
from longtrain_kernels.backend import Backend, default_backend

Precision = Literal["float32", "bfloat16", "bfloat16-parameters"]
OBJECTIVE = next_token.Objective(next_token.Config("next_token"))
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class Step:
    """What one step says of itself."""

    loss: float
    """The mean."""
    host_wait_seconds: float = 0.0
    """Of this rank's device, for copies to and from the host's memory."""


@dataclass(frozen=True)
class Figures:
    """Of the repetitions of a step."""

    seconds: float
    """The median; of ranks, the slowest's of every repetition."""
    repeats: int
    first_seconds: float
    """Of the first step, which compiles what this length needs; it is not counted unless it is the only one."""
    loss: float
    host_wait_seconds: float
    """Of the last step, and of the rank that waited longest."""
    peak_bytes: int | None
    """Of a device at most, with parameters and gradients; None on a CPU."""
    phases: list[Phase]
    """What made it; none on a CPU."""
    host_bytes: int | None
    """Pinned by a rank at most, with what is free for reuse; None on a CPU, and where PyTorch does not count it."""


@dataclass(frozen=True)
class Workload:
    """A model with random weights, the same on all ranks, and how it computes."""

    model: Model
    handles: Handles
    precision: Precision
    seed: int
    layout: LayoutKind = "contiguous"
    document_tokens: int | None = None
    """Of each document of a sequence; None: it is one."""

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

    def among(self, group: Group, cut: SequenceParallelConfig, registry: Registry) -> "Workload":
        """The same of ranks that share a sequence. Raises Refused for an algorithm that does not exist."""
        handles = build_handles(cut, self.handles.backend or default_backend(self.device), group, self.device, registry)
        return replace(self, handles=handles, layout=cut.layout)

    def gradients(self, length: int, config: StreamConfig, watch: Watch | None = None) -> Step:
        """Of a sequence of `length` random tokens with random labels, the same for all modes and numbers of ranks.

        Adds them to the parameters' `grad`, where every rank has their sum over ranks; the device is done then. A
        collective call.
        """
        group = self.handles.group
        layout = SequenceLayout(length, group.size, (self.starts(length),), config.chunk_tokens, self.layout)
        tokens, labels = self._part(layout)
        targets = Targets(labels)
        count = group.all_reduce(OBJECTIVE.count(targets))
        stream = Stream(self.model, self.handles, OBJECTIVE, config, self._autocast, watch=watch)
        [loss] = stream.backward(tokens, targets, layout, count)
        stream.deliver()
        sum_over_ranks([p.grad for p in self.model.parameters() if p.grad is not None], group)
        return Step((group.all_reduce(loss) / count).item(), stream.host_wait_seconds())

    def starts(self, length: int) -> tuple[int, ...]:
        """The tokens at which a document begins."""
        return tuple(range(0, length, self.document_tokens or length))

    def clear(self) -> None:
        """Forget the gradients."""
        self.model.zero_grad(set_to_none=True)

    def grads(self, length: int) -> dict[str, Tensor]:
        """What `gradients` of so many tokens has found, by our parameters' names."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def _part(self, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """This rank's tokens and labels, [1, L], by chunk and slot; the last token has no label, as in a text."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        vocabulary, rank = self.model.embedding.num_embeddings, self.handles.group.rank
        spans = [span for chunk in range(layout.num_chunks) for span in layout.spans(rank, chunk)]

        def draw() -> Tensor:
            return torch.randint(vocabulary, (1, layout.length), generator=generator, device=self.device)

        def own(whole: Tensor) -> Tensor:
            return whole if layout.num_ranks == 1 else torch.cat([whole[:, begin:end] for begin, end in spans], dim=1)

        tokens, labels = draw(), draw()
        labels[:, -1] = IGNORED_LABEL
        return own(tokens), own(labels)

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


def measure(
    step: Callable[[Watch | None], Step], workload: Workload, world: World, repeats: int, seconds: float
) -> Figures:
    """Time a step `repeats` times after one that is not counted; one longer than `seconds` is the only one.

    All ranks of the world take it, from a barrier. Memory is that of the last step.
    """
    device = workload.device
    times: list[float] = []
    while len(times) <= repeats:
        workload.clear()
        phases = begin(device)
        world.barrier()
        world.synchronize()
        started = time.perf_counter()
        last = step(phases)  # waits for the device
        times.append(max(world.gather(time.perf_counter() - started)))
        if len(times) == 1 and times[0] > seconds:
            break
    counted = times[1:] or times
    # What ranks write into each other's memory is not the allocator's.
    found = most(world.gather(phases.end(beside=world.group.lane_bytes) if phases else []))
    peak, pinned = highest(found), world.gather(_pinned(device))
    return Figures(
        seconds=statistics.median(counted),
        repeats=len(counted),
        first_seconds=times[0],
        loss=last.loss,
        host_wait_seconds=max(world.gather(last.host_wait_seconds)),
        peak_bytes=None if peak is None else peak["peak_bytes"],
        phases=found,
        host_bytes=None if None in pinned else max(pinned),
    )


def _pinned(device: torch.device) -> int | None:
    """Of the host, what this process has pinned, with what is free for reuse: what is in use PyTorch 2.11 miscounts."""
    return torch.cuda.host_memory_stats().get("allocated_bytes.peak") if device.type == "cuda" else None


def device_memory(device: torch.device) -> int | None:
    """What this process has of the device's memory and can still get; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def free() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        empty_pinned = getattr(torch.accelerator, "empty_host_cache", None)  # of newer versions
        (empty_pinned or torch._C._host_emptyCache)()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left: libraries report it in words of their own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in _OUT_OF_MEMORY
    )
