"""A training run small enough for a test, and a listener that keeps what it hears."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longtrain.checkpoint.config import CheckpointConfig
from longtrain.comm.journal import Journal
from longtrain.core.registry import Registry
from longtrain.data.prepare import prepare
from longtrain.data.sources import text
from longtrain.engine.config import EngineConfig, OptimizerConfig
from longtrain.mixers import simple_gla, sliding_window, softmax
from longtrain.model.config import MixerConfig, ModelConfig
from longtrain.objectives import next_token
from longtrain.sequence_parallel.config import SequenceParallelConfig
from longtrain.streaming.config import StreamConfig
from longtrain.telemetry.config import TelemetryConfig
from longtrain.telemetry.events import Event, StepDone
from longtrain.training.config import RunConfig, TrainingConfig
from longtrain.training.rank import run_rank


def tiny_config(folder: Path, **changes: Any) -> TrainingConfig:
    """A three-layer hybrid on the sources of the tests' own standard library modules, below `folder`."""
    source = folder / "source"
    if not source.exists():
        source.mkdir()
        for name in ("argparse.py", "ast.py", "heapq.py", "bisect.py", "this.py"):
            (source / name).write_bytes((Path(os.__file__).parent / name).read_bytes())
    data = text.Config(
        name="text",
        tokenizer="bytes",
        end_of_document=None,
        store=folder / "store",
        path=source,
        suffixes=(".py",),
        documents="file",
    )
    prepare(data, Registry())
    config = TrainingConfig(
        run=RunConfig(name="run", dir=folder / "runs"),
        steps=6,
        seed=0,
        context_length=128,
        batch_size=2,
        micro_batch_size=None,
        model=ModelConfig(32, 3, ("simple_gla", "softmax", "sliding_window"), 64, True, 1e-6, 0.05),
        mixer=MixerConfig(
            backend="auto",
            options={
                "simple_gla": simple_gla.Config(num_heads=2, key_dim=8, value_dim=8, conv_width=4),
                "softmax": softmax.Config(num_heads=3, num_key_value_heads=1, head_dim=8, rope_theta=1e4),
                "sliding_window": sliding_window.Config(
                    num_heads=2, num_key_value_heads=1, head_dim=8, rope_theta=1e4, window=40
                ),
            },
        ),
        sequence_parallel=SequenceParallelConfig(
            size=1, scan="all_gather", attend="ring", layout="contiguous", block_attention="auto", copy_engines=True
        ),
        stream=StreamConfig(block_layers="all", chunk_tokens=None, logit_tokens=4096, offload="none"),
        objective=next_token.Config(name="next_token"),
        data=data,
        optimizer=OptimizerConfig("adamw", 1e-2, 0.1, 2, (0.9, 0.95), 1e-8, 0.1, 1.0),
        engine=EngineConfig(name="replicated", precision="float32", device="cpu"),
        checkpoint=CheckpointConfig(every_steps=2, keep=2),
        resume="auto",
        initial_weights=None,
        telemetry=TelemetryConfig(wandb="disabled", wandb_project="longtrain"),
        plugins=(),
    )
    return replace(config, **changes)


def with_ranks(config: TrainingConfig, sequence_size: int, **changes: Any) -> TrainingConfig:
    """The same run on another sequence-parallel size, as a run of its own."""
    run = replace(config.run, name=f"ranks-{sequence_size}")
    cut = replace(config.sequence_parallel, size=sequence_size)
    return replace(config, run=run, sequence_parallel=cut, **changes)


@dataclass
class Recorder:
    """A listener; asks to stop after `stop_after` steps."""

    stop_after: int | None = None
    events: list[Event] = field(default_factory=list)
    steps: int = 0
    journal: Journal = field(default_factory=Journal)

    def event(self, event: Event) -> None:
        """Keep it."""
        self.events.append(event)

    def phase(self, name: str, step: int) -> None:
        """Count steps."""
        self.steps += name == "step"

    def watch(self, journal: Journal) -> None:
        """Keep it."""
        self.journal = journal

    def stop_requested(self) -> bool:
        """After the given number of steps."""
        return self.stop_after is not None and self.steps >= self.stop_after


def train_rank(config: TrainingConfig, stop_after: int | None = None) -> list[Event]:
    """Run this process's rank to the end and return what it said."""
    recorder = Recorder(stop_after)
    run_rank(config, recorder)
    return recorder.events


def losses(events: list[Event]) -> list[float]:
    """Of the steps, in order."""
    return [event.loss for event in events if isinstance(event, StepDone)]
