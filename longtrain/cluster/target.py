"""What a worker runs: one rank of the training."""

from datetime import timedelta
from pathlib import Path
from typing import Any

from longtrain.cluster.config import JobConfig
from longtrain.comm.mesh import COLLECTIVE_TIMEOUT
from longtrain.config.load import load_config
from longtrain.core.registry import Registry
from longtrain.training.listener import Listener
from longtrain.training.rank import Outcome, run_rank

_TIMEOUT_FACTOR = 2.5
"""A collective's limit over the hang limit: more than the 2 of loading and saving, so that the driver, who can name
the rank that is waited for, speaks before the ranks that wait."""


def train(tree: dict[str, Any], plugins: tuple[Path, ...], listener: Listener) -> Outcome:
    """Load the configuration and train; raises what `run_rank` raises."""
    config = load_config(JobConfig, tree, Registry(plugins))
    timeout = timedelta(seconds=_TIMEOUT_FACTOR * config.cluster.hang_timeout_seconds)
    return run_rank(config, listener, max(timeout, COLLECTIVE_TIMEOUT))
