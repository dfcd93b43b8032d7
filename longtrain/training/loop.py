"""The training loop: batch, forward, backward, update; metrics every step, a checkpoint now and then."""

import math
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from longtrain.checkpoint.store import CheckpointStore
from longtrain.comm.mesh import Mesh
from longtrain.core.contracts import Objective
from longtrain.core.errors import Diverged, Refused
from longtrain.core.layout import mean_context
from longtrain.engine.replicated import ReplicatedEngine, StepResult
from longtrain.model.model import Model
from longtrain.streaming.stream import Stream
from longtrain.telemetry.events import CheckpointDone, StepDone, Warned
from longtrain.telemetry.records import LedgerLine, RunRecords
from longtrain.training.batch import BatchReader
from longtrain.training.config import TrainingConfig
from longtrain.training.listener import Listener
from longtrain.training.reference import ReferencedReader

HOST_WAIT_SHARE = 0.1
"""Of a step, that is worth a word to the user."""
# Dense bfloat16 matrix rate by datasheet, in FLOP/s, for the model FLOP utilisation.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Progressed:
    """Where the loop is: steps done and tokens consumed since the start of the run."""

    step: int
    tokens: int


@dataclass(frozen=True)
class _Done:
    """What one step gave, the same on all ranks."""

    loss: float
    """Global mean, in the objective's unit."""
    metrics: dict[str, float]
    """The objective's, global means."""
    result: StepResult
    peak_memory_bytes: int
    host_wait_seconds: float
    """The most of any rank."""
    mean_context: float
    """Tokens that a token sees on average, over all ranks."""
    stop: bool
    """Whether any rank was asked to stop."""


@dataclass
class Loop:
    """Everything a rank needs for its steps."""

    config: TrainingConfig
    mesh: Mesh
    device: torch.device
    model: Model
    objective: Objective
    engine: ReplicatedEngine
    reader: BatchReader | ReferencedReader
    stream: Stream
    store: CheckpointStore
    records: RunRecords | None
    """Of the writer; None on the other ranks."""
    listener: Listener
    about: dict[str, Any]
    """What checkpoints tell of the run: see `resume.about`."""
    attempt: int
    """Which start of the workers this is, counted from 0."""
    ledger: list[LedgerLine] = field(default_factory=list)
    """Lines of the steps since the last checkpoint: they are committed with the next one."""
    _told_of_host: bool = False

    def run(self, step: int, tokens: int) -> Progressed:
        """Train from `step` steps and `tokens` tokens done, to the last step or until a stop is requested."""
        while step < self.config.steps:
            self.listener.phase("step", step)
            begun = time.perf_counter()
            batch_tokens = self.reader.tokens_per_step
            try:
                done = self._step(step, tokens)
            except torch.OutOfMemoryError as error:
                raise Refused(_does_not_fit(step, error)) from error
            step, tokens = step + 1, tokens + batch_tokens
            self._record(step, tokens, done, time.perf_counter() - begun)
            if done.stop or step == self.config.steps or step % self.config.checkpoint.every_steps == 0:
                self._checkpoint(step, tokens)
            if done.stop:
                break
        return Progressed(step, tokens)

    def _step(self, step: int, position: int) -> _Done:
        """One update on the batch at `position`."""
        batches = self.reader.read(position)
        stop = torch.tensor(float(self.listener.stop_requested()), dtype=torch.float64, device=self.device)
        counted = torch.stack([self.objective.count(batch.targets) for batch in batches]).sum()
        sums = self.mesh.world.all_reduce(torch.stack([counted, stop]))
        count = sums[0].clamp(min=1)
        losses = [self.stream.backward(batch.tokens, batch.targets, batch.layout, count) for batch in batches]
        self.stream.deliver()
        result = self.engine.step(step)
        own_context = mean_context(batch.layout for batch in batches)
        (loss, *metrics), memory, waited, context = self._over_ranks(torch.stack(losses).sum(0) / count, own_context)
        if not (math.isfinite(loss) and math.isfinite(result.grad_norm)):
            end = position + self.reader.tokens_per_step
            raise Diverged(
                f"step {step + 1}: loss {loss}, gradient norm {result.grad_norm} (tokens {position} to {end} of the "
                "stream); nothing of this step is saved: lower optimizer.learning_rate and run the command again"
            )
        told = dict(zip(self.objective.metrics, metrics, strict=True))
        return _Done(loss, told, result, memory, waited, context, stop=bool(sums[1] > 0))

    def _over_ranks(self, shares: Tensor, context: float) -> tuple[list[float], int, float, float]:
        """Sums of the ranks' shares [n], their largest peak memory in bytes and wait for the host in s, and the mean of
        their contexts."""
        memory = peak_memory(self.device) + self.mesh.sequence.lane_bytes
        own = [memory, self.stream.host_wait_seconds(), context]
        mine = torch.cat([torch.tensor(own, dtype=torch.float64, device=self.device), shares])
        gathered = torch.stack(self.mesh.world.all_gather(mine)).cpu()
        memories, waits, contexts = gathered[:, :3].unbind(1)
        return gathered[:, 3:].sum(0).tolist(), int(memories.max()), waits.max().item(), contexts.mean().item()

    def _record(self, step: int, tokens: int, step_done: _Done, seconds: float) -> None:
        if self.records is None:
            return
        size = self.reader.tokens_per_step
        done = StepDone(
            step=step,
            tokens=tokens,
            loss=step_done.loss,
            metrics=step_done.metrics,
            grad_norm=step_done.result.grad_norm,
            learning_rate=step_done.result.learning_rate,
            step_seconds=seconds,
            tokens_per_second=size / seconds,
            peak_memory_bytes=step_done.peak_memory_bytes,
            host_wait_seconds=step_done.host_wait_seconds,
            mfu=self._mfu(size / seconds, step_done.mean_context),
        )
        self.records.metrics(done)
        self.listener.event(done)
        if not self._told_of_host and done.host_wait_seconds > HOST_WAIT_SHARE * seconds:
            self._told_of_host = True
            self.listener.event(Warned(_waits_for_the_host(done)))
        self.ledger.append(
            LedgerLine(
                step=step,
                begin=tokens - size,
                end=tokens,
                tokens=size,
                context_length=self.config.context_length,
                batch_size=self.config.batch_size,
                seed=self.config.seed,
                world_size=self.mesh.world.size,
                sequence_parallel_size=self.mesh.sequence.size,
                attempt=self.attempt,
                loss=step_done.loss.hex(),
            )
        )

    def _checkpoint(self, step: int, tokens: int) -> None:
        self.listener.phase("checkpoint", step)
        begun = time.perf_counter()
        metadata = {
            **self.about,
            "tokens": tokens,
            "attempt": self.attempt,
            "ledger": [asdict(line) for line in self.ledger],
        }
        path = self.store.save(step, self.engine.state(), metadata)
        if self.records is not None:
            self.records.ledger(self.ledger)
            self.listener.event(CheckpointDone(step=step, path=str(path), seconds=time.perf_counter() - begun))
        self.ledger = []

    def _mfu(self, tokens_per_second: float, mean_context: float) -> float | None:
        """Model FLOP utilisation over all ranks, or None where the device's peak is not known.

        A token of a packed sequence attends to its own document alone, and counts no more.
        """
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        peak = next((flops for model, flops in PEAK_FLOPS.items() if model in name), None)
        if peak is None:
            return None
        flops = self.model.flops_per_token(mean_context)
        return tokens_per_second * flops / (peak * self.mesh.world.size)


def _does_not_fit(step: int, error: torch.OutOfMemoryError) -> str:
    reason = str(error).strip().split(". ")[0]
    return (
        f"step {step + 1}: {reason}; cut time (stream.chunk_tokens=16k or less), keep less (stream.block_layers=1), "
        "share sequences among more GPUs (sequence_parallel.size), or set micro_batch_size=1; the same command goes on "
        "from the last checkpoint"
    )


def _waits_for_the_host(done: StepDone) -> str:
    return (
        f"step {done.step}: GPUs waited {done.host_wait_seconds:.1f} of {done.step_seconds:.1f} s for copies to and "
        "from the host (stream.offload=host), whose bandwidth is the limit now; where memory allows, a larger "
        "stream.block_layers or stream.offload=none is faster"
    )


def peak_memory(device: torch.device) -> int:
    """Largest memory so far in bytes: of the GPU's allocator, or the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
