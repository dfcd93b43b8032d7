"""The configuration of one training run, without where it runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from longtrain.checkpoint.config import CheckpointConfig
from longtrain.core.component import component, components
from longtrain.core.paths import GivenPath
from longtrain.core.units import TokenCount
from longtrain.data.config import SourceConfig
from longtrain.engine.config import EngineConfig, OptimizerConfig
from longtrain.model.config import MixerConfig, ModelConfig
from longtrain.sequence_parallel.config import SequenceParallelConfig
from longtrain.streaming.config import StreamConfig
from longtrain.telemetry.config import TelemetryConfig


@dataclass(frozen=True)
class RunConfig:
    """`run.*`: the run directory is `<dir>/<name>`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None
    """Null: derived from the settings, so that the same command is the same run (`longtrain.config.identity`)."""
    dir: GivenPath


RESUME_WORDS = ("auto", "never", "required")


@dataclass(frozen=True)
class TrainingConfig:
    """Root of the resolved configuration below `cluster`; `conf/train.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    run: RunConfig
    steps: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    context_length: TokenCount
    """Tokens of one sequence, over all its ranks."""
    batch_size: Annotated[int, Field(ge=1)]
    """Sequences of one step, over all ranks."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None
    """Sequences that a group of ranks computes at once, at most; gradients are summed over a step. Null: all."""
    model: ModelConfig
    mixer: Annotated[MixerConfig, components("mixers", MixerConfig)]
    sequence_parallel: SequenceParallelConfig
    stream: StreamConfig
    objective: Annotated[Any, component("objectives")]
    data: Annotated[SourceConfig, component("data.sources")]
    optimizer: OptimizerConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    resume: str
    """`auto`: go on from the newest usable checkpoint of the run directory, or start; `never`: refuse if there is one;
    `required`: refuse if there is none; a path with a slash: start from that checkpoint where the run has none yet."""
    initial_weights: GivenPath | None
    """A checkpoint of the same model, of any run: a new run starts from its weights, at step 0. Null: random ones."""
    telemetry: TelemetryConfig
    plugins: tuple[Path, ...]
    """Folders laid out like the project that add components."""
