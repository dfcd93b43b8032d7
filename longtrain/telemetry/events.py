"""What a training run tells the outside: plain Python values, so that they travel between processes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Started:
    """The ranks are ready and the next step is `step + 1`."""

    step: int
    """Committed steps so far; 0 for a fresh run."""
    total_steps: int
    context_length: int
    """Tokens of one sequence, over all its ranks."""
    world_size: int
    sequence_parallel_size: int
    parameters: int
    """Trained numbers of the model."""
    resumed_from: str | None
    """Folder of the checkpoint that this attempt started from."""
    unigram_entropy: float | None
    """Nats per token of the training data: the loss of a model that knows only how often each token occurs. None where
    the loss is of another unit."""
    run_directory: str
    backend: str
    """What runs the recurrent operations of the mixers: `reference`, `chunked` or `triton`."""
    choices: tuple[str, ...] = ()
    """Settings that `auto` chose, and why: a line each."""
    loss_unit: str = "nats/token"
    initial_weights: str | None = None
    """Folder of the checkpoint whose weights a run takes at step 0; one that resumes does not read it."""


@dataclass(frozen=True)
class StepDone:
    """One optimizer step."""

    step: int
    """Counted from 1."""
    tokens: int
    """Consumed since the start of training, this step included."""
    loss: float
    """In the unit of the objective: for `next_token`, nats per predicted token."""
    metrics: Mapping[str, float]
    """What the objective tells besides, by name: for `dpo`, how many pairs it prefers as they are."""
    grad_norm: float
    """Global 2-norm before clipping."""
    learning_rate: float
    step_seconds: float
    tokens_per_second: float
    """Of this step, over all ranks."""
    peak_memory_bytes: int
    """Largest over the ranks."""
    host_wait_seconds: float
    """In which a GPU stood still for copies to and from the host's memory, the most of any; 0 without offload."""
    mfu: float | None
    """Model FLOPs over the devices' peak, 0 to 1; None on a CPU."""

    def values(self) -> dict[str, float]:
        """Everything by name, the metrics too, but what is not known."""
        found = {**asdict(self), **self.metrics}
        del found["metrics"]
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class CheckpointDone:
    """A checkpoint is committed."""

    step: int
    path: str
    seconds: float
    """For which training stood still."""


@dataclass(frozen=True)
class Warned:
    """One line for the user, such as a corrupt checkpoint that was passed over."""

    message: str


Event = Started | StepDone | CheckpointDone | Warned
