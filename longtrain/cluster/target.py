"""What a worker runs: one rank of the training."""

from pathlib import Path
from typing import Any

from longtrain.cluster.config import JobConfig
from longtrain.config.load import load_config
from longtrain.core.registry import Registry
from longtrain.training.listener import Listener
from longtrain.training.rank import Outcome, run_rank


def train(tree: dict[str, Any], plugins: tuple[Path, ...], listener: Listener) -> Outcome:
    """Load the configuration and train; raises what `run_rank` raises."""
    return run_rank(load_config(JobConfig, tree, Registry(plugins)), listener)
